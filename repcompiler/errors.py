"""What can go wrong, as a tree; every error here is the caller's to mend.

RepCompilerError
├── NotEval           the model, or a norm inside it, is in train mode
├── CaptureError      no door could turn the model into a graph that computes the same
├── UnsupportedInput  the argument is not a model, or the example inputs do not fit it
└── VerificationError a check was asked for that cannot be made

Each carries `hint`, one sentence on what to do. Faults of the compiler itself are
assertions, never one of these.
"""

from __future__ import annotations


class RepCompilerError(Exception):
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


class NotEval(RepCompilerError):
    """The model is in train mode, where a batch norm is not an affine map."""


class CaptureError(RepCompilerError):
    """The model could not be captured as a graph that computes the same function."""


class UnsupportedInput(RepCompilerError):
    """The argument is no model that can be copied, or the inputs do not fit it."""


class VerificationError(RepCompilerError):
    """A verification was asked for that cannot be made."""


def does_not_run(error: BaseException) -> UnsupportedInput:
    """The error for a model whose own code fails on the example inputs."""
    return UnsupportedInput(
        f"The model does not run on the example inputs: {first_line(error)}.",
        hint="Give inputs that model(*inputs) takes.",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, or its type."""
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__
