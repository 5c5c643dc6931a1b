"""Edits of attention and values: against a float64 forward, and a forward with softmax hooked."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from reference import Reference, answer, error, hooked, ids_of, plain_logits, real
from surface import under
from tiny import DISTINCT, THREE, crossed, tiny

import twotower as tt

HEADS = [(0, 1), (0, 2), (1, 3), (2, 0)]


def make(model: tt.Model, n: int = 3, seed: int = 2) -> tt.Prompts:
    prompts = tt.build_prompts(model, THREE, shots=1, n=n, seed=seed)
    assert len(set(prompts.lengths)) >= 3
    return prompts


def edited(layer: int) -> list[int]:
    return [head for index, head in HEADS if index == layer]


def looking(prompts: tt.Prompts, i: int, positions: str) -> torch.Tensor:
    """(T,) boolean: positions that look."""
    return torch.as_tensor((prompts.role[i] == "last") | (positions == "all"))[real(prompts, i)]


def keys_of(prompts: tt.Prompts, i: int) -> torch.Tensor:
    """(T,) boolean: label positions holding foo."""
    return torch.as_tensor((prompts.role[i] == "label") & (prompts.label_text[i] == "foo"))[
        real(prompts, i)
    ]


def attended(parts, head: int, attention: torch.Tensor, rows: torch.Tensor, value=None):
    """z with a head's attention (T, T) and values (T, D) replaced at some rows."""
    value = parts.value[:, head] if value is None else value
    parts.z[rows, head] = (attention @ value)[rows]


# ---- what each edit is, by its definition, in float64 ---------------------------------------


def scaled(reference, prompts, i, positions, factor, renormalize=False):
    rows, keys = looking(prompts, i, positions), keys_of(prompts, i)

    def attend(layer, parts):
        for head in edited(layer):
            new = parts.attention[head].clone()
            new[:, keys] *= factor
            if renormalize:
                new /= new.sum(dim=-1, keepdim=True)
            attended(parts, head, new, rows)
        return parts.z

    return attend


def dropped(reference, prompts, i, positions, distance, only_keys):
    """Position parts dropped; rotary scores are computed distance by distance."""
    rows = looking(prompts, i, positions)
    keys = keys_of(prompts, i) if only_keys else torch.ones_like(rows)
    labels = np.flatnonzero(prompts.role[i][real(prompts, i)] == "label")

    def rotary(layer, parts):
        n, scale = len(rows), reference.scale(layer)
        new = torch.zeros_like(parts.score)
        for q in range(n):
            query = reference.rotate(parts.query, torch.full((n,), q))[q]
            places = [p for p in labels if p <= q] if distance == "mean" else []
            for place in places or [q]:
                turned = reference.rotate(parts.key, torch.full((n,), place))
                new[:, q] += torch.einsum("hd,khd->hk", query, turned) * scale / len(places or [q])
        return new

    def learned(layer, parts):
        b, n = reference.blocks[layer], len(rows)
        direct = reference.pull(
            reference.w["transformer.wpe.weight"][:n], b.norm, like=parts.residual
        )
        content = reference.norm(parts.residual, b.norm) - direct
        q, k, _ = reference.queries_keys_values(layer, content)
        return torch.einsum("qhd,khd->hqk", q, k) * reference.scale(layer)

    def attend(layer, parts):
        content = (learned if reference.kind == "gpt2" else rotary)(layer, parts)
        for head in edited(layer):
            score = torch.where(keys, content[head], parts.score[head])
            new = score.masked_fill(~parts.seen, -torch.inf).softmax(dim=-1)
            attended(parts, head, new, rows)
        return parts.z

    return attend


def patched(reference, prompts, i, positions, what):
    rows = looking(prompts, i, positions)
    donor = reference.run(ids_of(prompts.reversed_labels(), i))

    def attend(layer, parts):
        for head in edited(layer):
            if what == "attention":
                attended(parts, head, donor.attention[layer][head], rows)
            elif what == "values":
                attended(parts, head, parts.attention[head], rows, donor.value[layer][:, head])
            else:
                parts.z[rows, head] = donor.z[layer][rows, head]
        return parts.z

    return attend


FOO = tt.at(role="label", label="foo")
EDITS = {
    "scaled": (
        lambda p, at: tt.ScaleAttention(HEADS, 2.5, FOO, positions=at),
        lambda r, p, i, at: scaled(r, p, i, at, 2.5),
    ),
    "scaled, renormalized": (
        lambda p, at: tt.ScaleAttention(HEADS, 0.3, FOO, renormalize=True, positions=at),
        lambda r, p, i, at: scaled(r, p, i, at, 0.3, True),
    ),
    "cut": (
        lambda p, at: tt.ScaleAttention(HEADS, 0, FOO, positions=at),
        lambda r, p, i, at: scaled(r, p, i, at, 0.0),
    ),
    "position dropped": (
        lambda p, at: tt.DropPosition(HEADS, positions=at),
        lambda r, p, i, at: dropped(r, p, i, at, "zero", False),
    ),
    "position dropped at keys": (
        lambda p, at: tt.DropPosition(HEADS, FOO, at),
        lambda r, p, i, at: dropped(r, p, i, at, "zero", True),
    ),
    "mean distance": (
        lambda p, at: tt.DropPosition(HEADS, FOO, at, distance="mean"),
        lambda r, p, i, at: dropped(r, p, i, at, "mean", True),
    ),
    "attention patched": (
        lambda p, at: tt.Patch(HEADS, p.reversed_labels(), "attention", at),
        lambda r, p, i, at: patched(r, p, i, at, "attention"),
    ),
    "values patched": (
        lambda p, at: tt.Patch(HEADS, p.reversed_labels(), "values", at),
        lambda r, p, i, at: patched(r, p, i, at, "values"),
    ),
    "z patched": (
        lambda p, at: tt.KnockOut(HEADS, at, to=tt.From(p.reversed_labels())),
        lambda r, p, i, at: patched(r, p, i, at, "z"),
    ),
}


def check(found, model: tt.Model, prompts: tt.Prompts, by_hand) -> None:
    """`by_hand(i)` gives the edit of prompt i in a float64 forward."""
    reference = Reference(model.module)
    for i in range(len(prompts)):
        exact = reference.run(ids_of(prompts, i), attend=by_hand(i)).logits[-1]
        one = found.isel(prompt=i)
        assert error(one["logit"], exact[list(prompts.label_ids)]) <= 2e-5
        _, logprobs = answer(exact, prompts, i)
        assert error(one["logprob"], logprobs) <= 2e-5


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "all"], ["all"], on=DISTINCT),
    indirect=["any_model"],
)
@pytest.mark.parametrize("name", EDITS)
def test_against_float64(any_model: tt.Model, name: str, positions: str) -> None:
    model, prompts = any_model, make(any_model)
    if name == "mean distance" and model.architecture.learned_positions_path:
        with pytest.raises(tt.errors.InputError, match="only for rotary models"):
            tt.predict(model, prompts, EDITS[name][0](prompts, positions))
        return
    edit, by_hand = EDITS[name]
    found = under(tt.predict, model, prompts, edit(prompts, positions), batch_size=2)
    reference = Reference(model.module)
    check(found, model, prompts, lambda i: by_hand(reference, prompts, i, positions))
    clean = tt.predict(model, prompts)["logit"]
    assert error(found["logit"], clean) > 1e-4


@contextmanager
def softmax_hooked(edit):
    """In a plain eager forward, every layer's attention (H, T, T) goes through `edit`."""
    own, layer = torch.nn.functional.softmax, iter(range(1000))

    def softmax(x, *arguments, **named):
        out = own(x, *arguments, **named)
        out[0] = edit(next(layer), out[0].clone())
        return out

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = own


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "all"], ["all"]),
    indirect=["any_model"],
)
@pytest.mark.parametrize("name", ["scaled", "scaled, renormalized", "attention patched"])
def test_against_hooked_softmax(any_model: tt.Model, name: str, positions: str) -> None:
    """transformers' own eager attention with its weights changed between softmax and values."""
    model, prompts = any_model, make(any_model)
    found = tt.predict(model, prompts, EDITS[name][0](prompts, positions))
    twin = prompts.reversed_labels()
    for i in range(len(prompts)):
        rows, keys = looking(prompts, i, positions), keys_of(prompts, i)
        donated: list[torch.Tensor] = []
        with softmax_hooked(lambda _, a: donated.append(a.clone()) or a):
            plain_logits(model.module, ids_of(twin, i))
        assert len(donated) == model.n_layers

        def change(layer, attention, rows=rows, keys=keys, donated=donated):
            for head in edited(layer):
                new = attention[head].clone()
                if name == "attention patched":
                    new = donated[layer][head]
                else:
                    new[:, keys] *= 0.3 if "renormalized" in name else 2.5
                if "renormalized" in name:
                    new = new / new.sum(dim=-1, keepdim=True)
                attention[head, rows] = new[rows]
            return attention

        with softmax_hooked(change):
            own = plain_logits(model.module, ids_of(prompts, i))
        assert error(found["logit"].values[i], own[list(prompts.label_ids)]) <= 2e-5


def test_composed(any_model: tt.Model) -> None:
    """Attention, values and z of one head, all at once, given in either order."""
    model, prompts = any_model, make(any_model)
    twin, (layer, head) = prompts.reversed_labels(), (1, 2)
    heads, reference = [(layer, head)], Reference(model.module)
    edits = [
        tt.KnockOut(heads, "labels", to=tt.Times(-0.5)),
        tt.Patch(heads, twin, "values", "all"),
        tt.ScaleAttention(heads, 3.0, FOO, positions="all"),
        tt.DropPosition(heads, tt.at(role="text"), "all"),
        tt.KnockOut(heads, tt.at(role="query")),
    ]

    def by_hand(i):
        donor = reference.run(ids_of(twin, i))
        role = prompts.role[i][real(prompts, i)]
        every = torch.ones(len(role), dtype=torch.bool)

        def attend(index, parts):
            if index != layer:
                return parts.z
            texts = torch.as_tensor(role == "text")
            # The whole of the scores without position, on the text keys alone.
            free = content(reference, index, parts)[head]
            score = torch.where(texts, free, parts.score[head])
            new = score.masked_fill(~parts.seen, -torch.inf).softmax(dim=-1)
            new[:, keys_of(prompts, i)] *= 3.0
            attended(parts, head, new, every, donor.value[index][:, head])
            parts.z[torch.as_tensor(role == "label"), head] *= -0.5
            parts.z[torch.as_tensor(role == "query"), head] = 0
            return parts.z

        return attend

    for given in (edits, edits[::-1]):
        check(tt.predict(model, prompts, given), model, prompts, by_hand)


def content(reference: Reference, layer: int, parts) -> torch.Tensor:
    """(H, T, T) content part of the scores at distance 0."""
    if reference.kind != "gpt2":
        # Rotary at distance 0 is no rotary at all.
        return torch.einsum("qhd,khd->hqk", parts.query, parts.key) * reference.scale(layer)
    b = reference.blocks[layer]
    embedding = reference.w["transformer.wpe.weight"][: len(parts.residual)]
    direct = reference.pull(embedding, b.norm, like=parts.residual)
    normed = reference.norm(parts.residual, b.norm) - direct
    q, k, _ = reference.queries_keys_values(layer, normed)
    return torch.einsum("qhd,khd->hqk", q, k) * reference.scale(layer)


def test_disjoint_keys_go_together(any_model: tt.Model) -> None:
    """Two labels weighted differently in the same head; one renormalizes the whole."""
    model, prompts = any_model, make(any_model)
    heads = [(1, 0)]
    edits = [
        tt.ScaleAttention(heads, 2.0, tt.at(role="label", label="foo")),
        tt.ScaleAttention(heads, 0.5, tt.at(role="label", label="bar"), renormalize=True),
    ]

    def by_hand(i):
        label = np.where(prompts.role[i] == "label", prompts.label_text[i], "")[real(prompts, i)]

        def attend(layer, parts):
            if layer == 1:
                new = parts.attention[0].clone()
                new[:, torch.as_tensor(label == "foo")] *= 2
                new[:, torch.as_tensor(label == "bar")] *= 0.5
                new /= new.sum(dim=-1, keepdim=True)
                rows = torch.zeros(len(label), dtype=torch.bool)
                rows[-1] = True
                attended(parts, 0, new, rows)
            return parts.z

        return attend

    for given in (edits, edits[::-1]):
        check(tt.predict(model, prompts, given), model, prompts, by_hand)


def test_what_changes_nothing(any_model: tt.Model) -> None:
    model, prompts = any_model, make(any_model)
    clean = tt.predict(model, prompts)["logit"].values
    for positions in ("last", "all"):
        same = tt.predict(model, prompts, tt.ScaleAttention(HEADS, 1, "labels", True, positions))
        assert error(same["logit"], clean) <= 1e-5
        patches = [tt.KnockOut(HEADS, positions, to=tt.From(prompts))]
        patches += [tt.Patch(HEADS, prompts, what, positions) for what in ("attention", "values")]
        for patch in patches:
            own = tt.predict(model, prompts, patch)
            assert error(own["logit"], clean) <= 1e-5
    exact = tt.predict(model, prompts, tt.ScaleAttention(HEADS, 1, "labels"))["logit"].values
    np.testing.assert_array_equal(exact, clean)


def test_all_attention_cut_is_a_knock_out(any_model: tt.Model) -> None:
    model, prompts = any_model, make(any_model)
    for positions in ("last", "labels", "all"):
        cut = tt.predict(model, prompts, tt.ScaleAttention(HEADS, 0, "all", positions=positions))
        out = tt.predict(model, prompts, tt.KnockOut(HEADS, positions))
        assert error(cut["logit"], out["logit"]) <= 1e-5


def test_attention_and_values_patched_are_z_patched(any_model: tt.Model) -> None:
    """Both towers of one layer's heads together are the donor's output."""
    model, prompts = any_model, make(any_model)
    twin, heads = prompts.reversed_labels(), [(0, 1), (0, 3)]
    both = [tt.Patch(heads, twin, "attention"), tt.Patch(heads, twin, "values")]
    found = tt.predict(model, prompts, both)
    whole = tt.predict(model, prompts, tt.KnockOut(heads, "last", to=tt.From(twin)))
    assert error(found["logit"], whole["logit"]) <= 1e-5


def test_z_patched_is_the_sweeps_patch(any_model: tt.Model) -> None:
    model, prompts = any_model, make(any_model)
    twin = prompts.reversed_labels()
    effects = tt.head_effects(model, prompts, logprobs=False, to=tt.From(twin))
    clean = tt.predict(model, prompts)["margin"]
    for layer, head in HEADS:
        after = tt.predict(model, prompts, tt.KnockOut([(layer, head)], "last", to=tt.From(twin)))[
            "margin"
        ]
        expected = effects["margin_drop"].sel(layer=layer, head=head).values
        largest = np.abs(effects["margin_drop"].values).max()
        assert np.abs((clean - after).values - expected).max() <= 1e-4 * largest


def test_sdpa_and_batches_give_the_same() -> None:
    eager, sdpa = tiny("llama-grouped"), tiny("llama-grouped", "sdpa")
    prompts = make(eager, n=5)
    edits = [
        tt.DropPosition([(0, 1)], positions="all"),
        tt.ScaleAttention([(1, 3)], 2.0, "labels", True),
        tt.Patch([(2, 2)], prompts.reversed_labels(), "attention"),
    ]
    expected = under(tt.predict, eager, prompts, edits, batch_size=5)["logit"].values
    for model in (eager, sdpa):
        for size in (1, 2, 3):
            found = under(tt.predict, model, prompts, edits, batch_size=size)["logit"]
            assert error(found, expected) <= 1e-5


def test_hooked_z_edit_still_composes_with_attention(any_model: tt.Model) -> None:
    """An edit of attention in one layer, and of z in another, against plain hooks."""
    model, prompts = any_model, make(any_model)
    edits = [
        tt.ScaleAttention([(0, 1)], 0, "all", positions="all"),
        tt.KnockOut([(2, 3)], "all", to=tt.Times(2.0)),
    ]
    found = tt.predict(model, prompts, edits)

    def change(layer, z):
        if layer == 0:
            z[:, 1] = 0
        elif layer == 2:
            z[:, 3] *= 2
        return z

    for i in range(len(prompts)):
        with hooked(model.module, model.n_heads, change):
            own = plain_logits(model.module, ids_of(prompts, i))
        assert error(found["logit"].values[i], own[list(prompts.label_ids)]) <= 1e-5


# ---- refusals ---------------------------------------------------------------------------------


H = [(0, 1)]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            lambda p: [tt.ScaleAttention(H, 2, "labels"), tt.DropPosition(H)],
            "the attention of head 0.1 is edited twice",
        ),
        (
            lambda p: [tt.ScaleAttention(H, 2, "labels"), tt.Patch(H, p, "attention", "all")],
            "the attention of head 0.1 is edited twice",
        ),
        (
            lambda p: [tt.DropPosition(H, FOO), tt.ScaleAttention(H, 2, FOO)],
            "the attention of head 0.1 is edited twice",
        ),
        (
            lambda p: [tt.Patch(H, p, "values"), tt.Patch(H, p, "values")],
            "the values of head 0.1 is edited twice",
        ),
        (
            lambda p: [tt.KnockOut(H, "last", to=tt.From(p)), tt.KnockOut(H, positions="all")],
            "the output of head 0.1 is edited twice",
        ),
        (lambda p: tt.ScaleAttention(H, -1, "labels"), "must be 0 or more"),
        (lambda p: tt.ScaleAttention(H, float("nan"), "labels"), "finite number"),
        (lambda p: tt.ScaleAttention(H, 2, "keys"), "positions='keys' is not known"),
        (lambda p: tt.ScaleAttention(H, 2, None), "positions must be"),
        (lambda p: tt.ScaleAttention(H, 2, tt.at(label="cup")), "has the label 'cup'"),
        (lambda p: tt.ScaleAttention(H, 2, "labels", renormalize="yes"), "True or False"),
        (
            lambda p: tt.ScaleAttention(H, 0, "all", renormalize=True),
            "sees nothing but the keys",
        ),
        (lambda p: tt.DropPosition(H, distance="far"), "distance='far' is not known"),
        (lambda p: tt.DropPosition([(9, 0)]), "9.0 is out of range"),
        (lambda p: tt.Patch(H, p, "query"), "what='query' is not known"),
        (
            lambda p: tt.KnockOut(H, "last", to=tt.From("twin")),
            "donor must be the result of build_prompts",
        ),
        (lambda p: tt.KnockOut(H, "last", to=tt.From(p[:2])), "2 donors for 3 prompts"),
        (lambda p: tt.Patch(H, p[[1, 0, 2]], "attention"), "cannot be aligned"),
        (lambda p: tt.Patch(H, p[[1, 0, 2]], "values"), "cannot be aligned"),
    ],
)
def test_refusals(edits, message: str) -> None:
    model = tiny("llama")
    prompts = make(model)
    with pytest.raises(tt.errors.InputError, match=message):
        tt.predict(model, prompts, edits(prompts))


def test_described() -> None:
    model = tiny("llama")
    prompts = make(model)
    twin = prompts.reversed_labels()
    edits = [
        tt.ScaleAttention([(0, 1)], 2.0, FOO, renormalize=True),
        tt.DropPosition([(1, 1)], np.asarray(prompts.role == "label"), distance="mean"),
        tt.Patch([(2, 1)], twin, "values"),
    ]
    settings = tt.predict(model, prompts, edits).attrs["settings"]
    for part in (
        '"keys": {"label": ["foo"], "role": ["label"]}',
        '"renormalize": true',
        '"keys": "given"',
        '"distance": "mean"',
        f'"donor": "{twin.hash}"',
        '"what": "values"',
    ):
        assert part in settings
