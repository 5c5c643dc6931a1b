"""Base class of measures: a group of the schema, settings, and a recorder for each batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..prompts.positions import named
from ..results import GROUPS
from ..walk.batch import Batch
from ..walk.recorder import Recorder

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

MakeRecorder = Callable[[Batch], Recorder]


class Measure:
    """A quantity to record in every batch.

    A subclass is usually a frozen dataclass whose fields are the settings.

    Attributes
    ----------
    group
        Group of the schema that the results belong to.
    gradients
        Whether the recorder needs gradients.
    scores_answers
        Whether results are scores of whole answers. If answers have several tokens, the recorder
        then runs on prompts with answers after them (`batch.answers.continued`) and returns
        log-probabilities by label.
    keep
        Positions at which to keep per-position results.
    """

    group: ClassVar[str]
    gradients: ClassVar[bool] = False
    scores_answers: ClassVar[bool] = False
    keep: Positions = "all"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        """Check the settings and return a function that makes a batch's recorder.

        Raises
        ------
        InputError
            If the settings do not fit the model or the prompts.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings to record in the dataset, by default the dataclass fields."""
        if not is_dataclass(self):
            return {}
        return {field.name: described(getattr(self, field.name)) for field in fields(self)}

    def coordinates(self) -> Mapping[str, Any]:
        """Return index coordinates of dims specific to this measure."""
        return {}

    @property
    def shares_beginnings(self) -> bool:
        """Whether to put prompts with the same beginning into one batch."""
        return False

    @property
    def dims(self) -> set[str]:
        """Dims of the group's variables."""
        return {dim for variable in GROUPS[self.group].values() for dim in variable.dims}

    def memory_key(self) -> Hashable:
        """Return the key under which the batch size found is remembered.

        It must contain every setting that changes the memory a batch takes.
        """
        settings = tuple((name, repr(value)) for name, value in self.settings().items())
        return (type(self).__module__, type(self).__qualname__, settings)


def described(value: Any) -> Any:
    """Return a setting in a form that JSON can store."""
    if hasattr(value, "describe"):
        return value.describe()
    return named(value) if hasattr(value, "dtype") else value
