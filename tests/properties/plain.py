"""What a model in any state computes, by transformers' own forward and hooks of PyTorch's.

Nothing of twotower's measures is used: the adapter only says where the projections are, and for
edits of nnsight's the forward is one of nnsight's own traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nnsight
import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch.nn.modules import module as torch_modules

import twotower as tt

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast; afterwards as before."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for part, flag in training:
            part.training = flag


class Plain:
    """One prompt at a time, without padding.

    Parameters
    ----------
    model, prompts
        Of the model only the modules' places are used, and its trace where it has edits.
    """

    def __init__(self, model: tt.Model, prompts: tt.Prompts) -> None:
        self.model, self.module, self.prompts = model, model.module, prompts
        self.places = model.architecture
        self.blocks = list(self.places.layers(self.module))

    def forward(self, number: int, **options: Any) -> Any:
        ids = self.prompts.token_id[number]
        inputs = {"input_ids": torch.tensor(ids[ids >= 0])[None], "use_cache": False, **options}
        if not self.model.traced._edits:
            return self.module(**inputs)
        with self.model.traced.trace(**inputs):
            found = nnsight.save(self.model.traced.output)
        return found

    def logits(self, number: int) -> torch.Tensor:
        """(vocabulary,) of the last position."""
        return self.forward(number).logits[0, -1].double()

    def margin(self, logits: torch.Tensor, number: int) -> float:
        labels = logits[list(self.prompts.label_ids)]
        gold = int(self.prompts.gold_index[number])
        others = torch.cat((labels[:gold], labels[gold + 1 :]))
        return float(labels[gold] - others.max())

    @contextmanager
    def without(
        self, head: tt.Head, everywhere: bool, new: torch.Tensor | float = 0.0
    ) -> Iterator[None]:
        """A head's output set to zero or to `new` (D,), after whatever other hooks do to it."""

        def zero(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = inputs[0].clone().unflatten(-1, (self.model.n_heads, -1))
            z[:, slice(None) if everywhere else -1, ..., head.head, :] = new
            return (z.flatten(-2), *inputs[1:])

        projection = self.places.projection(self.blocks[head.layer])
        handle = projection.register_forward_pre_hook(zero)
        try:
            yield
        finally:
            handle.remove()

    def attention(self, number: int) -> np.ndarray:
        """(layer, head, T) of the last position, under the eager kernel."""
        weights = self.forward(number, output_attentions=True).attentions
        return torch.stack([x[0, :, -1].float() for x in weights]).numpy()

    def parts(self, number: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """By layer z and values (T, head, D); and the last position's residual stream at the end.

        Values are those that attention reads; z is what the output projection reads.
        """
        z: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        end: list[torch.Tensor] = []
        handles = []
        n_heads, n_kv = self.model.n_heads, self.model.n_kv_heads

        def of_values(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if len(self.places.qkv_names) == 1:
                output = output.chunk(3, dim=-1)[2]
            by_head = output[0].double().unflatten(-1, (n_kv, -1))
            values.append(by_head.repeat_interleave(n_heads // n_kv, dim=-2))

        def of_z(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            z.append(inputs[0][0].double().unflatten(-1, (n_heads, -1)))

        for block in self.blocks:
            handles.append(self.places.qkv(block)[-1].register_forward_hook(of_values))
            handles.append(self.places.projection(block).register_forward_pre_hook(of_z))
        norm = self.places.final_norm(self.module)
        handles.append(
            norm.register_forward_pre_hook(lambda m, inputs: end.append(inputs[0][0, -1].double()))
        )
        try:
            self.forward(number)
        finally:
            for handle in handles:
                handle.remove()
        return z, values, end[0]

    def mean(self) -> torch.Tensor:
        """(layer, head, D) of all prompts' last positions."""
        own = [torch.stack([z[-1] for z in self.parts(i)[0]]) for i in range(len(self.prompts))]
        return torch.stack(own).mean(dim=0)

    def label_logits(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each head's output (layer, head, label), and of its values (layer, head, T, label)."""
        z, values, end = self.parts(number)
        norm = self.places.final_norm(self.module)
        rows = weight(self.places.unembedding(self.module))[list(self.prompts.label_ids)]
        pulled = rows * norm.weight.double()
        centred = isinstance(norm, torch.nn.LayerNorm)
        epsilon = norm.eps if centred else norm.variance_epsilon
        if centred:
            pulled = pulled - pulled.mean(dim=-1, keepdim=True)
            end = end - end.mean()
        spread = (end.square().mean() + epsilon).sqrt()
        written, carried = [], []
        for block, own, value in zip(self.blocks, z, values, strict=True):
            matrix = weight(self.places.projection(block))  # (d_model, heads * D)
            directions = (pulled / spread @ matrix).unflatten(-1, (self.model.n_heads, -1))
            written.append(torch.einsum("hd,lhd->hl", own[-1], directions))
            carried.append(torch.einsum("thd,lhd->htl", value, directions))
        return torch.stack(written).numpy(), torch.stack(carried).numpy()


def weight(module: Any) -> torch.Tensor:
    """(out, in) weight of a linear map, adapters in force included, in float64."""
    if isinstance(module, LoraLayer):
        found = weight(module.get_base_layer())
        if not module.merged and not module.disable_adapters:
            for name in module.active_adapters:
                if name in module.lora_A:
                    a, b = module.lora_A[name].weight, module.lora_B[name].weight
                    found = found + module.scaling[name] * (b.double() @ a.double())
        return found
    found = module.weight.detach().double()
    return found.T if type(module).__name__ == "Conv1D" else found


def conditions(module: torch.nn.Module) -> dict[str, Any]:
    """What a measure must leave as it was."""
    parts = list(module.modules())
    places = [getattr(part, name) for part in parts for name in HOOKS]
    places += [getattr(torch_modules, f"_global{name}") for name in HOOKS]
    parameters = list(module.parameters())
    return {
        "training": [part.training for part in parts],
        "requires_grad": [parameter.requires_grad for parameter in parameters],
        "parameters": [id(parameter) for parameter in parameters],
        "weights": [
            tensor.detach().clone().flatten().view(torch.uint8).numpy().tobytes()
            for tensor in (*parameters, *module.buffers())
        ],
        "gradients": [id(parameter.grad) for parameter in parameters],
        "hook dicts": [id(place) for place in places],
        "hooks": [[(key, id(hook)) for key, hook in place.items()] for place in places],
        "random state": torch.get_rng_state().numpy().tobytes(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
        ),
    }
