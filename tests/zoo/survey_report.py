"""`docs/coverage.md` from the records of the survey: a summary, then the worst."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Records = dict[str, Record]


def write(records: Records, path: Path) -> None:
    """Write the page."""
    path.write_text(page(records), encoding="utf-8")


def page(records: Records) -> str:
    """The page's text."""
    done = {k: v for k, v in records.items() if "ops" in v}
    stamps = sorted({v["stamp"] for v in records.values()})
    sections = [
        "# Coverage\n\nWhat fusing did to the models of installed packages, with "
        "random norm statistics, one process and one thread each. Made by "
        "`python tests/zoo/survey.py run` and `… report`; never edited by hand.\n",
        f"Stamps (package, torch, compiler source): {'; '.join(stamps)}\n",
        "## Summary\n\n" + _table(["", "Models"], _summary(records, done)),
        "## Against the best peer that keeps the function\n\n" + _against(done),
        "## Why affine ops stay\n\n" + _table(["Op: reason", "Ops"], _reasons(done)),
        "## What failed\n\n" + _table(["Model", "Status", "Note"], _failed(records)),
        "## The twenty largest error ratios\n\n"
        + _table(["Model", "Error ratio", "Exactness"], _worst(done)),
        "## Time\n\n" + _time(done),
    ]
    return "\n".join(sections)


def _table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(c) for c in line)} |\n" for line in lines)


def _summary(records: Records, done: Records) -> list[list[object]]:
    status = Counter(v["status"] for v in records.values())
    doors = Counter(v["door"] for v in done.values())
    norms = [v["norms"] for v in done.values()]
    rows: list[list[object]] = [[f"verdict: {k}", n] for k, n in status.most_common()]
    rows += [[f"captured by {door}", n] for door, n in doors.most_common()]
    rows += [
        ["batch norms before", sum(before for before, _ in norms)],
        ["batch norms after", sum(after for _, after in norms)],
        ["ops before", sum(v["ops"][0] for v in done.values())],
        ["ops after", sum(v["ops"][1] for v in done.values())],
    ]
    return rows


def best_peer(record: Record) -> int | None:
    """Ops that the best peer leaves, of those whose output is equal."""
    counts = [n for n in record.get("peers", {}).values() if isinstance(n, int)]
    return min(counts, default=None)


def _against(done: Records) -> str:
    pairs = {k: (v["ops"][1], best_peer(v)) for k, v in done.items()}
    both = {k: (a, b) for k, (a, b) in pairs.items() if b is not None}
    worse = [[k, a, b] for k, (a, b) in both.items() if a > b]
    ours, theirs = (sum(pair[i] for pair in both.values()) for i in (0, 1))
    fewer = sum(a < b for a, b in both.values())
    text = (
        f"On the {len(both)} models that a peer takes (timm's method, torch's fuser, "
        f"or both) ours leaves {ours} ops, the best peer of each model {theirs}. "
        f"Fewer than the best peer on {fewer} models, more on {len(worse)}.\n"
    )
    return text + ("\n" + _table(["Model", "Ours", "Peer"], worse) if worse else "")


def _reasons(done: Records) -> list[list[object]]:
    total: Counter[str] = Counter()
    for record in done.values():
        total.update(record["kept"])
    return [[reason, n] for reason, n in total.most_common()]


def _failed(records: Records) -> list[list[object]]:
    fine = ("equal", "too large")
    return [
        [name, v["status"], str(v.get("note", "")).replace("|", "/")[:160]]
        for name, v in sorted(records.items())
        if v["status"] not in fine
    ]


def _worst(done: Records) -> list[list[object]]:
    ranked = sorted(done, key=lambda k: -(done[k]["error_ratio"] or 0))[:20]
    return [
        [k, f"{done[k]['error_ratio']:.2f}", f"{done[k]['exactness'] or 0:.0e}"]
        for k in ranked
    ]


def _time(done: Records) -> str:
    total = {k: v["seconds"]["capture"] + v["seconds"]["fuse"] for k, v in done.items()}
    if not total:
        return ""
    slowest = sorted(total, key=lambda k: -total[k])[:5]
    rows = [
        [k, *(done[k]["seconds"][s] for s in ("capture", "lower"))] for k in slowest
    ]
    median = statistics.median(total.values())
    head = f"Capture to lower, with the checks in between: median {median:.1f} s."
    return f"{head}\n\n" + _table(["Slowest", "capture", "lower"], rows)
