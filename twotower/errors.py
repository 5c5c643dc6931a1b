"""The errors twotower raises, so that a script can tell them apart.

Every message is one sentence that says what is wrong and what to do.
"""


def in_one_line(error: BaseException, most: int = 300) -> str:
    """Kind and message of any error, in so many characters of one line at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


class TwoTowerError(Exception):
    """Base of every error that twotower raises on purpose."""


class TwoTowerWarning(UserWarning):
    """Base of every warning that twotower gives."""


class InputError(TwoTowerError, ValueError):
    """An argument, a task or a prompt is not usable."""


class ModelError(TwoTowerError, RuntimeError):
    """A model could not be loaded, or its structure is not understood."""


class CheckError(ModelError):
    """A model was loaded, but the numbers read from it do not add up."""


class FetchError(TwoTowerError, OSError):
    """Something could not be downloaded."""


class StoreError(TwoTowerError, OSError):
    """A store of results is missing, foreign, damaged or unreadable."""


class SchemaError(TwoTowerError, ValueError):
    """A dataset does not have the form that `twotower.results.schema` fixes."""


class FindingError(TwoTowerError, AssertionError):
    """A result that should hold on the demo task does not hold."""


class NotFiniteWarning(UserWarning):
    """Logits of some prompts are not finite: those prompts are missing (NaN) in the results."""


class WorkerError(TwoTowerError):
    """A worker died, or no other can be placed."""
