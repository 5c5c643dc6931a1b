"""Models with heads of known kinds, written by hand.

The task is of pairs: a0 to b0, a1 to b1, ... Prompts are "a3: b3" on each line, and "a5:" at the
end; each word and sign is one token.

- The *previous-token* head writes the previous token into a subspace of its own.
- The *induction* head looks for positions after an earlier occurrence of its own token, and copies
  what stands there.
- The *checking* head sees at every output whether its input stands two tokens before.
- The *function-vector* head reads from all outputs how many are right, and writes the task: a
  vector that is the same in all prompts.
- The *writer* looks at the query if the task is written, and writes its output. The *suppressor*
  looks there too, and writes against it.
- Distractors: a *silent* head looks like the writer and writes nothing; a *loud* one writes a long
  vector that nothing reads; a *recent* one writes weakly the
  outputs that follow those nearby.

Where several conditions must hold, scores add up, and another place is better unless all hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..checks import finite, one_of, whole
from ..head import Head
from .coordinates import Coordinates
from .families import FAMILIES, LEARNED, HeadWeights
from .mechanism import NEAR, Slots
from .tokens import make_tokenizer
from .weights import add_noise, start, write_waves

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import PairTask, Prompts

N_PAIRS = 16
N_LAYERS, N_HEADS, D_HEAD = 4, 5, 64
D_MODEL = N_HEADS * D_HEAD
ARCHITECTURES = ("gpt2", "gptj", "llama", "neox")

KINDS: dict[str, frozenset[str]] = {
    "previous": frozenset({"previous token"}),
    "induction": frozenset({"induction", "copying"}),
    "checking": frozenset(),
    "function vector": frozenset({"function vector"}),
    "writer": frozenset({"writer"}),
    "suppressor": frozenset({"suppressor"}),
    "silent": frozenset(),
    "loud": frozenset(),
    "recent": frozenset(),
}
"""Planted heads, and the names that `head_kinds` should give them."""

PLACES: Mapping[str, Head] = {
    "previous": Head(0, 1),
    "checking": Head(0, 3),
    "loud": Head(1, 0),
    "induction": Head(1, 2),
    "function vector": Head(1, 4),
    "recent": Head(2, 0),
    "writer": Head(2, 1),
    "silent": Head(2, 3),
    "suppressor": Head(3, 2),
}
"""Where they are by default."""


@dataclass(frozen=True)
class PlantedKinds:
    """A model with one head of each kind, and distractors.

    Attributes
    ----------
    architecture
        "gpt2", "gptj", "llama" or "neox".
    places
        Heads by what is planted there (`KINDS`). Each must be in a later layer than those that it
        reads: induction after previous; function vector after checking; writer, silent and
        suppressor after function vector.
    noise
        As in `Planting`.
    seed
        Random seed for the noise.
    """

    architecture: str = "llama"
    places: Mapping[str, Head] = field(default_factory=lambda: PLACES)
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("architecture", self.architecture, ARCHITECTURES)
        finite("noise", self.noise)
        whole("seed", self.seed)

    @property
    def expected(self) -> dict[Head, frozenset[str]]:
        """The names of every head; empty for heads that are not planted."""
        planted = {Head(*place): KINDS[kind] for kind, place in self.places.items()}
        every = [Head(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
        return {head: planted.get(head, frozenset()) for head in every}

    @property
    def task(self) -> PairTask:
        """The task of pairs."""
        from ..prompts import PairTask

        return PairTask("planted pairs", [(f"a{i}", f"b{i}") for i in range(N_PAIRS)])

    def prompts(self, model: Model, n: int = 32, shots: int = 4, **options: Any) -> Prompts:
        """Build prompts of the task, by `twotower.build_prompts`."""
        from ..prompts import build_prompts

        return build_prompts(model, self.task, shots=shots, n=n, **options)

    def tokenizer(self) -> Any:
        """Make the tokenizer; every word and sign is one token."""
        inputs, outputs = zip(*self.task.pairs, strict=True)
        return make_tokenizer(inputs, outputs)

    def load(self, **options: Any) -> Model:
        """Load the model by `twotower.load`, with its options."""
        from ..models import load

        return load(self.module(), tokenizer=self.tokenizer(), **options)

    def module(self) -> Any:
        """Make the transformers model."""
        family = FAMILIES[self.architecture]
        tokens = self.tokenizer().get_vocab()
        words = [name for i in range(2 * N_PAIRS) for name in (f"token {i}", f"previous {i}")]
        answers = [f"answer {i}" for i in range(N_PAIRS * 2)]
        flags = ["constant", "input", "output", "sign", "right", "task", "format", "nothing"]
        waves = [f"{wave} {f}" for f in range(len(LEARNED)) for wave in ("cos", "sin")]
        x = Coordinates([*flags, *words, *answers, *waves], D_MODEL)
        model = start(family, tokens, D_MODEL, N_LAYERS, N_HEADS, N_HEADS)
        base = getattr(model, family.base)
        layers = getattr(base, family.layers)
        weights = Weights(x, family.slots(D_HEAD), learned=family.learned_positions is not None)
        kinds = {Head(*place): kind for kind, place in self.places.items()}
        with torch.no_grad():
            _embed(model, getattr(base, family.embedding).weight, tokens, x)
            if family.learned_positions:
                write_waves(getattr(base, family.learned_positions).weight, x)
            for number, layer in enumerate(layers):
                heads = [weights.of(kinds.get(Head(number, head))) for head in range(N_HEADS)]
                family.write(getattr(layer, family.attention), heads, N_HEADS)
            add_noise(layers, self.noise, self.seed, D_MODEL)
        return model


def _embed(model: Any, table: torch.Tensor, tokens: dict[str, int], x: Coordinates) -> None:
    table[:] = math.sqrt(D_MODEL) * x["constant"]
    unembedding = model.get_output_embeddings().weight
    for sign in (":", "\n"):
        table[tokens[sign]] += x["sign"]
    # The next token is an output in any case: only which one depends on the task.
    table[tokens[":"]] += 8 * x["format"]
    for i in range(N_PAIRS):
        for name, number, flag in ((f"a{i}", i, "input"), (f" b{i}", N_PAIRS + i, "output")):
            table[tokens[name]] += x[flag] + x[f"token {number}"]
            unembedding[tokens[name]] = x[f"answer {number}"]
        unembedding[tokens[f" b{i}"]] += x["format"]


@dataclass(frozen=True)
class Weights:
    """Weights of the planted heads.

    Attributes
    ----------
    x
        Directions of the residual stream.
    slots
        Elements for the parts of queries and keys.
    learned
        Whether positions come from the residual stream.
    """

    x: Coordinates
    slots: Slots
    learned: bool

    def of(self, kind: str | None) -> HeadWeights:
        """Return the weights of a head; without a kind, zeros."""
        q, k, o = (torch.zeros(D_HEAD, D_MODEL) for _ in range(3))
        one, x = self.x["constant"] / math.sqrt(D_MODEL), self.x
        content = self.slots.content
        if kind == "previous":
            self._near(q, k, 1, 12)
            for i in range(2 * N_PAIRS):
                o[i] = x[f"previous {i}"]
        if kind == "induction":
            for i in range(N_PAIRS):  # an output's code is its input's, negative
                q[content[i]] = 25 * (x[f"token {i}"] - x[f"token {N_PAIRS + i}"])
                k[content[i]] = x[f"previous {i}"] - x[f"previous {N_PAIRS + i}"]
            q[content[N_PAIRS]], k[content[N_PAIRS]] = 8 * one, x["sign"]
            for i in range(2 * N_PAIRS):
                o[i] = 4 * x[f"answer {i}"]
        if kind == "checking":
            self._near(q, k, 2, 7)
            for i in range(N_PAIRS):
                q[content[i]], k[content[i]] = 14 * x[f"token {N_PAIRS + i}"], x[f"token {i}"]
            q[content[N_PAIRS]], k[content[N_PAIRS]] = 18 * one, x["output"]
            o[2 * N_PAIRS] = x["right"]
        if kind in ("function vector", "loud"):
            q[content[N_PAIRS]], k[content[N_PAIRS]] = 16 * one, x["output"]
            if kind == "loud":
                o[N_PAIRS : 2 * N_PAIRS] = 3 * x["nothing"]
            else:
                o[2 * N_PAIRS + 1] = x["task"]
        if kind in ("writer", "suppressor", "silent"):
            self._near(q, k, NEAR, 3)
            q[content[0]], k[content[0]] = 15 * x["task"], x["input"]
            q[content[N_PAIRS]], k[content[N_PAIRS]] = 12 * one, x["output"]
            gain = {"writer": 8.0, "suppressor": -2.0, "silent": 0.0}[kind]
            for i in range(N_PAIRS):
                o[i] = gain * x[f"answer {N_PAIRS + i}"]
        if kind == "recent":
            self._near(q, k, 3, 1)
            q[content[N_PAIRS]], k[content[N_PAIRS]] = 8 * one, x["output"]
            for i in range(N_PAIRS):
                o[N_PAIRS + i] = 0.25 * x[f"answer {N_PAIRS + (i + 1) % N_PAIRS}"]
        return HeadWeights(q * math.sqrt(D_HEAD), k, self._values(), o.T)

    def _values(self) -> torch.Tensor:
        """(d_head, d_model) values: the token, whether it is an input, and the check's result."""
        weight = torch.zeros(D_HEAD, D_MODEL)
        for i in range(2 * N_PAIRS):
            weight[i] = self.x[f"token {i}"]
        weight[2 * N_PAIRS], weight[2 * N_PAIRS + 1] = self.x["input"], self.x["right"]
        return weight

    def _near(self, q: torch.Tensor, k: torch.Tensor, distance: float, strength: float) -> None:
        """Write queries and keys whose scores are largest at a distance."""
        one = self.x["constant"] / math.sqrt(D_MODEL)
        for f, (a, b, theta) in enumerate(self.slots.near):
            cos, sin = (strength * wave(theta * distance) for wave in (math.cos, math.sin))
            if self.learned:
                c, s = self.x[f"cos {f}"], self.x[f"sin {f}"]
                k[a], k[b] = c, s
                q[a], q[b] = cos * c + sin * s, cos * s - sin * c
            else:
                k[a] = one
                q[a], q[b] = cos * one, -sin * one
