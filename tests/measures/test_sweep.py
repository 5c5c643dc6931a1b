"""Sweeps against one float64 forward per head: every ablation, kernel and architecture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import Reference, error, ids_of, knocked_out, random_model, real
from surface import under
from tiny import DISTINCT, THREE, TWO, byte_level, crossed, tiny
from transformers import (
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import twotower as tt

POSITIONS = ("last", "labels", "all", "given")


def make(model: tt.Model, n: int = 3, seed: int = 2) -> tt.Prompts:
    prompts = tt.build_prompts(model, THREE, shots=1, n=n, seed=seed)
    assert len(set(prompts.lengths)) >= min(n, 3)
    return prompts


def places(prompts: tt.Prompts, positions: str) -> np.ndarray:
    """(prompt, position); "given": at random, other ones in each prompt, none in the first."""
    if positions != "given":
        roles = {"last": ["last"], "labels": ["label"]}.get(positions)
        return np.isin(prompts.role, roles) if roles else prompts.role != "pad"
    at = np.random.default_rng(0).random(prompts.token_id.shape) < 0.2
    at[0] = False
    assert at[1:, : -prompts.lengths.min()].any()  # some of them on padding
    return at


def measured(model: tt.Model, prompts: tt.Prompts, positions: str, **options):
    at = places(prompts, positions)
    found = tt.head_effects(model, prompts, at if positions == "given" else positions, **options)
    return found["margin_drop"].values, found["logprob_drop"].values


def check(found, expected) -> None:
    for name, a, b in zip(("margin", "log-probability"), found, expected, strict=True):
        assert error(a, b) <= 1e-4, name


@pytest.mark.parametrize(("name", "positions"), crossed(POSITIONS, ["last", "all"], on=DISTINCT))
def test_zero(name: str, positions: str) -> None:
    model = tiny(name)
    prompts = make(model)
    expected = knocked_out(Reference(model.module), prompts, places(prompts, positions))
    check(measured(model, prompts, positions), expected)
    if name != "gptj":  # transformers has no sdpa for it
        sdpa = tiny(name, "sdpa")
        assert sdpa.attention_kernel == "sdpa"
        check(measured(sdpa, prompts, positions), expected)


def means(reference: Reference, prompts: tt.Prompts) -> dict[tuple[str, int], torch.Tensor]:
    """(layer, H, D) mean of z by role and number of demonstration."""
    total: dict[tuple[str, int], list[torch.Tensor]] = {}
    for i in range(len(prompts)):
        z = torch.stack(reference.run(ids_of(prompts, i)).z)
        at = np.flatnonzero(real(prompts, i))
        for place, column in enumerate(at):
            key = (prompts.role[i, column], int(prompts.demonstration[i, column]))
            total.setdefault(key, []).append(z[:, place])
    return {key: torch.stack(values).mean(dim=0) for key, values in total.items()}


@pytest.mark.parametrize(("name", "positions"), crossed(POSITIONS, ["last", "all"]))
def test_mean(name: str, positions: str) -> None:
    model = tiny(name)
    prompts, others = make(model), make(model, n=5, seed=8)
    reference = Reference(model.module)
    mean = means(reference, others)

    def value(i: int, layer: int) -> torch.Tensor:
        at = np.flatnonzero(real(prompts, i))
        keys = [(prompts.role[i, c], int(prompts.demonstration[i, c])) for c in at]
        return torch.stack([mean[key][layer] for key in keys])

    expected = knocked_out(reference, prompts, places(prompts, positions), value)
    found = measured(model, prompts, positions, to=tt.Mean(others))
    check(found, expected)
    again = under(measured, model, prompts, positions, batch_size=1, to=tt.Mean(others))
    check(again, expected)


def donated(
    reference: Reference, prompts: tt.Prompts, others: tt.Prompts, donor: int, at: np.ndarray
) -> Callable[[int, int], torch.Tensor]:
    """The donor's z, k-th position of a role in a demonstration matched to its k-th."""
    z = reference.run(ids_of(others, donor)).z
    columns = np.flatnonzero(real(others, donor))
    keys = [(others.role[donor, c], int(others.demonstration[donor, c])) for c in columns]

    def value(i: int, layer: int) -> torch.Tensor:
        new = torch.full((int(prompts.lengths[i]), *z[layer].shape[1:]), torch.nan).double()
        seen: dict[tuple[str, int], int] = {}
        for place, column in enumerate(np.flatnonzero(real(prompts, i))):
            key = (prompts.role[i, column], int(prompts.demonstration[i, column]))
            number = seen.get(key, 0)
            seen[key] = number + 1
            if at[i, column]:
                new[place] = z[layer][[p for p, k in enumerate(keys) if k == key][number]]
        return new

    return value


@pytest.mark.parametrize(("name", "positions"), crossed(["last", "labels", "given"], ["labels"]))
def test_resample(name: str, positions: str) -> None:
    """Every prompt's drops are those of one donor, for all heads; never itself."""
    model = tiny(name)
    prompts = make(model)
    # Donors of other lengths; the prompts themselves are among the candidates.
    others = tt.build_prompts(model, THREE, shots=1, n=5, seed=2)
    at = places(prompts, positions)
    if positions == "given":  # what can be aligned although texts differ in length
        at &= np.isin(prompts.role, ["separator", "label", "last"])
        at[:, -1] = True
    reference = Reference(model.module)
    by_donor = []
    for donor in range(len(others)):
        value = donated(reference, prompts, others, donor, at)
        by_donor.append(knocked_out(reference, prompts, at, value))
    drawn = []
    for seed in range(3):
        effects = under(
            tt.head_effects, model, prompts, at, batch_size=seed + 1, to=tt.Resample(others, seed)
        )
        found = effects["margin_drop"].values, effects["logprob_drop"].values
        donors = []
        for i in range(len(prompts)):
            off = [np.abs(found[0][i] - margins[i]).max() for margins, _ in by_donor]
            donors.append(int(np.argmin(off)))
            assert prompts.strings[i] != others.strings[donors[-1]]
        check(
            found,
            [
                np.stack([by_donor[donor][part][i] for i, donor in enumerate(donors)])
                for part in (0, 1)
            ],
        )
        drawn.append(donors)
    assert len({tuple(x) for x in drawn}) > 1  # the seed decides


def test_resample_at_all_positions(any_model: tt.Model) -> None:
    """Texts of one token each, so that everything aligns; one donor only."""
    texts = {"animal": ["cat", "dog", "owl", "cow"], "city": ["Rome", "Oslo", "Lima", "Cairo"]}
    drawn = tt.build_prompts(any_model, tt.Task("short", texts), shots=2, n=4, seed=1)
    assert len(set(drawn.lengths)) == 1
    prompts, donor = drawn[:3], drawn[3:]
    reference = Reference(any_model.module)
    at = prompts.role != "pad"
    value = donated(reference, prompts, donor, 0, at)
    expected = knocked_out(reference, prompts, at, value)
    found = tt.head_effects(any_model, prompts, "all", to=tt.Resample(donor))
    check((found["margin_drop"].values, found["logprob_drop"].values), expected)


@pytest.mark.parametrize("tokens", [1, 100, 10**9])
@pytest.mark.parametrize("positions", ["labels", "all", "given"])
def test_chunks(positions: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral")
    prompts = make(model)
    expected = knocked_out(Reference(model.module), prompts, places(prompts, positions))
    monkeypatch.setattr("twotower.sweep.memory.TOKENS_PER_CHUNK", tokens)
    for batch_size in (1, 2, None):
        check(under(measured, model, prompts, positions, batch_size=batch_size), expected)


def test_margins_alone(any_model: tt.Model) -> None:
    prompts = make(any_model)
    for positions in ("last", "labels"):
        alone = tt.head_effects(any_model, prompts, positions, logprobs=False)
        assert set(alone.data_vars) == {"margin_drop"}
        both = tt.head_effects(any_model, prompts, positions)["margin_drop"]
        np.testing.assert_array_equal(alone["margin_drop"], both)


def test_where_nothing_is_replaced_nothing_drops(llama: tt.Model) -> None:
    prompts = make(llama)
    at = np.zeros(prompts.token_id.shape, dtype=bool)
    at[2, -5] = True
    for batch_size in (1, 3):
        found = under(tt.head_effects, llama, prompts, at, batch_size=batch_size)
        scale = np.abs(found["margin_drop"].values[2]).max()
        assert scale > 1e-3
        assert np.abs(found["margin_drop"].values[:2]).max() < 1e-3 * scale
        assert np.abs(found["logprob_drop"].values[:2]).max() < 1e-3 * scale


SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 256}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
VARIANTS = {
    # Scores divided by the layer's number; and not scaled at all.
    "gpt2-inverse-layer": lambda: GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled": lambda: GPT2Config(**GPT, scale_attn_weights=False, tie_word_embeddings=False),
    # All of a head rotated.
    "gptj-whole": lambda: GPTJConfig(**GPT, rotary_dim=12),
    "neox-no-bias": lambda: GPTNeoXConfig(
        **SMALL,
        attention_bias=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 1.0,
        },
    ),
    # z wider than the residual stream; one key-value head for all; biases everywhere.
    "llama-wide": lambda: LlamaConfig(
        **SMALL, head_dim=20, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "llama-tied": lambda: LlamaConfig(**SMALL, head_dim=12, tie_word_embeddings=True),
    # A window in the upper layers alone.
    "qwen2-mixed": lambda: Qwen2Config(
        **SMALL,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    ),
    "qwen3-wide": lambda: Qwen3Config(**SMALL, head_dim=16, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    """Settings that the ordinary tiny models leave at their defaults."""
    attention = "eager" if name.startswith("gptj") else "sdpa"
    model = tt.load(random_model(VARIANTS[name](), attention), tokenizer=byte_level())
    reference = Reference(model.module)
    if name == "qwen2-mixed":
        assert [reference.window(layer) for layer in range(3)] == [None, 9, 9]
    prompts = make(model)
    for positions in POSITIONS:
        expected = knocked_out(reference, prompts, places(prompts, positions))
        check(measured(model, prompts, positions), expected)
    run = tt.analyze(model, prompts, measures=("qk", "ov", "attribution"))
    for i in range(len(prompts)):
        plain, at = reference.run(ids_of(prompts, i)), real(prompts, i)
        for layer in range(model.n_layers):
            for variable in ("score", "attention"):
                own = getattr(plain, variable)[layer][:, -1]
                assert error(run["qk"][variable].values[i, layer][:, at], own) <= 1e-5
        weighted = (run["ov"]["label_logit"] * run["qk"]["attention"]).sum("position")
        blocks = zip(plain.z, reference.blocks, strict=True)
        written = torch.stack([torch.einsum("hd,hde->he", z[-1], b.out) for z, b in blocks])
        expected = reference.label_logit(written, plain.residual[-1][-1], prompts.label_ids)
        direct = run["attribution"]["label_logit"]
        assert error(direct.values[i], expected) <= 1e-5
        assert error(weighted.transpose(*direct.dims).values[i], expected) <= 1e-5


def test_two_labels(any_model: tt.Model) -> None:
    prompts = tt.build_prompts(any_model, TWO, shots={"foo": 3, "bar": 1}, n=2, seed=1)
    expected = knocked_out(Reference(any_model.module), prompts, places(prompts, "last"))
    check(measured(any_model, prompts, "last"), expected)
