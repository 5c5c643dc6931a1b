"""Edges once more: two of transformers' own forwards for each, with hooks.

In the first forward, the stream that enters the target's layer loses the source's write, and the
queries, keys and values that reach the attention are taken down. In the second, which is clean up
to there, the target's output at the last position is made again from one of the three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from verify import Reference, hooks, relative

import twotower as tt

INTO = ("q", "k", "v")


class Paths(Reference):
    """One prompt without padding, and what every part wrote to the residual stream."""

    def __init__(
        self,
        model: tt.Model,
        prompts: tt.Prompts,
        number: int,
        answer: tuple[int, ...] = (),
        donor: Any = None,
        few: bool = False,
    ) -> None:
        super().__init__(model, prompts, number)
        self.real = prompts.token_id[number] >= 0
        if answer:
            self.tokens = torch.cat((self.tokens, torch.tensor([answer[:-1]])), dim=1)
        self.answer, self.donor = answer, donor
        self.reads = slice(-max(len(answer), 1), None)
        self.z: dict[int, torch.Tensor] = {}
        self.streams, self.attention, self.more = self._clean()
        self.sources = self._sources(few)

    def _clean(self, head: tt.Head | None = None) -> tuple[dict, dict, dict]:
        """Return each block's input and its parts' writes; without the head, if one is given."""
        streams, attention, more = {}, {}, {}
        architecture = self.architecture

        def change(module: nn.Module, given: Any, layer: int) -> Any:
            z = given[0].clone()
            n = architecture.heads_in(layer)
            by_head = z.view(-1, n, z.shape[-1] // n)
            if head is None:
                self.z[layer] = by_head.clone()
            elif head.layer == layer:
                by_head[:, head.head] = (
                    0 if self.donor is None else self.donor.z[layer][:, head.head]
                )
            return (z, *given[1:])

        with hooks() as add:
            for layer, block in enumerate(self.blocks):

                def enter(module: nn.Module, given: Any, named: Any, layer: int = layer) -> None:
                    x = given[0] if given else named["hidden_states"]
                    streams[layer] = x.clone()

                add(block.register_forward_pre_hook(enter, with_kwargs=True))
                if layer in self.with_heads:
                    projection = architecture.projection(block)
                    add(projection.register_forward_pre_hook(partial(change, layer=layer)))
                    module = architecture.attention_post_norm(block)
                    module = architecture.projection(block) if module is None else module
                    add(module.register_forward_hook(_kept(attention, layer)))
                if architecture.mixes(layer):
                    mixer = architecture.mixer(block)
                    add(mixer.register_forward_hook(_kept(more, ("mixer", layer))))
                if architecture.writes_more(layer):
                    norm = block.post_per_layer_input_norm
                    add(norm.register_forward_hook(_kept(more, ("extra", layer))))
            self.forward()
        attention = {
            layer: x.view(streams[layer].shape) * architecture.write_multiplier(layer)
            for layer, x in attention.items()
        }
        return streams, attention, more

    def _sources(self, few: bool) -> dict[str, tuple[int, torch.Tensor]]:
        """Each source's layer and what it adds to the stream, by name."""
        found = {"embedding": (-1, self.streams[0])}
        for layer in range(self.model.n_layers - 1):
            added = self.streams[layer + 1] / self.factor(layer) - self.streams[layer]
            if layer in self.with_heads:
                added = added - self.attention[layer]
            for head in (h for h in self.model.heads if h.layer == layer):
                if few and head.head not in (0, 3):
                    continue
                left = self._clean(head)[1][layer]
                found[str(head)] = (layer, self.attention[layer] - left)
            for kind in ("mixer", "extra"):
                if (kind, layer) in self.more:
                    write = self.more[kind, layer]
                    if kind == "mixer":
                        write = self.architecture.mixer_write(self.blocks[layer], write)
                    found[f"{kind} {layer}"] = (layer, write)
                    added = added - write
            if self.architecture.has_mlp(layer):
                found[f"mlp {layer}"] = (layer, added)
        if self.donor is not None:
            for name, (layer, write) in found.items():
                if "." not in name:
                    found[name] = (layer, write - self.donor.writes(name))
        return found

    def writes(self, name: str) -> torch.Tensor:
        """Return a source's write (1, T, d_model) to the residual stream."""
        return self.sources[name][1]

    def factor(self, layer: int) -> float:
        factor = self.architecture.stream_factor(self.blocks[layer])
        return 1.0 if factor is None else float(factor)

    def lost(self, name: str, layer: int) -> torch.Tensor:
        """Return a source's write, times the factors on the stream up to a layer."""
        source, write = self.sources[name]
        for between in range(max(source, 0), layer):
            write = write * self.factor(between)
        return write

    def read(self, layer: int, at: int, lost: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a layer's attention if the layer `at` reads less."""

        def enter(module: nn.Module, given: Any, named: Any) -> Any:
            if given:
                return (given[0] - lost, *given[1:]), named
            return given, {**named, "hidden_states": named["hidden_states"] - lost}

        found: list[tuple[torch.Tensor, ...]] = []
        with hooks() as add:
            add(self.blocks[at].register_forward_pre_hook(enter, with_kwargs=True))
            with self.attending(
                layer, lambda run, q, k, v: found.append((q, k, v)) or run(q, k, v)
            ):
                self.forward()
        return found[0]

    @contextmanager
    def attending(self, layer: int, instead: Any) -> Iterator[None]:
        """A forward in which a layer's attention is `instead` of (run, q, k, v)."""
        number, calls = self.with_heads.index(layer), [0]
        owner, name, places = self._attention_function()
        original = getattr(owner, name)

        def attend(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] - 1 != number:
                return original(*given, **named)

            def run(*qkv: torch.Tensor) -> Any:
                changed = list(given)
                changed[places : places + 3] = qkv
                return original(*changed, **named)

            return instead(run, *given[places : places + 3])

        with patch.object(owner, name, attend):
            yield

    def _attention_function(self) -> tuple[Any, str, int]:
        """Where the model's attention is, its name, and the place of its first tensor."""
        modules = {type(self.architecture.attention(self.blocks[i])) for i in self.with_heads}
        (own,) = {sys.modules[kind.__module__] for kind in modules}
        if hasattr(own, "eager_attention_forward") and self.kernel == "eager":
            return own, "eager_attention_forward", 1
        if self.kernel == "sdpa":
            return torch.nn.functional, "scaled_dot_product_attention", 0
        (kind,) = modules
        return kind, "_attn", 1

    @property
    def kernel(self) -> str:
        return self.module.config._attn_implementation

    def answers(
        self,
        layer: int,
        heads: int,
        changed: list[tuple[torch.Tensor, ...]],
        outputs: torch.Tensor,
    ) -> np.ndarray:
        """(row, label) log-probabilities; a row has the output of one head from its q, k, v."""

        # eager_attention_forward returns (row, position, head, element), others swap the middle.
        by_position = self._attention_function()[1] == "eager_attention_forward"

        def attend(run: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            clean = run(q, k, v)
            out = clean[0].clone() if isinstance(clean, tuple) else clean.clone()
            for row, qkv in enumerate(changed):
                again = run(*(x.expand(len(changed), *x.shape[1:]) for x in qkv))
                again = again[0] if isinstance(again, tuple) else again
                head = row % heads
                if by_position:
                    out[row, outputs, head] = again[row, outputs, head]
                else:
                    out[row, head, outputs] = again[row, head, outputs]
            return (out, *clean[1:]) if isinstance(clean, tuple) else out

        with self.attending(layer, attend):
            return self.scores(len(changed))

    def scores(self, rows: int = 1) -> np.ndarray:
        """(row, label) log-probabilities of the labels, or (row, 1) of the whole answer."""
        logprobs = self.forward(rows).logits[:, self.reads].double().log_softmax(-1)
        if not self.answer:
            return logprobs[:, -1, self.labels].numpy()
        tokens = torch.tensor(self.answer).expand(rows, -1)[..., None]
        return logprobs.gather(-1, tokens).sum(dim=1).numpy()


def _kept(found: dict[Any, torch.Tensor], key: Any) -> Any:
    def keep(module: nn.Module, given: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        found[key] = output.clone()

    return keep


class Average:
    """Mean outputs of some prompts by role and number of demonstration, at a prompt's positions."""

    def __init__(self, model: tt.Model, references: tt.Prompts, like: tt.Prompts, number: int):
        self.own = [Paths(model, references, i) for i in range(len(references))]
        self.keys = [key for i in range(len(references)) for key in _keys(references, i)]
        self.wanted = _keys(like, number)
        layers = self.own[0].z
        self.z = {layer: self._mean([one.z[layer] for one in self.own]) for layer in layers}

    def writes(self, name: str) -> torch.Tensor:
        return self._mean([one.writes(name)[0] for one in self.own])[None]

    def _mean(self, values: list[torch.Tensor]) -> torch.Tensor:
        every = torch.cat(values)
        picked = [[i for i, key in enumerate(self.keys) if key == own] for own in self.wanted]
        return torch.stack([every[rows].mean(dim=0) for rows in picked])


def _keys(prompts: tt.Prompts, number: int) -> list[tuple[str, int]]:
    real = prompts.token_id[number] >= 0
    roles, numbers = prompts.role[number][real], prompts.demonstration[number][real]
    return list(zip(roles.tolist(), numbers.tolist(), strict=True))


def edges(
    model: tt.Model,
    prompts: tt.Prompts,
    positions: Any = "all",
    few: bool = False,
    to: Any = None,
    donor: Callable[[int], Any] = lambda number: None,
    outputs: str = "last",
) -> float:
    """Error of the effects of all edges on log-probabilities.

    With `few`, of those from some sources into the highest layer with heads, on the shortest
    prompt. `donor` gives the outputs (`Paths`, or the like) that a prompt's sources get by `to`.
    """
    options = {"positions": positions, "outputs": outputs, "logprobs": True, "to": to or tt.Zero()}
    found = tt.edge_effects(model, prompts, **options).logprob_drop
    at = prompts.where(positions) if isinstance(positions, str) else positions
    ours, theirs = [], []
    shortest = int(prompts.lengths.argmin())
    several = prompts.answers.several
    for number in [shortest] if few else range(len(prompts)):
        answers = [()]
        if several:
            ids = prompts.answers.token_id[number]
            answers = [tuple(int(i) for i in row if i >= 0) for row in ids]
        for label, answer in enumerate(answers):
            one = Paths(model, prompts, number, answer, donor(number), few)
            length = one.tokens.shape[1]
            here = torch.ones(length, dtype=torch.bool)  # an answer's tokens belong to "all"
            here[: one.real.sum()] = torch.as_tensor(at[number][one.real])
            last = torch.zeros(length, dtype=torch.bool)
            last[one.reads] = True
            if outputs != "last":
                last[:] = outputs == "all"
                last[: one.real.sum()] = torch.as_tensor(prompts.where(outputs)[number][one.real])
            # In the highest layer, only outputs at the last position have an effect.
            top = slice(-1, None) if outputs == "last" else slice(-2, -1)
            layers = one.with_heads[top] if few else one.with_heads
            for name, target, into, drop in _drops(one, here, last, layers):
                own = found.sel(source=name, target=target, into=into).values[number]
                ours.append(own[label : label + 1] if several else own)
                theirs.append(drop)
    assert few or several or int(found.notnull().any("label").sum()) == len(ours)
    return relative(np.array(ours), np.array(theirs))


def _drops(
    one: Paths, here: torch.Tensor, last: torch.Tensor, layers: list[int]
) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Every edge of a prompt with the drops of the log-probabilities."""
    clean = one.scores()[0]
    for layer in layers:
        heads = one.architecture.heads_in(layer)
        own = one.read(layer, layer, torch.zeros_like(one.streams[0]))
        for name, (source, _) in one.sources.items():
            rows, names = [], []
            for place, into in enumerate(INTO):
                read_at = layer if into == "q" else one.architecture.keys_of(layer)
                if source >= read_at:
                    continue
                at = last if into == "q" else here
                new = one.read(layer, read_at, one.lost(name, read_at) * at[None, :, None])
                rows += [tuple(new[i] if i == place else own[i] for i in range(3))] * heads
                names += [(f"{layer}.{head}", into) for head in range(heads)]
            if rows:
                after = one.answers(layer, heads, rows, last)
                for (target, into), row in zip(names, after, strict=True):
                    yield name, target, into, clean - row
