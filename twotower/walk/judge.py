"""Judgement of a batch's proof: record the errors, or raise with the likely cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CheckError
from ..models.rounding import Rounding
from ..options import option
from ..results.findings import Finding
from .not_finite import FINITE
from .proof import IDENTITIES, WAITING_BYTES, Proof, Proved
from .recorder import BatchEdit, Recorder
from .walk import donors_of, run_batch

if TYPE_CHECKING:
    from ..models import Model
    from .batch import Batch

SOME = 0.25
"""Largest share of layers and prompts in which rounding may change a choice of experts."""

EARLIER = 2
"""Number of layers of each batch in which attention is recomputed at an earlier position too."""


def proved_batch(
    model: Model,
    batch: Batch,
    recorders: Sequence[Recorder],
    edits: Sequence[BatchEdit] = (),
    *,
    gradients: bool = False,
) -> list[dict[Any, torch.Tensor]]:
    """Run a batch, check its identities, and return the recorders' results.

    Raises
    ------
    CheckError
        If an identity does not hold. The message names prompt, layer, head, identity, error and
        probable cause.
    """
    if not option("proof"):
        model.proof.made = False
        return run_batch(model, batch, recorders, edits, gradients=gradients)
    rounding = Rounding.of(model)
    waiting = WAITING_BYTES if option("memory_budget") is None else 0
    of_donors = []
    for donors in donors_of(edits, recorders):
        of_donors.append(Proof(rounding, waiting_bytes=waiting))
        donors.recorder = Proved(donors.recorder, of_donors[-1])
    proof = Proof(rounding, [*recorders, *of_donors], waiting, _earlier(model, batch))
    *found, claims = run_batch(model, batch, [*recorders, proof], edits, gradients=gradients)
    refuse(model, model.acting)
    finite = [bool(new[FINITE].all()) for new in found if FINITE in new]
    if all(finite):  # otherwise the finite prompts are measured again, without the others
        judge(model, batch, claims)
        model.proof.prompts += len(batch.rows)
    return found


def _earlier(model: Model, batch: Batch) -> dict[int, int]:
    """Return a random column before the last, of tokens alone, for a few random layers."""
    architecture = model.architecture
    layers = [layer for layer in range(model.n_layers) if architecture.has_heads(layer)]
    first = int((~batch.mask.own).sum(dim=1).max())
    if not layers or first >= batch.width - 1:
        return {}
    rng = np.random.default_rng([int(batch.rows[0]), batch.width])
    some = rng.choice(layers, size=min(EARLIER, len(layers)), replace=False)
    return {int(layer): int(rng.integers(first, batch.width - 1)) for layer in some}


def judge(model: Model, batch: Batch, claims: Mapping[Any, torch.Tensor]) -> None:
    """Record the worst case of each identity, and raise if one does not hold.

    Raises
    ------
    CheckError
        See `proved_batch`.
    """
    for (identity, layers), values in claims.items():
        error, allowed = values.double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            strain = np.where(error == 0, 0, error / allowed)
        strain = np.where(np.isnan(strain), np.inf, strain)
        worst = np.unravel_index(int(strain.argmax()), strain.shape)
        model.proof.add(identity, Finding(float(error[worst]), float(allowed[worst])))
        failing = np.flatnonzero((strain > 1).reshape(len(strain), -1).any(axis=1))
        few = failing.size and (strain > 1).sum() <= max(1, SOME * strain.size)
        rows = identity == "unchanged row"
        if few and rows and Rounding.is_unsteady(model, float(error.max())):
            model.proof.unsteady.add(identity)
            continue
        if failing.size:
            # The first layer is nearest to the cause.
            first = int(failing[0])
            inside = np.unravel_index(int(strain[first].argmax()), strain[first].shape)
            at = (first, *map(int, inside))
            finding = Finding(float(error[at]), float(allowed[at]))
            where = f"prompt {batch.rows[at[1]]}"
            if layers[at[0]] is not None:
                where = f"layer {layers[at[0]]}, {where}"
            if len(at) > 2:
                where = f"{where}, head {at[2]}"
            raise CheckError(
                f"{model.name}, {where}: {IDENTITIES[identity]} (error {finding.error:.2g}, at "
                f"most {finding.allowed:.2g} is accepted). {likely_cause(model, identity)}"
            )


def likely_cause(model: Model, identity: str) -> str:
    """Return a sentence with the probable cause of a failed identity."""
    assert model.state is not None
    others = model.state.interventions()
    if others:
        return f"Probably because of the {_cannot_follow(others)}"
    if identity in ("label directions", "logits"):
        return (
            "Probably weights changed while a measure ran, or the final norm or the unembedding "
            "does more than a norm and a matrix product"
        )
    adapter = type(model.architecture).__name__
    if identity in ("attention", "scale"):
        return (
            f"Probably the adapter {adapter} does not describe this model's attention at this "
            "prompt's length (window, rotary, scale), or positions see later ones"
        )
    return (
        f"Probably the adapter {adapter} does not describe this model's blocks, or a module mixes "
        "positions"
    )


def refuse(model: Model, others: Sequence[str]) -> None:
    """Raise if foreign interventions are active that a measure cannot reproduce.

    Their effect on vectors outside the clean run is unknown. An intervention that clips large
    values, for example, may do nothing in the clean run and much in a row of a sweep.

    Raises
    ------
    CheckError
        If there are any; the message names them.
    """
    if others:
        raise CheckError(f"{model.name} has an active intervention: the {_cannot_follow(others)}")


def _cannot_follow(others: Sequence[str]) -> str:
    """Return the names of foreign interventions and the advice for the user."""
    every = others[0] + (f" ({len(others)} in all)" if len(others) > 1 else "")
    return (
        f"{every}, which this measure cannot follow: remove it, or write it as an edit "
        "(KnockOut, ScaleAttention, Patch, ...)"
    )
