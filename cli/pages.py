"""HTML reports: one file each, with styles and drawings inside and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvit_cli import charts, drawing, machine, tune_view
from fastvit_cli.profile_view import best_of
from fastvit_cli.render import group, human, relative

SMALLEST = 1e-17  # the least error that has a bar
TEMPLATES = Path(__file__).resolve().parent / "templates"


def fusion(document: dict[str, Any], report: Any) -> str:
    """The page of one fusion.

    Args:
        document: the JSON of `fastvit fuse`.
        report: the compiler's report that it was made from.
    """
    times = {
        id(region): row.get("milliseconds")
        for region, row in zip(report.regions, document["regions"])
    }
    stages = [
        {
            "name": stage,
            "regions": [_region(r, times[id(r)]) for r in regions],
            "ops": sum(r.ops.before - r.ops.after for r in regions),
            "saved": _saved([times[id(r)] for r in regions]),
        }
        for stage, regions in group(report.regions).items()
    ]
    reasons: dict[str, list[dict[str, Any]]] = {}
    for kept in document["kept"]:
        reasons.setdefault(kept["reason"], []).append(kept)
    totals = [
        {"name": name, **_change(document[key])}
        for name, key in (("Ops", "ops"), ("Parameters", "params"), ("MACs", "macs"))
    ]
    return _render(
        "fuse.html",
        title=f"{document['model']} fused",
        document=document,
        totals=totals,
        stages=stages,
        reasons=sorted(reasons.items(), key=lambda item: -len(item[1])),
        tune=_tune(document.get("tune")),
        slowest=max((x["before"] for x in times.values() if x), default=0.0),
        saved=_saved(list(times.values())),
    )


def _tune(tune: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was measured and chosen, with a sentence and the lengths of the bars."""
    if tune is None:
        return None
    longest = max((row["ratio"] for row in tune["plans"]), default=1.0)
    bars = [{**row, "width": 100 * row["ratio"] / longest} for row in tune["plans"]]
    return {**tune, "sentence": tune_view.sentence(tune), "bars": bars}


def profile(document: dict[str, Any]) -> str:
    """The page of one profile, from the JSON of `fastvit profile`."""
    charts = []
    rows = [row for row in document["measurements"] if row.get("milliseconds")]
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        longest = max(row["milliseconds"] for row in mine)
        charts.append(
            {
                "title": f"{model}, batch {batch}",
                "rows": [
                    {**row, "width": 100 * row["milliseconds"] / longest}
                    for row in sorted(mine, key=lambda row: row["milliseconds"])
                ],
            }
        )
    skipped = {
        (row["backend"], row["skipped"])
        for row in document["measurements"]
        if row["skipped"]
    }
    names = ", ".join(row["model"] for row in document["models"])
    return _render(
        "profile.html",
        title=f"{names} on this device",
        document=document,
        device=machine.line(document["device"]),
        charts=charts,
        skipped=sorted(skipped),
        layers=[_layers(row, document["roofline"]) for row in document["layers"]],
        best_of=best_of(document["roofline"]) if document["roofline"] else "",
    )


def _layers(row: dict[str, Any], roof: dict[str, Any]) -> dict[str, Any]:
    """One model's ops with their chart, and the longest time of each form."""
    forms = {
        form: {
            **facts,
            "slowest": max((x["milliseconds"] for x in facts["layers"]), default=0.0),
        }
        for form, facts in row["forms"].items()
    }
    return {**row, "forms": forms, "chart": charts.rooflines(roof, forms)}


def _saved(times: Sequence[dict[str, float] | None]) -> float | None:
    """Milliseconds saved in the regions whose time is known; None if none is."""
    known = [row["before"] - row["after"] for row in times if row]
    return sum(known) if known else None


def _error_bar(exactness: float | None) -> float:
    """An error as a length in percent, by its power of ten from 1e-17 to `EXACT`."""
    from repcompiler.verify import EXACT

    if not exactness:
        return 0.0
    steps = math.log10(exactness / SMALLEST) / math.log10(EXACT / SMALLEST)
    return 100 * min(max(steps, 0.0), 1.0)


def _region(region: Any, times: dict[str, float] | None) -> dict[str, Any]:
    changes = {
        key: _change(vars(getattr(region, key))) for key in ("ops", "params", "macs")
    }
    return {
        "name": region.name or "(root)",
        "kind": region.kind,
        "exactness": region.exactness,
        "error_bar": _error_bar(region.exactness),
        "milliseconds": times,
        "before": drawing.layers(region.graph),
        "after": drawing.column(region.graph, region.added),
        "added": region.added,
        **changes,
    }


def _change(change: dict[str, Any]) -> dict[str, str]:
    before, after = change["before"], change["after"]
    return {
        "before": human(before),
        "after": human(after),
        "change": relative(before, after),
    }


def _render(template: str, **context: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["human"] = human
    return environment.get_template(template).render(**context)
