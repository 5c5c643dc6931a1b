"""Every measure against plain PyTorch hooks on the transformers model, in each architecture.

Nothing of twotower's arithmetic is used on the reference side: heads are edited by forward
pre-hooks on the output projection, weights are read directly, and attention comes from
transformers' own eager kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, DISTINCT, TWO, crossed, tiny

import twotower as tt

Edit = Callable[[torch.Tensor], torch.Tensor]


def blocks(model: tt.Model) -> list[torch.nn.Module]:
    module = model.module
    for path in ("transformer.h", "model.layers", "gpt_neox.layers"):
        owner, name = path.split(".")
        if hasattr(module, owner):
            return list(getattr(getattr(module, owner), name))
    raise AssertionError("no layers")


def projection(block: torch.nn.Module) -> torch.nn.Module:
    for owner, name in (
        ("attn", "c_proj"),
        ("attn", "out_proj"),
        ("self_attn", "o_proj"),
        ("attention", "dense"),
    ):
        if hasattr(getattr(block, owner, None), name):
            return getattr(getattr(block, owner), name)
    raise AssertionError("no output projection")


def weight(module: torch.nn.Module) -> torch.Tensor:
    """(in, out) weight; GPT-2's Conv1D holds it that way, Linear transposed."""
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def one(prompts: tt.Prompts, i: int) -> dict[str, torch.Tensor]:
    """Inputs of one prompt by itself, without padding."""
    ids = prompts.token_id[i][prompts.token_id[i] >= 0]
    return {"input_ids": torch.as_tensor(ids)[None]}


@contextmanager
def edited(model: tt.Model, layer: int, edit: Edit) -> Iterator[None]:
    """z (B, T, H, d_head) of a layer goes through `edit` on its way to the projection."""

    def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = arguments[0].unflatten(-1, (model.n_heads, -1)).clone()
        return (edit(z).flatten(-2),)

    handle = projection(blocks(model)[layer]).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits(model: tt.Model, prompts: tt.Prompts, i: int) -> torch.Tensor:
    with torch.no_grad():
        return model.module(**one(prompts, i), use_cache=False).logits[0, -1]


def margin_and_logprobs(model: tt.Model, prompts: tt.Prompts, i: int) -> tuple[float, np.ndarray]:
    found = logits(model, prompts, i)
    labels = found[list(prompts.label_ids)]
    gold = prompts.gold_index[i]
    others = torch.cat((labels[:gold], labels[gold + 1 :]))
    logprobs = found.log_softmax(dim=-1)[list(prompts.label_ids)]
    return float(labels[gold] - others.max()), logprobs.numpy()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    error = np.nanmax(np.abs(found - expected)) / np.nanmax(np.abs(expected))
    assert error <= tolerance, f"error {error:.2g} over {tolerance:.0e}"


def make(model: tt.Model, n: int = 4, seed: int = 1) -> tt.Prompts:
    prompts = tt.build_prompts(model, TWO, shots=2, n=n, seed=seed)
    assert n == 1 or len(set(prompts.lengths)) > 1  # so that batches are padded
    return prompts


def swept(
    model: tt.Model,
    prompts: tt.Prompts,
    at: np.ndarray,
    value: Callable[[int, int], np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray]:
    """Margin and log-probability drops, one hooked forward per head and prompt.

    `value(prompt, layer)` gives (T, H, d_head) what z is replaced by; None for zero.
    """
    margins = np.zeros((len(prompts), model.n_layers, model.n_heads))
    logprobs = np.zeros((*margins.shape, len(prompts.labels)))
    for i in range(len(prompts)):
        clean = margin_and_logprobs(model, prompts, i)
        mask = torch.as_tensor(at[i][prompts.token_id[i] >= 0])
        for layer, head in model.heads:
            new = value(i, layer)

            def edit(z: torch.Tensor, head=head, mask=mask, new=new) -> torch.Tensor:
                z[0, mask, head] = 0 if new is None else torch.as_tensor(new)[mask, head]
                return z

            with edited(model, layer, edit):
                margin, logprob = margin_and_logprobs(model, prompts, i)
            margins[i, layer, head] = clean[0] - margin
            logprobs[i, layer, head] = clean[1] - logprob
    return margins, logprobs


def heads_of(model: tt.Model, prompts: tt.Prompts, i: int) -> np.ndarray:
    """(layer, T, H, d_head) z of one prompt, read by hooks."""
    found: list[np.ndarray] = []

    def look(z: torch.Tensor) -> torch.Tensor:
        found.append(z[0].numpy().copy())
        return z

    from contextlib import ExitStack

    with ExitStack() as stack:
        for layer in range(model.n_layers):
            stack.enter_context(edited(model, layer, look))
        logits(model, prompts, i)
    return np.stack(found)


@pytest.mark.parametrize(
    ("any_model", "positions"),
    crossed(["last", "labels", "all"], ["all"], on=DISTINCT),
    indirect=["any_model"],
)
def test_sweep_equals_one_forward_per_head(any_model: tt.Model, positions: str) -> None:
    prompts = make(any_model, n=2)
    effects = tt.head_effects(any_model, prompts, positions)
    margins, logprobs = swept(any_model, prompts, prompts.where(positions), lambda i, layer: None)
    close(effects["margin_drop"].values, margins, 1e-4)
    close(effects["logprob_drop"].values, logprobs, 1e-4)


def test_sweep_at_given_positions(llama: tt.Model) -> None:
    prompts = make(llama, n=2)
    at = (prompts.role == "label") & (prompts.label_text == "foo")
    effects = tt.head_effects(llama, prompts, at)
    margins, _ = swept(llama, prompts, at, lambda i, layer: None)
    close(effects["margin_drop"].values, margins, 1e-4)


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_sweep_does_not_depend_on_chunks(
    llama: tt.Model, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make(llama, n=3)
    expected = tt.head_effects(llama, prompts, "all")
    monkeypatch.setattr("twotower.sweep.memory.TOKENS_PER_CHUNK", tokens)
    found = tt.head_effects(llama, prompts, "all")
    close(found["margin_drop"].values, expected["margin_drop"].values, 1e-5)


@pytest.mark.slow  # test_sweep has both kernels, too
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gptj"])
def test_sdpa_gives_the_same_effects(name: str) -> None:
    eager, sdpa = tiny(name), tiny(name, "sdpa")
    prompts = make(eager)
    for positions in ("last", "labels"):
        found = tt.head_effects(sdpa, prompts, positions)["margin_drop"].values
        close(found, tt.head_effects(eager, prompts, positions)["margin_drop"].values, 1e-4)


@pytest.mark.parametrize("positions", ["last", "labels", "all"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-grouped"])
def test_mean_ablation(name: str, positions: str) -> None:
    model = tiny(name)
    prompts, reference = make(model, n=2), make(model, n=3, seed=9)
    sums: dict[tuple[str, int], list[np.ndarray]] = {}
    for j in range(len(reference)):
        z = heads_of(model, reference, j)
        real = reference.token_id[j] >= 0
        keys = zip(reference.role[j][real], reference.demonstration[j][real], strict=True)
        for position, key in enumerate(keys):
            sums.setdefault(key, []).append(z[:, position])
    means = {key: np.mean(values, axis=0) for key, values in sums.items()}

    def value(i: int, layer: int) -> np.ndarray:
        real = prompts.token_id[i] >= 0
        keys = zip(prompts.role[i][real], prompts.demonstration[i][real], strict=True)
        return np.stack([means[key][layer] for key in keys])

    effects = tt.head_effects(model, prompts, positions, to=tt.Mean(reference))
    margins, _ = swept(model, prompts, prompts.where(positions), value)
    close(effects["margin_drop"].values, margins, 1e-4)


@pytest.mark.parametrize("positions", ["last", "labels"])
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_resample_ablation(name: str, positions: str) -> None:
    model = tiny(name)
    prompts, reference = make(model, n=2), make(model, n=2, seed=9)[:1]  # one donor: no draw
    z = heads_of(model, reference, 0)
    offset = reference.n_positions - reference.lengths[0]
    theirs = np.flatnonzero(reference.where(positions)[0]) - offset

    def value(i: int, layer: int) -> np.ndarray:
        mine = np.flatnonzero(prompts.where(positions)[i]) - (
            prompts.n_positions - prompts.lengths[i]
        )
        new = np.zeros((prompts.lengths[i], *z.shape[2:]), dtype=np.float32)
        new[mine] = z[layer][theirs]
        return new

    effects = tt.head_effects(model, prompts, positions, to=tt.Resample(reference))
    margins, _ = swept(model, prompts, prompts.where(positions), value)
    close(effects["margin_drop"].values, margins, 1e-4)


def test_resample_refuses_what_cannot_be_aligned(llama: tt.Model) -> None:
    prompts = make(llama)
    with pytest.raises(tt.errors.InputError, match="cannot be aligned"):
        tt.head_effects(llama, prompts, "all", to=tt.Resample(prompts))


def test_knock_out_equals_zeroed_columns(any_model: tt.Model) -> None:
    prompts = make(any_model)
    heads = [(0, 1), (1, 3), (2, 0)]
    found = tt.predict(any_model, prompts, [tt.KnockOut(heads, positions="all")])
    saved = [projection(block).weight.clone() for block in blocks(any_model)]
    width = any_model.d_head
    try:
        for layer, head in heads:
            weight(projection(blocks(any_model)[layer]))[head * width : (head + 1) * width] = 0
        expected = np.stack([logits(any_model, prompts, i).numpy() for i in range(len(prompts))])
    finally:
        for block, old in zip(blocks(any_model), saved, strict=True):
            projection(block).weight.copy_(old)
    close(found["logit"].values, expected[:, list(prompts.label_ids)], 1e-5)
    top = [any_model.tokenizer.decode([i]) for i in expected.argmax(axis=1)]
    assert found["top_token"].values.tolist() == top


def test_heads_are_not_in_the_attention_output(any_model: tt.Model) -> None:
    """Cutting d_head elements out of the attention module's output is not a knock-out."""
    prompts = make(any_model, n=1)
    layer, head, width = 1, 2, any_model.d_head
    found = tt.predict(any_model, prompts, [tt.KnockOut([(layer, head)], positions="all")])[
        "logit"
    ].values[0]

    def wrong(module, arguments, output):
        output = output.clone()
        output[..., head * width : (head + 1) * width] = 0
        return output

    handle = projection(blocks(any_model)[layer]).register_forward_hook(wrong)
    cut = logits(any_model, prompts, 0)[list(prompts.label_ids)].numpy()
    handle.remove()

    def right(z: torch.Tensor) -> torch.Tensor:
        z[:, :, head] = 0
        return z

    with edited(any_model, layer, right):
        expected = logits(any_model, prompts, 0)[list(prompts.label_ids)].numpy()
    close(found, expected, 1e-5)
    assert np.abs(cut - expected).max() > 1e-2 * np.abs(expected).max()


def test_scale_and_composition(any_model: tt.Model) -> None:
    prompts = make(any_model, n=2)
    edits = [
        tt.KnockOut([(0, 1)], positions="labels"),
        tt.KnockOut([(0, 2), (2, 1)], "all", to=tt.Times(1.7)),
        tt.KnockOut([(0, 1)], "last", to=tt.Times(0.3)),
    ]
    found = tt.predict(any_model, prompts, edits)["logit"].values
    for i in range(len(prompts)):
        labels = torch.as_tensor((prompts.role == "label")[i][prompts.token_id[i] >= 0])

        def first(z: torch.Tensor, labels=labels) -> torch.Tensor:
            z[:, labels, 1] = 0
            z[:, -1, 1] *= 0.3
            z[:, :, 2] *= 1.7
            return z

        def third(z: torch.Tensor) -> torch.Tensor:
            z[:, :, 1] *= 1.7
            return z

        with edited(any_model, 0, first), edited(any_model, 2, third):
            expected = logits(any_model, prompts, i)[list(prompts.label_ids)].numpy()
        close(found[i], expected, 1e-5)


def test_attention_and_scores(any_model: tt.Model) -> None:
    prompts = make(any_model)
    qk = tt.qk_similarity(any_model, prompts)
    for i in range(len(prompts)):
        with torch.no_grad():
            found = any_model.module(**one(prompts, i), output_attentions=True, use_cache=False)
        eager = torch.stack(found.attentions)[:, 0, :, -1].numpy()
        real = prompts.token_id[i] >= 0
        close(qk["attention"].values[i][..., real], eager, 1e-5)
        assert np.isnan(qk["attention"].values[i][..., ~real]).all()
        # Scores differ from the log of attention by a constant per head.
        seen = eager > 1e-6
        gap = np.where(seen, qk["score"].values[i][..., real] - np.log(eager + ~seen), np.nan)
        spread = np.nanmax(gap, axis=-1) - np.nanmin(gap, axis=-1)
        assert spread.max() < 1e-3


def test_value_output_vectors_sum_to_attention_output(any_model: tt.Model) -> None:
    """Through the label directions: sum over positions of attention x label logit, and the
    head's output itself, taken from the weights."""
    prompts = make(any_model, n=2)
    run = tt.analyze(any_model, prompts, measures=("attribution", "qk", "ov"))
    weighted = (run["ov"]["label_logit"] * run["qk"]["attention"]).sum("position")
    direct = run["attribution"]["label_logit"]
    close(weighted.transpose(*direct.dims).values, direct.values, 1e-4)


def test_parts_sum_to_the_models_own_logit(any_model: tt.Model) -> None:
    """Embeddings, heads, MLPs and biases add up to the logit of each label."""
    prompts = make(any_model, n=2)
    found = tt.attribution(any_model, prompts)["label_logit"].values
    module = any_model.module
    norm = any_model.architecture.final_norm(module)
    centred = isinstance(norm, torch.nn.LayerNorm)
    epsilon = norm.eps if centred else norm.variance_epsilon
    rows = module.lm_head.weight[list(prompts.label_ids)].double()
    bias = module.lm_head.bias
    bias = 0 if bias is None else bias[list(prompts.label_ids)].double()

    for i in range(len(prompts)):
        kept: dict[str, list[torch.Tensor]] = {"mlp": [], "input": []}
        handles = []
        for block in blocks(any_model):
            handles.append(
                block.mlp.register_forward_hook(lambda m, a, o: kept["mlp"].append(o[0, -1]))
            )
        first = blocks(any_model)[0]
        handles.append(
            first.register_forward_pre_hook(
                lambda m, a, k: kept["input"].append((a[0] if a else k["hidden_states"])[0, -1]),
                with_kwargs=True,
            )
        )
        handles.append(norm.register_forward_pre_hook(lambda m, a: kept.update(end=[a[0][0, -1]])))
        own = logits(any_model, prompts, i)[list(prompts.label_ids)].double()
        for handle in handles:
            handle.remove()
        end = kept["end"][0].double()
        centre = (lambda x: x - x.mean()) if centred else (lambda x: x)
        spread = (centre(end).square().mean() + epsilon).sqrt()

        def label_logit(vector, centre=centre, spread=spread):
            return (centre(vector.double()) / spread * norm.weight.double()) @ rows.T

        total = label_logit(kept["input"][0]) + bias
        if centred:
            total = total + norm.bias.double() @ rows.T
        for vector in kept["mlp"]:
            total = total + label_logit(vector)
        for block in blocks(any_model):
            if projection(block).bias is not None:
                total = total + label_logit(projection(block).bias)
        total = total + torch.as_tensor(found[i].sum(axis=(0, 1)))
        close(total.numpy(), own.numpy(), 1e-4)


@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_log_probability_increase(any_model: tt.Model, norm: str) -> None:
    prompts = make(any_model, n=2)
    found = tt.attribution(any_model, prompts, norm=norm)["logprob_increase"].values
    module = any_model.module
    final = any_model.architecture.final_norm(module)
    centred = isinstance(final, torch.nn.LayerNorm)
    epsilon = final.eps if centred else final.variance_epsilon
    for i in range(len(prompts)):
        z = torch.as_tensor(heads_of(any_model, prompts, i))[:, -1]
        inputs: list[torch.Tensor] = []
        end: list[torch.Tensor] = []
        handles = [
            block.register_forward_pre_hook(
                lambda m, a, k: inputs.append((a[0] if a else k["hidden_states"])[0, -1]),
                with_kwargs=True,
            )
            for block in blocks(any_model)
        ]
        handles.append(final.register_forward_pre_hook(lambda m, a: end.append(a[0][0, -1])))
        logits(any_model, prompts, i)
        for handle in handles:
            handle.remove()

        def logprob(x: torch.Tensor, end=end) -> torch.Tensor:
            if norm == "own":
                normed = final(x)
            else:
                last = end[0] - end[0].mean() if centred else end[0]
                spread = (last.square().mean() + epsilon).sqrt()
                normed = (x - x.mean() if centred else x) / spread * final.weight
                normed = normed + final.bias if centred else normed
            return module.lm_head(normed).log_softmax(dim=-1)[list(prompts.label_ids)]

        expected = np.zeros(found.shape[1:])
        width = any_model.d_head
        for layer, head in any_model.heads:
            w = weight(projection(blocks(any_model)[layer]))[head * width : (head + 1) * width]
            output = z[layer, head] @ w
            change = logprob(inputs[layer] + output) - logprob(inputs[layer])
            expected[layer, head] = change.numpy()
        close(found[i], expected, 1e-4)


def test_predictions(any_model: tt.Model) -> None:
    prompts = make(any_model)
    found = tt.predict(any_model, prompts)
    for i in range(len(prompts)):
        own = logits(any_model, prompts, i)
        margin, logprobs = margin_and_logprobs(any_model, prompts, i)
        close(found["logit"].values[i], own[list(prompts.label_ids)].numpy(), 1e-4)
        close(found["logprob"].values[i], logprobs, 1e-4)
        assert float(found["margin"][i]) == pytest.approx(margin, abs=1e-4)
        assert bool(found["correct"][i]) == (margin > 0)
        best = int(own.argmax())
        gold = prompts.label_ids[prompts.gold_index[i]]
        assert bool(found["top1_correct"][i]) == (best == gold)
