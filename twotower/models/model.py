"""A loaded model: nnsight's wrapper, its tokenizer, its adapter and its shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError
from ..head import Head
from ..results.findings import Findings
from .adapters import adapters_of
from .architecture import Architecture
from .quantization import quantization_of
from .state import State, take_state
from .weights import hash_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ADAPTERS = ("adapters",)
"""Cache key of the adapters' record."""

WEIGHTS = ("weights",)
"""Cache key of the weights' hash."""


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device that a module with weights runs on.

    For offloaded weights, accelerate's hook knows the device.
    """
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(module.parameters()).device


@dataclass
class Model:
    """A causal language model whose heads can be read and edited.

    Use `twotower.load` to make one.

    Attributes
    ----------
    traced
        The nnsight model; every measure runs in its traces.
    tokenizer
        A fast transformers tokenizer.
    architecture
        The adapter that locates queries, keys, values and heads.
    name, revision
        Hub id or folder, and the revision or content hash of the weights.
    remote
        Value of nnsight's `remote=` when tracing.
    cache
        Values derived from the weights, such as label directions. Cleared when the state
        changes; batch sizes are kept.
    state
        State at the last measure (`twotower.models.state`).
    loaded, loaded_weights
        State when it was loaded, and the hash of the weights then.
    proof
        Checks of the current or last measure (`twotower.results.findings`).
    acting
        Descriptions of user hooks that changed values in it.
    """

    traced: Any
    tokenizer: Any
    architecture: Architecture
    name: str
    revision: str | None = None
    remote: bool | str = False
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    state: State | None = field(default=None, repr=False)
    loaded: State | None = field(default=None, repr=False)
    loaded_weights: str = field(default="", repr=False)
    proof: Findings = field(default_factory=Findings, repr=False)
    acting: list[str] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        raise ModelError(
            "a loaded model cannot be copied or pickled, since nnsight wraps it: load a copy of "
            "its module, tt.load(copy.deepcopy(model.module), tokenizer=model.tokenizer), or send "
            "what tt.load was given and load it there"
        )

    def look(self) -> State:
        """Take the model's state, and clear the cache if the state changed.

        Called before each measure, which starts its own proof.
        """
        if not self.remote:
            from .wrapper import renew_methods, renew_modules

            renew_methods(self.module)
            renew_modules(self.traced, self.architecture)
        now = take_state(self)
        if now != self.state:
            self.forget()
            self.state = now
        self.begin()
        return now

    def forget(self) -> None:
        """Clear the values derived from the weights, and the proof; keep batch sizes."""
        sizes = {key: size for key, size in self.cache.items() if key[0] == "batch size"}
        self.cache.clear()
        self.cache.update(sizes)
        self.begin()

    def begin(self) -> None:
        """Start the proof of a new measure."""
        self.proof = Findings()
        self.acting.clear()

    def about(self) -> dict[str, str]:
        """Return the state and proof of the last measure, for the provenance."""
        state = self.state or self.look()
        if ADAPTERS not in self.cache:
            self.cache[ADAPTERS] = [] if self.remote else adapters_of(self.module)
        changed = state.differences(self.loaded or state)
        hashes = (self.loaded_weights, self.weights_hash)
        if all(hashes) and hashes[0] != hashes[1] and "weights" not in changed:
            changed.insert(0, "weights")
        return {
            "weights_hash": self.weights_hash,
            "dtypes": ", ".join(state.dtypes),
            "adapters": json.dumps(self.cache[ADAPTERS]),
            "interventions": json.dumps(state.interventions()),
            "changed_since_loading": json.dumps(changed),
            "proof": self.proof.describe(),
        }

    @property
    def weights_hash(self) -> str:
        """Hash of all weights, of when the state last changed."""
        if WEIGHTS not in self.cache:
            self.cache[WEIGHTS] = hash_weights(self.module)
        known: str = self.cache[WEIGHTS]
        return known

    @property
    def quantization(self) -> str | None:
        """Quantization of the weights: "int8", "nf4", "fp4", another method's name, or None."""
        return None if self.remote else quantization_of(self.module)

    @property
    def module(self) -> PreTrainedModel:
        """The transformers model."""
        return self.traced._module

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.architecture.config

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.architecture.n_layers

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return self.architecture.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Number of key-value heads per layer."""
        return self.architecture.n_kv_heads

    @property
    def d_head(self) -> int:
        """Dimension of a head's query, key and value."""
        return self.architecture.d_head

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return self.architecture.d_model

    @property
    def max_positions(self) -> int | None:
        """Longest prompt, in tokens; None if the configuration does not state it."""
        return self.architecture.max_positions

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the residual stream."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device for the token ids; the CPU for a remote model."""
        return torch.device("cpu") if self.remote else device_of(self.module.get_input_embeddings())

    @property
    def layer_devices(self) -> list[torch.device]:
        """Device that the attention (or mixer) of each layer runs on."""
        if self.remote:
            return [self.device] * self.n_layers
        a = self.architecture
        return [
            device_of(a.projection(block) if a.has_heads(layer) else block)
            for layer, block in enumerate(a.layers(self.module))
        ]

    @property
    def devices(self) -> list[torch.device]:
        """All devices of the model: embedding, layers, final norm, unembedding."""
        if self.remote:
            return [self.device]
        a, root = self.architecture, self.module
        end = [
            device_of(part)
            for part in (a.final_norm(root), a.unembedding(root))
            if any(True for _ in part.parameters())  # OLMo's norms have none
        ]
        return list(dict.fromkeys([self.device, *self.layer_devices, *end]))

    @property
    def attention_kernel(self) -> str | None:
        """Attention implementation in transformers."""
        return getattr(self.config, "_attn_implementation", None)

    @property
    def device_map(self) -> dict[str, str]:
        """Device of each module; {"": device} for a model on one device."""
        placed = getattr(self.module, "hf_device_map", None) or {"": self.device}
        return {name: str(device) for name, device in placed.items()}

    @property
    def heads(self) -> list[Head]:
        """All heads, layer by layer."""
        a = self.architecture
        return [Head(x, y) for x in range(self.n_layers) for y in range(a.heads_in(x))]

    def heads_in(self, layer: int) -> int:
        """Return the number of query heads of a layer."""
        return self.architecture.heads_in(layer)

    @property
    def layers_without_heads(self) -> list[int]:
        """Layers that do not attend by softmax, such as linear or recurrent layers."""
        return [x for x in range(self.n_layers) if not self.architecture.has_heads(x)]

    def __repr__(self) -> str:
        kv = "" if self.n_kv_heads == self.n_heads else f" on {self.n_kv_heads} key-value heads"
        return (
            f"Model({self.name!r}, {type(self.architecture).__name__}, {self.n_layers} layers "
            f"x {self.n_heads} heads{kv}, d_model {self.d_model}, d_head {self.d_head}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.quantization or 'not quantized'})"
        )
