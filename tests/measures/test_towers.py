"""Content parts, what is kept, top tokens, and the scores made of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr
from surface import under
from tiny import ARCHITECTURES, THREE, TWO, tiny

import twotower as tt
from twotower.measures.scores import auc, ov_auc, qk_auc

ROTARY = [name for name in ARCHITECTURES if name != "gpt2"]


def rotation(name: str, width: int, distance: float) -> np.ndarray:
    """(width, width) matrix that turns a head by a distance; from the definition."""
    config = tiny(name).config
    turn = np.eye(width)
    if name == "gptj":
        rotated, base, half = config.rotary_dim, 10000.0, None
    else:
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        rotated, base = int(width * share), config.rope_parameters["rope_theta"]
        half = rotated // 2
    for j in range(rotated // 2):
        angle = distance * base ** (-2 * j / rotated)
        x, y = (2 * j, 2 * j + 1) if half is None else (j, j + half)
        turn[np.ix_((x, y), (x, y))] = [
            [np.cos(angle), -np.sin(angle)],
            [np.sin(angle), np.cos(angle)],
        ]
    return turn


def queries_and_keys(model: tt.Model, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(layer, T, H, D) queries and keys before rotary, by hooks; keys repeated to H heads."""
    found: list[torch.Tensor] = []
    handles = []
    for block in model.architecture.layers(model.module):
        for module in model.architecture.qkv(block):
            handles.append(module.register_forward_hook(lambda m, a, o: found.append(o[0])))
    with torch.no_grad():
        model.module(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    per = len(found) // model.n_layers
    queries, keys = [], []
    for layer, block in enumerate(model.architecture.layers(model.module)):
        parts = found[layer * per : (layer + 1) * per]
        if type(model.architecture).__name__ == "GPTNeoX":
            q, k, _ = parts[0].view(len(ids), model.n_heads, 3, model.d_head).unbind(dim=2)
        else:
            q = parts[0].view(len(ids), -1, model.d_head)
            k = parts[1].view(len(ids), -1, model.d_head)
        if hasattr(getattr(block, "self_attn", None), "q_norm"):
            q, k = block.self_attn.q_norm(q), block.self_attn.k_norm(k)
        queries.append(q.double().numpy())
        keys.append(np.repeat(k.double().numpy(), model.n_heads // k.shape[1], axis=1))
    return np.stack(queries), np.stack(keys)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_content(name: str) -> None:
    model = tiny(name)
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=1)
    qk = tt.qk_similarity(model, prompts)
    for i in range(len(prompts)):
        real = prompts.token_id[i] >= 0
        q, k = queries_and_keys(model, torch.as_tensor(prompts.token_id[i][real]))
        last, scale = q[:, -1], model.d_head**-0.5
        distances = (len(q[0]) - 1 - np.arange(len(q[0])))[prompts.role[i][real] == "label"]
        turn = np.mean([rotation(name, model.d_head, d) for d in distances], axis=0)
        for variable, matrix in (
            ("score_content", np.eye(model.d_head)),
            ("score_content_mean", turn),
        ):
            # q at distance d from k: q R(d) k, as rotary turns by the difference.
            expected = np.einsum("lhd,de,lphe->lhp", last, matrix.T, k) * scale
            found = qk[variable].values[i][..., real]
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        whole = np.stack([rotation(name, model.d_head, d) for d in range(len(q[0]))][::-1])
        expected = np.einsum("lhd,ped,lphe->lhp", last, whole, k) * scale
        found = qk["score"].values[i][..., real]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_learned_positions_content() -> None:
    """GPT-2: less the position embedding's direct path; biases are content."""
    model = tiny("gpt2")
    prompts = tt.build_prompts(model, TWO, shots=2, n=3, seed=1)
    found = tt.qk_similarity(model, prompts)["score_content"].values
    module = model.module.transformer
    width = model.d_model
    for i in range(len(prompts)):
        real = prompts.token_id[i] >= 0
        ids = torch.as_tensor(prompts.token_id[i][real])
        with torch.no_grad():
            states = model.module(input_ids=ids[None], output_hidden_states=True).hidden_states
        positions = module.wpe.weight[: len(ids)].double()
        for layer, block in enumerate(module.h):
            x = states[layer][0].double()
            deviation = (x.var(dim=-1, keepdim=True, unbiased=False) + block.ln_1.eps).sqrt()
            content = (x - x.mean(dim=-1, keepdim=True)) / deviation
            content -= (positions - positions.mean(dim=-1, keepdim=True)) / deviation
            normed = content * block.ln_1.weight.double() + block.ln_1.bias.double()
            qkv = normed @ block.attn.c_attn.weight.double() + block.attn.c_attn.bias.double()
            q, k = qkv[-1, :width].view(4, -1), qkv[:, width : 2 * width].view(len(ids), 4, -1)
            expected = torch.einsum("hd,phd->hp", q, k).numpy() * model.d_head**-0.5
            error = np.abs(found[i, layer][:, real] - expected).max() / np.abs(expected).max()
            assert error <= 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped"])
def test_label_logits_of_value_vectors(name: str) -> None:
    """Raw vectors, straight from the weights, position by position."""
    model = tiny(name)
    prompts = tt.build_prompts(model, THREE, shots=1, n=2, seed=1)
    found = tt.ov_labels(model, prompts)["label_logit"].values
    module = model.module
    norm = model.architecture.final_norm(module)
    centred = isinstance(norm, torch.nn.LayerNorm)
    rows = module.lm_head.weight[list(prompts.label_ids)].double() * norm.weight.double()
    epsilon = norm.eps if centred else norm.variance_epsilon
    for i in range(len(prompts)):
        real = prompts.token_id[i] >= 0
        ids = torch.as_tensor(prompts.token_id[i][real])
        end: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        handles = [norm.register_forward_pre_hook(lambda m, a: end.append(a[0][0, -1].double()))]
        for block in model.architecture.layers(module):
            last = model.architecture.qkv(block)[-1]
            handles.append(last.register_forward_hook(lambda m, a, o: values.append(o[0])))
        with torch.no_grad():
            module(input_ids=ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        spread_of = end[0] - end[0].mean() if centred else end[0]
        spread = (spread_of.square().mean() + epsilon).sqrt()
        for layer, block in enumerate(model.architecture.layers(module)):
            projection = model.architecture.projection(block)
            weight = projection.weight if name == "gpt2" else projection.weight.T
            value = values[layer].double()
            value = value[:, -model.d_model :] if name == "gpt2" else value
            value = value.view(len(ids), -1, model.d_head)
            value = value.repeat_interleave(model.n_heads // value.shape[1], dim=1)
            for head in range(model.n_heads):
                part = weight.double()[head * model.d_head : (head + 1) * model.d_head]
                vectors = value[:, head] @ part
                if centred:
                    vectors = vectors - vectors.mean(dim=-1, keepdim=True)
                expected = (vectors / spread @ rows.T).numpy()
                got = found[i, layer, head][real]
                assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_keeping_labels_alone(any_model: tt.Model) -> None:
    prompts = tt.build_prompts(any_model, TWO, shots={"foo": 3, "bar": 2}, n=3, seed=1)
    whole = tt.analyze(any_model, prompts, measures=("qk", "ov"))
    kept = tt.analyze(any_model, prompts, measures=("qk", "ov"), keep="labels")
    assert kept["qk"].sizes["position"] == 5
    for group in ("qk", "ov"):
        for name, array in kept[group].data_vars.items():
            full = whole[group][name]
            for i, j in product(range(3), range(5)):
                at = int(array["token_position"][i, j])
                np.testing.assert_array_equal(
                    array.isel(prompt=i, position=j).values,
                    full.isel(prompt=i).sel(position=at).values,
                )
                assert (
                    array["label_text"].values[i, j]
                    == full["label_text"].sel(position=at).values[i]
                )
    for name in kept["scores"].data_vars:
        np.testing.assert_array_equal(kept["scores"][name], whole["scores"][name])


def test_keeping_labels_with_fewer_in_some_prompts(llama: tt.Model) -> None:
    strings = ["cat: foo\nowl: bar\ncow:", "cat: foo\ndog: bar\nRome: foo\ncow:"]
    spans = [[(5, 8), (14, 17)], [(5, 8), (14, 17), (24, 27)]]
    prompts = tt.prompts_from_strings(llama, strings, spans, ["foo", "bar"])
    kept = tt.qk_similarity(llama, prompts, keep="labels")
    assert kept["role"].values.tolist() == [["pad", "label", "label"], ["label"] * 3]
    assert np.isnan(kept["score"].values[0, :, :, 0]).all()
    assert np.isfinite(kept["score"].values[1]).all()
    found = tt.ov_labels(llama, prompts, keep="labels", top_tokens=[(1, 2)])
    whole = tt.ov_labels(llama, prompts, top_tokens=[(1, 2)])["top_token"].values
    expected = whole[1, 0][prompts.role[1] == "label"].tolist()
    assert found["top_token"].values[1, 0].tolist() == expected
    assert found["top_token"].values[0, 0, 0] == ""
    assert set(whole[0, 0][prompts.role[0] == "pad"]) == {""}


def test_top_tokens(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=2, n=2, seed=1)
    heads = [tt.Head(2, 3), tt.Head(0, 1)]
    found = tt.ov_labels(llama, prompts, top_tokens=heads)
    assert found["chosen"].values.tolist() == ["2.3", "0.1"]
    module = llama.module
    for i, (c, (layer, head)) in product(range(2), enumerate(heads)):
        real = prompts.token_id[i] >= 0
        values: list[torch.Tensor] = []
        attention = module.model.layers[layer].self_attn
        handle = attention.v_proj.register_forward_hook(lambda m, a, o: values.append(o[0]))
        with torch.no_grad():
            module(input_ids=torch.as_tensor(prompts.token_id[i][real])[None])
        handle.remove()
        value = values[0].view(len(values[0]), 2, 12)[:, head // 2]
        vectors = value @ attention.o_proj.weight.T[head * 12 : (head + 1) * 12]
        best = (vectors * module.model.norm.weight @ module.lm_head.weight.T).argmax(dim=-1)
        expected = [llama.tokenizer.decode([int(t)]) for t in best]
        assert found["top_token"].values[i, c][real].tolist() == expected


def test_auc_counts_pairs() -> None:
    values = np.array([3.0, 1.0, 2.0, 2.0])
    positive = np.array([True, False, True, False])
    # (3 > 1), (3 > 2), (2 > 1), (2 = 2)
    assert auc(values, positive) == pytest.approx(3.5 / 4)
    assert auc(values, np.ones(4, dtype=bool)) is None
    assert auc(-values, positive) == pytest.approx(0.5 / 4)


def scores(values: np.ndarray, classes: list[list[str]], query: list[str]) -> xr.DataArray:
    """(prompt, 1, 1, position) scores of label positions."""
    shape = (len(query), len(classes[0]))
    return xr.DataArray(
        np.asarray(values, dtype=float).reshape(shape[0], 1, 1, shape[1]),
        dims=("prompt", "layer", "head", "position"),
        coords={
            "role": (("prompt", "position"), np.full(shape, "label", dtype=object)),
            "demonstration_class": (("prompt", "position"), np.array(classes, dtype=object)),
            "label_text": (("prompt", "position"), np.array(classes, dtype=object)),
            "query_class": ("prompt", np.array(query, dtype=object)),
        },
    )


def test_qk_auc_by_hand() -> None:
    found = qk_auc(
        scores(
            [[3, 1, 2], [1, 1, 5], [9, 9, 9]],
            [["a", "b", "b"], ["a", "b", "b"], ["a", "a", "a"]],
            ["a", "b", "a"],
        )
    )
    # First: 3 beats both. Second: query b: (1, 5) against 1: half and one. Third: skipped.
    assert found.item() == pytest.approx((1.0 + 0.75) / 2)


def test_auc_is_nan_where_nothing_can_be_compared() -> None:
    assert np.isnan(qk_auc(scores([[1, 2]], [["a", "a"]], ["a"]))).tolist() == [[True]]


def test_ov_auc_by_hand() -> None:
    one = scores([[0, 0, 0]], [["x", "y", "y"]], ["x"])
    logits = one.expand_dims(label=["x", "y", "z"], axis=-1).copy()
    logits[..., 0] = [5.0, 1.0, 6.0]
    logits[..., 1] = [1.0, 0.0, 2.0]
    logits[..., 2] = [0.0, 0.0, 0.0]
    # x less the mean of y and z: 4.5, 1, 5; holder is the first: beats one of two.
    # y less the mean of x and z: -1.5, -0.5, -1: holders are the others, both beat it.
    # z stands nowhere: skipped.
    assert ov_auc(logits).item() == pytest.approx((0.5 + 1.0) / 2)


@pytest.fixture(scope="module")
def run(llama: tt.Model) -> xr.DataTree:
    return tt.analyze(llama, tt.build_prompts(llama, TWO, shots=2, n=8, seed=3))


def test_heads_are_ranked_by_mean_effect(run: xr.DataTree) -> None:
    mean = run["effects"]["margin_drop"].values.mean(axis=0)
    heads = tt.in_context_heads(run, 5)
    assert [mean[h] for h in heads] == sorted(mean.ravel(), reverse=True)[:5]
    for k in range(1, 12):
        assert tt.in_context_heads(run, k) == tt.in_context_heads(run, 12)[:k]
    assert tt.in_context_heads(run["effects"], 5) == heads
    assert tt.in_context_heads(run["effects"].to_dataset(), 5) == heads


def test_a_labels_heads(run: xr.DataTree) -> None:
    effects = run["effects"]
    right = effects["gold"].values == "foo"
    drops = effects["logprob_drop"].values[right][..., 0].mean(axis=0)
    assert tt.in_context_heads(run, 1, label="foo")[0] == np.unravel_index(
        drops.argmax(), drops.shape
    )


def test_heads_that_write(run: xr.DataTree) -> None:
    values = run["attribution"]["label_logit"].values
    gold = (run["attribution"]["gold"].values == "bar").astype(int)
    rows = np.arange(len(gold))
    margin = (values[rows, ..., gold] - values[rows, ..., 1 - gold]).mean(axis=0)
    heads = tt.in_context_heads(run, 4, by="label_logit")
    assert [float(margin[h]) for h in heads] == pytest.approx(sorted(margin.ravel())[::-1][:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "must be a whole number, from 1 to 12"),
        ({"k": 13}, "must be a whole number, from 1 to 12"),
        ({"k": 2.5}, "must be a whole number, from 1 to 12"),
        ({"label": "baz"}, "not among foo, bar"),
        ({"by": "charm"}, "by='charm'"),
    ],
)
def test_bad_choices(run: xr.DataTree, arguments: dict, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        tt.in_context_heads(run, **arguments)


def test_a_labels_heads_need_log_probabilities(run: xr.DataTree) -> None:
    effects = run["effects"].to_dataset().drop_vars("logprob_drop")
    with pytest.raises(tt.errors.InputError, match="logprobs=True"):
        tt.in_context_heads(effects, 2, label="foo")


def test_analyze_equals_the_separate_measures(llama: tt.Model) -> None:
    prompts = tt.build_prompts(llama, THREE, shots=1, n=4, seed=3)
    run = tt.analyze(llama, prompts)
    for group, alone in (
        ("predictions", tt.predict(llama, prompts)),
        ("effects", tt.head_effects(llama, prompts)),
        ("attribution", tt.attribution(llama, prompts)),
        ("qk", tt.qk_similarity(llama, prompts)),
        ("ov", tt.ov_labels(llama, prompts)),
    ):
        for name, array in alone.data_vars.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(
                    run[group][name].values, array.values, rtol=1e-4, atol=1e-5
                )
            else:
                np.testing.assert_array_equal(run[group][name].values, array.values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: tt.analyze(m, p, measures=()), "choose a list from"),
        (lambda m, p: tt.analyze(m, p, measures=("magic",)), "choose a list from"),
        (lambda m, p: tt.analyze(m, p, keep="some"), "keep='some'"),
        (lambda m, p: tt.attribution(m, p, norm="soft"), "norm='soft'"),
        (lambda m, p: tt.head_effects(m, p, "first"), "positions='first'"),
        (
            lambda m, p: tt.head_effects(m, p, np.zeros((2, 2), dtype=bool)),
            "boolean array of shape",
        ),
        (lambda m, p: tt.head_effects(m, p, np.zeros(p.token_id.shape, dtype=bool)), "are empty"),
        (lambda m, p: tt.head_effects(m, p, to="noise"), "to='noise' is not a change"),
        (lambda m, p: under(tt.predict, m, p, batch_size=0), "batch_size=0"),
        (
            lambda m, p: tt.predict(m, p, [tt.KnockOut([(9, 0)], positions="all")]),
            "head 9.0 is out of range",
        ),
        (
            lambda m, p: tt.predict(m, p, [tt.KnockOut([(0, 4)], positions="all")]),
            "head 0.4 is out of range",
        ),
        (
            lambda m, p: tt.predict(m, p, [tt.KnockOut([(0, 1), (0, 1)], positions="all")]),
            "given twice",
        ),
        (lambda m, p: tt.predict(m, p, [tt.KnockOut([3], positions="all")]), "is not a head"),
        (lambda m, p: tt.predict(m, p, ["KnockOut"]), "is not an edit"),
        (
            lambda m, p: tt.predict(
                m,
                p,
                [
                    tt.KnockOut([(0, 1)], positions="all"),
                    tt.KnockOut([(0, 1)], "all", to=tt.Times(2.0)),
                ],
            ),
            "edited twice",
        ),
        (
            lambda m, p: tt.KnockOut([(0, 1)], "all", to=tt.Times(float("nan"))),
            "must be a finite number",
        ),
        (lambda m, p: tt.ov_labels(m, p, top_tokens=[(0, 99)]), "out of range"),
        (lambda m, p: tt.two_tower_scores(tt.analyze(m, p, measures=("qk",))), "group 'ov'"),
    ],
)
def test_bad_input(llama: tt.Model, prompts: tt.Prompts, call, message: str) -> None:
    with pytest.raises(tt.errors.InputError, match=message):
        call(llama, prompts)
