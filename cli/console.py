"""Where output goes: results on stdout, progress and errors on stderr.

With `--json -`, stdout is for machines alone and people's output goes to stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastvit_cli.files import all_or_nothing, check_writable
from rich.console import Console

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Screen:
    """The consoles of one command, and where its JSON goes."""

    people: Console
    progress: Console
    json_target: str | None
    debug: bool

    @contextmanager
    def working(self, title: str) -> Iterator[Stage]:
        """A spinner that names the stage, on a terminal; nothing elsewhere.

        What foreign code prints meanwhile goes to stderr, so that stdout stays clean;
        what it warns of and logs is shown with --debug only.
        """
        with self.calm():
            if not self.progress.is_terminal:
                yield lambda stage: None
                return
            with self.progress.status(title) as status:
                yield lambda stage: status.update(f"{title}: {stage}")

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Foreign prints go to stderr, foreign warnings nowhere but with --debug."""
        with redirect_stdout(sys.stderr), _without_logs(self.debug):
            yield

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Swallow prints of the block: torch shows whole graphs when it gives up."""
        sink = io.StringIO()
        with contextlib.ExitStack() as stack:
            if not self.debug:
                stack.enter_context(redirect_stdout(sink))
                stack.enter_context(redirect_stderr(sink))
            yield

    def emit(self, document: dict[str, Any]) -> None:
        """Write the command's JSON where `--json` says, if it was given.

        Raises:
            OSError: the file could not be written.
        """
        if self.json_target is None:
            return
        text = to_json(document)
        if self.json_target == "-":
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except BrokenPipeError:
                _go_on_without_reader(sys.stdout)
            return
        with all_or_nothing([Path(self.json_target)]) as (temporary,):
            temporary.write_text(text, encoding="utf-8")


def open_screen(json_target: str | None, *, quiet: bool, debug: bool) -> Screen:
    """The screen of one command.

    Raises:
        BadInput: the file for JSON cannot be written.
    """
    if json_target not in (None, "-"):
        check_writable(Path(json_target), "--json")
    stream = sys.stderr if json_target == "-" else sys.stdout
    return Screen(
        people=console(stream, quiet=quiet),
        progress=console(sys.stderr, quiet=quiet),
        json_target=json_target,
        debug=debug,
    )


@contextmanager
def _without_logs(debug: bool) -> Iterator[None]:
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


class _Console(Console):
    """A console that goes on without its reader: `| head -1` must not end a run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _go_on_without_reader(self.file)


def _go_on_without_reader(stream: Any) -> None:
    """Send the rest of a stream, what it has in its buffer too, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console(stream: TextIO, *, quiet: bool = False) -> Console:
    """A console that is plain when not on a terminal, or when NO_COLOR is set."""
    plain = bool(os.environ.get("NO_COLOR"))
    return _Console(
        file=stream,
        quiet=quiet,
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=False if plain else None,
        color_system=None if plain else "auto",
    )


def to_json(document: dict[str, Any]) -> str:
    """Strict JSON; numbers that JSON has no word for become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
