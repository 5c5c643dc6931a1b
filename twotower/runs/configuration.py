"""The settings of a run: one dataclass, filled from the command line or a YAML file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..checks import MOST_PROMPTS, whole
from ..errors import InputError
from .engine_settings import EngineSettings
from .load_settings import LoadSettings, MaybeWhole, Whole, Wholes

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import PairTask, Prompts, Task


Words = Parameter(consume_multiple=True)
Measure = Literal["predictions", "effects", "attribution", "qk", "ov"]
SEVERAL = ("model", "task", "seed")
"""Settings that may have several values; each combination is a part of the run."""

YES_OR_NO = ("permute_labels",)
"""Optional settings that are true or false."""

LISTS = (*SEVERAL, "labels", "measures")
WHOLE = ("batch_size", "threads", "workers", "gpus_per_replica")
"""Optional settings that are whole numbers."""

NOT_IN_HASH = ("output", "overwrite", "batch_size", "device_map", "remote", "threads")
"""Settings that do not change the results, besides those of the engine."""

LATER = ("input_column", "output_column", "wrong", "scoring")
"""Settings that older runs lack. Their defaults are left out of the record, so these runs go on."""


@dataclass(frozen=True)
class Configuration(LoadSettings, EngineSettings):
    """Models, tasks, seeds and measures of a run.

    Attributes
    ----------
    model
        Hub id, folder, or smollm2-135m (the demo model); one or several.
    task
        A bundled task of classes or of pairs, a known hub dataset, a .csv, .tsv, .json, .jsonl
        or .parquet file, or hub:owner/dataset; one or several. A file with the columns input and
        output, and not text and label, holds pairs.
    output
        Where to write the run: a path, or a URL such as s3://bucket/run.zarr; by default
        runs/TASK.zarr.
    overwrite
        Replace an existing run.
    labels
        One word per class, or CLASS=WORD for each class; by default foo, bar,
        map, ... Words that equal class names are assigned to those classes.
    shots
        Demonstrations per label; of a task of pairs, in each prompt.
    n
        Prompts per model, task and seed.
    seed
        Random seed; one or several.
    template
        Format of a demonstration, with {text} before {label}.
    instruction
        Text before the first demonstration.
    order
        Order of the demonstrations.
    permute_labels
        Let the label of a class change between prompts. By default true, unless labels are
        given by class or equal the class names.
    shared_demonstrations
        Give all prompts the same demonstrations.
    add_special_tokens
        Let the tokenizer add its special tokens; false if the template contains them.
    control_tokens
        Allow control tokens of the tokenizer in texts and labels.
    text_column
        Text column of a file or hub dataset.
    label_column
        Class column of a file or hub dataset.
    input_column
        Column of the inputs of a file of pairs.
    output_column
        Column of the outputs of a file of pairs.
    wrong
        Wrong answers of each prompt of a task of pairs; 0 for the rest of the vocabulary.
    scoring
        Score of an answer of several tokens.
    measures
        Measures to compute.
    norm
        Final norm for the log-probability increase: own statistics, or frozen.
    logprobs
        Also compute head effects on log-probabilities.
    keep
        Store QK and OV at all positions, or only at label positions.
    batch_size
        Prompts per batch; by default about a thousand tokens' worth on a CPU, and as many
        as fill a GPU. Reduced when memory runs out.
    unit_size
        Prompts per unit of work; a batch is never larger.
    """

    model: Annotated[tuple[str, ...], Words] = ("smollm2-135m",)
    task: Annotated[tuple[str, ...], Words] = ("animals-cities",)
    output: str | None = None
    overwrite: bool = False
    labels: Annotated[tuple[str, ...] | None, Words] = None
    shots: Whole = 8
    n: Whole = 40
    seed: Annotated[tuple[int, ...], Wholes] = (0,)
    template: str = "{text}: {label}\n"
    instruction: str = ""
    order: Literal["shuffled", "alternating", "blocked"] = "shuffled"
    permute_labels: bool | None = None
    shared_demonstrations: bool = False
    add_special_tokens: bool = True
    control_tokens: bool = False
    text_column: str = "text"
    label_column: str = "label"
    input_column: str = "input"
    output_column: str = "output"
    wrong: Whole = 1
    scoring: Literal["sum", "mean", "characters", "first"] = "sum"
    measures: Annotated[tuple[Measure, ...], Words] = (
        "predictions",
        "effects",
        "attribution",
        "qk",
        "ov",
    )
    norm: Literal["own", "frozen"] = "frozen"
    logprobs: bool = True
    keep: Literal["all", "labels"] = "all"
    batch_size: MaybeWhole = None

    unit_size: Whole = 16

    def __post_init__(self) -> None:
        for name in SEVERAL:
            value = getattr(self, name)
            several = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if not several or len(set(several)) != len(several):
                raise InputError(f"{name}={value!r} must be one value, or several without repeats")
            object.__setattr__(self, name, several)
        if isinstance(self.labels, dict):
            by_class = tuple(f"{cls}={word}" for cls, word in self.labels.items())
            object.__setattr__(self, "labels", by_class)
        for seed in self.seed:
            whole("seed", seed)
        whole("n", self.n, 1, MOST_PROMPTS)
        whole("wrong", self.wrong)
        whole("unit_size", self.unit_size, 1)
        for name in ("batch_size", "threads"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Configuration:
        """Read a configuration from a YAML file.

        Raises
        ------
        InputError
            If the file cannot be read, or contains an unknown setting.
        """
        return cls(**read_yaml(Path(path)))

    @property
    def store(self) -> str:
        """Path or URL of the run's store."""
        if self.output is not None:
            return str(self.output)
        return str(Path("runs") / ("+".join(Path(task).stem for task in self.task) + ".zarr"))

    @property
    def parts(self) -> dict[str, Configuration]:
        """One configuration per model, task and seed, by name; the name of a single one is ""."""
        alone = [
            replace(self, model=(model,), task=(task,), seed=(seed,))
            for model in self.model
            for task in self.task
            for seed in self.seed
        ]
        if len(alone) == 1:
            return {"": alone[0]}
        named = {one._name: one for one in alone}
        if len(named) < len(alone):
            raise InputError("two models or two tasks have the same name in the store; rename one")
        return named

    @property
    def _name(self) -> str:
        words = (Path(self.model[0]).name, Path(self.task[0]).stem, f"seed-{self.seed[0]}")
        return ".".join(re.sub(r"[^A-Za-z0-9_-]+", "-", word) for word in words)

    def describe(self) -> dict[str, Any]:
        """Return the settings that change the results, as a dict for JSON."""
        engine = {field.name for field in fields(EngineSettings)}
        usual = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        left_out = {*NOT_IN_HASH, *engine, *(usual & set(LATER))}
        kept = {k: v for k, v in asdict(self).items() if k not in left_out}
        return dict(json.loads(json.dumps(kept)))

    @property
    def hash(self) -> str:
        """SHA-256 of the settings that change the results."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def load_model(self) -> Model:
        """Load the model; the first of several."""
        return self.load(self.model[0])

    def load_task(self) -> Task | PairTask:
        """Load the task; the first of several."""
        from ..prompts.read_task import read_task

        return read_task(
            self.task[0],
            text=self.text_column,
            label=self.label_column,
            input=self.input_column,
            output=self.output_column,
        )

    def build_prompts(self, model: Model, task: Task | PairTask) -> Prompts:
        """Build the prompts, with the first of several seeds."""
        from ..prompts import build_prompts

        return build_prompts(
            model,
            task,
            self._labels(),
            self.shots,
            self.n,
            self.seed[0],
            template=self.template,
            instruction=self.instruction,
            order=self.order,
            permute_labels=self.permute_labels,
            shared_demonstrations=self.shared_demonstrations,
            add_special_tokens=self.add_special_tokens,
            control_tokens=self.control_tokens,
            scoring=self.scoring,
            wrong=self.wrong,
        )

    def _labels(self) -> tuple[str, ...] | dict[str, str] | None:
        """Return the labels as words, or by class if each is written CLASS=WORD."""
        pairs = [label.rpartition("=") for label in self.labels or ()]
        if pairs and all(cls and word for cls, _, word in pairs):
            if len({cls for cls, _, _ in pairs}) < len(pairs):
                raise InputError(f"labels={self.labels!r} names a class twice")
            return {cls: word for cls, _, word in pairs}
        return self.labels


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file, by the names of `Configuration`."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        found, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if found is None:
        return {}
    known = [field.name for field in fields(Configuration)]
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold names and values, such as 'model: smollm2-135m'")
    names = [] if root is None else [key.value for key, _ in root.value]
    for name in found:
        if names.count(name) > 1:  # YAML silently takes the last one
            raise InputError(f"{path}: {name!r} is set twice")
        if name not in known:
            raise InputError(f"{path}: unknown setting {name!r}; settings are {', '.join(known)}")
    for name, value in found.items():
        _check_setting(path, name, value)
    if isinstance(found.get("labels"), dict):
        found["labels"] = [f"{cls}={word}" for cls, word in found["labels"].items()]
    for name in LISTS:
        if isinstance(found.get(name), list):
            found[name] = tuple(found[name])
    return found


def _check_setting(path: Path, name: str, value: Any) -> None:
    """Check that a value has the setting's type; for example, YAML reads yes as true."""
    default = getattr(Configuration, name)
    single = default[0] if name in SEVERAL else default
    values = value if name in LISTS and isinstance(value, list) else [value]
    by_class = name == "labels" and isinstance(value, dict)
    if by_class:
        kind = "a list of texts, or class: text for each class"
        ok = all(isinstance(one, str) for one in value.values())
    elif isinstance(single, bool) or name in YES_OR_NO:
        kind, ok = "true or false", isinstance(value, bool)
    elif isinstance(single, float):
        kind, ok = "a number", isinstance(value, (int, float)) and not isinstance(value, bool)
    elif isinstance(single, int) or name in WHOLE:
        kind = "a whole number"
        ok = all(isinstance(one, int) and not isinstance(one, bool) for one in values)
    else:
        kind, ok = "a text", all(isinstance(one, str) for one in values)
    if name in LISTS and not by_class:
        kind = f"{kind}, or a list" if name in SEVERAL else "a list of texts"
        ok = ok and (name in SEVERAL or isinstance(value, list))
    if not (ok or (value is None and default is None)):
        raise InputError(
            f"{path}: {name}: {value!r} must be {kind}; words such as yes, no, on need quotes"
        )
