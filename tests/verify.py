"""Checks of a small model of any family, each against an independent computation.

The references are transformers' own forwards with PyTorch's hooks. Of an adapter they use only
where the parts of a block are, and how many heads a layer has. Errors are relative to the largest
element of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tiny import THREE, byte_level
from torch import nn

import twotower as tt
from twotower.models.check import check_model

LARGEST = 1e-4
"""Largest error of a right adapter, in float32."""

Hook = Callable[..., Any]


def verified(module: nn.Module, n: int = 2) -> dict[str, float]:
    """Return the error of each identity in a transformers model, on n prompts of two shots."""
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, THREE, shots=2, n=n, seed=2)
    own = [Reference(model, prompts, number) for number in range(n)]
    return {
        "proof": max(one.error for one in check_model(model).values()),
        "knock-outs, last": knock_outs(model, prompts, own, "last"),
        "knock-outs, all": knock_outs(model, prompts, own, "all"),
        "attention": attention(model, prompts, own),
        "label logits": label_logits(model, prompts, own),
        "values": values(model, prompts),
        "attention edit": attention_edit(model, prompts, own),
    }


class Reference:
    """One prompt without padding, through transformers' own forward.

    Parameters
    ----------
    model, prompts
        Where the prompt is from.
    number
        Which one.
    """

    def __init__(self, model: tt.Model, prompts: tt.Prompts, number: int) -> None:
        ids = prompts.token_id[number]
        self.model, self.module, self.architecture = model, model.module, model.architecture
        self.tokens = torch.tensor(ids[ids >= 0])[None]
        self.labels = prompts.answers.first[number].tolist()
        self.at_labels = prompts.where("labels")[number][ids >= 0]
        self.blocks = list(self.architecture.layers(self.module))
        self.with_heads = [i for i in range(model.n_layers) if self.architecture.heads_in(i)]

    def forward(self, rows: int = 1, **options: bool) -> Any:
        """Run the prompt in so many equal rows."""
        with torch.no_grad():
            return self.module(self.tokens.expand(rows, -1), use_cache=False, **options)

    def logits(self, rows: int = 1) -> torch.Tensor:
        """(row, vocabulary) at the last position."""
        return self.forward(rows).logits[:, -1].double()

    @contextmanager
    def without(self, heads: list[list[tt.Head]], last: bool) -> Iterator[None]:
        """A forward of as many rows as lists, each without a list's heads, by hooks."""
        with hooks() as add:
            for layer in self.with_heads:
                projection = self.architecture.projection(self.blocks[layer])
                add(projection.register_forward_pre_hook(self._zeroing(layer, heads, last)))
            yield

    def _zeroing(self, layer: int, heads: list[list[tt.Head]], last: bool) -> Hook:
        def zero(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            z = inputs[0].clone()
            # Some models flatten rows and positions before the projection.
            n = self.architecture.heads_in(layer)
            by_head = z.view(len(heads), -1, n, z.shape[-1] // n)
            for row, out in enumerate(heads):
                for head in out:
                    if head.layer == layer:
                        by_head[row, -1 if last else slice(None), head.head] = 0
            return (z, *inputs[1:])

        return zero


def _copy(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if isinstance(output, tuple) else output


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    """Handles that are given to the function are removed at the end."""
    with ExitStack() as stack:
        yield lambda handle: stack.callback(handle.remove)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, of the largest element."""
    assert np.shape(found) == np.shape(expected)
    assert np.isfinite(found).all()
    assert np.isfinite(expected).all()
    return float(abs(found - expected).max() / abs(expected).max())


def knock_outs(model: tt.Model, prompts: tt.Prompts, own: list[Reference], where: str) -> float:
    """Of the effects of every head on log-probabilities, at the last or at all positions."""
    found = tt.head_effects(model, prompts, positions=where).logprob_drop.values
    rows = [[], *([head] for head in model.heads)]
    ours, theirs = [], []
    for number, one in enumerate(own):
        with one.without(rows, last=where == "last"):
            logprobs = one.logits(len(rows)).log_softmax(-1)[:, one.labels].numpy()
        ours.append([found[number][head] for head in model.heads])
        theirs.append(logprobs[0] - logprobs[1:])
    return relative(np.array(ours), np.array(theirs))


# ---- attention -----------------------------------------------------------------------------------


def attention(model: tt.Model, prompts: tt.Prompts, own: list[Reference]) -> float:
    """Of the last position's attention, against transformers' own weights."""
    found = tt.qk_similarity(model, prompts).attention.values
    ours, theirs = [], []
    for number, one in enumerate(own):
        n = one.tokens.shape[1]
        for layer, weights in zip(one.with_heads, _weights(one), strict=True):
            heads = one.architecture.heads_in(layer)
            mine = found[number, layer, :, -n:]
            assert np.isnan(mine[heads:]).all()
            mine = mine[:heads]
            if "_swa" in model.config.get_text_config(decoder=True).model_type:
                # Theirs are before the sink's share, which multiplies the heads' outputs later.
                mine = mine / mine.sum(axis=-1, keepdims=True)
            ours.append(mine.ravel())
            theirs.append(weights[0, :, -1, :n].double().numpy().ravel())  # without a sink's column
    return relative(np.concatenate(ours), np.concatenate(theirs))


def _weights(one: Reference) -> list[torch.Tensor]:
    """Weights (1, heads, query, key) of the layers with heads, as the model reports them."""
    if _fused(one):
        return _fused_weights(one)
    reported = one.forward(output_attentions=True).attentions
    return [weights for weights in reported if weights is not None]


def _fused(one: Reference) -> bool:
    return bool(one.module.config._attn_implementation == "sdpa")


def _fused_weights(one: Reference) -> list[torch.Tensor]:
    """From what PyTorch's fused attention is given: asked for weights, Falcon would run without it.

    Falcon then adds ALiBi in another way than the fused attention.
    """
    found = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, attn_mask=None, is_causal=False, **options):
        scores = (q.double() @ k.double().mT) / q.shape[-1] ** 0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        found.append(scores.softmax(-1))
        return fused(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    with patch("torch.nn.functional.scaled_dot_product_attention", seen):
        one.forward()
    return found


def attention_edit(model: tt.Model, prompts: tt.Prompts, own: list[Reference]) -> float:
    """Of the change by tripling all heads' weights at the labels, for all queries.

    The reference triples them inside transformers' own attention, where they pass through dropout
    or come from the softmax. Fused attention has no such place: there the weights of all keys
    become 0, and the reference knocks out the heads.
    """
    fused = _fused(own[0])
    keys, factor = ("all", 0.0) if fused else ("labels", 3.0)
    edits = [tt.ScaleAttention(model.heads, factor, keys, positions="all")]
    clean, edited = (tt.predict(model, prompts, edits=x).logprob.values for x in ([], edits))
    theirs = []
    for one in own:
        with one.without([model.heads], last=False) if fused else _tripled(one):
            out = one.logits().log_softmax(-1)
        theirs.append((one.logits().log_softmax(-1) - out)[0, one.labels].numpy())
    return relative(clean - edited, np.array(theirs))


@contextmanager
def _tripled(one: Reference) -> Iterator[None]:
    """A forward with all heads' weights tripled at the labels."""
    n = one.tokens.shape[1]
    at = torch.tensor(np.flatnonzero(one.at_labels))

    def passing(run: Hook, seen: list[torch.Size]) -> Hook:
        def changed(weights: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
            out = run(weights, *given, **options)
            if out.dim() not in (3, 4) or out.shape[-2] != n or out.shape[-1] not in (n, n + 1):
                return out
            seen.append(out.shape)
            out = out.clone()
            out[..., at] *= 3
            return out

        return changed

    functional, tensor = torch.nn.functional, torch.Tensor
    for owner, name in ((functional, "dropout"), (functional, "softmax"), (tensor, "softmax")):
        seen: list[torch.Size] = []
        with patch.object(owner, name, passing(getattr(owner, name), seen)):
            one.forward()
            if len(seen) == len(one.with_heads):
                yield
                return
    raise AssertionError("this model's weights pass neither dropout nor softmax, once a layer")


# ---- label logits --------------------------------------------------------------------------------


def values(model: tt.Model, prompts: tt.Prompts) -> float:
    """Of the values' label logits, weighted by attention, against the heads' label logits."""
    weights = tt.qk_similarity(model, prompts).attention
    weighted = (tt.ov_labels(model, prompts).label_logit * weights).sum("position", min_count=1)
    written = tt.attribution(model, prompts).label_logit
    ours, theirs = weighted.transpose(*written.dims).values, written.values
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    return relative(ours[~np.isnan(ours)], theirs[~np.isnan(theirs)])


def label_logits(model: tt.Model, prompts: tt.Prompts, own: list[Reference]) -> float:
    """Of the heads' label logits against what each writes, and of their sum with all the rest.

    The reference repeats every output of a block's modules, so that the stream loses only what a
    head itself writes when its z becomes 0; statistics of norms stay those of the full forward.
    The last row loses all heads: what is left (embedding, MLPs, mixers, biases) and all heads'
    label logits must make the model's own logits of the labels.
    """
    found = tt.attribution(model, prompts).label_logit.values
    architecture = model.architecture
    final = architecture.final_norm(model.module)
    unembedding = architecture.unembedding(model.module)
    ours, theirs, sums, logits = [], [], [], []
    for number, one in enumerate(own):
        rows = [[], *([head] for head in model.heads), model.heads]
        stream, answer = _repeated(one, rows)
        normed = Frozen(final, stream[:1, None])(stream[:, None])
        with torch.no_grad():
            out = unembedding(normed.to(torch.float32)).double()[:, 0, one.labels]
        out = out * architecture.logit_multiplier
        mine = np.array([found[number][head] for head in model.heads])
        ours.append(mine)
        theirs.append((out[0] - out[1:-1]).numpy())
        total = out[-1] + torch.tensor(mine).sum(dim=0)
        cap = architecture.logit_softcap
        sums.append(total.numpy() if cap is None else (cap * (total / cap).tanh()).numpy())
        logits.append(answer[0, one.labels].numpy())
    heads = relative(np.array(ours), np.array(theirs))
    return max(heads, relative(np.array(sums), np.array(logits)))


def _repeated(one: Reference, rows: list[list[tt.Head]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the streams (row, d_model) without the direct writes of heads, and clean logits."""
    architecture = one.architecture
    clean: dict[nn.Module, list[Any]] = {}
    ended: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # Copies, because Falcon adds attention's output to the MLP's in place.
        clean.setdefault(module, []).append(_copy(output))

    def keep_input(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        clean.setdefault(module, []).append(inputs[0])

    def end(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        ended.append(inputs[0])

    def again(module: nn.Module, inputs: Any, output: Any) -> Any:
        return clean[module].pop(0)

    def again_input(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        return (clean[module].pop(0), *inputs[1:])

    def frozen(norm: Frozen) -> Hook:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
            return norm(inputs[0]).to(output.dtype)

        return hook

    projections, norms, others = [], [], []
    for layer, block in enumerate(one.blocks):
        skipped: set[nn.Module] = set()
        if layer in one.with_heads:
            projection = architecture.projection(block)
            projections.append((layer, projection))
            skipped |= set(projection.modules())
            norm = architecture.attention_post_norm(block)
            if norm is not None:
                norms.append(norm)
                skipped |= set(norm.modules())
        leaves = (x for x in block.modules() if not any(True for _ in x.children()))
        skipped |= {x for x in block.modules() if isinstance(x, (nn.Dropout, nn.Identity))}
        others += [x for x in leaves if x not in skipped]
    final = architecture.final_norm(one.module)
    with hooks() as add:
        for module in others:
            add(module.register_forward_hook(keep))
        for module in [*norms, *(p for _, p in projections)]:
            add(module.register_forward_pre_hook(keep_input))
        answer = one.logits(len(rows))
    given = [Frozen(module, clean[module][0]) for module in norms]
    with hooks() as add:
        for module in others:
            add(module.register_forward_hook(again))
        for module, norm in zip(norms, given, strict=True):
            add(module.register_forward_hook(frozen(norm)))
        for _, module in projections:
            add(module.register_forward_pre_hook(again_input))
        add(final.register_forward_pre_hook(end))
        with one.without(rows, last=True):  # its hooks come after those that repeat z
            one.forward(len(rows))
    return ended[-1][:, -1].double(), answer


class Frozen:
    """A norm with the statistics of given vectors, as a linear map found by calling the norm.

    Far from 0 the norm of a vector is its linear part over root-mean-square or deviation, with
    any epsilon negligible. Which of the two: a norm that centres gives the same for all
    constant vectors.
    """

    FAR = 1e4

    def __init__(self, norm: nn.Module, given: torch.Tensor) -> None:
        width = given.shape[-1]
        with torch.no_grad():
            self.bias = norm(torch.zeros(1, 1, width))[0, 0].double()
            constant = norm(torch.full((1, 1, width), self.FAR))[0, 0].double() - self.bias
            units = norm(self.FAR * torch.eye(width)[None])[0].double() - self.bias
            normed = norm(given.to(torch.float32)).double() - self.bias
        centred = bool(constant.abs().max() < 1e-3 * units.abs().max())
        variance = 1 / width - (1 / width**2 if centred else 0)
        self.matrix = units * variance**0.5  # what a unit vector gives, times its own statistic
        linear = given.double() @ self.matrix
        square = linear.square().sum(dim=-1, keepdim=True)
        self.inverse = (normed * linear).sum(dim=-1, keepdim=True) / square

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() @ self.matrix * self.inverse + self.bias
