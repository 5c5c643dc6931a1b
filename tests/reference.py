"""The models once more, written out from their weights in float64.

What the tests compare twotower with. Nothing here comes from twotower, and nothing but
weights and settings from transformers: norms, rotary embedding, masks, attention and MLPs are
spelled out, one prompt at a time, without padding. `test_reference.py` shows that it equals
transformers' own modules.

Shapes use T positions, H heads, D = d_head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import twotower as tt

Edit = Callable[[int, torch.Tensor], torch.Tensor]
"""Takes a layer's number and its z (T, H, D); gives z, perhaps several, (n, T, H, D)."""

Attend = Callable[[int, SimpleNamespace], torch.Tensor]
"""Takes a layer's number and its parts (residual, query, key, value, score, seen, attention,
z); gives z (T, H, D)."""


@dataclass
class Run:
    """Everything that one forward computes; lists by layer.

    After an edit that gives n variants of z, all shapes have n in front.
    """

    residual: list[torch.Tensor] = field(default_factory=list)  # (T, d_model), and the end
    query: list[torch.Tensor] = field(default_factory=list)  # (T, H, D), before rotary
    key: list[torch.Tensor] = field(default_factory=list)  # (T, H, D), before rotary
    value: list[torch.Tensor] = field(default_factory=list)  # (T, H, D)
    score: list[torch.Tensor] = field(default_factory=list)  # (H, T, T), scaled, unmasked
    attention: list[torch.Tensor] = field(default_factory=list)  # (H, T, T)
    z: list[torch.Tensor] = field(default_factory=list)  # (T, H, D), after the edit
    attention_output: list[torch.Tensor] = field(default_factory=list)  # (T, d_model)
    mlp_output: list[torch.Tensor] = field(default_factory=list)  # (T, d_model)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (T, vocabulary)


class Reference:
    """A transformers model, from its weights.

    Parameters
    ----------
    module
        GPT-2, GPT-J, GPT-NeoX, Llama, Mistral, Qwen2 or Qwen3.
    """

    def __init__(self, module: Any) -> None:
        config = module.config
        self.config, self.kind = config, config.model_type
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.d_model = config.hidden_size
        self.d_head = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.w = {name: x.detach().double() for name, x in module.state_dict().items()}
        if module.config.tie_word_embeddings:
            self.w["lm_head.weight"] = self.w[
                next(n for n in self.w if n.endswith(("wte.weight", "embed_tokens.weight")))
            ]
        self.layer_norm = self.kind in ("gpt2", "gptj", "gpt_neox")
        self.epsilon = next(
            getattr(config, name)
            for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
            if hasattr(config, name)
        )
        self.parallel = self.kind == "gptj" or getattr(config, "use_parallel_residual", False)
        end = {"gpt2": "transformer.ln_f", "gptj": "transformer.ln_f"}
        self.end = end.get(self.kind) or (
            "gpt_neox.final_layer_norm" if self.kind == "gpt_neox" else "model.norm"
        )
        self.blocks = [self._block(layer) for layer in range(self.n_layers)]

    # ---- weights --------------------------------------------------------------------

    def _linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(in, out) weight and (out,) bias of a Linear; GPT-2 holds its weights transposed."""
        weight = self.w[f"{name}.weight"]
        if self.kind != "gpt2":
            weight = weight.T
        return weight, self.w.get(f"{name}.bias", torch.zeros(weight.shape[1]).double())

    def _block(self, layer: int) -> SimpleNamespace:
        """q, k, v as (d_model, H, D) weights and (H, D) biases; out as (H, D, d_model)."""
        heads, width = self.n_heads, self.d_head
        root = {"gpt_neox": "gpt_neox.layers"}.get(
            self.kind, "transformer.h" if self.kind in ("gpt2", "gptj") else "model.layers"
        )
        root = f"{root}.{layer}"
        b = SimpleNamespace(root=root)
        if self.kind == "gpt2":
            b.norm, b.mlp_norm = f"{root}.ln_1", f"{root}.ln_2"
            weight, bias = self._linear(f"{root}.attn.c_attn")
            size = heads * width
            b.qkv = [
                (
                    weight[:, i * size : (i + 1) * size].reshape(-1, heads, width),
                    bias[i * size : (i + 1) * size].reshape(heads, width),
                )
                for i in range(3)
            ]
            out = self._linear(f"{root}.attn.c_proj")
        elif self.kind == "gpt_neox":
            b.norm, b.mlp_norm = f"{root}.input_layernorm", f"{root}.post_attention_layernorm"
            weight, bias = self._linear(f"{root}.attention.query_key_value")
            # Output number h * 3 D + i * D + d is element d of head h's q, k or v (i).
            b.qkv = [
                (
                    torch.stack(
                        [
                            weight[:, h * 3 * width + i * width : h * 3 * width + (i + 1) * width]
                            for h in range(heads)
                        ],
                        dim=1,
                    ),
                    torch.stack(
                        [
                            bias[h * 3 * width + i * width : h * 3 * width + (i + 1) * width]
                            for h in range(heads)
                        ]
                    ),
                )
                for i in range(3)
            ]
            out = self._linear(f"{root}.attention.dense")
        else:
            at = "attn" if self.kind == "gptj" else "self_attn"
            b.norm = f"{root}.ln_1" if self.kind == "gptj" else f"{root}.input_layernorm"
            b.mlp_norm = b.norm if self.kind == "gptj" else f"{root}.post_attention_layernorm"
            b.qkv = []
            for name in ("q_proj", "k_proj", "v_proj"):
                weight, bias = self._linear(f"{root}.{at}.{name}")
                weight = weight.reshape(weight.shape[0], -1, width)
                bias = bias.reshape(-1, width)
                # Head h shares key-value head h // (heads per key-value head).
                owner = [h * weight.shape[1] // heads for h in range(heads)]
                b.qkv.append((weight[:, owner], bias[owner]))
            out = self._linear(f"{root}.{at}.{'out_proj' if self.kind == 'gptj' else 'o_proj'}")
        b.out, b.out_bias = out[0].reshape(heads, width, -1), out[1]
        return b

    # ---- parts ----------------------------------------------------------------------

    def norm(self, x: torch.Tensor, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """A norm of x (..., d); its spread is that of `like` where given."""
        return self.pull(x, name, like) + self.w.get(f"{name}.bias", 0.0)

    def pull(self, x: torch.Tensor, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """The same without the norm's bias: linear in x for a given `like`."""
        like = x if like is None else like
        if self.layer_norm:
            x = x - x.mean(dim=-1, keepdim=True)
            like = like - like.mean(dim=-1, keepdim=True)
        spread = torch.sqrt((like**2).mean(dim=-1, keepdim=True) + self.epsilon)
        return x / spread * self.w[f"{name}.weight"]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x (T, H, D) at positions (T,), as complex numbers."""
        if self.kind == "gpt2":
            return x
        if self.kind == "gptj":
            rotated, base, scale = self.config.rotary_dim or self.d_model, 10000.0, 1.0
        else:
            parameters = self.config.rope_parameters
            assert parameters["rope_type"] == "default"
            rotated = int(self.d_head * parameters.get("partial_rotary_factor", 1.0))
            base, scale = parameters["rope_theta"], 1.0
        half = rotated // 2
        turn = _turns(tuple(positions.tolist()), rotated, base) * scale
        out = x.clone()
        if self.kind == "gptj":
            real, imaginary = slice(0, rotated, 2), slice(1, rotated, 2)
        else:
            real, imaginary = slice(0, half), slice(half, rotated)
        turned = (x[..., real] + 1j * x[..., imaginary]) * turn
        out[..., real], out[..., imaginary] = turned.real, turned.imag
        return out

    def queries_keys_values(
        self, layer: int, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, H, D) each, before rotary, of what the layer's attention reads."""
        b = self.blocks[layer]
        q, k, v = (torch.einsum("...td,dhe->...the", normed, w) + bias for w, bias in b.qkv)
        if self.kind == "qwen3":
            q, k = (
                x
                / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + self.epsilon)
                * self.w[f"{b.root}.self_attn.{name}.weight"]
                for x, name in ((q, "q_norm"), (k, "k_norm"))
            )
        return q, k, v

    def scale(self, layer: int) -> float:
        """Factor on q.k."""
        scale = 1 / math.sqrt(self.d_head)
        if self.kind == "gpt2":
            scale = scale if self.config.scale_attn_weights else 1.0
            if self.config.scale_attn_by_inverse_layer_idx:
                scale /= layer + 1
        return scale

    def window(self, layer: int) -> int | None:
        """Positions a query sees, itself included."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[layer] == "full_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        root = f"{self.blocks[layer].root}.mlp"

        def through(name: str, x: torch.Tensor) -> torch.Tensor:
            weight, bias = self._linear(f"{root}.{name}")
            return x @ weight + bias

        if self.kind == "gpt2":
            inner = functional.gelu(through("c_fc", x), approximate="tanh")
            return through("c_proj", inner)
        if self.kind == "gptj":
            inner = functional.gelu(through("fc_in", x), approximate="tanh")
            return through("fc_out", inner)
        if self.kind == "gpt_neox":
            return through("dense_4h_to_h", functional.gelu(through("dense_h_to_4h", x)))
        gate = through("gate_proj", x)
        return through("down_proj", gate * torch.sigmoid(gate) * through("up_proj", x))

    def unembed(self, normed: torch.Tensor, bias: bool = True) -> torch.Tensor:
        """(..., vocabulary) logits of normed vectors."""
        found = normed @ self.w["lm_head.weight"].T
        return found + self.w["lm_head.bias"] if bias and "lm_head.bias" in self.w else found

    def label_logit(
        self, vectors: torch.Tensor, end: torch.Tensor, ids: tuple[int, ...]
    ) -> torch.Tensor:
        """(..., label) label logits of vectors (..., d_model) under the end's statistic."""
        return self.unembed(self.pull(vectors, self.end, end), bias=False)[..., list(ids)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kind == "gpt2":
            positions = self.w["transformer.wpe.weight"][: len(ids)]
            return self.w["transformer.wte.weight"][ids] + positions
        name = {"gptj": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}.get(self.kind)
        return self.w[f"{name or 'model.embed_tokens'}.weight"][ids]

    # ---- the whole ------------------------------------------------------------------

    def run(self, ids: torch.Tensor, edit: Edit | None = None, attend: Attend | None = None) -> Run:
        """One forward of ids (T,), with every layer's attention and then its z edited."""
        run, n = Run(), len(ids)
        positions = torch.arange(n)
        x = self.embed(ids)
        for layer, b in enumerate(self.blocks):
            run.residual.append(x)
            q, k, v = self.queries_keys_values(layer, self.norm(x, b.norm))
            turned_q, turned_k = self.rotate(q, positions), self.rotate(k, positions)
            score = torch.einsum("...qhd,...khd->...hqk", turned_q, turned_k) * self.scale(layer)
            distance = positions[:, None] - positions
            seen = distance >= 0
            if self.window(layer) is not None:
                seen &= distance < self.window(layer)
            attention = score.masked_fill(~seen, -math.inf).softmax(dim=-1)
            z = torch.einsum("...hqk,...khd->...qhd", attention, v)
            if attend is not None:
                parts = SimpleNamespace(
                    residual=x,
                    query=q,
                    key=k,
                    value=v,
                    score=score,
                    seen=seen,
                    attention=attention,
                    z=z.clone(),
                )
                z = attend(layer, parts)
            if edit is not None:
                z = edit(layer, z.clone())
            attended = torch.einsum("...thd,hde->...te", z, b.out) + b.out_bias
            source = x if self.parallel else x + attended
            mlp_output = self.mlp(layer, self.norm(source, b.mlp_norm))
            x = x + attended + mlp_output
            for name, value in (
                ("query", q),
                ("key", k),
                ("value", v),
                ("score", score),
                ("attention", attention),
                ("z", z),
                ("attention_output", attended),
                ("mlp_output", mlp_output),
            ):
                getattr(run, name).append(value)
        run.residual.append(x)
        run.logits = self.unembed(self.norm(x, self.end))
        return run


# ---- prompts and answers ------------------------------------------------------------------


@cache
def _turns(positions: tuple[int, ...], rotated: int, base: float) -> torch.Tensor:
    """(T, 1, half) what each pair of elements is turned by, as complex numbers."""
    rate = torch.tensor([base ** (-2 * j / rotated) for j in range(rotated // 2)]).double()
    return torch.exp(1j * torch.tensor(positions).double()[:, None] * rate)[:, None]


def ids_of(prompts: tt.Prompts, i: int) -> torch.Tensor:
    """(T,) token ids of a prompt by itself."""
    return torch.as_tensor(prompts.token_id[i][prompts.token_id[i] >= 0])


def real(prompts: tt.Prompts, i: int) -> np.ndarray:
    """(position,) boolean: not padding."""
    return prompts.token_id[i] >= 0


def answer(logits: torch.Tensor, prompts: tt.Prompts, i: int) -> tuple[float, np.ndarray]:
    """Margin and the labels' log-probabilities, of the logits (vocabulary,)."""
    labels = logits[list(prompts.label_ids)].double()
    gold = list(prompts.labels).index(prompts.gold[i])
    others = max(float(x) for number, x in enumerate(labels) if number != gold)
    logprobs = labels - torch.logsumexp(logits.double(), dim=-1)
    return float(labels[gold]) - others, logprobs.numpy()


Value = Callable[[int, int], torch.Tensor]
"""Takes a prompt's and a layer's number; gives (T, H, D) what replaces z."""


def knocked_out(
    reference: Reference, prompts: tt.Prompts, at: np.ndarray, value: Value | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Margin and log-probability drops, a forward of its own for every head and prompt.

    `at` is (prompt, position); zero replaces z where there is no `value`.
    """
    heads = list(np.ndindex(reference.n_layers, reference.n_heads))
    found = changed(reference, prompts, at, [[head] for head in heads], value)
    shape = (len(prompts), reference.n_layers, reference.n_heads)
    return tuple(x.reshape(*shape, *x.shape[2:]) for x in found)


def changed(
    reference: Reference,
    prompts: tt.Prompts,
    at: np.ndarray,
    groups: list,
    value: Value | None = None,
    factor: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for groups of heads changed together: (prompt, group), (prompt, group, label)."""
    margins = np.zeros((len(prompts), len(groups)))
    logprobs = np.zeros((*margins.shape, len(prompts.labels)))
    for i in range(len(prompts)):
        ids, mask = ids_of(prompts, i), torch.as_tensor(at[i][real(prompts, i)])
        clean = answer(reference.run(ids).logits[-1], prompts, i)

        def edit(index, z, mask=mask, i=i):
            if index == 0:
                z = z.expand(len(groups), -1, -1, -1).clone()
            for row, group in enumerate(groups):
                for layer, head in group:
                    if index == layer:
                        new = z[row] * factor if value is None else value(i, layer)
                        z[row, mask, head] = new[mask, head]
            return z

        rows = reference.run(ids, edit).logits[:, -1]
        for number, row in enumerate(rows):
            after = answer(row, prompts, i)
            margins[i, number] = clean[0] - after[0]
            logprobs[i, number] = clean[1] - after[1]
    return margins, logprobs


def error(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected element; both must be finite."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---- transformers' own modules --------------------------------------------------------------


def output_projections(module: Any) -> list[torch.nn.Module]:
    """The attention modules' output projections, layer by layer."""
    names = ("attn.c_proj", "attn.out_proj", "self_attn.o_proj", "attention.dense")
    return [child for name, child in module.named_modules() if name.endswith(names)]


@contextmanager
def hooked(module: Any, n_heads: int, edit: Edit):
    """In a plain forward of one prompt, every z (T, H, D) goes through `edit`."""

    def hook_of(layer):
        def hook(projection, arguments):
            z = arguments[0][0].unflatten(-1, (n_heads, -1)).clone()
            return (edit(layer, z).flatten(-2)[None],)

        return hook

    handles = [
        projection.register_forward_pre_hook(hook_of(layer))
        for layer, projection in enumerate(output_projections(module))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """(vocabulary,) of the last position, from a plain forward."""
    with torch.no_grad():
        return module(input_ids=ids[None], use_cache=False).logits[0, -1]


def random_model(config: Any, attention: str = "eager", seed: int = 3) -> Any:
    """A random transformers model of a configuration, every parameter off its default."""
    config.vocab_size = 704
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_((0 if name.endswith("bias") else 1) + 0.2 * noise)
            else:
                parameter.copy_(0.18 * noise)
    return model.eval().requires_grad_(False)
