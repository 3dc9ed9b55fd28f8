"""What ends a command early, each with the exit code that it means.

Stop
├── BadInput   2  bad usage or bad input: what was wrong, expected, and to do
└── JobFailed  1  not equal, or a job that could not be finished
"""

from __future__ import annotations

import re

# What some libraries colour their messages with.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Stop(Exception):
    """Base of the two; shown as one line.

    Attributes:
        hint: one sentence that says what the reader can do, or an empty string.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def line(self) -> str:
        """The message and the hint as one line."""
        message = one_line(super().__str__())
        return f"{message} {one_line(self.hint)}" if self.hint else message


class BadInput(Stop):
    """The command line, or a file that it names, is at fault."""

    exit_code = 2


class JobFailed(Stop):
    """The work was understood but its result is not good enough to be handed over."""


def one_line(text: str, limit: int = 600) -> str:
    """The text without line breaks, shortened to `limit` characters."""
    flat = " ".join(_COLOURS.sub("", text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def disk_said(error: OSError) -> str:
    """What the disk refused, where it says of which file, and why."""
    if error.filename is None or not error.strerror:
        return f"the disk said: {summary(error)}"
    return f"{error.filename}: {error.strerror}"


def root(error: BaseException) -> BaseException:
    """What an exception comes from in the end: the outer ones say where, not why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def summary(error: BaseException, limit: int = 240) -> str:
    """An exception of unknown origin in a few words: its type, its first paragraph."""
    paragraph = str(error).strip().split("\n\n")[0].rstrip(".: ")
    name = type(error).__name__
    return f"{name}: {one_line(paragraph, limit)}" if paragraph else name
