"""Scores of kinds of heads, function vectors and `Add`, each computed a second way."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from reference import Reference, ids_of
from tiny import TWO, byte_level, hf_model, tiny

import twotower as tt
from twotower.measures.copying import TOP
from twotower.prompts.repeats import random_repeats

N, LENGTH = 4, 6


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped"])
def test_scores_on_repeated_sequences(name: str) -> None:
    """Attention and value-output vectors of the reference in float64."""
    model = tiny(name)
    found = tt.head_kinds(model, n=N, length=LENGTH, seed=3)
    repeats = random_repeats(model, N, LENGTH, 3)
    reference = Reference(model.module)
    start = int(np.flatnonzero(repeats.role[0] == "text")[0])
    scores: dict[str, list[np.ndarray]] = {}
    for row in range(N):
        ids = ids_of(repeats, row)
        assert ids[start : start + LENGTH - 1].tolist() == ids[start + LENGTH :].tolist()
        assert len(set(ids[start : start + LENGTH].tolist())) == LENGTH
        run = reference.run(ids)
        pattern = torch.stack(run.attention).numpy()  # (layer, head, query, key)
        width = len(ids)
        second = range(start + LENGTH, width)
        values = {
            "previous_token": [pattern[..., t, t - 1] for t in range(start + 1, width)],
            "duplicate_token": [pattern[..., t, t - LENGTH] for t in second],
            "induction": [pattern[..., t, t - LENGTH + 1] for t in second],
            "sink": [pattern[..., t, 0] for t in second],
        }
        for kind, listed in values.items():
            scores.setdefault(kind, []).append(np.mean(listed, axis=0))
    for kind, by_prompt in scores.items():
        np.testing.assert_allclose(found[kind], np.mean(by_prompt, axis=0), atol=1e-5)
        spread = np.std(by_prompt, axis=0, ddof=1) / np.sqrt(N)
        np.testing.assert_allclose(found[f"{kind}_error"], 3.182446 * spread, atol=1e-5)
    copied = np.zeros((model.n_layers, model.n_heads))
    for row in range(N):  # all first occurrences are tested: there are fewer than asked for
        ids = ids_of(repeats, row)
        run = reference.run(ids)
        for layer, block in enumerate(reference.blocks):
            per = model.n_heads // run.value[layer].shape[1]
            value = run.value[layer].repeat_interleave(per, dim=1)
            vectors = torch.einsum("thd,hde->the", value, block.out)
            logits = reference.unembed(
                reference.pull(vectors, reference.end, run.residual[-1][-1]), bias=False
            )
            own = logits.gather(-1, ids[:, None, None].expand(-1, model.n_heads, 1))
            few = ((logits > own).sum(dim=-1) < TOP).double()
            copied[layer] += few[start : start + LENGTH].mean(dim=0).numpy() / N
    np.testing.assert_allclose(found["copying"], copied, atol=1e-6)


def test_scores_of_a_task() -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=4, seed=2)
    found = tt.head_kinds(model, prompts, n=2, length=4, seed=5)
    shuffled = prompts.shuffled_labels(5)
    gold = prompts.gold_index
    rows = np.arange(len(prompts))
    before = tt.predict(model, shuffled)["logprob"].values[rows, gold]
    for head in [(0, 1), (2, 2)]:
        edit = tt.KnockOut([head], to=tt.Mean(prompts))
        after = tt.predict(model, shuffled, edit)["logprob"].values[rows, gold]
        got = float(found["function_vector"].sel(layer=head[0], head=head[1]))
        assert abs(got - float((after - before).mean())) < 1e-4
    written = tt.attribution(model, prompts)["label_logit"].values
    right = written[rows, ..., gold] - written[rows, ..., 1 - gold]
    np.testing.assert_allclose(found["answer_logit"], right.mean(axis=0), atol=1e-5)
    drops = tt.head_effects(model, prompts)["margin_drop"].mean("prompt")
    np.testing.assert_allclose(found["answer_effect"], drops, atol=1e-5)
    towers = tt.two_tower_scores(tt.analyze(model, prompts, measures=["qk", "ov"]))
    for name in ("qk_auc", "qk_size", "ov_auc", "ov_size"):
        np.testing.assert_allclose(found[name], towers[name], atol=1e-5)
        assert (found[f"{name}_error"] >= 0).all()


def test_scores_of_prompts_without_demonstrations() -> None:
    model = tiny("llama-grouped")
    prompts = tt.contrast(model, ["a b", "the cat ran"], [" foo", " bar"], [" bar", " foo"])
    found = tt.head_kinds(model, prompts, n=2, length=4)
    assert "function_vector" not in found
    drops = tt.head_effects(model, prompts)["margin_drop"].mean("prompt")
    np.testing.assert_allclose(found["answer_effect"], drops, atol=1e-5)
    written = tt.attribution(model, prompts)["label_logit"]
    right = written.sel(label="right") - written.sel(label="wrong")
    np.testing.assert_allclose(found["answer_logit"], right.mean("prompt"), atol=1e-5)


def test_shuffled_labels_keep_everything_else() -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=4, seed=2)
    shuffled = prompts.shuffled_labels(1)
    assert (shuffled.gold == prompts.gold).all()
    assert (shuffled.role == prompts.role).all()
    moved = 0
    for one, other in zip(prompts, shuffled, strict=True):
        labels = [[s.label for s in p.segments if s.role == "label"] for p in (one, other)]
        assert sorted(labels[0]) == sorted(labels[1])
        moved += labels[0] != labels[1]
        texts = [[s.text for s in p.segments if s.role in ("text", "query")] for p in (one, other)]
        assert texts[0] == texts[1]
    assert moved
    with pytest.raises(tt.errors.InputError, match="labels are shuffled among two or more"):
        tt.contrast(model, ["a b"], [" foo"]).shuffled_labels()


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped"])
def test_a_function_vector_is_the_mean_of_what_heads_write(name: str) -> None:
    model = tiny(name)
    reference = Reference(model.module)
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=4)
    heads = [(0, 1), (2, 3)]
    found = tt.function_vector(model, prompts, heads)
    assert found["chosen"].values.tolist() == ["0.1", "2.3"]
    for number, (layer, head) in enumerate(heads):
        out = reference.blocks[layer].out[head]
        writes = [reference.run(ids_of(prompts, row)).z[layer][-1, head] @ out for row in range(3)]
        expected = torch.stack(writes).mean(dim=0)
        np.testing.assert_allclose(found["head_vector"][number], expected, atol=1e-5)
    np.testing.assert_allclose(found["vector"], found["head_vector"].sum("chosen"), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_an_added_vector_is_that_of_a_hook(name: str, positions: str) -> None:
    """In padded batches, for predictions and completions, together with a knock-out."""
    model = tiny(name)
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=4)
    vector = np.random.default_rng(0).normal(size=model.d_model).astype(np.float32)
    edit = tt.Add(vector, 1, positions)
    found = tt.predict(model, prompts, edit)
    effects = tt.measures.function_vector.vector_effects(model, prompts, vector, [1, 2], positions)
    texts = tt.complete(model, prompts, 3, edit)
    clean = tt.predict(model, prompts)
    block = model.architecture.layers(model.module)[1]
    for row in range(3):
        ids = ids_of(prompts, row)
        n = len(ids)

        def hook(module: Any, args: Any, kwargs: Any, n: int = n) -> Any:
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            x[:, (n - 1 if positions == "last" else 0) :] += torch.as_tensor(vector)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        handle = block.register_forward_pre_hook(hook, with_kwargs=True)
        tokens: list[int] = []
        with torch.no_grad():
            logits = model.module(ids[None]).logits[0, -1]
            for _ in range(3):
                whole = torch.cat((ids, torch.tensor(tokens, dtype=torch.long)))
                tokens.append(int(model.module(whole[None]).logits[0, -1].argmax()))
        handle.remove()
        expected = logits[list(prompts.label_ids)]
        np.testing.assert_allclose(found["logit"][row], expected, rtol=1e-4, atol=1e-4)
        end = model.config.eos_token_id
        ended = end in tokens
        text = model.tokenizer.decode(tokens[: tokens.index(end)] if ended else tokens)
        assert texts[row] == (text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}"))
    gain = found["logprob"] - clean["logprob"]
    right = gain.values[np.arange(3), prompts.gold_index]
    np.testing.assert_allclose(effects["logprob_gain"].sel(layer=1), right, atol=1e-5)


def test_a_vector_of_other_weights_is_told() -> None:
    model = tiny("llama-grouped")
    other = tt.load(hf_model("llama-grouped", seed=5), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=2)
    own, theirs = (tt.function_vector(m, prompts, [(0, 1)]) for m in (model, other))
    found = tt.predict(model, prompts, tt.Add(own, 1))
    (edit,) = json.loads(found.attrs["settings"])["edits"]
    assert edit["made_on"]["weights_hash"] == found.attrs["weights_hash"]
    with pytest.warns(tt.errors.TwoTowerWarning, match="made on other weights"):
        found = tt.predict(model, prompts, tt.Add(theirs, 1))
    (edit,) = json.loads(found.attrs["settings"])["edits"]
    assert edit["made_on"]["weights_hash"] != found.attrs["weights_hash"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: tt.Add("x", 0), "vector must be numbers"),
        (lambda m: tt.Add([1j], 0), "vector must be numbers"),
        (lambda m: tt.Add([[1.0]], 0), r"finite numbers \(d_model,\); this is of shape \(1, 1\)"),
        (lambda m: tt.Add([float("nan")], 0), "must be finite numbers"),
        (lambda m: tt.Add([1.0], -1), "layer=-1 must be a whole number"),
        (lambda m: tt.Add(np.zeros(3), 0), "the vector has 3 numbers"),
        (lambda m: tt.Add(np.zeros(m.d_model), 99), "layer=99 is not below"),
    ],
)
def test_vectors_that_do_not_fit(make: Any, message: str) -> None:
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=1, n=1)
    with pytest.raises(tt.errors.InputError, match=message):
        tt.predict(model, prompts, make(model))


def test_sizes_stand_beside_the_aucs() -> None:
    model = tiny("llama-grouped")
    prompts = tt.build_prompts(model, TWO, shots=2, n=3)
    run = tt.analyze(model, prompts, measures=["qk", "ov"])
    scores = tt.two_tower_scores(run)
    for auc, size in (("qk_auc", "qk_size"), ("ov_auc", "ov_size")):
        sure = (scores[auc] == 1) | (scores[auc] == 0)
        assert ((scores[size] > 0) == (scores[auc] == 1)).where(sure, other=True).all()
    row, layer, head = 1, 1, 2
    one = run["qk"]["score"].isel(prompt=row).sel(layer=layer, head=head)
    at = (one["role"] == "label").values
    same = (one["demonstration_class"] == one["query_class"]).values[at]
    values = one.values[at]
    single = tt.two_tower_scores(tt.analyze(model, prompts[[row]], measures=["qk", "ov"]))
    expected = values[same].mean() - values[~same].mean()
    assert abs(float(single["qk_size"].sel(layer=layer, head=head)) - expected) < 1e-5
