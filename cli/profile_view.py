"""What people see of a profile: counts, measurements, what is slow, and advice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvit_cli import machine
from fastvit_cli.render import human
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastvit_cli.cells import Cell
    from fastvit_cli.profile import Profile


WIDE = 72  # characters, below which columns would be cut


def models(out: Console, result: Profile) -> None:
    """The device, and what every model has before anything is timed."""
    out.print(machine.line(result.device))
    out.print()
    _put(out, *counts(result.models))
    for row in result.models:
        uncounted(out, row)
    out.print()


def cells(out: Console, measured: list[Cell]) -> None:
    """The timings of one batch size, a table for each model."""
    for model in dict.fromkeys(cell.model for cell in measured):
        rows = [cell for cell in measured if cell.model == model]
        if any(cell.timing for cell in rows):
            _put(out, *measurements(rows))


def conclusion(out: Console, result: Profile, layers: int = 0) -> None:
    """What could not be timed, which ops are slow, notes, and what to use."""
    skipped(out, result.cells)
    for row in result.layers if layers else ():
        slowest(out, row, layers, result.roofline)
        regions(out, row)
    for note in result.notes:
        out.print(Text(f"Note: {note}.", "yellow"))
    for batch in dict.fromkeys(row.cell.batch for row in result.advice):
        ranking(out, result, batch)
    timed = any(cell.timing for cell in result.cells)
    advice(out, result.advice, timed=timed)


def _table(*columns: tuple[str, bool], title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left"
    )
    for name, number in columns:
        if number:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _put(out: Console, table: Table, labels: int) -> None:
    """Show a table; where it would lose its figures, a line for each row.

    Args:
        labels: how many columns say what the figures of a row are of.
    """
    if out.width >= WIDE:
        out.print(table)
        return
    if table.title:
        out.print(Text(str(table.title), "italic"))
    for cells in zip(*(column.cells for column in table.columns)):
        names = [str(column.header) for column in table.columns]
        figures = [f"{n} {c}" for n, c in zip(names[labels:], cells[labels:])]
        label = ", ".join(str(cell) for cell in cells[:labels])
        out.print(Text(f"{label}: {', '.join(figures)}"))
    out.print()


def counts(models: list[dict[str, Any]]) -> tuple[Table, int]:
    """Parameters, MACs and ops of every form."""
    table = _table(
        ("Model", False),
        ("Form", False),
        ("Params", True),
        ("MACs", True),
        ("Ops", True),
    )
    for row in models:
        for form, facts in row["forms"].items():
            figures = (human(facts[key]) for key in ("params", "macs", "ops"))
            table.add_row(row["model"], form, *figures)
    return table, 2


def uncounted(out: Console, row: dict[str, Any]) -> None:
    """Operators that have no multiply-accumulates, or no count."""
    last = list(row["forms"].values())[-1]
    found = last.get("uncounted")
    if not found:
        return
    shown = found if isinstance(found, str) else _times(found)
    out.print(Text(f"{row['model']}: no MACs are counted for {shown}", "dim"))


def _times(found: dict[str, int]) -> str:
    return ", ".join(f"{n} {times}x" if times else n for n, times in found.items())


def measurements(cells: list[Cell]) -> tuple[Table, int]:
    """The cells of one model at one batch size; times are of the whole batch."""
    columns = [("Form", False), ("Backend", False), ("Dtype", False)]
    numbers = ("ms", "±", "x", "Error", "Peak")
    table = _table(
        *columns,
        *((name, True) for name in numbers),
        title=f"{cells[0].model}, batch {cells[0].batch}",
    )
    for column in table.columns:
        column.no_wrap = True  # a name that is cut in two cannot be copied
    rows: list[Any] = [cell for cell in cells if cell.timing]
    best = min(rows, key=lambda cell: cell.timing.median)
    for cell in rows:
        labels = [cell.form, cell.backend, cell.dtype]
        style = "bold" if cell is best else None
        table.add_row(*labels, *_figures(cell, rows[0].timing), style=style)
    return table, 3


def _figures(cell: Cell, first: Any) -> tuple[str, ...]:
    timing = cell.timing
    assert timing is not None
    ratio = "no reference" if cell.error_ratio is None else f"{cell.error_ratio:.2g}"
    if cell.error_ratio is not None and not cell.equal:
        ratio += " NOT EQUAL"
    memory = "?" if cell.memory is None else f"{cell.memory / 2**20:.0f} MiB"
    return (
        f"{timing.median:.2f}",
        f"{timing.spread:.0%}",
        f"{first.median / timing.median:.2f}",
        ratio,
        memory,
    )


def slowest(
    out: Console, row: dict[str, Any], number: int, roof: dict[str, Any]
) -> None:
    """The ops of the last form that take longest, against the roofline."""
    form, facts = list(row["forms"].items())[-1]
    total = facts["milliseconds"]
    layers = sorted(facts["layers"], key=lambda x: -x["milliseconds"])[:number]
    table = _table(
        ("Layer", False),
        ("Op", False),
        *((name, True) for name in ("ms", "GFLOP/s", "GB/s")),
        ("Bound", False),
        ("Roof", True),
        title=f"Slowest ops of {row['model']}, {form}, batch {row['batch']}, eager, "
        f"{row['dtype']}",
    )
    for layer in layers:
        figures = [f"{layer[key]:.3g}" for key in ("milliseconds", "gflops", "gbs")]
        share = f"{layer['share_of_roofline']:.0%}"
        table.add_row(layer["name"], layer["op"], *figures, layer["bound"], share)
    _put(out, table, 2)
    least = facts["at_roofline"]
    line = f"All ops together {total:.3g} ms; at this device's roofline {least:.3g} ms"
    out.print(Text(f"{line} ({best_of(roof)}).", "dim"))
    out.print(Text("--json and --html have every op.", "dim"))


def best_of(roof: dict[str, Any]) -> str:
    """How often the roofline was measured, and when it was last bettered."""
    runs = f"{roof['runs']} run{'s' if roof['runs'] != 1 else ''}"
    return f"the best of {runs} here, last bettered {roof['bettered']}"


def regions(out: Console, row: dict[str, Any]) -> None:
    """What fusing saved, by kind of region."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for region in row["regions"]:
        kinds.setdefault(region["kind"], []).append(region)
    if not kinds:
        return
    table = _table(
        ("Regions fused", False),
        *((name, True) for name in ("Number", "ms before", "ms after")),
        title=f"Eager, {row['dtype']}",
    )
    for kind, found in kinds.items():
        sums = [f"{sum(r[key] for r in found):.3g}" for key in ("before", "after")]
        table.add_row(kind, str(len(found)), *sums)
    out.print()
    _put(out, table, 1)


def skipped(out: Console, cells: list[Cell]) -> None:
    """Why some cells have no timing: each reason once, with its models if not all."""
    everyone = dict.fromkeys(cell.model for cell in cells)
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        if cell.skipped:
            key = cell.backend, cell.skipped.rstrip(".")
            reasons.setdefault(key, {})[cell.model] = None
    for (backend, reason), found in reasons.items():
        whose = "" if found.keys() == everyone.keys() else f" for {', '.join(found)}"
        out.print(Text(f"{backend} was left out{whose}: {reason}.", "yellow"))


def ranking(out: Console, result: Profile, batch: int) -> None:
    """The fastest equal form of each model, fastest first; for one model nothing."""
    facts = {row["model"]: row["forms"] for row in result.models}
    best: dict[str, Any] = {}
    for row in result.advice:
        if row.cell.batch == batch:
            best.setdefault(row.cell.model, row.cell)
    if len(best) < 2:
        return
    table = _table(
        ("Model", False),
        ("Form", False),
        ("Backend", False),
        *((name, True) for name in ("Params", "MACs", "ms", "per s")),
        title=f"The fastest equal form of each, batch {batch}; samples per second",
    )
    table.columns[0].no_wrap = True
    for cell in sorted(best.values(), key=lambda cell: cell.timing.median):
        own = facts[cell.model].get(cell.form, {})
        figures = [human(own.get(key)) for key in ("params", "macs")]
        took = cell.timing.median
        figures += [f"{took:.2f}", _rate(1e3 * batch / took)]
        table.add_row(cell.model, cell.form, cell.backend, *figures)
    _put(out, table, 3)


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def advice(out: Console, rows: list[Any], *, timed: bool) -> None:
    """What to use, and how to get it."""
    if not rows and timed:
        out.print(Text("No form was shown equal, so none is recommended.", "bold red"))
    for row in rows:
        out.print()
        out.print(Text(f"{row.sentence}.", "bold green"), soft_wrap=True)
        if row.command:
            out.print(f"  make: {row.command}", soft_wrap=True)
        if row.note:
            out.print(Text(f"        ({row.note})", "dim"), soft_wrap=True)
        out.print(f"  run:  {row.usage}", soft_wrap=True)
