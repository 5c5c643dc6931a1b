"""Groups of heads, against a float64 forward for each group."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from reference import Reference, changed, error, ids_of
from surface import under
from tiny import THREE, TWO, crossed, tiny

import twotower as tt
from twotower.measures.group_effects import strongest_group, subset_effects

POSITIONS = ("last", "labels", "all")
GROUPS = [
    [(0, 1)],
    [(2, 0), (0, 1)],
    [(0, 1), (1, 2), (2, 0)],
    [(0, 1), (1, 2)],
    [(1, 0), (1, 3)],
    [(0, 0), (0, 3), (2, 1), (2, 2)],
    [(2, 3)],
    [(0, 0), (0, 3), (1, 1)],
]
"""One to four heads; within a layer and over layers; some share their lower heads."""


def make(model: tt.Model, n: int = 3) -> tt.Prompts:
    prompts = tt.build_prompts(model, THREE, shots=1, n=n, seed=2)
    assert len(set(prompts.lengths)) >= min(n, 3)
    return prompts


@pytest.mark.parametrize(("name", "positions"), crossed(POSITIONS, ["all"]))
def test_groups(name: str, positions: str) -> None:
    model = tiny(name)
    prompts = make(model)
    at = prompts.where(positions)
    expected = changed(Reference(model.module), prompts, at, GROUPS)
    found = tt.group_effects(model, prompts, GROUPS, positions, logprobs=True)
    assert error(found["margin_drop"], expected[0]) <= 1e-4
    assert error(found["logprob_drop"], expected[1]) <= 1e-4
    assert found["group"].values[1] == "0.1+2.0"
    assert found["n_heads"].values.tolist() == [1, 2, 3, 2, 2, 4, 1, 3]


@pytest.mark.parametrize(
    ("any_model", "positions"), crossed(POSITIONS, ["labels"]), indirect=["any_model"]
)
def test_scaled(any_model: tt.Model, positions: str) -> None:
    prompts = make(any_model)
    expected = changed(
        Reference(any_model.module), prompts, prompts.where(positions), GROUPS, factor=-1.5
    )
    found = tt.group_effects(
        any_model, prompts, GROUPS, positions, logprobs=True, to=tt.Times(-1.5)
    )
    assert error(found["margin_drop"], expected[0]) <= 1e-4
    assert error(found["logprob_drop"], expected[1]) <= 1e-4


@pytest.mark.parametrize(
    ("any_model", "positions"), crossed(POSITIONS, ["labels"]), indirect=["any_model"]
)
def test_patched_from_the_twin(any_model: tt.Model, positions: str) -> None:
    """Labels reversed, token by token the same length: every position aligns."""
    prompts = make(any_model)
    twin = prompts.reversed_labels()
    reference = Reference(any_model.module)

    def value(i: int, layer: int) -> torch.Tensor:
        return reference.run(ids_of(twin, i)).z[layer]

    expected = changed(reference, prompts, prompts.where(positions), GROUPS, value)
    to = tt.From(twin)
    found = under(tt.group_effects, any_model, prompts, GROUPS, positions, batch_size=2, to=to)
    assert error(found["margin_drop"], expected[0]) <= 1e-4
    single = tt.head_effects(any_model, prompts, positions, to=to)
    for group, column in ((GROUPS[0], 0), (GROUPS[6], 6)):
        values = single["margin_drop"].values[:, group[0][0], group[0][1]]
        np.testing.assert_allclose(values, expected[0][:, column], atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 60, 10**9])
@pytest.mark.parametrize("positions", POSITIONS)
def test_chunks(positions: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-grouped")
    prompts = make(model)
    expected = changed(Reference(model.module), prompts, prompts.where(positions), GROUPS)[0]
    monkeypatch.setattr("twotower.sweep.memory.TOKENS_PER_CHUNK", tokens)
    found = tt.group_effects(model, prompts, GROUPS, positions)
    assert error(found["margin_drop"], expected) <= 1e-4


def test_pairs(llama: tt.Model) -> None:
    prompts = make(llama)
    found = tt.pair_effects(llama, prompts)
    table = found["margin_drop"].values.reshape(len(prompts), 12, 12)
    np.testing.assert_array_equal(table, table.transpose(0, 2, 1))
    pairs = list(combinations(llama.heads, 2))
    expected = changed(Reference(llama.module), prompts, prompts.where("last"), pairs)[0]
    numbers = np.array([[layer * 4 + head for layer, head in pair] for pair in pairs])
    assert error(table[:, numbers[:, 0], numbers[:, 1]], expected) <= 1e-4
    own = tt.head_effects(llama, prompts)["margin_drop"].values.reshape(len(prompts), 12)
    assert error(np.einsum("pii->pi", table), own) <= 1e-5
    assert found.attrs["separate_forwards"] == 12 + 66 + 1
    assert found.attrs["forwards"] < 4


def test_subsets(llama: tt.Model) -> None:
    prompts = make(llama)
    pool = [(0, 1), (1, 2), (1, 3), (2, 0)]
    found = subset_effects(llama, prompts, pool)
    assert found.sizes["group"] == 15
    subsets = [x for k in range(1, 5) for x in combinations(pool, k)]
    expected = changed(Reference(llama.module), prompts, prompts.where("last"), subsets)[0]
    assert error(found["margin_drop"], expected) <= 1e-4
    for k in (1, 2, 3, 4):
        of_size = [i for i, subset in enumerate(subsets) if len(subset) == k]
        best = subsets[of_size[int(expected[:, of_size].mean(axis=0).argmax())]]
        assert strongest_group(found, k) == list(best)


@pytest.mark.parametrize("positions", ["last", "labels"])
def test_greedy_choice(positions: str, llama: tt.Model) -> None:
    prompts = make(llama)
    reference, at = Reference(llama.module), prompts.where(positions)
    found = tt.greedy_heads(llama, prompts, 3, positions=positions)
    pairs = zip(found["chosen_layer"].values, found["chosen_head"].values, strict=True)
    chosen: list[tuple[int, int]] = []
    for step, head in enumerate(tuple(map(int, pair)) for pair in pairs):
        left = [tuple(other) for other in llama.heads if tuple(other) not in chosen]
        drops = changed(reference, prompts, at, [[*chosen, other] for other in left])[0]
        own = drops[:, left.index(head)]
        # Several may be best: at labels the last layer's heads change nothing.
        assert own.mean() == pytest.approx(drops.mean(axis=0).max(), abs=1e-5)
        assert error(found["margin_drop"][:, step], own) <= 1e-4
        chosen.append(head)
    assert len(chosen) == 3
    assert found.attrs["separate_forwards"] == (12 + 1) + (11 + 1) + (10 + 1)


def test_a_greedy_pool(llama: tt.Model) -> None:
    pool = [tt.Head(2, 2), tt.Head(0, 3)]
    found = tt.greedy_heads(llama, make(llama), 2, pool=pool)
    pairs = zip(found["chosen_layer"].values, found["chosen_head"].values, strict=True)
    assert sorted(pairs) == [(0, 3), (2, 2)]


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["labels", "all"], ["labels"]),
    indirect=["any_model"],
)
def test_common_beginnings_are_run_once(any_model: tt.Model, positions: str, monkeypatch) -> None:
    """Shared demonstrations: fewer positions go through the blocks, the numbers stay."""
    from twotower.sweep import prepare

    prompts = tt.build_prompts(
        any_model, TWO, shots=2, n=6, seed=1, shared_demonstrations=True, permute_labels=False
    )
    reference = Reference(any_model.module)
    expected = changed(reference, prompts, prompts.where(positions), GROUPS)[0]
    layouts = []
    make_layout = prepare.make_layout

    def spy(*arguments, **options):
        layouts.append(make_layout(*arguments, **options))
        return layouts[-1]

    monkeypatch.setattr(prepare, "make_layout", spy)
    together = tt.group_effects(any_model, prompts, GROUPS, positions)
    packed = sum(x.source.own.numel() for x in layouts)
    layouts.clear()
    alone = under(tt.group_effects, any_model, prompts, GROUPS, positions, batch_size=1)
    separate = sum(x.source.own.numel() for x in layouts)
    assert packed < 0.5 * separate
    assert error(together["margin_drop"], expected) <= 1e-4
    assert error(alone["margin_drop"], expected) <= 1e-4


@pytest.mark.parametrize("positions", POSITIONS)
def test_budgets(llama: tt.Model, positions: str) -> None:
    prompts = make(llama)
    whole = tt.head_effects(llama, prompts, positions)
    with pytest.raises(tt.errors.InputError, match="it needs at least") as caught:
        under(tt.head_effects, llama, prompts, positions, memory_budget=1)
    smallest = int(str(caught.value).split("(")[1].split(" bytes")[0])
    found = under(tt.head_effects, llama, prompts, positions, memory_budget=smallest)
    assert error(found["margin_drop"], whole["margin_drop"]) <= 1e-5
    with pytest.raises(tt.errors.InputError, match="it needs at least"):
        under(tt.head_effects, llama, prompts, positions, memory_budget=smallest - 1)


@pytest.mark.parametrize("budget", [0, -5, True, 2.5, "much", "0GiB"])
def test_bad_budgets(llama: tt.Model, budget) -> None:
    with pytest.raises(tt.errors.InputError, match="memory_budget="):
        under(tt.head_effects, llama, make(llama), memory_budget=budget)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: tt.group_effects(m, p, []), "no groups"),
        (lambda m, p: tt.group_effects(m, p, [[]]), "a group is empty"),
        (lambda m, p: tt.group_effects(m, p, [[(0, 9)]]), "out of range"),
        (lambda m, p: tt.group_effects(m, p, [[(0, 1), (0, 1)]]), "given twice"),
        (
            lambda m, p: tt.group_effects(m, p, [[(0, 1), (1, 1)], [(1, 1), (0, 1)]]),
            r"group 0\.1\+1\.1 is given twice",
        ),
        (lambda m, p: subset_effects(m, p, []), "pool of 0"),
        (
            lambda m, p: strongest_group(subset_effects(m, p, [(0, 0)]), 2),
            "no group has 2",
        ),
        (lambda m, p: tt.greedy_heads(m, p, 0), "k=0 must be"),
        (lambda m, p: tt.greedy_heads(m, p, 13), "k=13 must be"),
        (lambda m, p: tt.head_effects(m, p, to=2.0), "to=2.0 is not a change"),
        (lambda m, p: tt.head_effects(m, p, to=tt.Times(np.nan)), "finite"),
        (lambda m, p: tt.head_effects(m, p, to=tt.From(p[:2])), "2 donors for 3"),
    ],
)
def test_bad_input(llama: tt.Model, call, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        call(llama, make(llama))


def test_a_pool_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    prompts, pool = make(model), model.heads[:4]
    with pytest.raises(tt.errors.InputError, match="given twice"):
        subset_effects(model, prompts, pool * 2)
    monkeypatch.setattr("twotower.measures.group_effects.LARGEST_POOL", 4)
    assert subset_effects(model, prompts, pool).sizes["group"] == 15
    monkeypatch.setattr("twotower.measures.group_effects.LARGEST_POOL", 3)
    with pytest.raises(tt.errors.InputError, match="pool of 4 heads has 15 subsets; give 1 to 3"):
        subset_effects(model, prompts, pool)
