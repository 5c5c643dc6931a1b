"""The command `check`: proof that a model is read and edited correctly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..runs.load_settings import How, LoadSettings
from .sizing import console_of

if TYPE_CHECKING:
    from ..models import Model
    from ..results.findings import Finding


def check(
    model: str = "smollm2-135m",
    *,
    shape: bool = False,
    suggest: bool = False,
    how: How = None,
) -> None:
    """Prove that a model is read and edited correctly, up to its longest configured length.

    Parameters
    ----------
    model
        Hub id, folder, or smollm2-135m.
    shape
        Read only the configuration, and prove a small random model of the same kind. Needs no
        weights.
    suggest
        For a family without adapter: read only the configuration, try the known layouts, and print
        the file of an adapter if exactly one is right.
    """
    console = console_of()
    settings = how or LoadSettings()
    if shape or suggest:
        from ..models.load import load_config

        given = [name for name, value in vars(settings).items() if value and name != "revision"]
        if given or (shape and suggest):
            raise InputError(
                "--shape and --suggest read only the configuration; leave out "
                + (", ".join(f"--{name.replace('_', '-')}" for name in given) or "one of them")
            )
        config = load_config(model, settings.revision)
        if suggest:
            from ..models.suggest import suggest as suggestion

            console.print(suggestion(config), end="", markup=False, highlight=False, soft_wrap=True)
            return
        _check_kind(config, console)
        return
    from ..models.check import check_model
    from ..models.lengths import check_lengths
    from ..models.measuring import measuring

    loaded = settings.load(model, check=False)
    console.print(repr(loaded), soft_wrap=True)
    with measuring(loaded):
        _show(check_model(loaded), "", console)
        _show(check_lengths(loaded), " beyond its lengths", console)
    console.print("All hold.")


def _check_kind(config: Any, console: Any) -> None:
    """Prove a small random model of a configuration's kind, and one of its heads by a hook."""
    from ..models.kind import check_small, small_model
    from ..models.measuring import measuring

    small, longest = small_model(config)
    console.print(repr(small), soft_wrap=True)
    if small.layers_without_heads:
        numbers = ", ".join(map(str, small.layers_without_heads))
        console.print(f"  layers without heads: {numbers}", soft_wrap=True)
    with measuring(small):
        _show(check_small(small, longest), "", console)
    one = _by_hook(small)
    console.print(
        f"  {one['error']:8.1e} of {one['allowed']:.1e}  knocking out head {one['head']} by a hook "
        "in transformers' own forward has the effect that the sweep finds",
        soft_wrap=True,
    )
    console.print("All hold. Models of this kind are supported.")


def _by_hook(model: Model) -> dict[str, Any]:
    """Return the comparison of a sweep with a hook (`twotower.sweep.second_forward`)."""
    from ..measures.effects import head_effects
    from ..prompts import build_prompts, load_task

    prompts = build_prompts(model, load_task("animals-cities"), shots=1, n=2)
    head_effects(model, prompts)
    return dict(model.proof.second_forward or {})


def _show(found: dict[str, Finding], where: str, console: Any) -> None:
    from ..models.check import IDENTITIES

    for name, one in found.items():
        numbers = f"{one.error:8.1e} of {one.allowed:.1e}"
        console.print(f"  {numbers}  {_affirm(IDENTITIES[name])}{where}", soft_wrap=True)


def _affirm(identity: str) -> str:
    """Turn the error text of an identity into a statement that it holds."""
    return (
        identity.replace(" do not ", " ")
        .replace(" does not give ", " gives ")
        .replace(" does not reach ", " reaches ")
        .replace(" changes the logits", " leaves the logits as they are")
    )
