"""Edits through `predict` against plain forwards with hooks, and against changed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import (
    Reference,
    answer,
    error,
    hooked,
    ids_of,
    output_projections,
    plain_logits,
    real,
)
from surface import under
from tiny import DISTINCT, THREE, crossed, tiny

import twotower as tt


def make(model: tt.Model, n: int = 3, seed: int = 2) -> tt.Prompts:
    prompts = tt.build_prompts(model, THREE, shots=1, n=n, seed=seed)
    assert len(set(prompts.lengths)) >= 3
    return prompts


def check(found, model: tt.Model, prompts: tt.Prompts, edit) -> None:
    """`edit(prompt)` gives what a plain forward's z (T, H, D) goes through, by layer."""
    for i in range(len(prompts)):
        ids = ids_of(prompts, i)
        with hooked(model.module, model.n_heads, edit(i)):
            own = plain_logits(model.module, ids)
        exact = Reference(model.module).run(ids, edit(i)).logits[-1]
        assert error(own, exact) <= 1e-5
        labels = list(prompts.label_ids)
        one = found.isel(prompt=i)
        assert error(one["logit"], own[labels]) <= 1e-5
        margin, logprobs = answer(own, prompts, i)
        assert error(one["logprob"], logprobs) <= 1e-5
        assert one["margin"].item() == pytest.approx(margin, abs=1e-4)
        assert one["top_token"].item() == model.tokenizer.decode([int(own.argmax())])


def test_zero_at_all_positions_is_zeroed_columns(any_model: tt.Model) -> None:
    prompts = make(any_model)
    heads = [tt.Head(0, 1), tt.Head(1, 3), tt.Head(1, 0), tt.Head(2, 2)]
    found = under(
        tt.predict, any_model, prompts, [tt.KnockOut(heads, positions="all")], batch_size=2
    )["logit"].values
    clean = tt.predict(any_model, prompts)["logit"].values
    projections = output_projections(any_model.module)
    assert len(projections) == any_model.n_layers
    saved = [p.weight.clone() for p in projections]
    width = any_model.d_head
    try:
        for layer, head in heads:
            columns = slice(head * width, (head + 1) * width)
            if type(projections[layer]).__name__ == "Conv1D":  # (in, out)
                projections[layer].weight[columns] = 0
            else:
                projections[layer].weight[:, columns] = 0
        own = [plain_logits(any_model.module, ids_of(prompts, i)) for i in range(len(prompts))]
    finally:
        for p, old in zip(projections, saved, strict=True):
            p.weight.copy_(old)
    expected = torch.stack(own)[:, list(prompts.label_ids)]
    assert error(found, expected) <= 1e-5
    assert error(clean, expected) > 1e-2


def test_cutting_the_attention_output_is_wrong(any_model: tt.Model) -> None:
    """After the output projection there are no heads: public recipes that cut there differ."""
    prompts = make(any_model)
    layer, head, width = 1, 2, any_model.d_head
    found = tt.predict(any_model, prompts, tt.KnockOut([(layer, head)], positions="all"))[
        "logit"
    ].values

    def cut(module, arguments, output):
        output = output.clone()
        output[..., head * width : (head + 1) * width] = 0
        return output

    def columns(index, z):
        if index == layer:
            z[:, head] = 0
        return z

    wrong, right = [], []
    for i in range(len(prompts)):
        handle = output_projections(any_model.module)[layer].register_forward_hook(cut)
        wrong.append(plain_logits(any_model.module, ids_of(prompts, i)))
        handle.remove()
        with hooked(any_model.module, any_model.n_heads, columns):
            right.append(plain_logits(any_model.module, ids_of(prompts, i)))
    labels = list(prompts.label_ids)
    assert error(found, torch.stack(right)[:, labels]) <= 1e-5
    for i in range(len(prompts)):
        assert error(found[i], wrong[i][labels]) > 1e-2


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "labels", "all", "given"], ["all"], on=DISTINCT),
    indirect=["any_model"],
)
def test_knock_out_and_scale(any_model: tt.Model, positions: str) -> None:
    prompts = make(any_model)
    at = {"last": prompts.role == "last", "labels": prompts.role == "label"}.get(
        positions, prompts.role != "pad"
    )
    if positions == "given":
        at = np.random.default_rng(1).random(prompts.token_id.shape) < 0.3
    where = at if positions == "given" else positions
    heads = [(0, 2), (2, 1)]
    for edit, factor in (
        (tt.KnockOut(heads, where), 0.0),
        (tt.KnockOut(heads, where, to=tt.Times(-1.5)), -1.5),
    ):

        def by_hand(i, factor=factor):
            mask = torch.as_tensor(at[i][real(prompts, i)])

            def change(layer, z):
                for index, head in heads:
                    if index == layer:
                        z[mask, head] *= factor
                return z

            return change

        check(
            under(tt.predict, any_model, prompts, edit, batch_size=2), any_model, prompts, by_hand
        )


def test_mean_and_resample(any_model: tt.Model) -> None:
    prompts, others = make(any_model), make(any_model, n=5, seed=8)
    reference = Reference(any_model.module)
    mean: dict[int, list[torch.Tensor]] = {}
    for j in range(len(others)):
        z = reference.run(ids_of(others, j)).z[1]
        for place, column in enumerate(np.flatnonzero(real(others, j))):
            if others.role[j, column] == "label":
                mean.setdefault(int(others.demonstration[j, column]), []).append(z[place])

    def at_labels(value):
        def by_hand(i):
            def change(layer, z):
                if layer != 1:
                    return z
                for place, column in enumerate(np.flatnonzero(real(prompts, i))):
                    if prompts.role[i, column] == "label":
                        new = value(int(prompts.demonstration[i, column]))
                        z[place, [0, 3]] = new[[0, 3]].to(z.dtype)
                return z

            return change

        return by_hand

    heads = [(1, 0), (1, 3)]
    edit = tt.KnockOut(heads, "labels", to=tt.Mean(others))
    found = under(tt.predict, any_model, prompts, [edit], batch_size=2)
    by_hand = at_labels(lambda k: torch.stack(mean[k]).mean(dim=0))
    check(found, any_model, prompts, by_hand)

    donor = others[2:3]
    z = reference.run(ids_of(donor, 0)).z[1][donor.role[0] == "label"]
    edit = tt.KnockOut(heads, "labels", to=tt.Resample(donor))
    found = under(tt.predict, any_model, prompts, [edit], batch_size=2)
    check(found, any_model, prompts, at_labels(lambda k: z[k]))


def test_composed(any_model: tt.Model) -> None:
    """Five edits, some of them on one head at different positions, in one layer and across."""
    prompts = make(any_model)
    query = prompts.role == "query"
    edits = [
        tt.KnockOut([(0, 1), (2, 3)], query, to=tt.Times(0.5)),
        tt.KnockOut([(0, 1), (1, 1)], positions="labels"),
        tt.KnockOut([(0, 1)], "last", to=tt.Times(2.5)),
        tt.KnockOut([(2, 0)], positions="all"),
        tt.KnockOut([(2, 3)], "labels", to=tt.Times(-1.0)),
    ]

    def by_hand(i):
        at = real(prompts, i)
        asked, label = (torch.as_tensor(m[i][at]) for m in (query, prompts.role == "label"))

        def change(layer, z):
            if layer == 0:
                z[asked, 1] *= 0.5
                z[label, 1] = 0
                z[-1, 1] *= 2.5
            elif layer == 1:
                z[label, 1] = 0
            else:
                z[asked, 3] *= 0.5
                z[:, 0] = 0
                z[label, 3] *= -1
            return z

        return change

    found = tt.predict(any_model, prompts, edits)
    check(found, any_model, prompts, by_hand)
    again = under(tt.predict, any_model, prompts, edits[::-1], batch_size=1)
    assert error(again["logit"], found["logit"]) <= 1e-5


def test_scale_by_nothing_and_by_one(any_model: tt.Model) -> None:
    prompts = make(any_model)
    heads = [(0, 0), (1, 2)]
    for positions in ("last", "labels", "all"):
        out = tt.predict(any_model, prompts, tt.KnockOut(heads, positions))
        scaled = tt.predict(any_model, prompts, tt.KnockOut(heads, positions, to=tt.Times(0)))
        clean = tt.predict(any_model, prompts)
        same = tt.predict(any_model, prompts, tt.KnockOut(heads, positions, to=tt.Times(1)))
        for name in ("logit", "logprob", "margin", "top_token"):
            np.testing.assert_array_equal(scaled[name], out[name])
            np.testing.assert_array_equal(same[name], clean[name])
        assert error(out["logit"], clean["logit"]) > 1e-3


def test_the_sweep_is_predict_head_by_head(any_model: tt.Model) -> None:
    prompts, others = make(any_model), make(any_model, n=4, seed=8)
    to = tt.Resample(others, seed=5)
    clean = tt.predict(any_model, prompts)
    found = tt.head_effects(any_model, prompts, "labels", to=to)
    for layer, head in ((0, 3), (1, 0), (2, 2)):
        after = tt.predict(any_model, prompts, tt.KnockOut([(layer, head)], "labels", to=to))
        for name, drop in (("margin", "margin_drop"), ("logprob", "logprob_drop")):
            expected = (clean[name] - after[name]).values
            got = found[drop].sel(layer=layer, head=head).values
            scale = np.abs(found[drop].values).max()
            assert np.abs(got - expected).max() <= 1e-4 * scale


# ---- refusals ------------------------------------------------------------------------------------


def mask_of(prompts: tt.Prompts) -> np.ndarray:
    return np.asarray(prompts.role == "label")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            lambda p: [
                tt.KnockOut([(0, 1)], positions="all"),
                tt.KnockOut([(0, 1)], "all", to=tt.Times(2.0)),
            ],
            "0.1 is edited twice",
        ),
        (
            lambda p: [
                tt.KnockOut([(0, 1)], "labels"),
                tt.KnockOut([(0, 1)], mask_of(p), to=tt.Times(2.0)),
            ],
            "0.1 is edited twice",
        ),
        (
            lambda p: [tt.KnockOut([(1, 1)], "last"), tt.KnockOut([(1, 1)], positions="all")],
            "1.1 is edited twice",
        ),
        (lambda p: tt.KnockOut([(0, 1), (0, 1)], positions="all"), "given twice"),
        (lambda p: tt.KnockOut([(0, 1), (0, np.int64(1))], positions="all"), "given twice"),
        (lambda p: tt.KnockOut([(3, 0)], positions="all"), "3.0 is out of range"),
        (lambda p: tt.KnockOut([(0, 4)], positions="all"), "0.4 is out of range"),
        (lambda p: tt.KnockOut([(-1, 0)], "all", to=tt.Times(2.0)), "-1.0 is out of range"),
        (lambda p: tt.KnockOut([3], positions="all"), "is not a head"),
        (lambda p: tt.KnockOut((0, 1), positions="all"), "is not a head"),
        (lambda p: tt.KnockOut([(0, 1, 2)], positions="all"), "is not a head"),
        (lambda p: tt.KnockOut([(0.5, 1)], positions="all"), "is not a head"),
        (lambda p: tt.KnockOut(["01"], positions="all"), "is not a head"),
        (lambda p: tt.KnockOut([None], positions="all"), "is not a head"),
        (lambda p: ["KnockOut"], "is not an edit"),
        (lambda p: [tt.Head(0, 1)], "is not an edit"),
        (lambda p: tt.KnockOut([(0, 1)], "first"), "positions='first'"),
        (lambda p: tt.KnockOut([(0, 1)], mask_of(p).astype(int)), "int64 of shape"),
        (lambda p: tt.KnockOut([(0, 1)], mask_of(p)[:, 1:]), "boolean array of shape"),
        (lambda p: tt.KnockOut([(0, 1)], mask_of(p)[0]), "boolean array of shape"),
        (lambda p: tt.KnockOut([(0, 1)], to="noise"), "to='noise' is not a change of a head's"),
        (lambda p: tt.KnockOut([(0, 1)], to=tt.Zero), "use one of tt.Zero, tt.Mean, tt.Resample"),
        (
            lambda p: tt.KnockOut([(0, 1)], to=tt.Mean("x")),
            "reference must be the result of build_prompts",
        ),
        (
            lambda p: tt.KnockOut([(0, 1)], positions="all", to=tt.Resample(p[:1])),
            "differs from the prompt",
        ),
        (
            lambda p: tt.KnockOut([(0, 1)], positions="all", to=tt.Resample(p)),
            "cannot be aligned",
        ),
        (
            lambda p: tt.KnockOut([(0, 1)], "all", to=tt.Times(float("inf"))),
            "must be a finite number",
        ),
        (lambda p: tt.KnockOut([(0, 1)], "all", to=tt.Times("much")), "must be a finite number"),
    ],
)
def test_refusals(llama: tt.Model, edits, message: str) -> None:
    prompts = make(llama)
    with pytest.raises(tt.errors.InputError, match=message):
        tt.predict(llama, prompts, edits(prompts))


def test_reference_prompts_need_the_same_parts(llama: tt.Model) -> None:
    prompts = make(llama)
    fewer = tt.build_prompts(llama, THREE, shots={"foo": 1, "bar": 1, "map": 0}, n=3, seed=1)
    changes = {"no reference prompt": tt.Mean(fewer), "cannot be aligned": tt.Resample(fewer)}
    for message, to in changes.items():
        edit = tt.KnockOut([(0, 1)], "labels", to=to)
        with pytest.raises(tt.errors.InputError, match=message):
            tt.predict(llama, prompts, edit)
        # What the last position needs is there.
        edit = tt.KnockOut([(0, 1)], "last", to=to)
        assert np.isfinite(tt.predict(llama, prompts, edit)["margin"]).all()


def test_one_head_and_generators_are_taken(llama: tt.Model) -> None:
    prompts = make(llama)
    expected = tt.predict(llama, prompts, [tt.KnockOut([(1, 2)], positions="all")])
    for edits in (
        tt.KnockOut(tt.Head(1, 2), positions="all"),
        (tt.KnockOut(heads, positions="all") for heads in [[(1, 2)]]),
        [tt.KnockOut([np.array([1, 2])], positions="all")],
    ):
        found = tt.predict(llama, prompts, edits)
        np.testing.assert_array_equal(found["logit"], expected["logit"])
        assert found.attrs["settings"] == expected.attrs["settings"]


def test_padding_in_a_mask_counts_for_nothing() -> None:
    model = tiny("gpt2")
    prompts = make(model)
    at = np.asarray(prompts.role == "label")
    everywhere = at | (prompts.role == "pad")
    found = tt.predict(model, prompts, tt.KnockOut([(0, 1)], everywhere))
    expected = tt.predict(model, prompts, tt.KnockOut([(0, 1)], at))
    np.testing.assert_array_equal(found["logit"], expected["logit"])
