"""What people see of an evaluation and of predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastvit_cli.runners import Runner

    from fastvit.evaluate import Evaluation

SKIPPED = 5  # images that are named; the JSON has all


def show(
    out: Console,
    loaded: Runner,
    notes: tuple[str, ...],
    found: Evaluation,
    document: dict[str, Any],
) -> None:
    """Show one run of `fastvit eval`."""
    size = "x".join(str(side) for side in document["input_size"])
    where = f"{size}, {loaded.dtype} on {loaded.device}, {loaded.card.origin}"
    out.print(Text.assemble((loaded.name, "bold"), f"  {where}"))
    for note in notes:
        out.print(Text(f"Note: {note}", "yellow"))
    out.print(_figures(document))
    _agreement(out, document)
    _confused(out, document)
    unreadable(out, document["skipped"])


def _figures(document: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows = (
        ("top-1 %", "top1", ".2f"),
        ("top-5 %", "top5", ".2f"),
        ("loss", "loss", ".4f"),
        ("images", "images", "d"),
        (f"images/s at batch {document['batch']}", "images_per_second", ".1f"),
        ("calibration error", "calibration_error", ".4f"),
    )
    forms = [document, *([document["fused"]] if "fused" in document else [])]
    table.add_column("")
    for name in ("Model", "Fused")[: len(forms)]:
        table.add_column(name, justify="right", no_wrap=True)
    for label, key, form in rows:
        if key in document:
            table.add_row(label, *(format(row[key], form) for row in forms))
    return table


def _agreement(out: Console, document: dict[str, Any]) -> None:
    if "agreement" not in document:
        return
    share, images = document["agreement"], document["images"]
    if share == 1:
        out.print(
            Text.assemble(
                ("Agree", "bold green"), f": the same class for all {images} images"
            )
        )
        return
    out.print(
        Text.assemble(
            ("DISAGREE", "bold red"), f": the same class for {share:.4%} of the images"
        )
    )


def _confused(out: Console, document: dict[str, Any]) -> None:
    pairs = document["confused"]
    if not pairs:
        return
    said = [f"{p['class']} → {p['predicted']} ({p['count']})" for p in pairs]
    out.print(Text(f"Most confused: {', '.join(said)}"))


def unreadable(out: Console, skipped: list[dict[str, str]]) -> None:
    """Name the images that could not be read, and say why."""
    if not skipped:
        return
    count = f"{len(skipped)} image{'s' * (len(skipped) != 1)}"
    out.print(Text(f"{count} could not be read:", "yellow"))
    for problem in skipped[:SKIPPED]:
        out.print(Text(f"  {problem['image']}: {problem['reason']}", "yellow"))
    if len(skipped) > SKIPPED:
        out.print(Text("  … --json has all.", "yellow"))


def predictions(out: Console, rows: list[dict[str, Any]]) -> None:
    """Show the most likely classes of each image."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Image", overflow="fold")
    table.add_column("Class", overflow="fold")
    table.add_column("Probability", justify="right", no_wrap=True)
    for row in rows:
        shown = row["image"]
        for guess in row["top"]:
            table.add_row(shown, guess["class"], f"{guess['probability']:.4f}")
            shown = ""
        if row is not rows[-1]:
            table.add_section()
    out.print(table)
