"""What a run is made of: one dataclass, from the command line or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import InputError
from .load_settings import LoadSettings, Whole, to_whole

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts, Task


Words = Parameter(consume_multiple=True)
Measure = Literal["predictions", "effects", "attribution", "qk", "ov"]


@dataclass(frozen=True)
class Configuration(LoadSettings):
    """A model, a task, and what is measured.

    Attributes
    ----------
    model
        Hub id, folder, or smollm2-135m (the demo model).
    task
        A bundled task, a ready hub dataset, a .csv or .jsonl file, or hub:owner/dataset.
    output
        Where the run is written; by default runs/TASK.zarr.
    overwrite
        Replace a run that is there.
    labels
        One word per class, each one token; by default foo, bar, map, ...
    shots
        Demonstrations per label.
    n
        Number of prompts.
    seed
        Decides every draw.
    template
        How a demonstration is written, with {text} and then {label}.
    instruction
        Text before the first demonstration.
    order
        Order of the demonstrations.
    permute_labels
        Let the label of a class change between prompts.
    shared_demonstrations
        Give all prompts the same demonstrations.
    text_column
        Column of the texts in a file or hub dataset.
    label_column
        Column of the classes in a file or hub dataset.
    measures
        What is measured.
    norm
        Final norm of the log-probability increase: its own statistics, or frozen.
    logprobs
        Give head effects on log-probabilities too.
    keep
        Keep QK and OV at all positions, or at label positions alone.
    batch_size
        Prompts in a batch; by default about a thousand tokens' worth on a processor, and
        as many as fill a GPU. Fewer where memory runs out.
    """

    model: str = "smollm2-135m"
    task: str = "animals-cities"
    output: Path | None = None
    overwrite: bool = False
    labels: Annotated[tuple[str, ...] | None, Words] = None
    shots: Whole = 8
    n: Whole = 40
    seed: Whole = 0
    template: str = "{text}: {label}\n"
    instruction: str = ""
    order: Literal["shuffled", "alternating", "blocked"] = "shuffled"
    permute_labels: bool = True
    shared_demonstrations: bool = False
    text_column: str = "text"
    label_column: str = "label"
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
    batch_size: Annotated[int | None, Parameter(converter=to_whole)] = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Configuration:
        """A configuration from a YAML file of these names.

        Raises
        ------
        InputError
            If the file cannot be read, or holds a name that is none of these.
        """
        return cls(**read_yaml(Path(path)))

    @property
    def store(self) -> Path:
        """Where the run is written."""
        if self.output is not None:
            return self.output.expanduser()
        return Path("runs") / f"{Path(self.task).stem}.zarr"

    def load_model(self) -> Model:
        """The model."""
        return self.load(self.model)

    def load_task(self) -> Task:
        """The task."""
        from ..prompts import load_task

        return load_task(self.task, text=self.text_column, label=self.label_column)

    def build_prompts(self, model: Model, task: Task) -> Prompts:
        """The prompts."""
        from ..prompts import build_prompts

        return build_prompts(
            model,
            task,
            self.labels,
            self.shots,
            self.n,
            self.seed,
            template=self.template,
            instruction=self.instruction,
            order=self.order,
            permute_labels=self.permute_labels,
            shared_demonstrations=self.shared_demonstrations,
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, by the names of `Configuration`."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if found is None:
        return {}
    known = [field.name for field in fields(Configuration)]
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold names and values, such as 'model: smollm2-135m'")
    for name in found:
        if name not in known:
            raise InputError(f"{path}: {name!r} is no setting; settings are {', '.join(known)}")
    for name, value in found.items():
        _check_setting(path, name, value)
    for name in ("labels", "measures"):
        if isinstance(found.get(name), list):
            found[name] = tuple(found[name])
    if isinstance(found.get("output"), str):
        found["output"] = Path(found["output"])
    return found


def _check_setting(path: Path, name: str, value: Any) -> None:
    """Refuse a value of another type than the setting's; YAML reads yes as true, for one."""
    default = getattr(Configuration, name)
    if name in ("labels", "measures"):
        kind, ok = "a list of texts", isinstance(value, list)
        ok = ok and all(isinstance(word, str) for word in value)
    elif isinstance(default, bool):
        kind, ok = "true or false", isinstance(value, bool)
    elif isinstance(default, int) or name in ("batch_size", "threads"):
        kind, ok = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    else:
        kind, ok = "a text", isinstance(value, str)
    if not (ok or (value is None and default is None)):
        raise InputError(
            f"{path}: {name}: {value!r} must be {kind}; words such as yes, no, on need quotes"
        )
