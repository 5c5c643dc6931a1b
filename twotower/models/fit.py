"""Whether an adapter fits a model: where its parts are, and whether all parts are known.

A block or attention module with unknown parts (further norms, cross-attention) does not fit.
Ignoring such a part would give wrong numbers without an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .architecture import Architecture, resolve

WRAPPED = ("language_model", "text_model", "decoder")
"""Names of the language model inside a model of several modalities."""

PATHS = ("layers_path", "final_norm_path", "unembedding_path", "learned_positions_path")


def located(adapter: type[Architecture], module: torch.nn.Module) -> dict[str, str]:
    """Return an adapter's paths in a model, also if the language model is inside a wrapper.

    Parts that are not found keep the adapter's path.
    """
    found = {}
    for name in PATHS:
        path = getattr(adapter, name)
        if path is not None:
            places = (p for p in _places(path) if resolve(module, p, default=None) is not None)
            found[name] = next(places, path)
    return found


def _places(path: str) -> Iterator[str]:
    """Iterate over the paths at which a part may be, the adapter's own first."""
    yield path
    head, _, rest = path.partition(".")
    for name in WRAPPED:
        if rest:
            yield f"{head}.{name}.{rest}"
        yield f"{name}.{path}"


def misfit(adapter: type[Architecture], module: torch.nn.Module) -> str | None:
    """Return why a plain module does not have an adapter's layout; None if it does.

    Blocks without the attention module must have the adapter's mixer instead.
    """
    paths = located(adapter, module)
    for name, path in paths.items():
        if resolve(module, path, default=None) is None:
            return f"it has no {getattr(adapter, name)}"
    for index, block in enumerate(resolve(module, paths["layers_path"])):
        attention = resolve(block, adapter.attention_name, default=None)
        mixer = adapter.mixer_name and resolve(block, adapter.mixer_name, default=None)
        of_attention = {*adapter.qkv_names, adapter.projection_name}
        if attention is mixer and not all(hasattr(attention, name) for name in of_attention):
            attention = None
        if attention is None and mixer is None:
            return f"layer {index} has no {adapter.attention_name}"
        names = (
            adapter.attention_norm_name,
            adapter.mlp_norm_name,
            adapter.attention_post_norm_name,
            adapter.mlp_post_norm_name,
            adapter.mlp_name,
        )
        of_block = {name for name in names if name}
        of_block |= set() if attention is None else {adapter.attention_name}
        of_block |= {adapter.mixer_name} if mixer is not None and adapter.mixer_name else set()
        known = of_block | adapter.more_names
        if attention is None:  # norms may stand elsewhere
            of_block &= {adapter.mixer_name or "", adapter.mlp_name}
        parts = [(block, "block", of_block)]
        if attention is not None:
            parts.append((attention, adapter.attention_name, of_attention))
        for owner, place, needed in parts:
            norms = {name for name in names[:4] if name}
            missing = [name for name in needed if not _is_there(owner, name, name in norms)]
            found = _parts(owner)
            named = {name.partition(".")[0] for name in needed | known}
            if missing or found - named:
                return (
                    f"layer {index}'s {place} holds {sorted(found)} "
                    f"where {sorted(needed)} is expected"
                )
    return None


def _is_there(owner: torch.nn.Module, name: str, is_norm: bool) -> bool:
    """Check that a part exists, and has parameters unless it is a norm."""
    found = resolve(owner, name, default=None)
    return found is not None and (is_norm or any(True for _ in found.parameters()))


def _parts(owner: torch.nn.Module) -> set[str]:
    """Return the names of a module's parameters and of its children with parameters."""
    own = {name for name, _ in owner.named_parameters(recurse=False)}
    return own | {
        name for name, child in owner.named_children() if any(True for _ in child.parameters())
    }
