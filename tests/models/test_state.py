"""The state of a model: what is done to it after loading shows in the numbers, or is refused."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import peft
import pytest
import torch
import xarray as xr
from tiny import TWO, byte_level, hf_model

import twotower as tt
from twotower.models.state import take_state

NAMES = ["gpt2", "llama-grouped"]
"""`make test` takes gpt2 where its transposed weights matter."""

ADAPTED = {"gpt2": ["c_attn", "c_proj"], "llama-grouped": ["q_proj", "o_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def _always(one_thread: None) -> None:
    pass


@pytest.fixture(params=[pytest.param("gpt2", marks=pytest.mark.slow), "llama-grouped"])
def model(request: pytest.FixtureRequest) -> tt.Model:
    """A model of its own for each test, whose weights can be learned."""
    module = hf_model(request.param).requires_grad_(True)
    return tt.load(module, tokenizer=byte_level())


@pytest.fixture
def prompts(model: tt.Model) -> tt.Prompts:
    return tt.build_prompts(model, TWO, shots=1, n=3, seed=4)


def name_of(model: tt.Model) -> str:
    return "gpt2" if model.config.model_type == "gpt2" else "llama-grouped"


def everything(model: tt.Model, prompts: tt.Prompts) -> dict[str, np.ndarray]:
    run = tt.analyze(model, prompts)
    whole = tt.head_effects(model, prompts, positions="all", logprobs=False)
    return {
        "margin": run.predictions.margin.values,
        "effects": run.effects.margin_drop.values,
        "effects everywhere": whole.margin_drop.values,
        "logprob": run.effects.logprob_drop.values,
        "ov": run.ov.label_logit.values,
        "attribution": run.attribution.label_logit.values,
        "attention": run.qk.attention.values,
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], allowed: float = 1e-5) -> None:
    for name, values in one.items():
        size = float(np.nanmax(np.abs(values)))
        np.testing.assert_allclose(
            other[name] / size, values / size, rtol=0, atol=allowed, err_msg=name
        )


def block(model: tt.Model, layer: int = 1) -> Any:
    return model.architecture.layers(model.module)[layer]


def plain_margins(model: tt.Model, prompts: tt.Prompts) -> np.ndarray:
    found = []
    for ids, gold in zip(prompts.token_id, prompts.gold_index, strict=True):
        with torch.no_grad():
            logits = model.module(torch.tensor(ids[ids >= 0])[None], use_cache=False).logits
        labels = logits[0, -1, list(prompts.label_ids)].double().numpy()
        found.append(labels[gold] - np.delete(labels, gold).max())
    return np.array(found)


# ---- weights -----------------------------------------------------------------------------


def load_others(model: tt.Model) -> None:
    model.module.load_state_dict(hf_model(name_of(model), seed=5).state_dict())


def step(model: tt.Model, kind: type = torch.optim.SGD, **options: Any) -> None:
    learned = [p for p in model.module.parameters() if p.requires_grad]
    ids = torch.arange(20).view(2, 10) + 30
    model.module(ids, labels=ids).loss.backward()
    kind(learned, lr=0.01, **options).step()


def through_data(model: tt.Model) -> None:
    model.architecture.projection(block(model)).weight.data *= 1.5


def in_place(model: tt.Model) -> None:
    with torch.no_grad():
        model.architecture.projection(block(model)).weight[:12] = 0


def replaced(model: tt.Model) -> None:
    norm = model.architecture.final_norm(model.module)
    norm.weight = torch.nn.Parameter(norm.weight.detach().flip(0))


CHANGES: dict[str, Callable[[tt.Model], Any]] = {
    "load_state_dict": load_others,
    "SGD": step,
    "Adam": lambda model: step(model, torch.optim.Adam, foreach=False),
    "AdamW with foreach": lambda model: step(model, torch.optim.AdamW, foreach=True),
    "fused Adam": lambda model: step(model, torch.optim.Adam, fused=True),
    ".data": through_data,
    "in place": in_place,
    "a new parameter": replaced,
    "bfloat16 and back": lambda model: model.module.to(torch.bfloat16).float(),
}

OPTIMIZED = ("SGD", "Adam", "AdamW with foreach")
"""Changes that torch counts as it counts those of fused Adam."""


@pytest.mark.parametrize(
    "change",
    [pytest.param(x, marks=pytest.mark.slow) if x in OPTIMIZED else x for x in CHANGES],
)
def test_changed_weights_are_measured(change: str, model, prompts) -> None:
    before = everything(model, prompts)
    CHANGES[change](model)
    found = everything(model, prompts)
    assert np.abs(found["effects"] - before["effects"]).max() > 1e-4
    told = tt.predict(model, prompts).attrs
    assert json.loads(told["changed_since_loading"]) == ["weights"]
    again = tt.load(model.module, tokenizer=byte_level())
    same(everything(again, prompts), found)
    assert tt.predict(again, prompts).attrs["weights_hash"] == told["weights_hash"]


def test_a_few_elements_that_no_sample_shows(model, prompts) -> None:
    """Written through `.data`, they show only where what was derived fails its proof."""
    everything(model, prompts)
    state = take_state(model)
    model.architecture.projection(block(model)).weight.data.view(-1)[3:9] += 2
    assert take_state(model) == state
    again = tt.load(model.module, tokenizer=byte_level())
    same(everything(again, prompts), everything(model, prompts))


def a_neuron(model: tt.Model) -> None:
    model.architecture.mlp(block(model, 0)).down_proj.weight.data[:, 1] *= 20


def an_embedding(model: tt.Model) -> None:
    token = model.tokenizer(":", add_special_tokens=False)["input_ids"][0]
    model.module.get_input_embeddings().weight.data[token] += 1


UNSEEN = {"a neuron": a_neuron, "an embedding": an_embedding}


@pytest.mark.parametrize("change", UNSEEN)
def test_means_are_those_of_the_model_as_it_is(change: str) -> None:
    model = tt.load(hf_model("llama-grouped"), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=4)
    to = tt.Mean(prompts)
    before = tt.head_effects(model, prompts, to=to)
    UNSEEN[change](model)
    assert take_state(model) == model.state
    found = tt.head_effects(model, prompts, to=to)
    again = tt.load(model.module, tokenizer=byte_level())
    expected = tt.head_effects(again, prompts, to=to)
    np.testing.assert_allclose(found.margin_drop, expected.margin_drop, rtol=0, atol=1e-6)
    assert float(abs(found.margin_drop - before.margin_drop).max()) > 1e-3


def test_one_neuron_changes_the_hash(model, prompts) -> None:
    before = tt.predict(model, prompts).attrs["weights_hash"]
    with torch.no_grad():
        model.architecture.projection(block(model)).weight.view(-1)[3:9] += 2
    told = tt.predict(model, prompts).attrs
    assert told["weights_hash"] != before
    assert json.loads(told["changed_since_loading"]) == ["weights"]


def test_the_configuration_is_part_of_the_state(model, prompts) -> None:
    tt.predict(model, prompts)
    model.config.some_setting = 3
    told = tt.predict(model, prompts).attrs
    assert json.loads(told["changed_since_loading"]) == ["configuration"]


def test_no_change_is_told_where_there_is_none(model, prompts) -> None:
    load_others(model)
    model.module.load_state_dict(hf_model(name_of(model)).state_dict())
    model.module.train().eval()
    block(model).register_forward_hook(lambda m, a, o: None).remove()
    assert json.loads(tt.predict(model, prompts).attrs["changed_since_loading"]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype(dtype: torch.dtype, model, prompts) -> None:
    tt.analyze(model, prompts)
    model.module.set_attn_implementation("sdpa")  # eager makes NaN of padding in float64
    model.module.to(dtype)
    found = everything(model, prompts)
    same(everything(tt.load(model.module, tokenizer=byte_level()), prompts), found)
    told = tt.predict(model, prompts).attrs
    assert told["dtype"] == str(dtype).removeprefix("torch.")
    assert told["attention_kernel"] == "sdpa"
    changed = json.loads(told["changed_since_loading"])
    assert {"attention kernel", "dtypes"} <= set(changed)


# ---- adapters ----------------------------------------------------------------------------


def adapted(model: tt.Model) -> Any:
    name = name_of(model)
    config = peft.LoraConfig(
        target_modules=ADAPTED[name],
        r=3,
        lora_dropout=0.2,
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks in a deprecated way
        found = peft.get_peft_model(model.module, config)
    found.add_adapter("other", config)
    return found


def unloaded(wrapper: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapper.unload()


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_adapters_added_after_loading(model, prompts) -> None:
    before = everything(model, prompts)
    wrapper = adapted(model)

    def now() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        found = everything(model, prompts)
        same(everything(tt.load(wrapper, tokenizer=byte_level()), prompts), found)
        told = json.loads(tt.predict(model, prompts).attrs["adapters"])
        return found, {one["name"]: one for one in told}

    first, told = now()
    assert np.abs(first["effects"] - before["effects"]).max() > 1e-2
    assert set(told) == {"default", "other"}
    assert told["default"]["active"]
    assert not told["other"]["active"]
    assert told["default"]["sha256"] != told["other"]["sha256"]
    wrapper.set_adapter("other")
    other, told = now()
    assert np.abs(other["effects"] - first["effects"]).max() > 1e-2
    assert not told["default"]["active"]
    with wrapper.disable_adapter():
        off, told = now()
    same(before, off, 1e-4)
    assert not any(one["active"] for one in told.values())
    wrapper.set_adapter("default")
    wrapper.merge_adapter()
    merged, told = now()
    same(first, merged, 1e-4)
    assert told["default"]["merged"]
    wrapper.unmerge_adapter()
    same(first, now()[0], 1e-4)
    unloaded(wrapper)
    same(before, everything(model, prompts), 1e-4)
    assert tt.predict(model, prompts).attrs["adapters"] == "[]"


def test_modules_of_another_layout_put_in_later(model, prompts) -> None:
    block(model).mlp = torch.nn.Identity()
    with pytest.raises(tt.errors.ModelError, match="replaced after loading, and layer 1"):
        tt.predict(model, prompts)


def test_a_module_put_in_later(model, prompts) -> None:
    other = block(tt.load(hf_model(name_of(model), seed=3), tokenizer=byte_level()))
    before = everything(model, prompts)
    block(model).mlp = other.mlp
    found = everything(model, prompts)
    assert np.abs(found["effects"] - before["effects"]).max() > 1e-2
    np.testing.assert_allclose(found["margin"], plain_margins(model, prompts), atol=1e-4)


class Handed:
    """Wrappers around a model that people hold."""

    @staticmethod
    def peft(module: Any) -> Any:
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(module, config)

    @staticmethod
    def compiled(module: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when first used
            return torch.compile(module)

    data_parallel = staticmethod(torch.nn.DataParallel)


@pytest.mark.parametrize("kind", ["peft", "compiled", "data_parallel"])
def test_wrappers_are_accepted_as_they_are(kind: str) -> None:
    module = hf_model("llama-grouped")
    model = tt.load(getattr(Handed, kind)(module), tokenizer=byte_level())
    assert model.module is module
    prompts = tt.build_prompts(model, TWO, shots=1, n=3)
    found = tt.predict(model, prompts)
    np.testing.assert_allclose(found.margin, plain_margins(model, prompts), atol=1e-4)
    assert bool(json.loads(found.attrs["adapters"])) == (kind == "peft")


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_prompt_learning_is_refused_by_name(kind: str) -> None:
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = peft.get_peft_model(hf_model("llama-grouped"), config, adapter_name="mine")
    with pytest.raises(tt.errors.ModelError, match="'mine' uses prompt learning"):
        tt.load(wrapper, tokenizer=byte_level())


def test_an_activated_adapter_is_refused_by_name() -> None:
    """It acts only after certain tokens, which peft's wrapper looks for."""
    config = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = peft.get_peft_model(hf_model("llama-grouped"), config, adapter_name="mine")
    with pytest.raises(tt.errors.ModelError, match="'mine' is an activated LoRA"):
        tt.load(wrapper, tokenizer=byte_level())


# ---- conditions ----------------------------------------------------------------------------


def test_measures_run_in_eval_and_leave_train() -> None:
    module = hf_model("gpt2")
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    model = tt.load(module, tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3)
    expected = everything(model, prompts)
    module.train()
    module.transformer.h[1].mlp.eval()
    flags = [part.training for part in module.modules()]
    state = torch.get_rng_state()
    same(expected, everything(model, prompts), 0)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_and_what_is_learned_are_left(model, prompts) -> None:
    step(model)
    block(model).requires_grad_(False)
    before = [(p, p.requires_grad, p.grad) for p in model.module.parameters()]
    tt.analyze(model, prompts)
    after = [(p, p.requires_grad, p.grad) for p in model.module.parameters()]
    for one, two in zip(before, after, strict=True):
        assert all(x is y for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "surroundings", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=str
)
def test_modes_around_a_measure(
    surroundings: Callable[[], AbstractContextManager[Any]], model, prompts
) -> None:
    expected = everything(model, prompts)
    model.cache.clear()
    with surroundings():
        same(expected, everything(model, prompts), 1e-6)


def test_autocast_is_left_out_with_one_warning(model, prompts) -> None:
    expected = tt.analyze(model, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(tt.errors.TwoTowerWarning) as given:
            found = tt.analyze(model, prompts)
        assert torch.is_autocast_enabled("cpu")
    assert len(given) == 1
    xr.testing.assert_equal(found.effects.dataset, expected.effects.dataset)


def test_autocast_inside_the_forward_is_refused(model, prompts) -> None:
    """As accelerate's `prepare` puts it there."""
    model.module.forward = torch.autocast("cpu", torch.bfloat16)(model.module.forward)
    for measure in (tt.predict, tt.head_effects, tt.head_kinds):
        with pytest.raises(tt.errors.ModelError, match="forward computes under autocast"):
            measure(model, prompts)


def test_matrices_are_multiplied_in_float32(model, prompts) -> None:
    """Also on a processor that would use another precision; a forward hook looks."""
    seen = set()

    def look(*_: Any) -> None:
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))

    handle = block(model).register_forward_hook(look)
    expected = everything(model, prompts)
    torch.set_float32_matmul_precision("medium")
    try:
        same(expected, everything(model, prompts), 0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        handle.remove()
    assert seen == {("highest", False)}


def test_two_threads(model, prompts) -> None:
    expected = everything(model, prompts)
    found: list[dict[str, np.ndarray]] = []
    threads = [
        threading.Thread(target=lambda: found.append(everything(model, prompts))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for one in found:
        same(expected, one, 0)


# ---- hooks, methods and edits of others ------------------------------------------------------

PLACES: dict[str, Callable[[tt.Model], Any]] = {
    "block": block,
    "attention": lambda model: model.architecture.attention(block(model)),
    "projection": lambda model: model.architecture.projection(block(model)),
    "values": lambda model: model.architecture.qkv(block(model))[-1],
    "MLP": lambda model: block(model).mlp,
    "inside the MLP": lambda model: next(block(model).mlp.children()),
    "norm": lambda model: model.architecture.mlp_norm(block(model)),
    "final norm": lambda model: model.architecture.final_norm(model.module),
    "unembedding": lambda model: model.architecture.unembedding(model.module),
}


def changed(module: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] * 1.1, *output[1:])
    return output * 1.1


def clipped(module: Any, inputs: Any, output: Any) -> Any:
    """Nothing, until a knock-out makes something large."""
    if isinstance(output, tuple):
        return (output[0].clamp(-1e5, 1e5), *output[1:])
    return output.clamp(-1e5, 1e5)


def clipped_in_place(module: Any, inputs: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).clamp_(-1e5, 1e5)


def of_other_tokens(module: Any, inputs: Any, output: Any) -> Any:
    return torch.cat((output[..., :9] + 5, output[..., 9:]), dim=-1)


@pytest.fixture
def measures() -> list[Callable[..., Any]]:
    return [tt.predict, tt.head_effects, tt.attribution, tt.qk_similarity, tt.ov_labels]


def hooked() -> list[Any]:
    """All places with all hooks; what does nothing until it is reached is slow in most places."""
    found = []
    for place in PLACES:
        for hook in (changed, clipped, clipped_in_place):
            taken = hook is changed or place in ("projection", "MLP")
            found.append(pytest.param(place, hook, marks=() if taken else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("place", "hook"), hooked())
def test_hooks_that_act_are_refused_by_name(place: str, hook: Any, model, prompts, measures):
    module = PLACES[place](model)
    path = next(path for path, part in model.module.named_modules() if part is module)
    expected = tt.head_effects(model, prompts).margin_drop.values
    handle = module.register_forward_hook(hook)
    for measure in measures:
        with pytest.raises(
            tt.errors.CheckError, match=rf"forward hook \S+{hook.__name__} on {path}"
        ):
            measure(model, prompts)
    assert list(module._forward_hooks.values()) == [hook]
    handle.remove()
    np.testing.assert_array_equal(tt.head_effects(model, prompts).margin_drop, expected)


def test_a_hook_on_tokens_that_are_no_labels(model, prompts) -> None:
    model.module.lm_head.register_forward_hook(of_other_tokens)
    with pytest.raises(tt.errors.CheckError, match="of_other_tokens on lm_head"):
        tt.head_effects(model, prompts)


def test_a_hook_hidden_by_wraps(model, prompts) -> None:
    module = block(model).mlp
    module.register_forward_hook(functools.wraps(torch.relu)(lambda m, a, o: o * 2))
    with pytest.raises(tt.errors.CheckError, match="forward hook"):
        tt.head_effects(model, prompts)


def test_hooks_under_no_grad_are_a_users_too(model, prompts) -> None:
    block(model).mlp.register_forward_hook(torch.no_grad()(changed))
    with pytest.raises(tt.errors.CheckError, match=r"test_state\.changed"):
        tt.head_effects(model, prompts)


def test_a_pre_hook_that_acts(model, prompts) -> None:
    projection = model.architecture.projection(block(model))
    projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(tt.errors.CheckError, match="forward pre-hook"):
        tt.predict(model, prompts)


@pytest.fixture
def on_every_module() -> Iterator[None]:
    kind = torch.nn.modules.module.register_module_forward_hook

    def twice(module: Any, inputs: Any, output: Any) -> Any:
        return output * 2 if "MLP" in type(module).__name__ else None

    handle = kind(twice)
    yield
    handle.remove()


def test_a_global_hook_names_where_it_acts(model, prompts, on_every_module: None) -> None:
    with pytest.raises(tt.errors.CheckError, match=r"twice on every module, acting on \S+\.mlp"):
        tt.predict(model, prompts)


def test_what_a_hook_does_before_the_first_block_is_measured(model, prompts) -> None:
    embedding = model.module.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output * 1.2)
    found = tt.analyze(model, prompts)
    expected = plain_margins(model, prompts)
    np.testing.assert_allclose(found.predictions.margin, expected, atol=1e-4)
    assert "on" in json.loads(found.predictions.attrs["interventions"])[0]


def test_observers_see_plain_forwards_only(model, prompts) -> None:
    expected = everything(model, prompts)
    seen: list[int] = []
    whole: list[int] = []

    def observe(module: Any, inputs: Any, output: Any) -> Any:
        seen.append(output.shape[1])
        return output

    block(model).mlp.register_forward_hook(observe)
    model.module.register_forward_hook(lambda module, inputs, output: whole.append(1))
    same(expected, everything(model, prompts), 0)
    assert len(seen) == len(whole)
    assert set(seen) <= {1, *map(int, prompts.lengths)}  # one is the probe's


def test_a_hook_that_fails_leaves_everything(model, prompts) -> None:
    expected = tt.predict(model, prompts).margin.values
    model.module.train()
    module = block(model).mlp

    def fail(module: Any, inputs: Any) -> None:
        raise ValueError("no")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no"):
        tt.head_effects(model, prompts)
    assert list(module._forward_pre_hooks.values()) == [fail]
    assert all(part.training for part in model.module.modules())
    handle.remove()
    np.testing.assert_array_equal(tt.predict(model, prompts).margin, expected)


@pytest.mark.parametrize("undo", ["delete", "put back", "bind the class's"])
def test_a_replaced_forward(undo: str, model, prompts) -> None:
    expected = everything(model, prompts)
    mlp = block(model).mlp
    original = mlp.forward

    def halved(x: torch.Tensor) -> torch.Tensor:
        return original(x) / 2

    def other(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    for method in (halved, other, functools.wraps(original)(halved)):
        mlp.forward = method
        found = tt.predict(model, prompts)
        np.testing.assert_allclose(found.margin, plain_margins(model, prompts), atol=1e-4)
        path = next(path for path, part in model.module.named_modules() if part is mlp)
        with pytest.raises(tt.errors.CheckError, match=rf"forward \S+ on {path}"):
            tt.head_effects(model, prompts)
        again = tt.load(model.module, tokenizer=byte_level())
        np.testing.assert_array_equal(tt.predict(again, prompts).margin, found.margin)
        if undo == "delete":
            del mlp.forward
        elif undo == "put back":
            mlp.forward = original
        else:
            mlp.forward = type(mlp).forward.__get__(mlp)
        same(expected, everything(model, prompts), 1e-6)


def test_an_nnsight_edit_is_refused_until_it_is_cleared(model, prompts) -> None:
    expected = everything(model, prompts)
    mlp = model.architecture.layers(model.traced)[1].mlp
    with model.traced.edit(inplace=True):
        mlp.output = mlp.output.clamp(-1e5, 1e5)  # nothing in the clean run
    line = test_an_nnsight_edit_is_refused_until_it_is_cleared.__code__.co_firstlineno + 4
    target = [(1, 0)]
    measures: list[Callable[[Any, Any], Any]] = [
        tt.head_effects,
        tt.analyze,
        lambda m, p: tt.edge_effects(m, p, None, target),
        lambda m, p: tt.score_parts(m, p, target),
    ]
    for measure in measures:
        with pytest.raises(tt.errors.CheckError, match=rf"nnsight edit at test_state\.py:{line}"):
            measure(model, prompts)
    told = tt.predict(model, prompts).attrs["interventions"]
    assert json.loads(told) == [f"nnsight edit at test_state.py:{line}"]
    model.traced.clear_edits()
    same(expected, everything(model, prompts), 0)
    assert json.loads(tt.predict(model, prompts).attrs["interventions"]) == []


def test_an_edit_of_tokens_that_are_no_labels(model, prompts) -> None:
    """Log-probabilities depend on them; what heads write would be unembedded without the edit."""
    with model.traced.edit(inplace=True):
        model.traced.lm_head.output[..., :9] += 5
    with pytest.raises(tt.errors.CheckError, match="nnsight edit"):
        tt.attribution(model, prompts)


def test_a_method_of_the_class_changed_after_loading(
    model, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tt.predict(model, prompts).margin.values
    kind = type(model.architecture.mlp(block(model)))
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 3 * own(self, x))
    found = tt.predict(model, prompts).margin.values
    twin = hf_model(name_of(model))
    twin = tt.load(twin, tokenizer=byte_level())
    np.testing.assert_allclose(found, plain_margins(twin, prompts), rtol=0, atol=1e-4)
    assert np.abs(found - before).max() > 1e-3
    monkeypatch.undo()
    np.testing.assert_allclose(tt.predict(model, prompts).margin.values, before, rtol=0, atol=1e-5)


def share_an_mlp(module: Any) -> None:
    module.model.layers[1].mlp = module.model.layers[2].mlp


def lose_a_layer(module: Any) -> None:
    del module.model.layers[1]


def fewer_by_configuration(module: Any) -> None:
    module.config.num_hidden_layers = 2


@pytest.mark.parametrize("change", [share_an_mlp, lose_a_layer, fewer_by_configuration])
def test_another_structure_is_refused(change: Callable[[Any], None]) -> None:
    model = tt.load(hf_model("llama-grouped"), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=1, n=3, seed=4)
    change(model.module)
    with pytest.raises(tt.errors.ModelError, match="load the model again"):
        tt.predict(model, prompts)
    with pytest.raises(tt.errors.ModelError, match="load the model again"):
        tt.head_effects(model, prompts)


def test_a_function_replaced_after_a_measure(
    model, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tt.predict(model, prompts)["margin"]
    own = torch.nn.functional.embedding

    def mixed(*arguments: Any, **options: Any) -> torch.Tensor:
        out = own(*arguments, **options)
        return out - out.mean(0, keepdim=True) / 2

    monkeypatch.setattr(torch.nn.functional, "embedding", mixed)
    with pytest.raises(tt.errors.CheckError, match="other logits than alone"):
        tt.predict(model, prompts)
    monkeypatch.undo()
    np.testing.assert_array_equal(tt.predict(model, prompts)["margin"], before)


def test_a_backward_hook_does_not_reach_gradients(model, prompts) -> None:
    before = tt.attribution_patching(model, prompts)
    block(model).register_full_backward_hook(lambda m, given, out: tuple(3 * x for x in given))
    found = tt.attribution_patching(model, prompts)
    np.testing.assert_allclose(found.margin_drop, before.margin_drop, rtol=0, atol=1e-6)
    assert "backward hook" in found.attrs["interventions"]


def test_a_users_forward_beside_a_proof_is_not_touched(
    model, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook of the second forward holds in its own thread alone."""
    from twotower.sweep import second_forward

    ids = torch.tensor(prompts.token_id[0][prompts.token_id[0] >= 0])[None]
    expected, seen = model.module(ids).logits, []
    with second_forward._without(model, tt.Head(1, 2)):
        thread = threading.Thread(target=lambda: seen.append(model.module(ids).logits))
        thread.start()
        thread.join()
        assert not torch.equal(model.module(ids).logits, expected)
    assert torch.equal(seen[0], expected)


def test_another_thread_may_run_the_model_during_a_measure(model, prompts) -> None:
    expected = everything(model, prompts)
    ids = torch.tensor(prompts.token_id[0][prompts.token_id[0] >= 0])[None]
    logits, own, seen, hooked = model.module(ids).logits, threading.get_ident(), [], []

    def beside(module: torch.nn.Module, given: Any, out: Any) -> None:
        if threading.get_ident() != own:
            hooked.append(out)
            return
        thread = threading.Thread(target=lambda: seen.append(model.module(ids).logits))
        thread.start()
        thread.join()

    block(model).register_forward_hook(beside)
    same(expected, everything(model, prompts), 0)
    assert seen
    assert len(hooked) == len(seen)
    assert all(torch.equal(found, logits) for found in seen)


def test_a_default_device_does_not_matter(model, prompts) -> None:
    expected = everything(model, prompts)
    with torch.device("meta"):
        same(expected, everything(model, prompts), 0)


@pytest.mark.parametrize("take", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_loaded_model_is_not_copied(model, take: Callable[[Any], Any]) -> None:
    with pytest.raises(tt.errors.ModelError, match=r"copy.deepcopy\(model.module\)"):
        take(model)


def test_several_interventions_are_counted(model, prompts) -> None:
    for layer in (0, 1):
        block(model, layer).register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(tt.errors.CheckError, match=r"\(2 in all\)"):
        tt.predict(model, prompts)
