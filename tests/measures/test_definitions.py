"""Scores, attention, label logits and log-probabilities against the definitions, in float64.

Every number of every prompt, head and position, measured in padded batches, is compared with
the same number computed for the prompt alone from the weights (see `reference.py`).
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr
from reference import Reference, Run, answer, error, ids_of, plain_logits, real
from surface import under
from tiny import THREE, TWO, tiny

import twotower as tt


@pytest.fixture(scope="module")
def case(any_model: tt.Model) -> tuple[tt.Model, tt.Prompts, Reference, list[Run]]:
    """A model, prompts of several lengths, and its forwards from the weights."""
    prompts = tt.build_prompts(any_model, THREE, shots={"foo": 2, "bar": 1, "map": 1}, n=4, seed=2)
    assert len(set(prompts.lengths)) >= 3
    reference = Reference(any_model.module)
    runs = [reference.run(ids_of(prompts, i)) for i in range(len(prompts))]
    return any_model, prompts, reference, runs


def by_prompt(array: xr.DataArray, prompts: tt.Prompts) -> list[np.ndarray]:
    """Each prompt's values without its padding, which must be NaN, and nothing else."""
    values = array.values
    axis = array.dims.index("position")
    found = []
    for i in range(len(prompts)):
        at = real(prompts, i)
        assert (prompts.role[i] == "pad").tolist() == (~at).tolist()
        kept = np.compress(at, values[i], axis=axis - 1)
        assert np.isfinite(kept).all()
        assert np.isnan(np.compress(~at, values[i], axis=axis - 1)).all()
        found.append(kept)
    return found


# ---- query and key ---------------------------------------------------------------------------


def test_attention_and_scores(case) -> None:
    model, prompts, _, runs = case
    qk = tt.qk_similarity(model, prompts)
    scores, attentions = (by_prompt(qk[name], prompts) for name in ("score", "attention"))
    for i, run in enumerate(runs):
        last = torch.stack(run.attention)[:, :, -1]
        assert error(attentions[i], last) <= 1e-5
        assert np.abs(attentions[i].sum(axis=-1) - 1).max() <= 1e-5
        assert error(scores[i], torch.stack(run.score)[:, :, -1]) <= 1e-5
        # transformers' own attention, from its eager kernel
        with torch.no_grad():
            own = model.module(input_ids=ids_of(prompts, i)[None], output_attentions=True)
        assert error(attentions[i], torch.stack(own.attentions)[:, 0, :, -1]) <= 1e-5


def test_attention_does_not_depend_on_the_kernel(case) -> None:
    model, prompts, _, runs = case
    name = next(n for n in NAMES if tiny(n) is model)
    if name == "gptj":
        pytest.skip("transformers has no sdpa for GPT-J")
    sdpa = tiny(name, "sdpa")
    qk = tt.qk_similarity(sdpa, prompts)
    for i, found in enumerate(by_prompt(qk["attention"], prompts)):
        assert error(found, torch.stack(runs[i].attention)[:, :, -1]) <= 1e-5


NAMES = [
    "gpt2",
    "gptj",
    "llama",
    "llama-grouped",
    "mistral",
    "qwen2",
    "qwen3",
    "neox-parallel",
    "neox-sequential",
]


def test_a_window_hides_what_is_before_it() -> None:
    model = tiny("mistral")
    prompts = tt.build_prompts(model, THREE, shots=1, n=3, seed=2)
    attention = tt.qk_similarity(model, prompts)["attention"]
    assert (attention.sel(position=slice(None, -12)).fillna(0) == 0).all()
    assert (attention.sel(position=slice(-11, None)) > 0).all()


def test_content(case) -> None:
    """Rotary: q at position 0 with keys at position minus distance, for each distance asked."""
    model, prompts, reference, runs = case
    qk = tt.qk_similarity(model, prompts)
    assert ("score_content_mean" in qk) == (reference.kind != "gpt2")
    content = by_prompt(qk["score_content"], prompts)
    for i, run in enumerate(runs):
        n = len(run.query[0])
        labels = np.flatnonzero(prompts.role[i][real(prompts, i)] == "label")
        for layer in range(model.n_layers):
            scale = reference.scale(layer)
            if reference.kind == "gpt2":
                expected = gpt2_content(reference, run, layer, n) * scale
                # Layer 0 reads token embedding and position alone.
                assert error(content[i][layer], expected) <= 1e-5
                continue
            query, key = run.query[layer][-1:], run.key[layer]

            def at_distance(distance: int, query=query, key=key, scale=scale) -> torch.Tensor:
                turned = reference.rotate(key, torch.full((len(key),), -float(distance)))
                return torch.einsum("qhd,khd->hk", query, turned) * scale

            assert error(content[i][layer], at_distance(0)) <= 1e-5
            own = torch.stack([at_distance(n - 1 - p)[:, p] for p in range(n)], dim=-1)
            assert error(own, run.score[layer][:, -1]) <= 1e-9
            mean = sum(at_distance(n - 1 - int(p)) for p in labels) / len(labels)
            found = by_prompt(qk["score_content_mean"], prompts)[i][layer]
            assert error(found, mean) <= 1e-5


def gpt2_content(reference: Reference, run: Run, layer: int, n: int) -> torch.Tensor:
    """(H, T) q.k less the position embedding's direct path, biases kept; before scaling."""
    b, x = reference.blocks[layer], run.residual[layer]
    position = reference.w["transformer.wpe.weight"][:n]
    # The path is linear once the norm's deviation is held at the residual stream's.
    direct = reference.pull(position, b.norm, like=x)
    q, k, _ = reference.queries_keys_values(layer, reference.norm(x, b.norm) - direct)
    return torch.einsum("hd,khd->hk", q[-1], k)


def test_gpt2_content_of_the_first_layer_is_that_of_the_tokens() -> None:
    """There, a model without positions at the same deviation; seen without any subtraction."""
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, THREE, shots=1, n=2, seed=2)
    reference = Reference(model.module)
    found = by_prompt(tt.qk_similarity(model, prompts)["score_content"], prompts)
    b = reference.blocks[0]
    for i in range(len(prompts)):
        ids = ids_of(prompts, i)
        tokens = reference.w["transformer.wte.weight"][ids]
        normed = reference.norm(tokens, b.norm, like=reference.embed(ids))
        q, k, _ = reference.queries_keys_values(0, normed)
        expected = torch.einsum("hd,khd->hk", q[-1], k) * reference.scale(0)
        assert error(found[i][0], expected) <= 1e-5


# ---- value and output -----------------------------------------------------------------------


def vectors(reference: Reference, run: Run, layer: int) -> torch.Tensor:
    """(H, T, d_model) raw value-output vectors, from the weights."""
    return torch.einsum("thd,hde->hte", run.value[layer], reference.blocks[layer].out)


def test_weighted_vectors_and_bias_are_the_attention_output(case) -> None:
    """With twotower's attention, at the last position."""
    model, prompts, reference, runs = case
    attention = by_prompt(tt.qk_similarity(model, prompts)["attention"], prompts)
    for i, run in enumerate(runs):
        outputs: list[torch.Tensor] = []
        handles = [
            module.register_forward_hook(lambda m, a, o: outputs.append(o[0, -1]))
            for module in output_modules(model.module)
        ]
        plain_logits(model.module, ids_of(prompts, i))
        for handle in handles:
            handle.remove()
        for layer, own in enumerate(outputs):
            raw = vectors(reference, run, layer)
            weight = torch.as_tensor(attention[i][layer]).double()
            whole = torch.einsum("ht,hte->e", weight, raw) + reference.blocks[layer].out_bias
            assert error(whole, own) <= 1e-5
            assert error(whole, run.attention_output[layer][-1]) <= 1e-5


def output_modules(module) -> list[torch.nn.Module]:
    from reference import output_projections

    return output_projections(module)


def test_label_logits_of_value_vectors(case) -> None:
    model, prompts, reference, runs = case
    ov = by_prompt(tt.ov_labels(model, prompts)["label_logit"], prompts)
    for i, run in enumerate(runs):
        end = run.residual[-1][-1]
        expected = torch.stack(
            [
                reference.label_logit(vectors(reference, run, layer), end, prompts.label_ids)
                for layer in range(model.n_layers)
            ]
        )
        assert error(ov[i], expected) <= 1e-5


def test_weighted_label_logits_sum_to_attribution(case) -> None:
    model, prompts, reference, runs = case
    run = tt.analyze(model, prompts, measures=("attribution", "qk", "ov"))
    weighted = (run["qk"]["attention"] * run["ov"]["label_logit"]).sum("position")
    direct = run["attribution"]["label_logit"]
    assert error(weighted.transpose(*direct.dims), direct) <= 1e-5
    for i, alone in enumerate(runs):
        for layer in range(model.n_layers):
            written = torch.einsum("hd,hde->he", alone.z[layer][-1], reference.blocks[layer].out)
            end = alone.residual[-1][-1]
            expected = reference.label_logit(written, end, prompts.label_ids)
            assert error(direct.values[i, layer], expected) <= 1e-5


def test_heads_mlps_and_biases_make_up_the_models_logits(case) -> None:
    model, prompts, reference, runs = case
    heads = tt.attribution(model, prompts)["label_logit"].sum(("layer", "head")).values
    ids = list(prompts.label_ids)
    for i, run in enumerate(runs):
        end = run.residual[-1][-1]

        def part(vector: torch.Tensor, end=end) -> torch.Tensor:
            return reference.label_logit(vector, end, prompts.label_ids)

        total = torch.as_tensor(heads[i]).double() + part(run.residual[0][-1])
        for layer, b in enumerate(reference.blocks):
            total = total + part(run.mlp_output[layer][-1]) + part(b.out_bias)
        shift = reference.w.get(f"{reference.end}.bias")
        if shift is not None:
            total = total + (shift @ reference.w["lm_head.weight"].T)[ids]
        if "lm_head.bias" in reference.w:
            total = total + reference.w["lm_head.bias"][ids]
        assert error(total, run.logits[-1][ids]) <= 1e-5
        assert error(total, plain_logits(model.module, ids_of(prompts, i))[ids]) <= 1e-5


def test_biases_belong_to_no_head(case) -> None:
    """Moving every bias behind the heads moves label logits by the norm's statistic alone."""
    model, prompts, reference, runs = case
    names = [f"{b.root}.{x}" for b in reference.blocks for x in BIASES]
    names += [f"{reference.end}.bias", "lm_head.bias"]
    kept = {name: reference.w[name] for name in names if name in reference.w}
    if not kept:
        pytest.skip("this architecture has no such bias")
    direct = tt.attribution(model, prompts)["label_logit"].values
    for i, run in enumerate(runs):
        written = torch.einsum("hd,hde->he", run.z[-1][-1], reference.blocks[-1].out)
        end = run.residual[-1][-1]
        linear = reference.unembed(reference.pull(written, reference.end, end), bias=False)
        shifted = reference.unembed(reference.norm(written, reference.end, end))
        ids = list(prompts.label_ids)
        assert error(direct[i, -1], linear[:, ids]) <= 1e-5
        if any(name.endswith(("lm_head.bias", f"{reference.end}.bias")) for name in kept):
            assert error(direct[i, -1], shifted[:, ids]) > 1e-2


BIASES = ("attn.c_proj.bias", "attention.dense.bias", "self_attn.o_proj.bias")


def test_top_tokens(case) -> None:
    model, prompts, reference, runs = case
    heads = [(2, 3), (0, 1), (1, 2)]
    found = under(tt.ov_labels, model, prompts, top_tokens=heads, batch_size=3)["top_token"]
    assert found["chosen"].values.tolist() == ["2.3", "0.1", "1.2"]
    checked = 0
    for i, (number, (layer, head)) in product(range(len(runs)), enumerate(heads)):
        at = real(prompts, i)
        assert (found.values[i, number][~at] == "").all()
        raw, end = vectors(reference, runs[i], layer)[head], runs[i].residual[-1][-1]
        logits = reference.unembed(reference.pull(raw, reference.end, end), bias=False)
        top = logits.topk(2, dim=-1)
        clear = (top.values[:, 0] - top.values[:, 1] > 1e-4).numpy()
        expected = [model.tokenizer.decode([int(t)]) for t in top.indices[:, 0]]
        got = found.values[i, number][at]
        assert (got == np.array(expected, dtype=object))[clear].all()
        checked += int(clear.sum())
    assert checked > 200


# ---- what a head's output does by itself ------------------------------------------------------


@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_log_probability_increase(case, norm: str) -> None:
    model, prompts, reference, runs = case
    found = tt.attribution(model, prompts, norm=norm)["logprob_increase"].values
    ids = list(prompts.label_ids)
    for i, run in enumerate(runs):
        end = run.residual[-1][-1] if norm == "frozen" else None

        def logprob(x: torch.Tensor, end=end) -> torch.Tensor:
            logits = reference.unembed(reference.norm(x, reference.end, end))
            return logits.log_softmax(dim=-1)[..., ids]

        for layer, b in enumerate(reference.blocks):
            x = run.residual[layer][-1]
            written = torch.einsum("hd,hde->he", run.z[layer][-1], b.out)
            expected = logprob(x + written) - logprob(x)
            assert error(found[i, layer], expected) <= 1e-4


# ---- predictions -------------------------------------------------------------------------------


def test_predictions(case) -> None:
    model, prompts, _, _ = case
    found = tt.predict(model, prompts)
    ids = list(prompts.label_ids)
    for i in range(len(prompts)):
        own = plain_logits(model.module, ids_of(prompts, i))
        one = found.isel(prompt=i)
        margin, logprobs = answer(own, prompts, i)
        assert error(one["logit"], own[ids]) <= 1e-5
        assert error(one["logprob"], logprobs) <= 1e-5
        assert one["margin"].item() == pytest.approx(margin, abs=1e-5 * float(own.abs().max()))
        gold = prompts.gold[i]
        assert one["correct"].item() == (prompts.labels[int(own[ids].argmax())] == gold)
        best = int(own.argmax())
        assert one["top_token"].item() == model.tokenizer.decode([best])
        assert one["top1_correct"].item() == (best == ids[prompts.labels.index(gold)])


def test_right_and_wrong_answers_are_told_apart() -> None:
    """Unembedding rows made so that one label wins everywhere, over all tokens or labels."""
    from tiny import byte_level, hf_model

    module = hf_model("llama")
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=4, seed=1)
    foo, bar = prompts.label_ids
    right = prompts.gold == "foo"
    assert 0 < right.sum() < 4
    norm = module.model.norm
    norm.weight.zero_()
    norm.weight[0] = 1
    module.lm_head.weight.zero_()
    module.model.embed_tokens.weight[:, 0] += 100.0  # element 0 of every residual is positive
    module.lm_head.weight[foo, 0] = 2.0
    module.lm_head.weight[bar, 0] = 1.0
    found = tt.predict(model, prompts)
    assert found["correct"].values.tolist() == right.tolist()
    assert found["top1_correct"].values.tolist() == right.tolist()
    assert ((found["margin"] > 0).values == right).all()
    module.lm_head.weight[5, 0] = 3.0
    found = tt.predict(model, prompts)
    assert found["correct"].values.tolist() == right.tolist()
    assert not found["top1_correct"].any()
    assert set(found["top_token"].values) == {model.tokenizer.decode([5])}


# ---- batches -----------------------------------------------------------------------------------


def test_batches_and_order_do_not_matter(case) -> None:
    model, prompts, _, _ = case
    order = np.array([2, 0, 3, 1])
    whole = under(tt.analyze, model, prompts, batch_size=4)
    single = under(tt.analyze, model, prompts, batch_size=1)
    shuffled = under(tt.analyze, model, prompts[order], batch_size=3)
    for group in ("predictions", "effects", "attribution", "qk", "ov"):
        for name, array in whole[group].data_vars.items():
            for other, rows in ((single[group][name], slice(None)), (shuffled[group][name], order)):
                assert other.dims == array.dims
                expected = array.values[rows]
                if array.dtype.kind != "f":
                    np.testing.assert_array_equal(other.values, expected)
                    continue
                np.testing.assert_array_equal(np.isnan(other.values), np.isnan(expected))
                difference = np.nanmax(np.abs(other.values - expected))
                assert difference <= 1e-4 * np.nanmax(np.abs(expected)), name
            if "position" in array.dims and array.dtype.kind == "f":
                by_prompt(array, prompts)
