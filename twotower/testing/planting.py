"""Models whose in-context heads are known, because their weights are constructed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import finite, one_of, whole
from ..errors import InputError
from ..head import Head
from .tokens import LABELS, make_tokenizer, words

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts, Task

ARCHITECTURES = ("gpt2", "gptj", "llama", "neox", "gemma2", "olmo2")
DISTRACTORS = ("silent", "loud", "recent")
"""Heads that match and write nothing; that write all labels equally; that write the nearest
labels."""


@dataclass(frozen=True)
class Planting:
    """A model that classifies in context by a constructed two-tower mechanism.

    A lower head carries the feature of each demonstration's text to its label position, and
    the feature of the query to the last position. Matching heads compare the two (QK) and copy
    the matching label (OV). Everything else is zero, or noise. The mechanism is that of Yu &
    Ananiadou (2024, arXiv 2402.02872); the weights are written by hand.

    Attributes
    ----------
    architecture
        "gpt2", "gptj", "llama", "neox", "gemma2" or "olmo2". Llama and Gemma 2 have two query
        heads per key-value head if the number of heads is even. Layers 0, 2, ... of Gemma 2 see
        only the last 64 tokens.
    n_layers, n_heads, d_head
        The model's size.
    n_classes
        Number of classes, and of labels (foo, bar, map, ...).
    gather
        The lower head.
    match
        The matching heads, all in later layers; together they write `gain`.
    distractors
        Heads by kind: "silent" (match, write nothing), "loud" (write all labels equally),
        "recent" (write the nearest labels).
    noise
        Standard deviation of the noise added to every matrix of attention and MLP, times the
        square root of d_model.
    similarity
        Score advantage of labels of the query's class. Below about 3, attention leaks to
        other labels, and answers lean towards the more frequent label.
    recency
        Decrease of a label's score per token of distance; answers lean towards recent labels.
    gain, distractor_gain
        Logits written with all attention on one label: by the matching heads together, and by
        each distractor.
    n_texts
        Texts per class.
    seed
        Random seed for the noise.

    Raises
    ------
    InputError
        If two heads have the same place, or a head or size is out of range.

    Examples
    --------
    >>> planting = Planting("llama", match=(Head(2, 3),))
    >>> sorted(planting.heads)
    [Head(layer=1, head=0), Head(layer=2, head=3)]
    """

    architecture: str = "llama"
    n_layers: int = 4
    n_heads: int = 4
    d_head: int = 32
    n_classes: int = 2
    gather: Head = field(default_factory=lambda: Head(1, 0))
    match: tuple[Head, ...] = field(default_factory=lambda: (Head(2, 1),))
    distractors: Mapping[str, Sequence[Head]] = field(default_factory=dict)
    noise: float = 0.0
    similarity: float = 8.0
    recency: float = 0.0
    gain: float = 6.0
    distractor_gain: float = 0.5
    n_texts: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("architecture", self.architecture, ARCHITECTURES)
        whole("n_layers", self.n_layers, 2)
        whole("n_heads", self.n_heads, 1)
        whole("n_classes", self.n_classes, 2, len(LABELS))
        whole("n_texts", self.n_texts, 2)
        if self.d_head not in (32, 64):
            raise InputError(f"d_head={self.d_head!r} must be 32 or 64")
        whole("seed", self.seed)
        for name in ("noise", "similarity", "recency", "gain", "distractor_gain"):
            finite(name, getattr(self, name))
        if self.noise < 0:
            raise InputError(f"noise={self.noise} must be 0 or more: it is a standard deviation")
        if not isinstance(self.distractors, Mapping):
            raise InputError(f"distractors={self.distractors!r} must be a dict of kind to heads")
        unknown = set(self.distractors) - set(DISTRACTORS)
        if unknown:
            raise InputError(f"distractors are {', '.join(DISTRACTORS)}, not {sorted(unknown)}")
        object.__setattr__(self, "match", tuple(_heads("match", self.match)))
        object.__setattr__(self, "gather", *_heads("gather", [self.gather]))
        self._check_places()

    def _check_places(self) -> None:
        kinds = self.distractors.values()
        others = [head for kind in kinds for head in _heads("distractors", kind)]
        places = [self.gather, *self.match, *others]
        for layer, head in places:
            whole("layer of a head", layer, 0, self.n_layers - 1)
            whole("head", head, 0, self.n_heads - 1)
        if len(set(places)) < len(places):
            raise InputError("two planted heads have the same layer and number; move one")
        if not self.match:
            raise InputError("match must name at least one matching head")
        if any(head.layer <= self.gather.layer for head in self.match):
            raise InputError("matching heads must be in later layers than the gathering head")

    @property
    def heads(self) -> list[Head]:
        """The heads that do the task: the gathering head and the matching heads."""
        return [self.gather, *self.match]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, one per class."""
        return LABELS[: self.n_classes]

    @property
    def task(self) -> Task:
        """The task: texts a0, a1, ... of the first class, b0, b1, ... of the second, and so on."""
        from ..prompts import Task

        return Task(f"planted-{self.n_classes}", words(self.n_classes, self.n_texts))

    def prompts(self, model: Model, n: int = 24, shots: Any = 4, **options: Any) -> Prompts:
        """Build prompts of the task, by `twotower.build_prompts`."""
        from ..prompts import build_prompts

        return build_prompts(model, self.task, self.labels, shots=shots, n=n, **options)

    def module(self) -> Any:
        """Make the transformers model."""
        from .weights import build

        return build(self)

    def tokenizer(self) -> Any:
        """Make the tokenizer; every text, label and sign is one token."""
        texts = [text for one in words(self.n_classes, self.n_texts).values() for text in one]
        return make_tokenizer(texts, self.labels)

    def load(self, **options: Any) -> Model:
        """Load the model by `twotower.load`, with its options."""
        from ..models import load

        return load(self.module(), tokenizer=self.tokenizer(), **options)

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint in transformers' format, with tokenizer, and return the folder.

        Raises
        ------
        InputError
            If the folder cannot be made.
        """
        if not isinstance(folder, (str, Path)):
            raise InputError(f"folder={folder!r} must be a path")
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the folder {str(place)!r} cannot be made: {reason}") from error
        self.module().save_pretrained(place)
        self.tokenizer().save_pretrained(place)
        return place

    @classmethod
    def random(cls, architecture: str, seed: int, **fixed: Any) -> Planting:
        """Draw a random planting: heads, size, number of classes, and distractors.

        Parameters
        ----------
        architecture
            As in `Planting`.
        seed
            Random seed.
        **fixed
            Settings that are not drawn.

        Raises
        ------
        InputError
            If the architecture is unknown, or the seed is not a whole number.
        """
        one_of("architecture", architecture, ARCHITECTURES)
        whole("seed", seed)
        rng = np.random.default_rng([seed, ARCHITECTURES.index(architecture)])
        n_layers, n_heads = int(rng.integers(3, 7)), int(rng.choice([4, 6, 8]))
        gather_layer = int(rng.integers(0, n_layers - 1))
        places = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        rng.shuffle(places)
        gather = next(head for head in places if head.layer == gather_layer)
        later = [head for head in places if head.layer > gather_layer]
        match = later[: int(rng.integers(1, min(4, len(later)) + 1))]
        taken = {gather, *match}
        # Place distractors after the gathering head: silent and loud ones need its output.
        free = [head for head in later if head not in taken]
        kinds = [DISTRACTORS[i % 3] for i in range(int(rng.integers(3, 7)))]
        distractors: dict[str, list[Head]] = {}
        for kind, head in zip(kinds, free, strict=False):
            distractors.setdefault(kind, []).append(head)
        settings = {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_classes": int(rng.integers(2, 5)),
            "gather": gather,
            "match": tuple(match),
            "distractors": distractors,
            "seed": seed,
        }
        return cls(architecture, **{**settings, **fixed})


def _heads(name: str, given: Any) -> list[Head]:
    """Convert pairs to heads; `_check_places` checks that the heads exist."""
    try:
        return [Head(*head) for head in given]
    except TypeError:
        raise InputError(f"{name}={given!r} must be heads, each as (layer, head)") from None
