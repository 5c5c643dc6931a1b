"""OV labels: roles, own labels, sums over roles; the rule of the verdict."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr

import twotower as tt

PART = importlib.import_module("experiments.ov_labels")
EXPERIMENT = PART.EXPERIMENT
own_label_logit, roles_of, over_role, ROLES = (
    getattr(PART, name) for name in ("own_label_logit", "roles_of", "over_role", "ROLES")
)


def test_own_label_and_roles(llama: tt.Model, prompts: tt.Prompts) -> None:
    ov = tt.ov_labels(llama, prompts)
    own, roles = own_label_logit(ov), roles_of(ov)
    logits = ov["label_logit"].values
    for i, prompt in enumerate(prompts):
        seen = set()
        for p in np.flatnonzero(prompts.role[i] != "pad"):
            label = prompts.label_text[i, p] or prompt.gold
            number = prompts.labels.index(label)
            expected = logits[i, :, :, p, number] - logits[i, :, :, p, 1 - number]
            np.testing.assert_allclose(own[i, :, :, p], expected, rtol=1e-5)
            role = prompts.role[i, p]
            if role == "separator":
                after = prompts.demonstration[i, p] in seen
                role = f"separator {'after' if after else 'before'} label"
            elif role == "label":
                seen.add(prompts.demonstration[i, p])
            assert roles[i, p] == role
    # A demonstration has a colon before its label and a line's end after it.
    assert (roles == "separator before label").sum() == (roles == "separator after label").sum()


def test_over_role_by_hand() -> None:
    values = np.array([[[[np.nan, 1.0, 3.0, 5.0]]], [[[2.0, 4.0, 6.0, 8.0]]]])
    roles = np.array([["pad", "text", "text", "label"], ["text", "label", "label", "last"]])
    found = over_role(values, roles)[..., 0, 0]
    text, label, last = (ROLES.index(x) for x in ("text", "label", "last"))
    assert found[:, text].tolist() == [2, 2]
    assert found[:, label].tolist() == [5, 5]
    assert np.isnan(found[0, last])
    assert found[1, last] == 8
    total = over_role(values, roles, total=True)[..., 0, 0]
    assert total[:, text].tolist() == [4, 2]
    assert total[1, label] == 10


def made_up(
    seed: int, writes: float, texts: float = 0.0, others: float = 0.0, auc: float = 0.9
) -> xr.DataTree:
    """A run in which heads 0.0 and 0.1 write and 1.0 and 1.1 are the in-context heads."""
    rng = np.random.default_rng(seed)
    raw = 0.05 * rng.normal(size=(20, len(ROLES), 5, 4))
    raw[:, ROLES.index("label")] += others
    raw[:, ROLES.index("label"), 0, :2] += writes - others
    raw[:, ROLES.index("text"), 0, :2] += texts
    raw[:, ROLES.index("bos")] = np.nan
    dims = ("prompt", "role", "layer", "head")
    scores = np.full((5, 4), 0.5)
    scores[0, :2] = auc
    tokens = rng.integers(0, 2, size=(20, 4)).astype(float)
    about = {"long_name": "share"}
    names = ["0.0", "0.1", "1.0", "1.1"]
    heads = [[[0, 0], [0, 1]], [[1, 0], [1, 1]]]
    return xr.DataTree.from_dict(
        {
            "by_role": xr.Dataset(
                {"raw": (dims, raw), "weighted": (dims, raw)}, {"role": list(ROLES)}
            ),
            "scores": xr.Dataset({"ov_auc": (("layer", "head"), scores)}),
            "tokens": xr.Dataset(
                {name: (("prompt", "chosen"), tokens, about) for name in ("own_token", "own_word")},
                {"chosen": names},
            ),
            "heads": xr.Dataset(
                {"number": (("kind", "rank", "part"), heads)}, {"kind": ["writers", "in_context"]}
            ),
        }
    )


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([{"writes": 1.0}] * 3, "supported"),
        ([{"writes": 1.0}, {"writes": 1.0}, {"writes": -0.2}], "undecided"),
        ([{"writes": 1.0, "auc": 0.5}] * 3, "undecided"),
        ([{"writes": 1.0, "texts": 1.0}] * 3, "undecided"),
        ([{"writes": -1.0}] * 3, "not supported"),
        ([{"writes": 1.0, "texts": 2.0}] * 3, "not supported"),
        ([{"writes": 1.0, "others": 2.0}] * 3, "not supported"),
    ],
)
def test_verdicts(runs: list[dict[str, float]], verdict: str) -> None:
    made = [made_up(seed, **about) for seed, about in enumerate(runs)]
    judgement = EXPERIMENT.judge(made)
    assert judgement.verdict == verdict, judgement.reason
    assert "raw vectors of bos positions, heads that write" not in judgement.numbers
    assert judgement.numbers["raw vectors of label positions, heads that write"].n == 60
