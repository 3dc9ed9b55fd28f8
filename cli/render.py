"""What people see of a fusion: what was fused, what stayed and why, what it saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastvit_cli.sources import Loaded

FULL_LIST = 40  # regions; more than that are shown by stage and kind
NAMED = 3  # examples named for a reason that kept ops


def fusion(
    out: Console,
    loaded: Loaded,
    report: Any,
    document: dict[str, Any],
    *,
    verbose: bool,
) -> None:
    """Show one run of `fastvit fuse`."""
    size = "x".join(str(side) for side in loaded.card.input_size)
    where = f"{size}, {loaded.dtype} on {loaded.device}, {loaded.card.origin}"
    out.print(Text.assemble((loaded.name, "bold"), f"  {where}"))
    for note in loaded.notes:
        out.print(Text(f"Note: {note}", "yellow"))
    out.print()
    _regions(out, report.regions, verbose)
    _kept(out, report.kept, verbose)
    _parts(out, report.parts, verbose)
    if "tune" in document:
        from fastvit_cli import tune_view

        tune_view.show(out, document["tune"])
    out.print(totals(report))
    out.print(verdict(report.equivalence))
    for note in report.notes:
        out.print(Text(f"Note: {note}", "yellow"))
    for row in document["outputs"]:
        size = row["bytes"] + row.get("weights_bytes", 0)  # in a file beside it
        out.print(f"Wrote {row['path']} ({size / 1e6:.1f} MB)")
    if document["outputs"] and loaded.card.weights["origin"] == "random":
        out.print(Text("The weights are random, and the file says so.", "yellow"))


def _parts(out: Console, parts: Sequence[Any], verbose: bool) -> None:
    """What was captured on its own, of a model that has no graph as a whole."""
    if not parts:
        return
    title = "Captured submodule by submodule"
    table = new_table("Submodule", "Door", "Why it was left", title=title)
    for part in parts if verbose else parts[:FULL_LIST]:
        table.add_row(Text(part.name), part.door or "left", Text(part.reason[:200]))
    out.print(table)
    if len(parts) > FULL_LIST and not verbose:
        out.print(Text(f"{len(parts) - FULL_LIST} more: --verbose lists them.", "dim"))
    out.print()


def _regions(out: Console, regions: Sequence[Any], verbose: bool) -> None:
    if not regions:
        out.print("Nothing to fuse: no region of this model can be made cheaper.")
        out.print()
        return
    short = len(regions) > FULL_LIST and not verbose
    out.print((by_kind if short else by_name)(regions))
    if short:
        out.print(Text("--verbose lists every region, as --json does.", "dim"))
    out.print()


def by_name(regions: Sequence[Any]) -> Table:
    """One line for each region, stage by stage."""
    table = new_table("Region", "Kind", "Nodes", "Exactness", title=_title(regions))
    stages = group(regions)
    for stage, members in stages.items():
        for region in members:
            table.add_row(region.name or "(root)", region.kind, *_figures([region]))
        if stage != list(stages)[-1]:
            table.add_section()
    return table


def by_kind(regions: Sequence[Any]) -> Table:
    """One line for each stage and kind, with counts and the worst exactness."""
    table = new_table(
        "Stage", "Kind", "Regions", "Nodes", "Exactness", title=_title(regions)
    )
    for stage, members in group(regions).items():
        shown = stage
        for kind in dict.fromkeys(region.kind for region in members):
            same = [region for region in members if region.kind == kind]
            table.add_row(shown, kind, str(len(same)), *_figures(same))
            shown = ""
    return table


def group(regions: Sequence[Any]) -> dict[str, list[Any]]:
    """Regions by stage, in order.

    The stage is the first part of the name; where more than half of all regions share
    that and a number follows (`stages.0`), it is the first two.
    """
    first = Counter(region.name.split(".")[0] for region in regions)
    groups: dict[str, list[Any]] = {}
    for region in regions:
        parts = region.name.split(".")
        crowded = 2 * first[parts[0]] > len(regions)
        deep = crowded and len(parts) > 2 and parts[1].isdigit()
        groups.setdefault(".".join(parts[: 1 + deep]) or "(root)", []).append(region)
    return groups


def _kept(out: Console, kept: Sequence[Any], verbose: bool) -> None:
    if not kept:
        return
    table = new_table("Kept", "Why", "Where", title=f"{len(kept)} affine ops stay")
    reasons: dict[str, list[Any]] = {}
    for row in kept:
        reasons.setdefault(row.reason, []).append(row)
    for reason, rows in sorted(reasons.items(), key=lambda item: -len(item[1])):
        names = [row.name for row in rows]
        shown = names if verbose else names[:NAMED]
        rest = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
        ops = ", ".join(f"{n} {op}" for op, n in Counter(r.op for r in rows).items())
        why = f"{rows[0].detail} ({reason})" if rows[0].detail else reason
        table.add_row(ops, why, ", ".join(shown) + rest)
    out.print(table)
    out.print()


def totals(report: Any) -> Table:
    """Ops, parameters and MACs before and after."""
    table = new_table("", "Before", "After", "Change")
    for name, change in (
        ("ops", report.ops),
        ("parameters", report.params),
        ("MACs", report.macs),
    ):
        cells = (human(change.before), human(change.after))
        table.add_row(name, *cells, relative(change.before, change.after))
    return table


def verdict(equivalence: Any) -> Text:
    """One line on whether the fused model is equal, and how that is known."""
    if equivalence.verdict == "not checked":
        return Text("NOT CHECKED: verification was skipped.", "bold yellow")
    facts = [
        ("exactness {:.1e} in float64", equivalence.exactness),
        ("error ratio {:.2g}", equivalence.error_ratio),
        ("max difference {:.1e}", equivalence.max_abs),
        ("top-1 agreement {:.0%}", equivalence.top1_agreement),
    ]
    said = [form.format(value) for form, value in facts if value is not None]
    if equivalence.samples:
        said.append(f"{equivalence.samples} samples")
    if equivalence.note:
        said.append(equivalence.note)
    style = "bold green" if equivalence.ok else "bold red"
    word = "Equal" if equivalence.ok else "NOT EQUAL"
    if equivalence.verdict not in ("equal", "different"):
        word = equivalence.verdict.capitalize()
    return Text.assemble((word, style), ": " if said else "", ", ".join(said))


def human(number: int | None) -> str:
    """A count in at most four digits, with its unit."""
    if number is None:
        return "?"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= factor:
            size = 1e3 if unit == "k" else factor
            return f"{number / size:.4g} {unit}"
    return str(number)


def relative(before: int | None, after: int | None) -> str:
    """The change in per cent."""
    if not before or after is None:
        return ""
    return f"{(after - before) / before:+.1%}"


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the house style; columns of figures are known by name."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left"
    )
    numbers = {"Nodes", "Exactness", "Regions", "Before", "After", "Change"}
    numbers |= {"Error ratio", "Max difference", "Channel", "Bound", "Measured", "Ops"}
    numbers |= {"Time, x default", "µs", "as one conv"}
    for name in columns:
        if name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _title(regions: Sequence[Any]) -> str:
    return f"{len(regions)} region{'s' if len(regions) != 1 else ''} fused"


def _figures(regions: Iterable[Any]) -> tuple[str, str]:
    """Nodes before and after, and the worst exactness."""
    regions = list(regions)
    removed = sum(len(region.removed) for region in regions)
    added = sum(len(region.added) for region in regions)
    checked = [region.exactness for region in regions]
    known = [value for value in checked if value is not None]
    worst = f"{max(known):.1e}" if len(known) == len(checked) else "not checked"
    return f"{removed} → {added}", worst
