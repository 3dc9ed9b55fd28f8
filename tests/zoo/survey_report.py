"""`docs/coverage.md` from the records of the survey: a summary, then the worst."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from survey import PEERS

Record = dict[str, Any]
Records = dict[str, Record]


def write(records: Records, path: Path) -> None:
    """Write the page."""
    path.write_text(page(records), encoding="utf-8")


def page(records: Records) -> str:
    """The page's text."""
    done = {k: v for k, v in records.items() if "ops" in v}
    sections = [
        "# Coverage\n\nWhat fusing did to the models of installed packages, with "
        "random norm statistics, one process and one thread each. Made by "
        "`python tests/zoo/survey.py run` and `… report`; never edited by hand.\n",
        _stamps(records),
        "## Summary\n\n" + _table(["", "Models"], _summary(records, done)),
        "## Packages\n\n" + _table(PACKAGE_COLUMNS, _packages(records)),
        "## Against the best peer that keeps the function\n\n" + _against(done),
        "## timm, the smallest model of each family with batch norms\n\n"
        + _families(done),
        "## Both doors\n\n" + _both_doors(done),
        "## Why affine ops stay\n\n" + _table(["Op: reason", "Ops"], _reasons(done)),
        "## Left without a reason\n\n" + _left_over(done),
        "## What failed\n\n"
        + _table(["Model", "Status", "Revision", "Note"], _failed(records)),
        "## The twenty largest error ratios\n\n"
        + _table(["Model", "Error ratio", "Exactness"], _worst(done)),
        "## Time\n\n" + _time(done),
    ]
    return "\n".join(sections)


def _stamps(records: Records) -> str:
    """The versions of the packages, and how many models each compiler source ran."""
    parts = [v["stamp"].split() for v in records.values()]
    versions = sorted({word for *words, _ in parts for word in words})
    sources = Counter(source for *_, source in parts).most_common()
    counted = ", ".join(f"`{source}` ({n} models)" for source, n in sources)
    return f"Versions: {', '.join(versions)}. Compiler sources: {counted}.\n"


def _table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(c) for c in line)} |\n" for line in lines)


def _summary(records: Records, done: Records) -> list[list[object]]:
    status = Counter(v["status"] for v in records.values())
    doors = Counter(v["door"] for v in done.values())
    norms = [v["norms"] for v in done.values()]
    rows: list[list[object]] = [[f"verdict: {k}", n] for k, n in status.most_common()]
    opened = sum(v.get("captured") is not None for v in records.values())
    rows += [["of the too large, captured without weights", opened]]
    rows += [
        ["nets run under another name", sum("same_as" in v for v in done.values())]
    ]
    rows += [[f"captured by {door}", n] for door, n in doors.most_common()]
    rows += [
        ["batch norms before", sum(before for before, _ in norms)],
        ["batch norms after", sum(after for _, after in norms)],
        ["ops before", _sums(done, 0)],
        ["ops after", _sums(done, 1)],
    ]
    return rows


PACKAGE_COLUMNS = (
    "Package|Models|equal|not equal|too large|failed|by trace|by export|by parts|"
    "norms before|after|ops before|after"
).split("|")


def _packages(records: Records) -> list[list[object]]:
    rows: list[list[object]] = []
    for package in sorted({key.split(":")[0] for key in records}):
        mine = [v for k, v in records.items() if k.split(":")[0] == package]
        done = [v for v in mine if "ops" in v]
        status = Counter(v["status"] for v in mine)
        doors = Counter(v["door"] for v in done)
        good, large = status["equal"], status["too large"]
        rows.append(
            [package, len(mine), good, len(done) - good, large]
            + [len(mine) - len(done) - large]
            + [doors[d] for d in ("symbolic_trace", "export", "submodules")]
            + [sum(v["norms"][i] for v in done) for i in (0, 1)]
            + [sum(v["ops"][i] for v in done) for i in (0, 1)]
        )
    return rows


def _left_over(done: Records) -> str:
    """What the independent reader of the fused graphs found (`leftovers.py`)."""
    read = {
        k: v["leftovers"] for k, v in done.items() if v.get("leftovers") is not None
    }
    rows: list[list[object]] = [[k, line] for k, v in read.items() for line in v]
    total = f"An independent reader looked at {len(read)} fused models and found "
    total += f"{len(rows)} ops that could join a neighbour and have no reason.\n"
    return total + ("\n" + _table(["Model", "Op"], rows[:40]) if rows else "")


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


def _families(done: Records) -> str:
    """Ours beside every peer, on the smallest model that was given to all three.

    That is a family's first, and others where the strongest peer failed.
    """
    rows: Records = {}
    for k, v in sorted(done.items(), key=lambda item: item[1]["params"]):
        compared = v["norms"][0] and set(PEERS) <= {*v.get("peers", ())}
        family = v["family"] not in {row["family"] for row in rows.values()}
        if k.startswith("timm:") and compared and family:
            rows[k] = v
    lines = [f"{len(rows)} models: {_sums(rows, 0)} ops before, ours {_sums(rows, 1)}."]
    for peer in PEERS:
        taken = {k: v for k, v in rows.items() if isinstance(v["peers"][peer], int)}
        theirs = sum(v["peers"][peer] for v in taken.values())
        lines.append(
            f"On the {len(taken)} that `{peer}` takes and keeps equal, it leaves "
            f"{theirs} of {_sums(taken, 0)}, ours {_sums(taken, 1)}."
        )
    table = [
        [k, v["ops"][0], *(v["peers"][p] for p in PEERS), v["ops"][1]]
        for k, v in sorted(rows.items())
    ]
    head = ["Model", "Before", "timm's method", "torch's fuser", "both", "ours"]
    text = " ".join(lines) + " (`both` is torch's fuser after timm's method.)\n\n"
    return text + _table(head, table)


def _sums(records: Records, place: int) -> int:
    return sum(v["ops"][place] for v in records.values())


def _both_doors(done: Records) -> str:
    """Models that tracing opens, fused through `torch.export` as well."""
    both = {k: v for k, v in done.items() if "export" in v}
    opened = {k: v for k, v in both.items() if v["export"]["status"] != "closed"}
    pairs = {k: (v["ops"][1], v["export"]["ops"]) for k, v in opened.items()}
    rows = [
        [k, *pairs[k], v["export"]["status"], _in_words(v["export"])]
        for k, v in opened.items()
        if len({*pairs[k]}) > 1 or v["export"]["status"] != "equal"
    ]
    text = (
        f"Of {len(both)} models that were traced and fused through `torch.export` as "
        f"well, the second door opens for {len(opened)}. As many ops are left, and "
        f"both are equal, in {len(opened) - len(rows)}.\n"
    )
    cut = sorted(k for k, v in done.items() if "unfinished" in v)
    if cut:
        text += f"Not done within the limits, after the verdict: {', '.join(cut)}.\n"
    if rows:
        head = ["Model", "Ops by trace", "Ops by export", "Verdict of export"]
        text += "\n" + _table([*head, "Ops that differ: trace, export"], rows)
        text += "\n" + WHY_DOORS_DIFFER
    return text


WHY_DOORS_DIFFER = """\
Tracing keeps some functions whole that `torch.export` takes apart, as local response \
norm and multi-head attention: what they are made of shows in the second graph alone. \
Of a tensor that `forward` makes from numbers (`arange`) tracing keeps the value and \
export the call.
"""


def _in_words(export: Record) -> str:
    """`mul 4, 2; add 2, 0`; nothing for a record of an older survey."""
    pairs = export.get("differs", {}).items()
    return "; ".join(f"{op} {ours}, {theirs}" for op, (ours, theirs) in pairs)


def _reasons(done: Records) -> list[list[object]]:
    total: Counter[str] = Counter()
    for record in done.values():
        total.update(record["kept"])
    return [[reason, n] for reason, n in total.most_common()]


def _failed(records: Records) -> list[list[object]]:
    fine = ("equal", "too large")
    return [
        [
            name,
            v["status"],
            v["stamp"].split()[-1],
            str(v.get("note", "")).replace("|", "/")[:160],
        ]
        for name, v in sorted(records.items())
        if v["status"] not in fine
    ]


def _worst(done: Records) -> list[list[object]]:
    ranked = sorted(done, key=lambda k: -(done[k]["error_ratio"] or 0))[:20]
    return [
        [k, f"{done[k]['error_ratio']:.2f}", f"{done[k]['exactness'] or 0:.0e}"]
        for k in ranked
    ]


STAGES = ("capture", "lift", "compose", "select", "lower", "verify")


def _time(done: Records) -> str:
    """Median and the slowest, without what `torch.export` takes."""
    seconds = {k: _own_time(v) for k, v in done.items()}
    if not seconds:
        return ""
    slowest = sorted(seconds, key=lambda k: -seconds[k])[:5]
    rows: list[list[object]] = [
        [k, f"{seconds[k]:.1f}", done[k]["door"]]
        + [done[k]["seconds"].get(stage, 0) for stage in STAGES]
        for k in slowest
    ]
    median, total = statistics.median(seconds.values()), len(seconds)
    over = sum(value > 60 for value in seconds.values())
    alone = {k: _own_time(v, checked=False) for k, v in done.items()}
    head = (
        f"Capture (but not `torch.export`), fusing and every check, in seconds of one "
        f"processor: median {median:.1f} s over {total} models, {over} over 60 s. The "
        "slowest, with the seconds of each stage by the clock (lower builds the "
        "kernels and checks each region; verify runs the whole model in float64):\n\n"
    )
    tail = (
        f"\nWithout the runs of the whole model at the end, which take as long as the "
        f"model does: median {statistics.median(alone.values()):.1f} s, "
        f"{sum(value > 60 for value in alone.values())} over 60 s.\n"
    )
    return head + _table(["Slowest", "Total", "Door", *STAGES], rows) + tail


def _own_time(record: Record, checked: bool = True) -> float:
    spent = record["seconds"]
    first = 0 if record["door"] == "symbolic_trace" else 1
    stages = STAGES[first:] if checked else STAGES[first:-1]
    # Taken by the clock, of which other work on the machine had a share.
    return record.get("share", 1.0) * sum(spent.get(stage, 0.0) for stage in stages)
