"""Memory estimate for a model on given devices, from its configuration only.

transformers' own functions place the weights; the functions that size a sweep's chunks count
the rest. No weights are read and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from ..checks import one_of, positive_bytes
from ..errors import InputError
from ..models.quantization import QUANTIZATIONS
from ..sweep.memory import TOKENS_PER_CHUNK, clean_bytes, end_bytes
from ..walk.memory import UNEMBED_BYTES, forward_bytes, logit_bytes, readable, row_bytes
from .shape import Shape

CONTEXT_BYTES = 600 << 20
"""Memory of CUDA and its libraries in a process, on each GPU."""

LIBRARIES_BYTES = 540 << 20
"""Memory of Python and the libraries before a model is loaded, on the CPU."""

HEAP_SHARE = 0.5
"""Extra CPU heap as a share of the activations: kept tensors fragment the heap. Measured on the
demo model with 8 to 64 prompts per batch: 0.2 to 1.0."""

PLACEMENTS = 8
"""Maximum number of placements to try; they settle after two or three, or alternate."""

N_LABELS = 2
"""Assumed number of labels."""

ARRAYS_BY_POSITION = 4
"""score, attention, score_content, score_content_mean; OV adds one per label."""


@dataclass
class Part:
    """Memory use of one device, in bytes.

    Attributes
    ----------
    device
        "cuda:0", "cpu" or "disk".
    limit
        Available memory; None for no limit.
    layers
        Numbers of the blocks placed there.
    other
        Other modules placed there.
    libraries, weights
        Memory in use before the first measure.
    activations
        Peak of the forward, and the part of it kept for the rows; on the CPU also the
        fragmented heap.
    rows
        Rows of a sweep in a layer, or their logits at the end, whichever is larger.
    results
        Results of a batch until they leave the device; on the CPU, of all prompts.
    """

    device: str
    limit: int | None
    layers: list[int] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    libraries: int = 0
    weights: int = 0
    activations: int = 0
    rows: int = 0
    results: int = 0

    @property
    def total(self) -> int:
        """Total bytes."""
        return self.libraries + self.weights + self.activations + self.rows + self.results

    @property
    def fits(self) -> bool:
        """Whether the total is within the limit."""
        return self.limit is None or self.total <= self.limit


@dataclass
class Plan:
    """Placement of a model, and the memory that `twotower.analyze` needs there.

    Attributes
    ----------
    model, dtype, quantization, prompt_tokens, batch, prompts, keep
        The arguments of the plan.
    parts
        Memory use of each device.
    device_map
        Device of each module.
    max_memory
        Argument `max_memory=` of `twotower.load` for this placement: bytes for the weights,
        by GPU number and "cpu".
    largest_batch, largest_batch_on_gpus
        Largest batch that fits, and that fits with all weights on the GPUs; 0 if none does.
    offloads_quantized
        Whether quantized weights would lie outside the GPUs, where bitsandbytes cannot
        compute with them.
    advice
        What to change if it does not fit.
    """

    model: str
    dtype: str
    quantization: str | None
    prompt_tokens: int
    batch: int
    prompts: int
    keep: str
    parts: list[Part]
    device_map: dict[str, str]
    max_memory: dict[int | str, int]
    largest_batch: int
    largest_batch_on_gpus: int
    offloads_quantized: bool
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether every device has room, and no quantized weights are offloaded."""
        return all(part.fits for part in self.parts) and not self.offloads_quantized

    def describe(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON."""
        parts = [asdict(p) | {"total": p.total, "fits": p.fits} for p in self.parts]
        return asdict(self) | {"parts": parts, "fits": self.fits}


def make_plan(
    name: str,
    *,
    gpus: Sequence[int | str] = (),
    cpu: int | str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    device_map: str = "auto",
    prompt_tokens: int = 500,
    batch: int = 8,
    prompts: int = 100,
    keep: str = "all",
    revision: str | None = None,
) -> Plan:
    """Plan a model on devices of given memory.

    Parameters
    ----------
    name
        Hub id, folder, or a shape bundled with the package.
    gpus, cpu
        Memory of each GPU and of the machine, in bytes or as "24GiB". Without GPUs the
        model is on the CPU. The default for `cpu` is this machine's memory.
    dtype, quantization, device_map, revision
        As for `twotower.load`.
    prompt_tokens, batch, prompts
        Tokens per prompt, prompts per batch, and total number of prompts.
    keep
        Stored positions of QK and OV: "all" or "labels".

    Raises
    ------
    InputError
        If a number is out of range.
    ModelError
        If the configuration cannot be loaded, or no adapter fits.
    """
    for words, value in (("prompt_tokens", prompt_tokens), ("batch", batch), ("prompts", prompts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{words}={value!r} must be a whole number of at least 1")
    one_of("keep", keep, ("all", "labels"))
    if quantization is not None:
        one_of("quantization", quantization, QUANTIZATIONS)
    shape = Shape(name, dtype, quantization, revision)
    limits: dict[int | str, int] = {
        index: positive_bytes("gpu", given) for index, given in enumerate(gpus)
    }
    limits["cpu"] = _machine_bytes() if cpu is None else positive_bytes("cpu", cpu)
    most = shape.architecture.max_positions
    if most is not None and prompt_tokens > most:
        raise InputError(f"prompt_tokens={prompt_tokens}: {name} takes at most {most}")

    @cache
    def at(batch: int) -> _Placement:
        return _placement(shape, limits, device_map, prompt_tokens, batch, prompts, keep)

    here = at(batch)
    found = Plan(
        name,
        str(shape.dtype).removeprefix("torch."),
        quantization,
        prompt_tokens,
        batch,
        prompts,
        keep,
        here.parts,
        {module: _device(where) for module, where in here.placed.items()},
        dict(here.room),
        _largest(lambda batch: at(batch).fits),
        _largest(lambda batch: at(batch).fits and not at(batch).offloads),
        quantization is not None and here.offloads,
        [],
    )
    if not found.fits:
        found.advice = _advice(found, shape)
    return found


@dataclass
class _Placement:
    """Placement of everything for one batch size.

    Attributes
    ----------
    placed
        Device of each module, as transformers places them within `room`.
    room
        Bytes for weights on each device.
    parts
        Memory use of each device.
    offloads
        Whether weights lie on a device that does not compute with them.
    fits
        Whether everything fits, and no quantized weight is offloaded.
    """

    placed: Mapping[str, int | str]
    room: Mapping[int | str, int]
    parts: list[Part]
    offloads: bool
    fits: bool


def _placement(
    shape: Shape,
    limits: Mapping[int | str, int],
    device_map: str,
    tokens: int,
    batch: int,
    prompts: int,
    keep: str,
) -> _Placement:
    """Try placements in turn, reserving the previous one's working memory, until one fits.

    Reserving memory moves weights, which moves the working memory: hence several tries.
    """
    room = dict(limits)
    for _ in range(PLACEMENTS):
        placed = shape.place(room, device_map)
        count = _Counter(shape, placed, limits, tokens, prompts, keep)
        parts = count.parts(batch)
        fits = all(part.fits for part in parts)
        fits &= shape.quantization is None or not count.offloads
        found = _Placement(placed, room, parts, count.offloads, fits)
        taken = {part.device: part.total - part.weights for part in parts}
        before = room
        room = {name: max(1, size - taken[_device(name)]) for name, size in limits.items()}
        if (fits and before != limits) or room == before:
            break
    return found


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest batch that fits, up to 4,096 prompts; 0 if none does."""
    if not fits(1):
        return 0
    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Counter:
    """Counts the memory of each device, for any batch size."""

    def __init__(
        self,
        shape: Shape,
        placed: Mapping[str, int | str],
        limits: Mapping[int | str, int],
        tokens: int,
        prompts: int,
        keep: str,
    ) -> None:
        self.model, self.architecture = shape.model, shape.architecture
        self.tokens, self.prompts = tokens, prompts
        # With keep="labels" about one of ten tokens is kept.
        self.kept = tokens if keep == "all" else max(1, tokens // 10)
        self.where = {name: _device(device) for name, device in placed.items()}
        self.limits = {_device(name): size for name, size in limits.items()}
        self.on_gpu = len(limits) > 1
        self.owned: dict[str, int] = dict.fromkeys([*self.limits, "disk"], 0)
        self.layers: dict[str, list[int]] = {name: [] for name in self.owned}
        self.other: dict[str, list[str]] = {name: [] for name in self.owned}
        self.of_layer: dict[int, int] = {}
        self.of_other: dict[str, int] = {}
        path = f"{self.architecture.layers_path}."
        for name, size in shape.bytes_by_module.items():
            device = self._of(name)
            self.owned[device] += size
            if name.startswith(path):
                index = int(name.removeprefix(path).split(".")[0])
                self.of_layer[index] = self.of_layer.get(index, 0) + size
                if index not in self.layers[device]:
                    self.layers[device].append(index)
            else:
                self.other[device].append(name)
                self.of_other[name] = size

    def _of(self, name: str) -> str:
        """Return the device of a module: that of its nearest parent in the map."""
        while name not in self.where and name:
            name = name.rpartition(".")[0]
        return self.where[name]

    @property
    def offloads(self) -> bool:
        """Whether weights lie on a device that does not compute with them."""
        return any(size and self.runs_on(name) != name for name, size in self.owned.items())

    def runs_on(self, device: str) -> str:
        """Return the device that computes with these weights: offloaded ones use the first GPU."""
        if device.startswith("cuda"):
            return device
        return "cuda:0" if self.on_gpu else "cpu"

    def parts(self, batch: int) -> list[Part]:
        """Return the memory use of all devices for one batch size."""
        found = {
            name: Part(name, self.limits.get(name), self.layers[name], self.other[name])
            for name in self.owned
        }
        for name, part in found.items():
            part.weights = self.owned[name]
            if name.startswith("cuda"):
                part.libraries = CONTEXT_BYTES
        found["cpu"].libraries = LIBRARIES_BYTES
        computing: dict[str, list[int]] = {}
        for name, layers in self.layers.items():
            computing.setdefault(self.runs_on(name), []).extend(layers)
            if self.runs_on(name) != name:  # offloaded modules are loaded one at a time
                there = [self.of_layer[index] for index in layers]
                there += [self.of_other[other] for other in self.other[name]]
                found[self.runs_on(name)].activations += max(there, default=0)
        last = self.runs_on(self._of(self.architecture.unembedding_path))
        for name, layers in computing.items():
            if layers or name == last:
                self._measure(found[name], len(layers), name == last, batch)
        found["cpu"].results += self.prompts * self._results(1)
        disk = found.pop("disk")
        return [*found.values(), *([disk] if disk.weights else [])]

    def _measure(self, part: Part, n_layers: int, at_end: bool, batch: int) -> None:
        """Count a batch's forward, rows and results on a device with `n_layers` layers."""
        model, tokens = self.model, self.tokens
        n_heads = model.n_layers * model.n_heads
        logits = batch * logit_bytes(model)
        part.activations += forward_bytes(model, batch, tokens) - (0 if at_end else logits)
        n_rows = min(n_heads, max(1, TOKENS_PER_CHUNK // batch))
        if n_rows < n_heads:  # several chunks of rows: the clean run is kept for them
            share = n_layers / model.n_layers
            part.activations += int(share * clean_bytes(model, batch, 1, tokens - 1))
        if part.device == "cpu":
            part.activations += int(HEAP_SHARE * part.activations)
        rows = n_rows * row_bytes(model, batch, 1, tokens - 1)
        if at_end:
            unembedded = min(UNEMBED_BYTES, n_rows * batch * logit_bytes(model))
            rows = max(rows, n_rows * end_bytes(model, batch) + unembedded)
        part.rows += rows
        own = self._results(batch)
        part.results += own if at_end else own * n_layers // model.n_layers

    def _results(self, batch: int) -> int:
        """Return the bytes of all measures' arrays for `batch` prompts."""
        by_position = self.kept * (ARRAYS_BY_POSITION + N_LABELS)
        by_head = 1 + 3 * N_LABELS
        return 4 * batch * self.model.n_layers * self.model.n_heads * (by_position + by_head)


def _advice(plan: Plan, shape: Shape) -> list[str]:
    """Return what to change, most useful first."""
    found = []
    if plan.largest_batch:
        return [f"take --batch {plan.largest_batch}"]
    if plan.offloads_quantized:
        return ["quantized weights cannot be offloaded: add a --gpu, or plan without GPUs"]
    weights = sum(part.weights for part in plan.parts)
    room = sum(part.limit or 0 for part in plan.parts if part.device != "disk")
    if plan.quantization is None:
        if shape.dtype.itemsize > 2:
            found.append(f"--dtype bfloat16 halves the weights ({readable(weights / 2)})")
        sizes = {
            kind: readable(sum(shape.quantized(kind).bytes_by_module.values()))
            for kind in QUANTIZATIONS
        }
        found.append("--quantization " + ", ".join(f"{k} takes {v}" for k, v in sizes.items()))
    elif plan.quantization == "int8":
        found.append("--quantization nf4 takes about half")
    if weights > room:
        found.append(f"the weights alone take {readable(weights)}: add a --gpu, or --cpu memory")
    if plan.prompt_tokens > 100:
        found.append("take shorter prompts (--prompt-tokens)")
    if plan.keep == "all":
        found.append("--keep labels stores QK and OV only at label positions")
    return found


def _device(name: int | str) -> str:
    return f"cuda:{name}" if isinstance(name, int) else str(name)


def _machine_bytes() -> int:
    """Return the memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)
