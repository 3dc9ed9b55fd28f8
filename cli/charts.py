"""The roofline as a drawing: where its lines and points go, for a template to draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WIDE, HIGH, EDGE = 640, 320, 46
DECADES = ((-2, 4), (-2, 4))  # at most: of operations a byte, of GFLOP/s


@dataclass(frozen=True)
class Chart:
    """Lines, points and marks of the axes in pixels."""

    width: int
    height: int
    roofs: list[dict[str, Any]]
    points: list[dict[str, Any]]
    marks: list[dict[str, Any]]


def rooflines(roof: dict[str, Any], forms: dict[str, Any]) -> Chart:
    """Every op with multiply-accumulates; its area is its share of the time."""
    ops = [(form, op) for form, facts in forms.items() for op in facts["layers"]]
    ops = [(form, op) for form, op in ops if op["macs"] and op["gflops"] > 0]
    low = math.floor(min((math.log10(op["gflops"]) for _, op in ops), default=0))
    high = math.ceil(math.log10(roof["gflops"]))
    frame = _Frame((-1, 3), (max(min(low, high - 1), DECADES[1][0]), high))
    total = {form: facts["milliseconds"] for form, facts in forms.items()}
    points = [
        {
            "x": frame.x(2 * op["macs"] / op["bytes"]),
            "y": frame.y(op["gflops"]),
            "r": 2.5 + 20 * math.sqrt(op["milliseconds"] / total[form]),
            "form": form,
            "title": f"{form}, {op['name']}, {op['op']}: {op['milliseconds']:.3g} ms, "
            f"{op['gflops']:.3g} GFLOP/s, {op['gbs']:.3g} GB/s",
        }
        for form, op in sorted(ops, key=lambda pair: -pair[1]["milliseconds"])
    ]
    rates = {"in cache": max(roof["gbs"]), "memory": roof["gbs"][-1]}
    lines = [_roof(frame, name, rate, roof["gflops"]) for name, rate in rates.items()]
    return Chart(WIDE, HIGH, lines, points, frame.marks())


@dataclass(frozen=True)
class _Frame:
    """Logarithmic axes, in decades from and to."""

    across: tuple[int, int]
    up: tuple[int, int]

    def x(self, value: float) -> float:
        return self._place(value, self.across, EDGE, WIDE - 24)

    def y(self, value: float) -> float:
        return self._place(value, self.up, HIGH - EDGE, 12)

    def _place(
        self, value: float, decades: tuple[int, int], start: float, end: float
    ) -> float:
        low, high = decades
        share = (math.log10(value) - low) / (high - low)
        return round(start + (end - start) * min(max(share, 0.0), 1.0), 1)

    def marks(self) -> list[dict[str, Any]]:
        low, high = self.across
        across = [
            {"x": self.x(10**k), "y": HIGH - EDGE + 16, "text": f"{10.0**k:g}",
             "anchor": "middle"}
            for k in range(low, high + 1)
        ]  # fmt: skip
        low, high = self.up
        up = [
            {"x": EDGE - 6, "y": self.y(10**k) + 4, "text": f"{10.0**k:g}",
             "anchor": "end"}
            for k in range(low, high + 1)
        ]  # fmt: skip
        return across + up


def _roof(frame: _Frame, name: str, rate: float, peak: float) -> dict[str, Any]:
    """From the left edge, or where it enters from below, to the ridge and the right."""
    least = max(10.0 ** frame.across[0], 10.0 ** frame.up[0] / rate)
    places = [least, max(peak / rate, least), 10.0 ** frame.across[1]]
    heights = [min(peak, rate * place) for place in places]
    pairs = (f"{frame.x(x)},{frame.y(y)}" for x, y in zip(places, heights))
    return {"points": " ".join(pairs), "label": f"{name}, {rate:.3g} GB/s"}
