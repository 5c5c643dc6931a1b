"""Draw sets of random heads, to compare chosen heads with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..head import Head


def random_heads(
    heads: Sequence[Head],
    k: int,
    n: int,
    seed: Sequence[int],
    without: Collection[Head] = (),
    like: Sequence[Head] = (),
) -> list[list[Head]]:
    """Draw n sets of k random heads.

    Parameters
    ----------
    heads
        The heads to draw from, in order.
    k, n
        Heads per set, and number of sets.
    seed
        Seed of NumPy's generator.
    without
        Heads that are not drawn.
    like
        If given, each set has as many heads per layer as `like` (k is ignored), or all that the
        layer has left.
    """
    rng = np.random.default_rng(list(seed))
    left = [head for head in heads if head not in without]
    draws = []
    for _ in range(n):
        order = [left[i] for i in rng.permutation(len(left))]
        if like:
            chosen = []
            for layer in sorted({head.layer for head in like}):
                wanted = sum(head.layer == layer for head in like)
                chosen += [head for head in order if head.layer == layer][:wanted]
            draws.append(chosen)
        else:
            draws.append(order[:k])
    return draws
