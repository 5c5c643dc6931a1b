"""CodeGen: GPT-J with one fused projection, of four parts with queries, values and keys each."""

from __future__ import annotations

from typing import Any

import torch

from .gptj import GPTJ


class CodeGen(GPTJ):
    """CodeGen; the parts are those of four processors in training."""

    model_types = ("codegen",)
    qkv_names = ("qkv_proj",)

    def split(
        self, block: Any, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = projected[0].unflatten(-1, (4, 3, -1, self.d_head))
        q, v, k = (x.flatten(-3, -2) for x in parts.unbind(-3))
        return q, k, v

    def of_a_layer(self, name: str) -> bool:
        return GPTJ.of_a_layer(self, name) and not name.endswith("attn.causal_mask")
