"""The proof at load: right models pass, and wrong adapters are refused with the layer."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, byte_level, hf_model
from transformers import AutoModelForCausalLM, LlamaConfig

import twotower as tt
from twotower.models import registry
from twotower.models.check import check_model
from twotower.models.families.gptneox import GPTNeoX
from twotower.models.families.llama import Llama
from twotower.models.rounding import Rounding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_pass(name: str, attention: str) -> None:
    if name == "gptj" and attention == "sdpa":
        pytest.skip("transformers has no sdpa kernel for GPT-J")
    model = tt.load(hf_model(name, attention), tokenizer=byte_level(), check=False)
    assert max(one.error for one in check_model(model).values()) < 1e-5


def wrong(base: type, **changes: object) -> type:
    return type(f"Wrong{base.__name__}", (base,), changes)


WRONG = {
    "scaling": ("llama", wrong(Llama, scaling=lambda self, layer: 1.0), "recomputed attention"),
    "rotary": ("llama", wrong(Llama, interleaved_rotary=True), "recomputed attention"),
    "window": ("mistral", wrong(Llama, window=lambda self, layer: 2), "recomputed attention"),
    "one layer only": (
        "llama",
        wrong(Llama, scaling=lambda self, layer: 12**-0.5 if layer < 2 else 1.0),
        "layer 2",
    ),
    "split": (
        "neox-parallel",
        wrong(
            GPTNeoX,
            split=lambda self, block, projected: tuple(
                x.unflatten(-1, (4, 12)) for x in projected[0].chunk(3, dim=-1)
            ),
        ),
        "recomputed attention",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_adapters_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, adapter, message = WRONG[case]
    monkeypatch.setattr(registry, "ADAPTERS", [adapter])
    with pytest.raises(tt.errors.CheckError, match=message) as raised:
        tt.load(hf_model(name), tokenizer=byte_level())
    assert "layer" in str(raised.value)
    assert "at most" in str(raised.value)
    tt.load(hf_model(name), tokenizer=byte_level(), check=False)


def test_a_block_that_adds_up_otherwise_is_refused() -> None:
    module = hf_model("llama")
    layer = module.model.layers[1]
    layer.register_forward_hook(lambda m, a, output: output * 1.01)
    with pytest.raises(tt.errors.CheckError, match="layer 1: .*do not sum to the block's output"):
        tt.load(module, tokenizer=byte_level())


def test_logits_that_are_scaled_are_refused() -> None:
    module = hf_model("llama")
    handle = module.model.norm.register_forward_hook(lambda m, a, output: output + 1)
    with pytest.raises(tt.errors.CheckError, match="norm and unembedding.*forward hook"):
        tt.load(module, tokenizer=byte_level())
    handle.remove()
    assert tt.load(module, tokenizer=byte_level()).n_layers == 3
    module.lm_head.register_forward_hook(
        lambda m, a, output: output if output.dim() < 3 else output * 2
    )
    with pytest.raises(tt.errors.CheckError, match="norm and unembedding"):
        tt.load(module, tokenizer=byte_level())


def test_not_a_number_is_refused() -> None:
    module = hf_model("llama")
    module.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(tt.errors.CheckError, match="layer"):
        tt.load(module, tokenizer=byte_level())


def test_an_overflow_is_called_so() -> None:
    module = hf_model("gpt2", seed=1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    with pytest.raises(tt.errors.CheckError, match="Numbers overflow in float16; load"):
        tt.load(module.half(), tokenizer=byte_level())


def test_a_kernel_that_fails_with_padding() -> None:
    """transformers' eager attention in float64 is NaN where a query sees padding alone."""
    module = hf_model("llama-grouped", "eager", dtype=torch.float64)
    with pytest.raises(tt.errors.CheckError, match="kernel 'eager'; load it with another dtype"):
        tt.load(module, tokenizer=byte_level())


def test_unknown_parts_of_a_block_are_refused() -> None:
    module = hf_model("llama")
    module.model.layers[1].extra_norm = torch.nn.LayerNorm(48)
    with pytest.raises(tt.errors.ModelError, match="layer 1's block holds .*extra_norm"):
        tt.load(module, tokenizer=byte_level())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_quantized_models_pass(name: str, quantization: str, tmp_path) -> None:
    """Shapes in multiples of 64, as bitsandbytes' kernels want them."""
    from transformers import GPT2Config, GPTJConfig

    shape = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 400}
    config = {
        "llama": LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=400,
        ),
        "gpt2": GPT2Config(**shape),
        "gptj": GPTJConfig(**shape, rotary_dim=16),
    }[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    model = tt.load(tmp_path, quantization=quantization, dtype="float32")
    assert model.quantization == quantization
    task = tt.Task("t", {"a": ["cat", "dog", "owl"], "b": ["Rome", "Oslo", "Lima"]})
    prompts = tt.build_prompts(model, task, shots=1, n=2)
    effects = tt.head_effects(model, prompts)["margin_drop"].values
    at_all = tt.head_effects(model, prompts, prompts.where("last"))["margin_drop"].values
    assert abs(effects - at_all).max() == 0
    # Against a separate forward per head: int8 rounds activations row by row.
    clean = tt.predict(model, prompts)["margin"].values
    for head in model.heads:
        after = tt.predict(model, prompts, [tt.KnockOut([head], positions="last")])["margin"].values
        assert abs(effects[:, head.layer, head.head] - (clean - after)).max() < 0.05 * max(
            abs(clean).max(), 0.1
        )


def test_scores_that_nearly_cancel() -> None:
    """A sum of large products that cancel is rounded by their size, not by its own."""
    torch.manual_seed(0)
    size, n = 64, 4000
    query, key = torch.randn(2, n, 2, size, dtype=torch.float64) * 6
    # Keys without their part along the last query, but for a little.
    last = query[:, -1:]
    along = (key * last).sum(dim=-1, keepdim=True) / last.square().sum(dim=-1, keepdim=True)
    key = (key - along * last).float().double()
    query, value = query.float().double(), torch.randn(n, 2, size, dtype=torch.float64)
    value = value.float().double()

    def outputs(dtype: torch.dtype, order: list[int]) -> torch.Tensor:
        q, k, v = (x.to(dtype)[..., order] for x in (last.float().double(), key, value))
        products = [q[..., i] * k[..., i] for i in range(size)]
        weights = (sum(products) / 8).softmax(dim=-1)
        return (weights[..., None] * v).sum(dim=1)[..., torch.tensor(order).argsort()].double()

    exact = outputs(torch.float64, list(range(size)))
    scores = (last.float().double() * key).sum(dim=-1).abs().amax(dim=1) / 8
    products = last.norm(dim=-1)[:, 0] * key.norm(dim=-1).amax(dim=1) / 8
    length = value.norm(dim=-1).mean(dim=1)
    error = (outputs(torch.float32, list(range(size))) - exact).norm(dim=-1) / length
    sizes = (scores.float(), products.float())
    assert (scores < 1).all()
    allowed = Rounding().attention(torch.float32, *sizes)
    assert (error < allowed).all()
    without = Rounding().attention(torch.float32, sizes[0], torch.zeros(n))
    assert (error > without).any()
