"""twotower beside the tools that people use for the same thing today.

Every way knocks out every head of the same model on the same prompt, in a process of its
own on the same machine, one after the other. Its numbers must equal those of plain PyTorch
hooks before its time counts. The peers need an environment of their own:

    python -m venv .venv-peers
    .venv-peers/bin/pip install --constraint constraints.txt --editable '.[peers]'
    .venv-peers/bin/python benchmarks/peers.py --promote
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import twotower as tt
from twotower.measures.batch import make_batch
from twotower.models import Model
from twotower.prompts import Prompts

TOLERANCE = 1e-3
Sweep = Callable[[Model, Prompts, str], np.ndarray]
"""Takes "last" or "all" positions; gives (layer, head) drops of the margin."""


class Answers:
    """Margins of one prompt."""

    def __init__(self, model: Model, prompts: Prompts) -> None:
        self.ids = list(prompts.label_ids)
        self.gold = int(prompts.gold_index[0])
        self.inputs = make_batch(model, prompts, np.array([0])).inputs

    def margin(self, logits: torch.Tensor) -> torch.Tensor:
        """(...) of logits (..., vocabulary)."""
        labels = logits[..., self.ids].float()
        others = [i for i in range(len(self.ids)) if i != self.gold]
        return labels[..., self.gold] - labels[..., others].amax(dim=-1)


def projections(model: Model) -> list[torch.nn.Module]:
    a = model.architecture
    return [a.projection(block) for block in a.layers(model.module)]


def loop(
    model: Model, prompts: Prompts, run: Callable[[int, int], torch.Tensor], clean: torch.Tensor
) -> np.ndarray:
    """Drops from one forward per head; `run` gives logits (vocabulary,)."""
    answers = Answers(model, prompts)
    base = answers.margin(clean)
    drops = [float(base - answers.margin(run(*head))) for head in model.heads]
    return np.array(drops).reshape(model.n_layers, model.n_heads)


def cut(z: torch.Tensor, head: int, width: int, positions: str) -> torch.Tensor:
    """z (B, T, H D) with one head set to zero."""
    z = z.clone()
    z[
        :,
        slice(-1, None) if positions == "last" else slice(None),
        head * width : (head + 1) * width,
    ] = 0
    return z


def with_hooks(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    inputs = Answers(model, prompts).inputs
    modules = projections(model)

    def run(layer: int, head: int) -> torch.Tensor:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (cut(arguments[0], head, model.d_head, positions),)

        handle = modules[layer].register_forward_pre_hook(hook)
        try:
            return model.module(**inputs).logits[0, -1]
        finally:
            handle.remove()

    return loop(model, prompts, run, model.module(**inputs).logits[0, -1])


def with_copies(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """The procedure of Yu & Ananiadou: a copy of the model, the head's columns zeroed."""
    inputs = Answers(model, prompts).inputs

    def run(layer: int, head: int) -> torch.Tensor:
        changed = copy.deepcopy(model.module)
        block = model.architecture.layers(changed)[layer]
        weight = model.architecture.projection(block).weight
        weight[:, head * model.d_head : (head + 1) * model.d_head] = 0
        return changed(**inputs).logits[0, -1]

    return loop(model, prompts, run, model.module(**inputs).logits[0, -1])


def with_traces(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """nnsight, a trace for every head."""
    inputs, root = Answers(model, prompts).inputs, model.traced
    places = [model.architecture.projection(b) for b in model.architecture.layers(root)]

    def run(layer: int, head: int) -> torch.Tensor:
        with root.trace(**inputs):
            places[layer].input = cut(places[layer].input, head, model.d_head, positions)
            logits = root.output.logits[0, -1].save()
        return logits

    return loop(model, prompts, run, model.module(**inputs).logits[0, -1])


def with_cache(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """All last tokens as one batch on the cached keys and values; the last position alone."""
    answers = Answers(model, prompts)
    ids, n = answers.inputs["input_ids"], len(model.heads)
    clean = model.module(input_ids=ids, logits_to_keep=1).logits[0, -1]
    cached = model.module(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    cached.batch_repeat_interleave(n)
    handles = []
    for layer, module in enumerate(projections(model)):

        def hook(_m: Any, arguments: tuple[Any, ...], layer: int = layer) -> tuple[Any, ...]:
            z = arguments[0].unflatten(-1, (model.n_heads, -1)).clone()
            rows = torch.arange(model.n_heads)
            z[layer * model.n_heads + rows, :, rows] = 0
            return (z.flatten(-2),)

        handles.append(module.register_forward_pre_hook(hook))
    last = ids[:, -1:].expand(n, -1)
    logits = model.module(input_ids=last, past_key_values=cached, use_cache=True).logits[:, -1]
    for handle in handles:
        handle.remove()
    drops = answers.margin(clean) - answers.margin(logits)
    return drops.view(model.n_layers, model.n_heads).numpy()


def lens(model: Model) -> Any:
    """TransformerLens's bridge around the same weights."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        model.module.config._name_or_path,
        hf_model=model.module,
        tokenizer=model.tokenizer,
        device="cpu",
    )


def with_lens(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    ids, bridge = Answers(model, prompts).inputs["input_ids"], model.cache["bridge"]

    def run(layer: int, head: int) -> torch.Tensor:
        def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            whole = z if z.dim() == 4 else z.unflatten(-1, (model.n_heads, -1))
            whole[:, slice(-1, None) if positions == "last" else slice(None), head] = 0
            return whole if z.dim() == 4 else whole.flatten(-2)

        name = f"blocks.{layer}.attn.hook_z"
        return bridge.run_with_hooks(ids, fwd_hooks=[(name, hook)])[0, -1]

    return loop(model, prompts, run, bridge(ids)[0, -1])


def with_twotower(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    return tt.head_effects(model, prompts, positions, logprobs=False)["margin_drop"].values[0]


def towers(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """Attention, QK and value-output vectors of all heads."""
    run = tt.analyze(model, prompts, measures=("qk", "ov"))
    return run["qk"]["attention"].values[0]


def lens_cache(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """The same from run_with_cache: attention patterns, and values for the rest."""
    ids, bridge = Answers(model, prompts).inputs["input_ids"], model.cache["bridge"]
    _, cache = bridge.run_with_cache(ids)
    patterns = [cache[f"blocks.{n}.attn.hook_pattern"][0, :, -1] for n in range(model.n_layers)]
    return torch.stack(patterns).numpy()


WAYS: dict[str, tuple[str, str, Sweep]] = {
    # name: what is compared, words, function
    "hooks": ("last", "plain PyTorch hooks, a forward per head", with_hooks),
    "twotower": ("last", "twotower", with_twotower),
    "cache": ("last", "all last tokens as one batch on the KV cache", with_cache),
    "traces": ("last", "nnsight, a trace per head", with_traces),
    "copies": ("all", "the authors' procedure: a copy of the model per head", with_copies),
    "lens": ("last", "TransformerLens 4.3, run_with_hooks per head", with_lens),
    "hooks-all": ("all", "plain PyTorch hooks, a forward per head", with_hooks),
    "twotower-all": ("all", "twotower", with_twotower),
    "lens-all": ("all", "TransformerLens 4.3, run_with_hooks per head", with_lens),
    "towers": ("towers", "twotower, analyze(measures=('qk', 'ov'))", towers),
    "lens-cache": ("towers", "TransformerLens 4.3, run_with_cache", lens_cache),
}
REFERENCE = {"last": "hooks", "all": "hooks-all", "towers": "towers"}
FAST = ("twotower", "cache", "towers", "lens-cache")


@torch.no_grad()
def measure(name: str, options: argparse.Namespace, numbers: Path) -> dict[str, Any]:
    """One way, in this process."""
    positions, words, sweep = WAYS[name]
    torch.set_num_threads(options.threads)
    model = tt.load(options.model)
    prompts = tt.build_prompts(model, tt.load_task("animals-cities"), shots=options.shots, n=1)
    inputs = make_batch(model, prompts, np.array([0])).inputs

    def plain() -> None:
        for _ in range(8):
            model.module(**inputs)

    plain()
    own = common.seconds(plain) / 8
    if name.startswith("lens"):
        # It changes the model's modules in place: plain forwards are timed before.
        model.cache["bridge"] = lens(model)
    if name in FAST:
        sweep(model, prompts, positions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took, units, found = [], [], []
    for _ in range(5 if name in FAST else 1):
        took.append(common.seconds(lambda: found.append(sweep(model, prompts, positions))))
        units.append(own if name.startswith("lens") else common.seconds(plain) / 8)
    np.save(numbers / f"{name}.npy", found[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "positions": positions,
        "way": words,
        "seconds": round(float(np.median(took)), 3),
        "forwards": round(float(np.median(np.array(took) / np.array(units))), 2),
        "plain_seconds": round(float(np.median(units)), 4),
        "peak_MiB_above_plain": round((peak - before) / 1024, 1),
        "tokens": prompts.n_positions,
    }


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "peers")
    parser.add_argument("--shots", type=int, default=9)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options, options.numbers)))
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder)
        for name in options.ways:
            command = [sys.executable, __file__, "--way", name, "--numbers", folder]
            command += ["--model", options.model, "--threads", str(options.threads)]
            command += ["--shots", str(options.shots)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                error = done.stderr.strip().splitlines()[-1][:300]
                rows[name] = {"positions": WAYS[name][0], "way": WAYS[name][1], "failed": error}
                print(f"{name:13s} failed: {error}", flush=True)
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1])
            reference = numbers / f"{REFERENCE[row['positions']]}.npy"
            if reference.exists():
                expected, found = np.load(reference), np.load(numbers / f"{name}.npy")
                error = float(np.abs(found - expected).max() / np.abs(expected).max())
                row["error"] = float(f"{error:.1e}")
                if error > TOLERANCE:
                    sys.exit(f"{name} gives other numbers than the reference: {error:.1e}")
            rows[name] = row
            print(f"{name:13s} {json.dumps(row)}", flush=True)
    packages = ("torch", "transformers", "nnsight", "transformer-lens")
    result = {
        "machine": common.machine(options.threads),
        "versions": {name: metadata.version(name) for name in packages},
        "model": options.model,
        "ways": rows,
    }
    common.finish(result, "peers", options)


if __name__ == "__main__":
    main()
