"""What people see of a check: the verdict, the evidence, and where the two differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvit_cli.errors import one_line
from fastvit_cli.render import new_table
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from fastvit_cli.check import Job
    from fastvit_cli.checking import Outcome
    from fastvit_cli.origins import Origin

SHOWN = 5
STYLES = {
    "equal": "green",
    "different": "bold red",
    "not comparable": "yellow",
    "skipped": "dim",
}


def show(out: Console, job: Job, outcome: Outcome, written: list[str]) -> None:
    """The whole result; nothing when the console is quiet."""
    out.print(
        Text.assemble((job.candidate, "bold"), " against ", (job.reference, "bold"))
    )
    for note in outcome.notes:
        out.print(Text(f"Note: {note}", "yellow"))
    out.print()
    _findings(out, outcome)
    _origin(out, outcome)
    _visible(out, outcome)
    if outcome.certificate is not None:
        outcome.certificate.show(out)
    for path in written:
        out.print(f"Wrote {path}", soft_wrap=True)
    if outcome.ok:
        out.print(Text.assemble(("Equal", "bold green"), f": {_evidence(outcome)}"))
    else:
        word = "NOT EQUAL" if outcome.verdict == "different" else "NOT COMPARABLE"
        out.print(Text.assemble((word, "bold red"), f": {_evidence(outcome)}"))


def in_one_line(job: Job, outcome: Outcome) -> str:
    """The verdict and the first reason for it."""
    head = f"{job.candidate} is not shown to be the same function as {job.reference}"
    return one_line(f"{head}: {_reason(outcome)}.", 500)


def _reason(outcome: Outcome) -> str:
    if outcome.first is not None and outcome.verdict == "different":
        first = outcome.first
        channel = first.get("channel")
        where = "" if channel is None else f", output channel {channel}"
        return f"first difference in {first['region']}{where}: {first['detail']}"
    for finding in outcome.findings:
        if finding.verdict in ("different", "not comparable"):
            ratio = finding.error_ratio
            measured = "" if ratio is None else f"error ratio {ratio:.3g}"
            return f"{finding.case}: {finding.note or measured}"
    if outcome.certificate is not None and outcome.certificate.problems:
        return f"the certificate does not hold: {outcome.certificate.problems[0]}"
    return "no input could be compared"


def _evidence(outcome: Outcome) -> str:
    facts = [
        ("error ratio {:.2g}", outcome.largest("error_ratio")),
        ("max difference {:.1e}", outcome.largest("max_abs")),
        ("top-1 agreement {:.0%}", outcome.share("top1")),
        ("top-5 agreement {:.0%}", outcome.share("top5")),
    ]
    said = [form.format(value) for form, value in facts if value is not None]
    rows = sum(f.rows for f in outcome.findings if f.verdict != "skipped")
    said += [f"{rows} samples", f"measured by {outcome.how}"]
    return ", ".join(said)


def _findings(out: Console, outcome: Outcome) -> None:
    rows = new_table("Input", "Shape", "Error ratio", "Max difference", "Verdict")
    for finding in outcome.findings:
        ratio = "" if finding.error_ratio is None else f"{finding.error_ratio:.2g}"
        largest = "" if finding.max_abs is None else f"{finding.max_abs:.1e}"
        verdict = Text(finding.verdict, STYLES[finding.verdict])
        if finding.note:
            verdict.append(f" ({finding.note})", "dim")
        shape = "x".join(map(str, finding.shape))
        rows.add_row(finding.case, shape, ratio, largest, verdict)
    out.print(rows)


def _origin(out: Console, outcome: Outcome) -> None:
    origin = outcome.origin
    if origin is None or not origin.related:
        out.print(f"{_unrelated(origin)}: only outputs were compared.")
        if outcome.first is not None:
            first = outcome.first
            out.print(f"First difference: {first['region']}: {first['detail']}")
        return
    form = "the reference's fused form" if origin.form == "fused" else "the reference"
    said = f"Op by op: {origin.steps} ops and {origin.tensors} constants of {form}"
    if not origin.differences:
        out.print(f"{said}, recomposed in float64, are as they should be.")
        return
    out.print(f"{said} were compared.")
    rows = new_table("Region", "Kind", "Channel", "What differs")
    for row in origin.differences[:SHOWN]:
        channel = "" if row["channel"] is None else str(row["channel"])
        rows.add_row(row["region"], row["region_kind"], channel, row["detail"])
    out.print(rows)
    more = len(origin.differences) - SHOWN
    if more > 0:
        out.print(f"and {more} more, in --json")


def _unrelated(origin: Origin | None) -> str:
    if origin is None:
        return "The two graphs cannot be laid side by side"
    if origin.shared == 1.0:
        return "The candidate has the reference's ops, but most numbers are others"
    return "The candidate is not written as the reference, nor as its fused form"


def _visible(out: Console, outcome: Outcome) -> None:
    if not outcome.visible:
        return
    worst, median = outcome.visible["worst"], outcome.visible["median"]
    if median is None:
        out.print("A change of one weight by any size below 100 % would not be seen.")
        return
    size = worst["relative_change"]
    least = f"{size:.1%}" if size else "none at all"
    out.print(
        f"What outputs can show: one median weight changed by {median:.1%} (median of "
        f"{len(outcome.visible['layers'])} layers; {least} in {worst['layer']})."
    )
