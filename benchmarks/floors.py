"""How near the sweeps come to their arithmetic floors.

The floor of a measure counts the multiplications that it cannot do without, in units of a
plain forward's, and takes them at the plain forward's own speed: the transformers model
itself on the same batch, its own attention kernel, no cache, logits of the last position.
A ratio of 1 means that a measure is as fast as a plain forward would be, had it as much
to multiply.

    python benchmarks/floors.py --promote
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, combinations
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import torch
from floor import Floor

import twotower as tt
from twotower.measures.agreement import agreement
from twotower.measures.group_effects import subset_effects
from twotower.models import Model
from twotower.prompts import Prompts
from twotower.sweep.counterfactuals import Group
from twotower.sweep.prepare import prepare_sweep
from twotower.walk.batch import Batch
from twotower.walk.batch_size import Batches
from twotower.walk.recorder import Recorder
from twotower.walk.views import End, LayerView
from twotower.walk.walk import run_batch

LABELS = ("foo", "bar", "map", "key")
LAST = {50: 20, 100: 10, 500: 2, 2000: 1}
"""Prompts by their length, for sweeps at the last position."""
SEVERAL = {50: 4, 100: 2, 500: 1}
"""The same for sweeps at several positions."""


def prompts_of(model: Model, length: int, n: int) -> Prompts:
    """Prompts of about so many tokens."""
    if length <= 300:
        task, labels, per_shot = tt.load_task("animals-cities"), LABELS[:2], 10.4
        template = "{text}: {label}\n"
    else:
        task, labels, per_shot = tt.load_task("news-topics"), LABELS, 36.5
        template = "{text}: {label}\n"
        if length > 1600:  # all the texts there are, in more words
            template, per_shot = "Text: {text}: {label}\n", 44.5
    shots = min(round(length / per_shot), min(map(len, task.texts.values())) - 1)
    return tt.build_prompts(model, task, labels, shots, n, template=template)


def first_label(prompts: Prompts) -> float:
    """Mean number of positions before the first label."""
    return float(
        np.mean(
            [np.flatnonzero(r == "label")[0] - np.flatnonzero(r != "pad")[0] for r in prompts.role]
        )
    )


def bare(model: Model, batch: Batch, recorders: list[Recorder]) -> list[Any]:
    """The walk once more without nnsight: the same recorders, fed by PyTorch's own hooks."""
    a, module = model.architecture, model.module
    found: dict[str, Any] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            found[name] = output

        return hook

    for index, block in enumerate(a.layers(module)):

        def enter(_m: Any, arguments: tuple[Any, ...]) -> None:
            found["residual"] = arguments[0]

        def attend(_m: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found["inputs"] = (arguments, named)

        def project(_m: Any, arguments: tuple[Any, ...]) -> None:
            found["z"] = arguments[0].unflatten(-1, (a.n_heads, -1))

        def leave(
            _m: Any, arguments: Any, output: Any, index: int = index, block: Any = block
        ) -> None:
            positions = a.positions(SimpleNamespace(inputs=found["inputs"]), index)
            projected = [found[f"qkv{i}"] for i in range(len(a.qkv_names))]
            q, k, v = a.split(block, projected)
            view = LayerView(
                a,
                index,
                block,
                batch.mask,
                found["residual"],
                q,
                k,
                v,
                positions,
                found["z"],
                found["z"],
            )
            view.attention_output, view.mlp_output = found["attention"], found["mlp"]
            view.attention_write, view.mlp_write = found["attention"], found["mlp"]
            for recorder in recorders:
                recorder.layer(view)

        handles.append(block.register_forward_pre_hook(enter))
        handles.append(a.attention(block).register_forward_pre_hook(attend, with_kwargs=True))
        for i, part in enumerate(a.qkv(block)):
            handles.append(part.register_forward_hook(keep(f"qkv{i}")))
        handles.append(a.projection(block).register_forward_pre_hook(project))
        handles.append(a.projection(block).register_forward_hook(keep("attention")))
        handles.append(a.mlp(block).register_forward_hook(keep("mlp")))
        handles.append(block.register_forward_hook(leave))

    def end(_m: Any, arguments: tuple[Any, ...]) -> None:
        found["end"] = arguments[0]

    handles.append(a.final_norm(module).register_forward_pre_hook(end))
    with torch.no_grad():
        logits = module(**batch.inputs).logits[:, -1].float()
        for handle in handles:
            handle.remove()
        last = found["end"][:, -1]
        after = End(last, logits, a.final_norm(module), a.unembedding(module), last.dtype)
        return [recorder.finish(after) for recorder in recorders]


def last_position(
    model: Model, floor: Floor, rounds: int, lengths: Iterable[int] = tuple(LAST)
) -> list[dict[str, Any]]:
    """The sweep at the last position, for prompts of several lengths."""
    rows = []
    for length in lengths:
        prompts = prompts_of(model, length, LAST[length])
        n = len(prompts)
        mean = float(prompts.lengths.mean())
        unit, found = common.ratios(
            common.plain_of(model, prompts),
            {"sweep": lambda p=prompts: tt.head_effects(model, p, logprobs=False)},
            rounds,
        )
        least = (floor.plain(mean) + floor.rows(mean, 1)) / floor.plain(mean)
        rows.append(row("last", mean, n, unit, found["sweep"], least))
    return rows


def row(
    positions: str, mean: float, n: int, unit: float, forwards: float, least: float
) -> dict[str, Any]:
    result = {
        "positions": positions,
        "tokens": round(mean, 1),
        "prompts": n,
        "plain_seconds_per_prompt": round(unit / n, 4),
        "forwards": round(forwards, 3),
        "floor": round(least, 3),
        "ratio": round(forwards / least, 3),
    }
    print(
        f"{positions:8s} {mean:7.0f} tokens {forwards:8.2f} forwards, floor {least:8.2f}, "
        f"ratio {forwards / least:.2f}",
        flush=True,
    )
    return result


def several_positions(
    model: Model, floor: Floor, lengths: Iterable[int] = tuple(SEVERAL)
) -> list[dict[str, Any]]:
    """Sweeps at label positions and at all positions.

    Of long prompts the heads of every fifth layer, against the floor of those.
    """
    rows = []
    for length in lengths:
        n = SEVERAL[length]
        prompts = prompts_of(model, length, n)
        mean, plain = float(prompts.lengths.mean()), common.plain_of(model, prompts, shared=True)
        heads = model.heads if length < 500 else [h for h in model.heads if h.layer % 5 == 0]
        groups: list[Group] = [(head,) for head in heads]
        for positions, earlier in (("labels", first_label(prompts)), ("all", 0.0)):

            def job(prompts: Prompts = prompts, at: str = positions, groups: Any = groups) -> None:
                if len(groups) == len(model.heads):
                    tt.head_effects(model, prompts, at, logprobs=False)
                else:
                    tt.group_effects(model, prompts, groups, at)

            unit, found = common.ratios(plain, {"x": job}, 1, warm=True, repeats=5)
            least = floor.plain(mean) + floor.rows(mean, mean - earlier, groups)
            words = positions if heads == model.heads else f"{positions}, {len(heads)} heads"
            rows.append(row(words, mean, n, unit, found["x"], least / floor.plain(mean)))
    return rows


def shared_demonstrations(model: Model, floor: Floor) -> list[dict[str, Any]]:
    """A sweep at all positions of prompts that have the same demonstrations."""
    task = tt.load_task("animals-cities")
    shared = tt.build_prompts(
        model, task, shots=9, n=16, shared_demonstrations=True, permute_labels=False
    )
    jobs = {"x": lambda: tt.head_effects(model, shared, "all", logprobs=False)}
    plain = common.plain_of(model, shared, shared=True)
    with tt.set_options(batch_size=16):
        unit, found = common.ratios(plain, jobs, 1, warm=True, repeats=3)
    mean = float(shared.lengths.mean())
    least = (floor.plain(mean) + floor.rows(mean, mean)) / floor.plain(mean)
    return [row("all, shared", mean, len(shared), unit, found["x"], least)]


def subsets(model: Model, floor: Floor) -> list[dict[str, Any]]:
    """All subsets of the eight strongest heads, on one short prompt."""
    prompts = prompts_of(model, 50, 1)
    effects = tt.head_effects(model, prompts, logprobs=False)
    pool = sorted(tt.in_context_heads(effects, k=8))
    groups: list[Group] = list(chain.from_iterable(combinations(pool, k + 1) for k in range(8)))
    return [
        together(
            model,
            floor,
            "all subsets of 8 heads",
            groups,
            positions,
            lambda at=positions: subset_effects(model, prompts, pool, at),
            rounds=3,
        )
        for positions in ("last", "all")
    ]


def pairs(model: Model, floor: Floor) -> list[dict[str, Any]]:
    """All pairs of all heads, and the heads by themselves, on one short prompt."""
    prompts = prompts_of(model, 50, 1)
    groups: list[Group] = [(head,) for head in model.heads]
    groups += list(combinations(model.heads, 2))
    job = partial(tt.pair_effects, model, prompts)
    return [together(model, floor, "all pairs", groups, "last", job, rounds=1)]


def together(
    model: Model,
    floor: Floor,
    what: str,
    groups: list[Group],
    positions: str,
    job: Callable[[], object],
    rounds: int,
) -> dict[str, Any]:
    """Time of groups of heads on one short prompt, against their floor."""
    prompts = prompts_of(model, 50, 1)
    mean = float(prompts.lengths.mean())
    plain = common.plain_of(model, prompts)
    plain()
    unit, found = common.ratios(plain, {"x": job}, rounds, warm=rounds == 1, repeats=5)
    rows = floor.rows(mean, 1 if positions == "last" else mean, groups)
    least = (floor.plain(mean) + rows) / floor.plain(mean)
    return {
        "what": what,
        "groups": len(groups),
        **row(positions, mean, 1, unit, found["x"], least),
    }


def analysis(model: Model, floor: Floor, rounds: int) -> dict[str, Any]:
    """All measures from one trace; and nnsight beside bare PyTorch."""
    prompts = prompts_of(model, 100, 20)
    mean = float(prompts.lengths.mean())
    plain = floor.plain(mean)
    parts = {name: x / plain for name, x in floor.parts(mean, len(prompts.labels)).items()}
    maker = prepare_sweep(model, prompts)

    def traced() -> None:
        for batch in Batches(model, prompts):
            run_batch(model, batch, [maker(batch)])

    def untraced() -> None:
        for batch in Batches(model, prompts):
            bare(model, batch, [maker(batch)])

    for batch in Batches(model, prompts):
        pair = zip(
            run_batch(model, batch, [maker(batch)]), bare(model, batch, [maker(batch)]), strict=True
        )
        for mine, other in pair:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    unit, found = common.ratios(
        common.plain_of(model, prompts),
        {
            "analyze": lambda: tt.analyze(model, prompts),
            "sweep in nnsight": traced,
            "sweep in bare PyTorch": untraced,
        },
        rounds,
    )
    least = sum(parts.values())
    overhead = found["sweep in nnsight"] / found["sweep in bare PyTorch"] - 1
    print(
        f"analyze {found['analyze']:.2f} forwards, floors {least:.2f}, "
        f"ratio {found['analyze'] / least:.2f}; nnsight adds {overhead:+.1%}",
        flush=True,
    )
    return {
        "tokens": round(mean, 1),
        "plain_seconds_per_prompt": round(unit / len(prompts), 4),
        "forwards": {name: round(value, 3) for name, value in found.items()},
        "floors": {name: round(value, 3) for name, value in parts.items()},
        "ratio": round(found["analyze"] / least, 3),
        "nnsight_overhead": round(overhead, 4),
    }


def half_precision(model: Model, name: str, rounds: int) -> dict[str, Any]:
    """bfloat16 beside float32: speed, and how well the effects agree."""
    half = tt.load(name, dtype="bfloat16")
    prompts = prompts_of(model, 100, 20)
    _, found = common.ratios(
        lambda: tt.head_effects(model, prompts, logprobs=False),
        {"x": lambda: tt.head_effects(half, prompts, logprobs=False)},
        rounds,
    )
    exact, other = (tt.head_effects(m, prompts, logprobs=False) for m in (model, half))
    agreed = agreement(exact, other)
    print(
        f"bfloat16: {1 / found['x']:.2f} times the speed, rank correlation "
        f"{agreed.rank_correlation:.3f}, top 12 in common {agreed.found:.2f}",
        flush=True,
    )
    return {
        "speed": round(1 / found["x"], 3),
        "rank_correlation": round(agreed.rank_correlation, 4),
        "rank_correlation_by_prompt": round(agreed.rank_correlation_by_prompt, 4),
        "top_12_in_common": round(agreed.found, 3),
    }


def screening(model: Model) -> dict[str, Any]:
    """Attribution patching beside the exact sweep."""
    prompts = prompts_of(model, 100, 20)
    exact = tt.head_effects(model, prompts, logprobs=False)
    agreed = agreement(exact, tt.attribution_patching(model, prompts))
    _, found = common.ratios(
        common.plain_of(model, prompts), {"x": lambda: tt.attribution_patching(model, prompts)}, 3
    )
    print(
        f"attribution patching: {found['x']:.2f} forwards, rank correlation "
        f"{agreed.rank_correlation:.3f}, missed of the top 12: {len(agreed.missed)}",
        flush=True,
    )
    return {
        "forwards": round(found["x"], 3),
        "rank_correlation": round(agreed.rank_correlation, 4),
        "rank_correlation_by_prompt": round(agreed.rank_correlation_by_prompt, 4),
        "missed_of_top_12": [str(head) for head in agreed.missed],
    }


def main() -> None:
    options = common.arguments(__doc__.splitlines()[0], "floors").parse_args()
    torch.set_num_threads(options.threads)
    model = tt.load(options.model)
    floor = Floor(model)
    result = {
        "machine": common.machine(options.threads),
        "model": options.model,
        "heads": model.n_layers * model.n_heads,
        "last_position": last_position(model, floor, options.rounds),
        "analyze": analysis(model, floor, options.rounds),
        "bfloat16": half_precision(model, options.model, options.rounds),
        "attribution_patching": screening(model),
        "several_positions": several_positions(model, floor) + shared_demonstrations(model, floor),
        "together": subsets(model, floor) + pairs(model, floor),
    }
    common.finish(result, "floors", options)


if __name__ == "__main__":
    main()
