"""`--png DIR`: the roofline with every op on it, the slowest ops, and the backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvit_cli.files import all_or_nothing

SHOWN = 20  # ops with bars of their own
LONGEST = 64  # characters of an op's name
COLOURS = {"fused": "#1f5fbf", "tuned": "#14713f"}
OTHER = "#b4450f"  # as it was loaded
MARKERS = "o^sDvP*X"  # of the models

Draw = Callable[[Any, dict[str, Any]], None]


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """The pictures of a profile's JSON that it has figures for, all or none."""
    layers = bool(document["layers"])
    timed = any(row.get("milliseconds") for row in document["measurements"])
    wanted = {_roofline: layers, _layers: layers, _backends: timed}
    figures = {name: draw for name, draw in PICTURES.items() if wanted[draw]}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in figures]
    with all_or_nothing(paths) as temporary:
        for draw, place in zip(figures.values(), temporary):
            place.write_bytes(_picture(draw, document))
    return paths


def _picture(draw: Draw, document: dict[str, Any]) -> bytes:
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display, no window.
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, document)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _roofline(figure: Any, document: dict[str, Any]) -> None:
    """Achieved GFLOP/s over operations a byte; an op's area is its time."""
    import numpy as np

    axis, roof = figure.subplots(), document["roofline"]
    x = np.geomspace(0.05, 2000, 200)
    roofs = (("in cache", max(roof["gbs"]), "-"), ("memory", roof["gbs"][-1], "--"))
    for name, rate, dashes in roofs:
        style = {"lw": 1, "color": "black", "ls": dashes}
        label = f"{name}, {rate:.3g} GB/s"
        axis.plot(x, np.minimum(roof["gflops"], x * rate), label=label, **style)
    for row, marker in zip(document["layers"], itertools.cycle(MARKERS)):
        for form, facts in row["forms"].items():
            ops = [op for op in facts["layers"] if op["macs"]]
            places = [2 * op["macs"] / op["bytes"] for op in ops]
            heights = [op["gflops"] for op in ops]
            share = [op["milliseconds"] / facts["milliseconds"] for op in ops]
            sizes = [15 + 1500 * part for part in share]
            label = f"{row['model']}, {form}"
            style = {"alpha": 0.5, "color": COLOURS.get(form, OTHER), "linewidths": 0}
            axis.scatter(places, heights, sizes, marker=marker, label=label, **style)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    row = document["layers"][0]
    what = f"batch {row['batch']}, eager, {row['dtype']}"
    axis.set_title(f"Roofline, {what}; an op's area is its time{_where(document)}")
    places = [2 * op["macs"] / op["bytes"] for op in _ops(document) if op["macs"]]
    ridge = roof["gflops"] / roof["gbs"][-1]
    axis.set_xlim(min([*places, ridge]) / 2, max([*places, ridge]) * 4)
    legend = axis.legend(frameon=False, fontsize="small")
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([30])
    axis.grid(alpha=0.3)


def _ops(document: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [form for row in document["layers"] for form in row["forms"].values()]
    return [op for form in rows for op in form["layers"]]


def _where(document: dict[str, Any]) -> str:
    """The device, on a line of its own: a picture is shown without its page."""
    device = document["device"]
    threads = f"{device['threads']} thread{'s' if device['threads'] != 1 else ''}"
    return f"\n{device['name']}, {threads}"


def _below(figure: Any, bars: list[int]) -> Any:
    """One chart below the other, each as high as its bars need."""
    heights = [1.2 + 0.22 * max(number, 4) for number in bars]
    figure.set_size_inches(10, sum(heights))
    return figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)[:, 0]


def _layers(figure: Any, document: dict[str, Any]) -> None:
    """The slowest ops of the last form of each model."""
    rows = document["layers"]
    for axis, row in zip(_below(figure, [SHOWN] * len(rows)), rows):
        form, facts = list(row["forms"].items())[-1]
        slow = sorted(facts["layers"], key=lambda op: -op["milliseconds"])[:SHOWN]
        slow.reverse()
        names = [_ended(f"{op['name']}  {op['op']}") for op in slow]
        bars = axis.barh(range(len(slow)), [op["milliseconds"] for op in slow])
        shares = [f" {op['share_of_roofline']:.1%}" for op in slow]
        axis.bar_label(bars, shares, fontsize=7)
        axis.set_yticks(range(len(slow)), names, fontsize=7)
        axis.margins(x=0.12)
        axis.set_xlabel("ms; per cent of the roofline")
        place = f"batch {row['batch']}, eager, {row['dtype']}"
        axis.set_title(f"{row['model']}, {form}, {place}{_where(document)}")


def _ended(text: str) -> str:
    """The end of a name, which says more than its start."""
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def _backends(figure: Any, document: dict[str, Any]) -> None:
    """Every cell that was timed, by batch size."""
    rows = [row for row in document["measurements"] if row.get("milliseconds")]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    several = len({row["model"] for row in rows}) > 1
    keys = (("model",) if several else ()) + ("form", "backend", "dtype")
    of_batch = {batch: [r for r in rows if r["batch"] == batch] for batch in batches}
    axes = _below(figure, [len(found) for found in of_batch.values()])
    for axis, (batch, found) in zip(axes, of_batch.items()):
        mine = found[::-1]
        times = [row["milliseconds"] for row in mine]
        errors = [row["milliseconds"] * row["spread"] for row in mine]
        colours = [COLOURS.get(row["form"], OTHER) for row in mine]
        bars = axis.barh(range(len(mine)), times, xerr=errors, color=colours)
        axis.bar_label(bars, fmt=" %.3g", fontsize=8)
        names = [", ".join(row[key] for key in keys) for row in mine]
        axis.set_yticks(range(len(mine)), names, fontsize=8)
        axis.margins(x=0.15)
        axis.set_xlabel("ms")
        model = "" if several else f"{found[0]['model']}, "
        axis.set_title(f"{model}batch {batch}{_where(document)}")


PICTURES: dict[str, Draw] = {
    "roofline.png": _roofline,
    "layers.png": _layers,
    "backends.png": _backends,
}
