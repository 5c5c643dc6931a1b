"""A measure: a group of the schema, its settings, and the recorder that a batch needs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..prompts.positions import named
from ..results import GROUPS
from ..walk.batch import Batch
from ..walk.walk import Recorder

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import Prompts
    from ..prompts.positions import Positions

MakeRecorder = Callable[[Batch], Recorder]


class Measure:
    """What to record of every batch.

    A subclass is usually a frozen dataclass whose fields are the settings.

    Attributes
    ----------
    group
        Group of the schema that the results belong to.
    gradients
        Whether the recorder takes gradients.
    keep
        Positions at which per-position results are kept.
    """

    group: ClassVar[str]
    gradients: ClassVar[bool] = False
    keep: Positions = "all"

    def prepare(self, model: Model, prompts: Prompts) -> MakeRecorder:
        """Check the settings and return a function that makes the recorder of a batch.

        Raises
        ------
        InputError
            If the settings do not fit the model or the prompts.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings as the dataset records them: by default the dataclass fields."""
        if not is_dataclass(self):
            return {}
        return {field.name: described(getattr(self, field.name)) for field in fields(self)}

    def coordinates(self) -> Mapping[str, Any]:
        """Return index coordinates of dims that only this measure has."""
        return {}

    @property
    def shares_beginnings(self) -> bool:
        """Whether a batch should hold prompts that begin alike."""
        return False

    @property
    def dims(self) -> set[str]:
        """Dims of the group's variables."""
        return {dim for variable in GROUPS[self.group].values() for dim in variable.dims}

    def memory_key(self) -> Hashable:
        """Return what decides how much memory a batch takes.

        The batch size that was found for a key is used again.
        """
        settings = tuple((name, repr(value)) for name, value in self.settings().items())
        return (type(self).__module__, type(self).__qualname__, settings)


def described(value: Any) -> Any:
    """Return a setting as JSON can hold it."""
    if hasattr(value, "describe"):
        return value.describe()
    return named(value) if hasattr(value, "dtype") else value
