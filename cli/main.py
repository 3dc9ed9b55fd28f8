"""The `fastvit` command: its sub-commands, and how any of them ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from fastvit_cli import (
    audit,
    check,
    data,
    evaluate,
    fuse,
    models,
    predict,
    profile,
    train,
)
from fastvit_cli.errors import Stop, disk_said, one_line, summary
from fastvit_cli.options import Version, refuse_empty
from typer.core import TyperCommand

USAGE_ERROR: Any = typer.BadParameter.__mro__[2]  # click's ClickException, vendored


class Command(TyperCommand):
    """A command none of whose options may be empty: `--weights "$FILE"` of no FILE."""

    def invoke(self, ctx: Any) -> Any:
        refuse_empty(self.get_params(ctx), ctx.params)
        return super().invoke(ctx)


app = typer.Typer(
    name="fastvit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("fuse", cls=Command, epilog=fuse.EXAMPLES)(fuse.fuse)
app.command("check", cls=Command, epilog=check.EXAMPLES)(check.check)
app.command("profile", cls=Command, epilog=profile.EXAMPLES)(profile.profile)
app.command("audit", cls=Command, epilog=audit.EXAMPLES)(audit.audit)
app.command("train", cls=Command, epilog=train.EXAMPLES)(train.train)
app.command("eval", cls=Command, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("predict", cls=Command, epilog=predict.EXAMPLES)(predict.predict)
app.command("data", cls=Command, epilog=data.EXAMPLES)(data.data)
app.command("models", cls=Command, epilog=models.EXAMPLES)(models.models)


@app.callback()
def fastvit(version: Version = False) -> None:
    """Fuse, verify and ship PyTorch models; train and evaluate FastViT."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command: 0 done and equal, 1 not equal or failed, 2 bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    debug = "--debug" in argv
    try:
        code = app(args=list(argv), prog_name="fastvit", standalone_mode=False)
    except Stop as error:
        return _end(error.line, error.exit_code, debug)
    except USAGE_ERROR as error:
        return _usage(error, debug)
    except SystemExit as error:  # not this command's: a model's, or a library's
        if isinstance(error.__context__, BrokenPipeError):  # rich, of the help text
            return 0
        return _end(f"The code of a model left with sys.exit({error.code}).", 1, debug)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("Interrupted.\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _end(f"{disk_said(error)}.", 1, debug)
    except Exception as error:
        hint = (
            "This is a fault of the command: run it again with --debug, and report it."
        )
        return _end(f"{summary(error)}. {hint}", 1, debug)
    return code if isinstance(code, int) else 0


def _usage(error: Any, debug: bool) -> int:
    message = error.format_message()
    if not message:  # no arguments at all: the help has been shown
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "fastvit"
    return _end(f"{message.rstrip('.')}. See {command} --help.", 2, debug)


def _end(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"Error: {one_line(message, limit=1200)}\n")
    return code


if __name__ == "__main__":
    main()
