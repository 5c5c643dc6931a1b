"""What a model takes on given devices, from its configuration alone.

Weights are laid out by the functions that transformers itself lays them out with when it
loads; what a sweep takes besides is counted by the functions that size its chunks. No weight
is read, and nothing is allocated.
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
"""What a process takes on a GPU for CUDA and its libraries."""

LIBRARIES_BYTES = 540 << 20
"""What Python and the libraries take of the machine's memory before a model is loaded."""

HEAP_SHARE = 0.5
"""Part of the activations that the C library holds besides, on the machine: what is kept of
every layer lies between what layers make and free, in pieces that nothing else fits in. Measured
on the demo model, 8 to 64 prompts in a batch: 0.2 to 1.0."""

PLACEMENTS = 8
"""How many placements are tried; they settle after two or three, or alternate."""

N_LABELS = 2
"""Labels that are reckoned with."""

ARRAYS_BY_POSITION = 4
"""score, attention, score_content, score_content_mean; OV has one more for every label."""


@dataclass
class Part:
    """What stands on one device, in bytes.

    Attributes
    ----------
    device
        "cuda:0", "cpu" or "disk".
    limit
        Memory that there is; None where it does not matter.
    layers
        Numbers of the blocks that are there.
    other
        Other modules that are there.
    libraries, weights
        What is taken before anything is measured.
    activations
        What the forward takes at its largest, and what of it is kept for the rows; on the
        machine with what its heap holds besides.
    rows
        Rows of a sweep on their way through a layer, or at the end their logits.
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
        """All of it."""
        return self.libraries + self.weights + self.activations + self.rows + self.results

    @property
    def fits(self) -> bool:
        """Whether it is no more than there is."""
        return self.limit is None or self.total <= self.limit


@dataclass
class Plan:
    """Where a model goes and what `twotower.analyze` takes there.

    Attributes
    ----------
    model, dtype, quantization, prompt_tokens, batch, prompts, keep
        What was asked.
    parts
        By device.
    device_map
        Modules by device.
    max_memory
        What `twotower.load` is to be given as `max_memory=`, for this placement: bytes for
        the weights, by number of the GPU and "cpu".
    largest_batch, largest_batch_on_gpus
        Most prompts of a batch that fit, and that fit with no weights moved off the GPUs; 0
        if none does.
    offloads_quantized
        Whether quantized weights would lie outside the GPUs, where bitsandbytes does not
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
        """Whether every device has room, and can do what is asked of it."""
        return all(part.fits for part in self.parts) and not self.offloads_quantized

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
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
        Hub id, folder, or a shape that comes with the package.
    gpus, cpu
        Memory of each GPU and of the machine, in bytes or as "24GiB"; without GPUs the
        model is on the CPU, whose memory is by default this machine's.
    dtype, quantization, device_map, revision
        As `twotower.load` takes them.
    prompt_tokens, batch, prompts
        Tokens of a prompt, prompts in a batch and prompts in all.
    keep
        "all" or "labels": positions of QK and OV that are stored.

    Raises
    ------
    InputError
        If the numbers make no sense.
    ModelError
        If the configuration cannot be had, or no adapter fits.
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
    """Where everything goes for batches of one size.

    Attributes
    ----------
    placed
        Modules by device: where transformers puts them, given `room`.
    room
        What weights may take on each device.
    parts
        What stands on each device.
    offloads
        Whether weights lie where they are not computed with.
    fits
        Whether there is room for all, and no quantized weight is offloaded.
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
    """The first placement that fits, of some of which each leaves the last one's room free.

    What is measured takes room that weights cannot have, and so moves them, and with them
    what is measured where.
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
    """Most prompts of a batch that fit, up to 4,096; 0 if none does."""
    if not fits(1):
        return 0
    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Counter:
    """Counts what stands where, for batches of any size."""

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
        # About half of a demonstration's tokens are its text; with labels alone one is kept.
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
        for name, size in shape.bytes_by_module().items():
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
        """Device of a module: that of the longest name in the map that begins its own."""
        while name not in self.where and name:
            name = name.rpartition(".")[0]
        return self.where[name]

    @property
    def offloads(self) -> bool:
        """Whether weights lie where they are not computed with."""
        return any(size and self.runs_on(name) != name for name, size in self.owned.items())

    def runs_on(self, device: str) -> str:
        """Where what lies on a device is computed: offloaded weights come to the first GPU."""
        if device.startswith("cuda"):
            return device
        return "cuda:0" if self.on_gpu else "cpu"

    def parts(self, batch: int) -> list[Part]:
        """All devices, with a batch of so many prompts."""
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
            if self.runs_on(name) != name:  # one after the other comes to where it is computed
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
        """Count a batch's forward, rows and results on a device that computes some layers."""
        model, tokens = self.model, self.tokens
        n_heads = model.n_layers * model.n_heads
        logits = batch * logit_bytes(model)
        part.activations += forward_bytes(model, batch, tokens) - (0 if at_end else logits)
        n_rows = min(n_heads, max(1, TOKENS_PER_CHUNK // batch))
        if n_rows < n_heads:  # the clean run is kept while rows go through it in chunks
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
        """Arrays of all measures of some prompts."""
        by_position = self.kept * (ARRAYS_BY_POSITION + N_LABELS)
        by_head = 1 + 3 * N_LABELS
        return 4 * batch * self.model.n_layers * self.model.n_heads * (by_position + by_head)


def _advice(plan: Plan, shape: Shape) -> list[str]:
    """What to change, most useful first."""
    found = []
    if plan.largest_batch:
        return [f"take --batch {plan.largest_batch}"]
    if plan.offloads_quantized:
        return ["quantized weights cannot be offloaded: add a --gpu, or leave the GPUs out"]
    weights = sum(part.weights for part in plan.parts)
    room = sum(part.limit or 0 for part in plan.parts if part.device != "disk")
    if plan.quantization is None:
        if shape.dtype.itemsize > 2:
            found.append(f"--dtype bfloat16 halves the weights ({readable(weights / 2)})")
        sizes = {
            kind: readable(sum(shape.quantized(kind).bytes_by_module().values()))
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
        found.append("--keep labels stores QK and OV at label positions alone")
    return found


def _device(name: int | str) -> str:
    return f"cuda:{name}" if isinstance(name, int) else str(name)


def _machine_bytes() -> int:
    """Memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)
