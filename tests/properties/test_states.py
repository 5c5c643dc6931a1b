"""Whatever users do to their model between measures: the numbers are right, or refused by name.

A machine plays such a user, in any order. After every step each measure equals transformers' own
forward in the same state (`plain.py`), or is refused with the name of what is in force; and it
leaves everything as it was.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import peft
import pytest
import torch
from acts import CHANGES, EDITS, OBSERVERS, global_hook, hook_on, replaced_forward
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft.tuners.tuners_utils import BaseTunerLayer
from plain import Plain, conditions, evaluating
from settings import N, examples
from tiny import TWO, byte_level, hf_model
from transformers import AutoModelForCausalLM

import twotower as tt

STEPS = 10
"""Of one user; a thousand steps are a hundred users."""

USERS = N // 3 or 5

PARTS = {
    "gpt2": ["attn", "attn.c_attn", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.act", "ln_1", "ln_2"],
    "llama-grouped": [
        "self_attn",
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        "mlp",
        "mlp.up_proj",
        "mlp.act_fn",
        "input_layernorm",
        "post_attention_layernorm",
    ],
}
OUTSIDE = {
    "gpt2": ["", "transformer", "transformer.wte", "transformer.drop", "transformer.ln_f"],
    "llama-grouped": ["", "model", "model.embed_tokens", "model.norm"],
}
LAYERS = {"gpt2": "transformer.h", "llama-grouped": "model.layers"}
TARGETS = {
    "gpt2": [["c_attn"], ["c_proj"], ["c_attn", "c_fc", "c_proj"]],
    "llama-grouped": [["q_proj", "v_proj"], ["o_proj"], ["k_proj", "o_proj", "down_proj"]],
}
ALLOWED = {torch.float32: 2e-4, torch.float64: 2e-4, torch.bfloat16: 6e-2}
"""Errors, relative to the largest number of the kind."""


def fresh(name: str, seed: int) -> Any:
    """A random model of two layers with dropout, ready to be trained."""
    config = hf_model(name).config
    if name == "gpt2":
        config.n_layer = 2
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.1
    else:
        config.num_hidden_layers, config.attention_dropout = 2, 0.1
        config.layer_types = None
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for label, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_((0 if label.endswith("bias") else 1) + 0.2 * noise)
            else:
                parameter.copy_(0.18 * noise)
    return module


@cache
def other_weights(name: str, seed: int) -> dict[str, torch.Tensor]:
    return fresh(name, seed).state_dict()


@cache
def some_prompts(name: str) -> tt.Prompts:
    model = tt.load(hf_model(name), tokenizer=byte_level())
    return tt.build_prompts(model, TWO, shots=1, n=2, seed=1)


class User(RuleBasedStateMachine):
    """A user with a model of their own."""

    @initialize(name=st.sampled_from(sorted(PARTS)), seed=st.integers(0, 9), training=st.booleans())
    def load(self, name: str, seed: int, training: bool) -> None:
        self.name, self.module = name, fresh(name, seed).train(training)
        self.model = tt.load(self.module, tokenizer=byte_level())
        self.prompts = some_prompts(name)
        self.loaded = self.contents()
        self.hooks: list[tuple[Any, str]] = []
        self.undo: dict[str, Callable[[], None]] = {}
        self.edits = 0
        self.adapters: Any = None
        self.surroundings = "none"
        self.few = False
        self.rng = np.random.default_rng(seed)

    def teardown(self) -> None:
        for handle, _ in getattr(self, "hooks", ()):
            handle.remove()

    # ---- training and weights ------------------------------------------------------------

    @rule(kind=st.sampled_from(["sgd", "adam", "foreach"]), keep=st.booleans())
    def train(self, kind: str, keep: bool) -> None:
        learned = [p for p in self.module.parameters() if p.requires_grad]
        if not learned or self.edits:
            return
        optimizer: Any = {
            "sgd": lambda: torch.optim.SGD(learned, lr=0.02),
            "adam": lambda: torch.optim.Adam(learned, lr=0.005, foreach=False),
            "foreach": lambda: torch.optim.AdamW(learned, lr=0.005, foreach=True),
        }[kind]()
        ids = torch.randint(0, 700, (2, 9))
        self.module(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if not keep:
            optimizer.zero_grad()

    @precondition(lambda self: self.adapters is None)
    @rule(seed=st.integers(0, 9))
    def load_other_weights(self, seed: int) -> None:
        self.module.load_state_dict(other_weights(self.name, seed))

    @rule(training=st.booleans(), data=st.data())
    def change_flags(self, training: bool, data: Any) -> None:
        parts = [self.module] * 10 + list(self.module.modules())
        parts[data.draw(st.integers(0, len(parts) - 1))].train(training)

    def weight(self, data: Any) -> tuple[Any, torch.nn.Parameter]:
        """A parameter and the module that holds it."""
        found = [(part, p) for part in self.module.modules() for p in part._parameters.values()]
        found = [(part, p) for part, p in found if p is not None]
        return found[data.draw(st.integers(0, len(found) - 1))]

    @rule(data=st.data(), how=st.sampled_from(["version", "data", "columns", "few", "replace"]))
    def edit_weights(self, data: Any, how: str) -> None:
        part, weight = self.weight(data)
        if how == "version":
            with torch.no_grad():
                weight.mul_(1.25)
        elif how == "data":
            weight.data *= 1.25
        elif how == "columns":
            with torch.no_grad():
                weight[..., :12] = 0
        elif how == "few":
            weight.data.view(-1)[3:5] += 0.5
            self.few = True
        else:
            name = next(name for name, p in part._parameters.items() if p is weight)
            setattr(part, name, torch.nn.Parameter(weight.detach() * 1.25, weight.requires_grad))

    # ---- dtypes and kernels --------------------------------------------------------------

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        if dtype is torch.float64:  # padding makes NaN under transformers' eager kernel there
            self.module.set_attn_implementation("sdpa")
        self.module.to(dtype)

    @rule(kernel=st.sampled_from(["eager", "sdpa"]))
    def switch_kernel(self, kernel: str) -> None:
        if self.module.dtype is not torch.float64:
            self.model.module.set_attn_implementation(kernel)

    # ---- hooks, methods, edits -----------------------------------------------------------

    @rule(
        data=st.data(),
        change=st.sampled_from(CHANGES + OBSERVERS * 2),
        before=st.booleans(),
        options=st.booleans(),
        first=st.booleans(),
    )
    def add_hook(self, data: Any, change: Any, before: bool, options: bool, first: bool) -> None:
        path = self.path(data)
        handle = hook_on(self.module.get_submodule(path), change, before, options, first)
        self.hooks.append((handle, f"on {path or 'the model'}"))

    @rule(change=st.sampled_from(CHANGES + OBSERVERS), before=st.booleans(), data=st.data())
    def add_global_hook(self, change: Any, before: bool, data: Any) -> None:
        kind = type(self.module.get_submodule(self.path(data)))
        self.hooks.append((global_hook(kind, change, before), "on every module"))

    def path(self, data: Any) -> str:
        layer = LAYERS[self.name]
        inside = [f"{layer}.{i}{f'.{x}'}" for i in (0, 1) for x in PARTS[self.name]]
        paths = [*inside, f"{layer}.0", f"{layer}.1", *OUTSIDE[self.name], "lm_head"]
        return data.draw(st.sampled_from(paths))

    @precondition(lambda self: self.hooks)
    @rule(every=st.booleans())
    def remove_hooks(self, every: bool) -> None:
        for _ in range(len(self.hooks) if every else 1):
            self.hooks.pop()[0].remove()

    @rule(
        part=st.sampled_from(["mlp", "norm", "block"]),
        how=st.sampled_from(["around", "wrapped", "instead"]),
        change=st.sampled_from(CHANGES),
    )
    def replace_forward(self, part: str, how: str, change: Any) -> None:
        block = self.model.architecture.layers(self.module)[1]
        module = {"mlp": block.mlp, "norm": self.model.architecture.mlp_norm(block)}.get(
            part, block
        )
        if part == "block" and how == "instead":
            return
        if part not in self.undo:
            self.undo[part] = replaced_forward(module, how, change)

    @precondition(lambda self: self.undo)
    @rule()
    def put_forward_back(self) -> None:
        self.undo.popitem()[1]()

    @rule(name=st.sampled_from(sorted(EDITS)))
    def add_edit(self, name: str) -> None:
        self.model.look()  # nnsight itself finds replaced modules only when it is told to
        EDITS[name](self.model)
        self.edits += 1

    @precondition(lambda self: self.edits)
    @rule()
    def clear_edits(self) -> None:
        self.model.traced.clear_edits()
        self.edits = 0

    # ---- adapters ------------------------------------------------------------------------

    @precondition(lambda self: self.adapters is None and not self.undo)
    @rule(data=st.data(), inject=st.booleans())
    def add_adapters(self, data: Any, inject: bool) -> None:
        targets = data.draw(st.sampled_from(TARGETS[self.name]))
        config = peft.LoraConfig(
            target_modules=targets,
            r=3,
            lora_dropout=0.1,
            init_lora_weights=False,
            fan_in_fan_out=self.name == "gpt2",
        )
        if inject:
            self.adapters = peft.inject_adapter_in_model(config, self.module)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks in a deprecated way
                self.adapters = peft.get_peft_model(self.module, config)
            self.adapters.add_adapter("second", config)

    @precondition(lambda self: self.adapters is not None)
    @rule(how=st.sampled_from(["on", "off", "first", "second", "scale", "merge", "unmerge"]))
    def change_adapters(self, how: str) -> None:
        for layer in self.module.modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if how in ("on", "off"):
                layer.enable_adapters(how == "on")
            elif how == "first":
                layer.set_adapter("default")
            elif how == "second" and "second" in layer.lora_A:
                layer.set_adapter("second")
            elif how == "scale":
                layer.scale_layer(0.5)
            elif how == "merge":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it says that they are merged already
                    layer.merge()
            elif how == "unmerge" and layer.merged:
                layer.unmerge()

    @precondition(lambda self: isinstance(self.adapters, peft.PeftModel) and not self.hooks)
    @rule(merge=st.booleans())
    def take_adapters_out(self, merge: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks in a deprecated way
            self.adapters.merge_and_unload() if merge else self.adapters.unload()
        self.adapters = None

    # ---- around a measure ----------------------------------------------------------------

    @rule(which=st.sampled_from(["none", "inference", "autocast", "default", "gradients"]))
    def surround(self, which: str) -> None:
        self.surroundings = which

    @contextmanager
    def surrounded(self) -> Iterator[None]:
        if self.surroundings == "inference":
            with torch.inference_mode():
                yield
        elif self.surroundings == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                yield
        elif self.surroundings == "gradients":
            with torch.no_grad(), torch.enable_grad():
                yield
        elif self.surroundings == "default":
            torch.set_default_dtype(torch.float64)
            try:
                yield
            finally:
                torch.set_default_dtype(torch.float32)
        else:
            yield

    # ---- what must hold ------------------------------------------------------------------

    def in_force(self) -> list[str]:
        """How what is in force is named."""
        named = [name for _, name in self.hooks]
        named += ["forward " for _ in self.undo]
        return named + ["nnsight edit at acts.py" for _ in range(self.edits)]

    def measured(self, measure: Callable[[], Any]) -> Any:
        """A measure's result; None where it was refused by name."""
        before = conditions(self.module)
        try:
            with self.surrounded(), warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                return measure()
        except tt.errors.CheckError as error:
            refusal = str(error)
        finally:
            after = conditions(self.module)
            assert [key for key in before if before[key] != after[key]] == []
            autocast = [tt.errors.TwoTowerWarning] if self.surroundings == "autocast" else []
            assert [one.category for one in given] == autocast
        assert any(name in refusal for name in self.in_force()), refusal
        return None

    @invariant()
    def every_measure_is_right_or_refused(self) -> None:
        model, prompts = self.model, self.prompts
        heads = [tt.Head(*self.rng.integers([2, 4])) for _ in range(2)]
        found = {
            "predict": self.measured(lambda: tt.predict(model, prompts)),
            "last": self.measured(lambda: tt.head_effects(model, prompts)),
            "all": self.measured(lambda: tt.head_effects(model, prompts, positions="all")),
            "mean": self.measured(
                lambda: tt.head_effects(model, prompts, to=tt.Mean(prompts), logprobs=False)
            ),
            "analyze": self.measured(
                lambda: tt.analyze(model, prompts, measures=["attribution", "qk", "ov"])
            ),
        }
        if not self.in_force():
            assert all(run is not None for run in found.values())
        for run in found.values():
            if run is not None:
                self.records(run)
        with evaluating(self.module):
            plain = Plain(model, prompts)
            mean = None if found["mean"] is None else plain.mean()
            for number in range(len(prompts)):
                self.compare(plain, number, heads, found, mean)

    def compare(
        self,
        plain: Plain,
        number: int,
        heads: list[tt.Head],
        found: Any,
        mean: torch.Tensor | None,
    ) -> None:
        labels = list(self.prompts.label_ids)
        logits = plain.logits(number)
        size = float(logits.abs().max())
        clean = plain.margin(logits, number)

        def close(name: str, own: Any, expected: Any, size: float) -> None:
            error = np.abs(np.asarray(own, dtype=float) - np.asarray(expected, dtype=float)).max()
            allowed = ALLOWED[self.module.dtype] * size
            assert error <= allowed, f"{name}: {error:.3g} of {size:.3g}"

        if found["predict"] is not None:
            one = found["predict"].isel(prompt=number)
            close("logit", one.logit, logits[labels], size)
            close("logprob", one.logprob, logits.log_softmax(-1)[labels], size)
            close("margin", one.margin, clean, size)
        for where in ("last", "all"):
            if found[where] is None:
                continue
            for head in heads:
                with plain.without(head, where == "all"):
                    out = plain.logits(number)
                one = found[where].isel(prompt=number, layer=head.layer, head=head.head)
                close(where, one.margin_drop, clean - plain.margin(out, number), size)
                lost = (logits.log_softmax(-1) - out.log_softmax(-1))[labels]
                close(f"{where}, logprob", one.logprob_drop, lost, size)
        for head in [] if mean is None else heads:
            with plain.without(head, False, mean[head].to(self.module.dtype)):
                out = plain.logits(number)
            one = found["mean"].isel(prompt=number, layer=head.layer, head=head.head)
            close("mean", one.margin_drop, clean - plain.margin(out, number), size)
        if found["analyze"] is not None:
            run, length = found["analyze"], int(self.prompts.lengths[number])
            if model_kernel(self.model) == "eager":
                own = run.qk.attention.isel(prompt=number).values[..., -length:]
                close("attention", own, plain.attention(number), 1.0)
            written, carried = plain.label_logits(number)
            own = run.attribution.label_logit.isel(prompt=number).values
            close("attribution", own, written, float(np.abs(written).max()))
            own = run.ov.label_logit.isel(prompt=number).values[:, :, -length:]
            close("ov", own, carried, float(np.abs(carried).max()))

    def contents(self) -> dict[str, bytes]:
        """All weights and buffers, byte for byte."""
        every = dict(self.module.state_dict()) | dict(self.module.named_buffers())
        return {
            name: x.detach().clone().flatten().view(torch.uint8).numpy().tobytes()
            for name, x in every.items()
        }

    def records(self, run: Any) -> None:
        """What a dataset says about the state of the model."""
        about = run.attrs
        assert about["dtype"] == str(self.module.dtype).removeprefix("torch.")
        assert about["quantization"] == "none"
        assert about["attention_kernel"] == model_kernel(self.model)
        assert json.loads(about["proof"])["prompts"] >= len(self.prompts)
        changed = json.loads(about["changed_since_loading"])
        if self.contents() == self.loaded:
            assert "weights" not in changed
        elif not self.few:
            assert "weights" in changed
        assert ("hooks" in changed) == bool(self.hooks or self.undo)
        assert ("edits" in changed) == bool(self.edits)
        interventions = about["interventions"]
        assert all(name in interventions for name in self.in_force())
        assert len(json.loads(interventions)) == len(self.in_force())
        layers = [x for x in self.module.modules() if isinstance(x, BaseTunerLayer)]
        told = {one["name"]: one for one in json.loads(about["adapters"])}
        assert set(told) == {name for layer in layers for name in layer.lora_A}
        for name, one in told.items():
            assert one["active"] == sum(
                name in x.active_adapters and not x.disable_adapters for x in layers
            )
            assert one["merged"] == sum(name in x.merged_adapters for x in layers)


def model_kernel(model: tt.Model) -> str:
    return model.module.config._attn_implementation


User.TestCase.settings = settings(examples(USERS), stateful_step_count=STEPS, max_examples=USERS)
TestStates = pytest.mark.filterwarnings("error")(User.TestCase)
