"""`fastvit models`: what can be named as MODEL."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.console import open_screen

EXAMPLES = """[bold]Examples[/bold]

fastvit models

fastvit models repvgg

fastvit models 'timm:mobileone_s*' --json -
"""

FEW = 40  # names of one family that are listed without being asked for


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]", help="Part of a name, or a pattern with * and ?."
        ),
    ] = None,
    json_target: common.Json = None,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    version: common.Version = False,
) -> None:
    """List the models that can be named; PATTERN narrows the list."""
    from fastvit_cli import catalogue

    screen = open_screen(json_target, quiet=quiet, debug=debug)
    with screen.working("models"):
        families = {
            family: catalogue.matching(pattern or "", names())
            for family, names in catalogue.FAMILIES.items()
        }
    rows = [
        {"name": name, "family": family}
        for family, names in families.items()
        for name in names
    ]
    _show(screen.people, families, bool(pattern))
    screen.emit({"schema": 1, "models": rows})
    if pattern and not rows:
        from fastvit_cli.builders import unknown

        raise unknown(pattern)


def _show(out: Any, families: dict[str, list[str]], asked: bool) -> None:
    """Names one a line, so that they can be piped; long families as a count."""
    for family, names in families.items():
        if asked or len(names) <= FEW:
            for name in names:
                out.print(name, soft_wrap=True)
        else:
            hint = f"fastvit models {family}: lists them"
            out.print(f"{family}:NAME  {len(names)} models ({hint})", soft_wrap=True)
    if not asked:
        out.print(
            "package.module:callable, path/file.py:callable, model.pt2 and the "
            ".safetensors of this project can be named as well.",
            soft_wrap=True,
        )
