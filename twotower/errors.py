"""Errors and warnings of twotower, one class per kind.

Every message is one sentence that says what is wrong and what to do.
"""


def in_one_line(error: BaseException, most: int = 300) -> str:
    """Return the class name and message of an error on one line, cut after `most` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


class TwoTowerError(Exception):
    """Base class of all errors of twotower."""


class TwoTowerWarning(UserWarning):
    """Base class of the warnings of twotower."""


class InputError(TwoTowerError, ValueError):
    """An argument, a task or a prompt is not usable."""


class ModelError(TwoTowerError, RuntimeError):
    """A model could not be loaded, or its architecture is not supported."""


class CheckError(ModelError):
    """A model was loaded, but the check of its numbers failed."""


class FetchError(TwoTowerError, OSError):
    """A download failed."""


class StoreError(TwoTowerError, OSError):
    """A results store is missing, damaged, unreadable or not of twotower."""


class SchemaError(TwoTowerError, ValueError):
    """A dataset does not match the schema (`twotower.results.schema`)."""


class FindingError(TwoTowerError, AssertionError):
    """An expected result on the demo task does not hold."""


class NotFiniteWarning(UserWarning):
    """Some prompts have non-finite logits; they are missing (NaN) in the results."""


class WorkerError(TwoTowerError):
    """A worker died, or no further worker can be placed."""
