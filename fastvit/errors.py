"""What can go wrong in this package, as a tree; every error is the caller's to mend.

FastViTError
├── ConfigError       an unknown variant, or options that make no model
├── RecipeError       a recipe's key or value that is not right
├── DataError         images or classes that cannot be trained on or evaluated
├── TrainingError     a run that cannot start, or had to stop
│   ├── CheckpointError   a checkpoint could not be written
│   ├── ResumeError       a folder's run cannot be continued, or must not be replaced
│   └── Diverged          the loss is not a number any more
└── WeightsError      weights could not be read or do not belong to the model
    ├── WeightsNotFound   no such file
    ├── CorruptFile       not a checkpoint: empty, truncated, a web page, a pointer
    ├── UnsafePickle      reading the file would run code
    └── KeyMismatch       missing, unexpected or misshapen keys
        └── FusedCheckpoint   the deploy form, which cannot be turned back

Each carries `hint`, one sentence on what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 5  # keys of each sort that a message spells out; the rest is a count


class FastViTError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        hint: one sentence that says what the caller can do, or an empty string.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.hint}" if self.hint else message


class ConfigError(FastViTError, ValueError):
    """The variant is not known, or the options do not describe a model."""


class RecipeError(FastViTError, ValueError):
    """A recipe has a key that is not known, or a value that cannot be."""


class DataError(FastViTError):
    """The data set is missing, empty, damaged or not the model's."""


class TrainingError(FastViTError):
    """A run cannot start as asked, or had to stop."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written; the older one is as it was."""


class ResumeError(TrainingError):
    """The folder's run is damaged, another one, or would be written over."""


class Diverged(TrainingError):
    """The loss is infinite or not a number."""


class WeightsError(FastViTError):
    """Weights could not be read, or do not belong to the model."""


class WeightsNotFound(WeightsError, FileNotFoundError):
    """There is no file at the given path."""


class CorruptFile(WeightsError):
    """The file is not a checkpoint, or is one that was damaged on the way."""


class UnsafePickle(WeightsError):
    """The file holds more than tensors: reading it would run code that it names."""


class KeyMismatch(WeightsError):
    """The file's tensors are not the model's.

    Attributes:
        missing: names that the model has and the file lacks.
        unexpected: names that the file has and the model lacks.
        misshapen: shared names whose tensors differ, each with both descriptions,
            as in `head.fc.bias: file (1000,), model (10,)`.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[str] = (),
        hint: str = "",
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)
        sorts = ("missing", "unexpected", "misshapen")
        listings = [_listing(sort, getattr(self, sort)) for sort in sorts]
        details = "; ".join(text for text in listings if text)
        super().__init__(f"{message}: {details}." if details else message, hint=hint)


class FusedCheckpoint(KeyMismatch):
    """The file holds the deploy form, whose merged kernels cannot be split again."""


def _listing(sort: str, names: tuple[str, ...]) -> str:
    if not names:
        return ""
    rest = len(names) - _LISTED
    tail = f" and {rest} more" if rest > 0 else ""
    return f"{len(names)} {sort} ({', '.join(names[:_LISTED])}{tail})"
