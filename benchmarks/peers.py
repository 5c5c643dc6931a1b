"""twotower beside the tools that people use for the same thing today.

Every way does the same for every head of the same model on the same prompt, in a process of
its own on the same machine, one after the other. Its numbers must equal those of plain
PyTorch hooks before its time counts. The peers need an environment of their own:

    python -m venv .venv-peers
    .venv-peers/bin/pip install --constraint constraints.txt --editable '.[peers]'
    .venv-peers/bin/python benchmarks/peers.py --promote

A busy machine disturbs ways that take a minute: `--beside` takes results of runs before.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import twotower as tt
from twotower.models import Head, Model
from twotower.prompts import Prompts
from twotower.walk.batch import make_batch

TOLERANCE = 1e-3
N_SHARED = 16
"""Prompts that share their demonstrations; hooks run the first N_HOOKED of them."""
N_HOOKED = 4


class Answers:
    """Inputs of a batch of prompts, and margins of its logits."""

    def __init__(self, model: Model, prompts: Prompts) -> None:
        self.ids = list(prompts.label_ids)
        batch = make_batch(model, prompts, np.arange(len(prompts)))
        self.inputs, self.gold = batch.inputs, batch.gold

    def margin(self, logits: torch.Tensor) -> torch.Tensor:
        """(B,) of logits (B, vocabulary)."""
        labels = logits[:, self.ids].float()
        gold = self.gold.expand(len(labels))[:, None]
        others = labels.scatter(1, gold, -torch.inf).amax(dim=1)
        return labels.gather(1, gold)[:, 0] - others


def projections(model: Model) -> list[torch.nn.Module]:
    a = model.architecture
    return [a.projection(block) for block in a.layers(model.module)]


def sweep_with(
    model: Model,
    prompts: Prompts,
    run: Callable[[int, int], torch.Tensor],
    clean: torch.Tensor,
    heads: Sequence[Head] | None = None,
) -> np.ndarray:
    """Drops (B, layer, head) from one forward per head, or (B, head) of some heads.

    `run` gives the logits (B, vocabulary) of a head's knock-out.
    """
    answers = Answers(model, prompts)
    base = answers.margin(clean)
    every = heads is None
    drops = [base - answers.margin(run(*head)) for head in (model.heads if every else heads)]
    found = torch.stack(drops, dim=1)
    return (found.unflatten(1, (model.n_layers, model.n_heads)) if every else found).numpy()


def places_of(positions: str) -> slice:
    return slice(-1, None) if positions == "last" else slice(None)


def cut(z: torch.Tensor, head: int, width: int, positions: str) -> torch.Tensor:
    """z (B, T, H D) with one head set to zero."""
    z = z.clone()
    z[:, places_of(positions), head * width : (head + 1) * width] = 0
    return z


def with_hooks(
    model: Model, prompts: Prompts, positions: str, heads: Sequence[Head] | None = None
) -> np.ndarray:
    inputs = Answers(model, prompts).inputs
    modules = projections(model)

    def run(layer: int, head: int) -> torch.Tensor:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (cut(arguments[0], head, model.d_head, positions),)

        handle = modules[layer].register_forward_pre_hook(hook)
        try:
            return model.module(**inputs).logits[:, -1]
        finally:
            handle.remove()

    return sweep_with(model, prompts, run, model.module(**inputs).logits[:, -1], heads)


def with_copies(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """The procedure of Yu & Ananiadou: a copy of the model, the head's columns zeroed."""
    inputs = Answers(model, prompts).inputs

    def run(layer: int, head: int) -> torch.Tensor:
        changed = copy.deepcopy(model.module)
        block = model.architecture.layers(changed)[layer]
        weight = model.architecture.projection(block).weight
        weight[:, head * model.d_head : (head + 1) * model.d_head] = 0
        return changed(**inputs).logits[:, -1]

    return sweep_with(model, prompts, run, model.module(**inputs).logits[:, -1])


def with_traces(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """nnsight, a trace for every head."""
    inputs, root = Answers(model, prompts).inputs, model.traced
    places = [model.architecture.projection(b) for b in model.architecture.layers(root)]

    def run(layer: int, head: int) -> torch.Tensor:
        with root.trace(**inputs):
            places[layer].input = cut(places[layer].input, head, model.d_head, positions)
            logits = root.output.logits[:, -1].save()
        return logits

    return sweep_with(model, prompts, run, model.module(**inputs).logits[:, -1])


def with_invokes(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """nnsight, a trace for every layer, in it an invoke for every head.

    nnsight makes one batch of them. Without a cache: with one, several invokes are wrong.
    """
    inputs, root = Answers(model, prompts).inputs, model.traced
    places = [model.architecture.projection(b) for b in model.architecture.layers(root)]
    layers: dict[int, list[torch.Tensor]] = {}

    def run(layer: int, head: int) -> torch.Tensor:
        if layer not in layers:
            found = []
            with root.trace(use_cache=False, logits_to_keep=1) as tracer:
                for h in range(model.n_heads):
                    with tracer.invoke(inputs["input_ids"]):
                        places[layer].input = cut(places[layer].input, h, model.d_head, positions)
                        found.append(root.output.logits[:, -1].save())
            layers[layer] = found
        return layers[layer][head]

    return sweep_with(model, prompts, run, model.module(**inputs).logits[:, -1])


def with_pyvene(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """pyvene's zero intervention on one head's output, a forward per head."""
    import pyvene

    inputs = Answers(model, prompts).inputs
    where = list(range(prompts.n_positions))[places_of(positions)]
    layers: dict[int, Any] = {}

    def run(layer: int, head: int) -> torch.Tensor:
        if layer not in layers:
            one = {
                "layer": layer,
                "component": "head_attention_value_output",
                "unit": "h.pos",
                "intervention_type": pyvene.ZeroIntervention,
            }
            settings = pyvene.IntervenableConfig([one])
            layers[layer] = pyvene.IntervenableModel(settings, model=model.module)
        _, changed = layers[layer](base=inputs, unit_locations={"base": [[[[head]], [where]]]})
        return changed.logits[:, -1]

    return sweep_with(model, prompts, run, model.module(**inputs).logits[:, -1])


def with_cache(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    """All last tokens as one batch on the cached keys and values; the last position alone."""
    answers = Answers(model, prompts)
    ids, n = answers.inputs["input_ids"], len(model.heads)
    clean = model.module(input_ids=ids, logits_to_keep=1).logits[:, -1]
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
    return drops.view(1, model.n_layers, model.n_heads).numpy()


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
            whole[:, places_of(positions), head] = 0
            return whole if z.dim() == 4 else whole.flatten(-2)

        name = f"blocks.{layer}.attn.hook_z"
        return bridge.run_with_hooks(ids, fwd_hooks=[(name, hook)])[:, -1]

    return sweep_with(model, prompts, run, bridge(ids)[:, -1])


def with_twotower(model: Model, prompts: Prompts, positions: str) -> np.ndarray:
    size = len(prompts)
    with tt.set_options(batch_size=size):
        found = tt.head_effects(model, prompts, positions, logprobs=False)
    return found["margin_drop"].values


Towers = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Attention and QK scores of the last position (B, L, H, T); label logits of value-output
vectors (B, L, H, T, label)."""


def towers(model: Model, prompts: Prompts, positions: str) -> Towers:
    run = tt.analyze(model, prompts, measures=("qk", "ov"))
    qk, ov = run["qk"], run["ov"]
    return qk["attention"].values, qk["score"].values, ov["label_logit"].values


def lens_cache(model: Model, prompts: Prompts, positions: str, chosen: bool = False) -> Towers:
    """The same from run_with_cache, of everything or of what is needed alone."""
    answers, bridge, a = Answers(model, prompts), model.cache["bridge"], model.architecture
    n = range(model.n_layers)
    wanted = [f"blocks.{i}.attn.hook_{what}" for i in n for what in ("pattern", "attn_scores", "v")]
    wanted.append(f"blocks.{n[-1]}.hook_resid_post")
    keep = {"names_filter": wanted} if chosen else {}
    _, cache = bridge.run_with_cache(answers.inputs["input_ids"], **keep)
    patterns = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][:, :, -1] for i in n], dim=1)
    scores = torch.stack([cache[f"blocks.{i}.attn.hook_attn_scores"][:, :, -1] for i in n], dim=1)
    # Labels' directions behind every head, with the final norm's scale at the last position.
    end = cache[wanted[-1]][:, -1]
    scale = (end.square().mean(dim=-1) + model.config.rms_norm_eps).rsqrt()
    labels = a.unembedding(model.module).weight[answers.ids] * a.final_norm(model.module).weight
    logits = []
    for i, module in zip(n, projections(model), strict=True):
        values = cache[f"blocks.{i}.attn.hook_v"]
        values = values.reshape(*values.shape[:2], model.n_kv_heads, model.d_head)
        values = values.repeat_interleave(model.n_heads // model.n_kv_heads, dim=2)
        directions = (labels @ module.weight).unflatten(1, (model.n_heads, -1))
        found = torch.einsum("bthd,lhd->bhtl", values, directions)
        logits.append(found * scale[:, None, None, None])
    return patterns.numpy(), scores.numpy(), torch.stack(logits, dim=1).numpy()


def lens_filter(model: Model, prompts: Prompts, positions: str) -> Towers:
    return lens_cache(model, prompts, positions, chosen=True)


@dataclass(frozen=True)
class Way:
    """One way to get the same numbers.

    Attributes
    ----------
    table
        Which numbers: "last", "all", "shared" (all positions of prompts with common
        demonstrations) or "towers".
    words
        What it does.
    run
        Takes a model, prompts and positions; gives one array or more, by prompt.
    rounds
        How often it is timed; more than once after a first time.
    prompts
        How many prompts it runs.
    """

    table: str
    words: str
    run: Callable[[Model, Prompts, str], Any]
    rounds: int = 1
    prompts: int = 1


HOOKS, LENS = "plain PyTorch hooks, a forward per head", "TransformerLens, run_with_hooks per head"
TRACES, INVOKES = "nnsight, a trace per head", "nnsight, a trace per layer, an invoke per head"
PYVENE = "pyvene, a forward per head"
WAYS = {
    "hooks": Way("last", HOOKS, with_hooks),
    "twotower": Way("last", "twotower", with_twotower, 5),
    "cache": Way("last", "all last tokens as one batch on the KV cache", with_cache, 5),
    "traces": Way("last", TRACES, with_traces),
    "invokes": Way("last", INVOKES, with_invokes),
    "pyvene": Way("last", PYVENE, with_pyvene),
    "lens": Way("last", LENS, with_lens),
    "hooks-all": Way("all", HOOKS, with_hooks),
    "twotower-all": Way("all", "twotower", with_twotower),
    "traces-all": Way("all", TRACES, with_traces),
    "invokes-all": Way("all", INVOKES, with_invokes),
    "pyvene-all": Way("all", PYVENE, with_pyvene),
    "lens-all": Way("all", LENS, with_lens),
    "copies": Way("all", "the authors' procedure: a copy of the model per head", with_copies),
    "hooks-shared": Way(
        "shared", f"{HOOKS}, on a batch of {N_HOOKED} prompts", with_hooks, prompts=N_HOOKED
    ),
    "twotower-shared": Way(
        "shared", f"twotower, on a batch of {N_SHARED} prompts", with_twotower, prompts=N_SHARED
    ),
    "towers": Way("towers", "twotower, analyze(measures=('qk', 'ov'))", towers, 5),
    "lens-cache": Way("towers", "TransformerLens, run_with_cache", lens_cache, 5),
    "lens-filter": Way(
        "towers", "TransformerLens, run_with_cache of what is needed alone", lens_filter, 5
    ),
}
REFERENCE = {"last": "hooks", "all": "hooks-all", "shared": "hooks-shared", "towers": "towers"}


@torch.no_grad()
def measure(name: str, options: argparse.Namespace, numbers: Path) -> dict[str, Any]:
    """One way, in this process."""
    way = WAYS[name]
    torch.set_num_threads(options.threads)
    model = tt.load(options.model)
    prompts = prompts_of(model, way, options.shots)
    inputs = Answers(model, prompts).inputs
    repeats = max(3, 16 // len(prompts))

    def plain(module: torch.nn.Module = model.module) -> float:
        """Least seconds of a plain forward of the batch."""
        return min(common.seconds(lambda: module(**inputs)) for _ in range(repeats))

    plain()
    units, took = [plain()], []
    found: list[Any] = []
    with common.Memory(model.device) as memory:
        if "lens" in name:
            model.cache["bridge"] = lens(model)
        positions = "last" if way.table == "last" else "all"
        if way.rounds > 1:
            way.run(model, prompts, positions)
        for _ in range(way.rounds):
            took.append(common.seconds(lambda: found.append(way.run(model, prompts, positions))))
            if "lens" not in name:  # which has changed the model's modules by now
                units.append(plain())
    if "lens" in name:
        fresh = tt.load(options.model).module
        plain(fresh)
        units.append(plain(fresh))
    np.savez(numbers / f"{name}.npz", *(found[0] if isinstance(found[0], tuple) else found[:1]))
    return {
        "table": way.table,
        "way": way.words,
        "seconds": round(min(took) / len(prompts), 3),
        "plain_seconds": round(min(units) / len(prompts), 4),
        "peak_MiB_above_plain": round(memory.peak / 2**20, 1),
        "prompts": len(prompts),
        "tokens": round(float(prompts.lengths.mean()), 1),
    }


def prompts_of(model: Model, way: Way, shots: int) -> Prompts:
    task = tt.load_task("animals-cities")
    if way.table != "shared":
        return tt.build_prompts(model, task, shots=shots, n=1)
    many = tt.build_prompts(
        model, task, shots=shots, n=N_SHARED, shared_demonstrations=True, permute_labels=False
    )
    return many[: way.prompts]


def difference(numbers: Path, name: str, reference: str) -> float:
    """Largest difference of any array of a way from the reference, over its largest value."""
    found, expected = (np.load(numbers / f"{x}.npz") for x in (name, reference))
    worst = 0.0
    for key in expected.files:
        wanted = expected[key]
        got = found[key][: len(wanted)]
        wanted = wanted[: len(got)]
        worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    return worst


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0], "peers")
    parser.add_argument("--shots", type=int, default=9)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--beside", nargs="+", type=Path, default=[], help="runs before; a way's fastest counts"
    )
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
                rows[name] = {"table": WAYS[name].table, "way": WAYS[name].words, "failed": error}
                print(f"{name:15s} failed: {error}", flush=True)
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1])
            reference = REFERENCE[row["table"]]
            if reference in rows and reference != name:
                error = difference(numbers, name, reference)
                row["error"] = float(f"{error:.1e}")
                if error > TOLERANCE:
                    sys.exit(f"{name} gives other numbers than the reference: {error:.1e}")
            rows[name] = row
            print(f"{name:15s} {json.dumps(row)}", flush=True)
    runs = [rows, *(json.loads(path.read_text())["ways"] for path in options.beside)]
    packages = ("torch", "transformers", "nnsight", "transformer-lens", "pyvene")
    result = {
        "machine": common.machine(options.threads),
        "versions": {name: metadata.version(name) for name in packages},
        "model": options.model,
        "heads": heads_of(options.model),
        "ways": in_forwards(
            {name: fastest(name, runs) for name in WAYS if any(name in x for x in runs)}
        ),
    }
    common.finish(result, "peers", options)


def fastest(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A way's row in the run in which it took least; a failed one if there is no other."""
    found = [rows[name] for rows in runs if name in rows]
    return min(found, key=lambda row: row.get("seconds", np.inf))


def in_forwards(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows with their time in plain forwards of the same prompts, the fastest of any process."""
    done = [row for row in rows.values() if "seconds" in row]
    for row in done:
        alike = [x for x in done if (x["table"] == "shared") == (row["table"] == "shared")]
        plain = min(x["plain_seconds"] for x in alike)
        row["forwards"] = round(row["seconds"] / plain, 2)
    return rows


def heads_of(name: str) -> int:
    return len(tt.load(name, check=False).heads)


if __name__ == "__main__":
    main()
