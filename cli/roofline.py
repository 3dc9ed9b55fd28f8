"""The roofline of this device: how fast it can compute, and how fast move numbers.

Measured, not looked up: the fastest of several matrix products, and copies of arrays
from those that fit the caches to those that do not (Williams, Waterman and Patterson,
2009, with a roof for each size of working set, because a small op finds its numbers
where the op before left them). It is measured in every run that shows it, and the best
that was ever measured is kept for each device, dtype and number of threads: any run may
fall on a busy moment, and none can be faster than the device.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_cli import machine
from fastvit_cli.files import all_or_nothing

PRODUCTS = (512, 1024, 2048)
COPIES = tuple(2**power for power in (18, 20, 22, 24, 26, 28))  # bytes moved
BEYOND = 20.0  # times what is measured now: a clock that jumped, another device
SECONDS = 0.05  # of copies of one size
ROW = ("runs", "gflops", "gbs", "bettered")  # of the cache


@dataclass(frozen=True)
class Roofline:
    """What bounds any op.

    Attributes:
        gflops: 2 a multiply-accumulate.
        gbs: by what is `moved`.
        runs: how many it is the best of.
        bettered: the day on which a figure was last bettered.
    """

    gflops: float
    gbs: tuple[float, ...]
    moved: tuple[int, ...]
    runs: int = 1
    bettered: str = ""

    def bandwidth(self, moved: float) -> float:
        """GB/s for an op that moves so many bytes."""
        pairs = zip(self.moved, self.gbs)
        return next((rate for size, rate in pairs if moved <= size), self.gbs[-1])

    def milliseconds(self, macs: float, moved: float) -> float:
        """The least time for so many multiply-accumulates and bytes."""
        return 1e-6 * max(2 * macs / self.gflops, moved / self.bandwidth(moved))

    def bound(self, macs: float, moved: float) -> str:
        """`compute` or `memory`, whichever takes longer."""
        arithmetic = 2 * macs / self.gflops
        return "compute" if arithmetic > moved / self.bandwidth(moved) else "memory"

    def to_dict(self) -> dict[str, Any]:
        """Both bounds, and what they come from, by JSON names."""
        return {
            "gflops": self.gflops,
            "gbs": list(self.gbs),
            "bytes": list(self.moved),
            "runs": self.runs,
            "bettered": self.bettered,
        }


def measured(device: str, dtype: str, threads: int) -> Roofline:
    """The best that was ever measured here, this run included."""
    path = machine.cache_folder() / "rooflines.json"
    version = f"torch {machine.package_version('torch')}"
    key = "|".join((machine.name(device), dtype, str(threads), version))
    found = measure(device, dtype)
    known = _read(path)
    row = known.get(key, {})
    if not row or _is_beyond(row, found):
        row = {"runs": 0, "gflops": 0.0, "gbs": [0.0] * len(COPIES)}
    gflops = max(row["gflops"], found.gflops)
    gbs = [max(pair) for pair in zip(row["gbs"], found.gbs)]
    same = (gflops, gbs) == (row["gflops"], row["gbs"])
    day = row["bettered"] if same else datetime.date.today().isoformat()
    runs = row["runs"] + 1
    new = {"runs": runs, "gflops": gflops, "gbs": gbs, "bettered": day}
    _write(path, {**known, key: new})
    return Roofline(gflops, tuple(gbs), COPIES, runs, day)


def _is_beyond(row: dict[str, Any], found: Roofline) -> bool:
    """Whether what was kept is no figure of a device that is now so much slower."""
    kept, now = [row["gflops"], *row["gbs"]], [found.gflops, *found.gbs]
    return any(old > BEYOND * new for old, new in zip(kept, now))


def measure(
    device: str,
    dtype: str,
    *,
    products: tuple[int, ...] = PRODUCTS,
    copies: tuple[int, ...] = COPIES,
) -> Roofline:
    """Both bounds, in a second or two, with the threads that torch has now."""
    import torch

    kind = getattr(torch, dtype)
    wait = torch.cuda.synchronize if device.startswith("cuda") else None
    rates: list[float] = []
    for size in products:
        left, right = (torch.randn(size, size).to(device, kind) for _ in range(2))
        rates.append(2e-9 * size**3 / _best(lambda a=left, b=right: a @ b, wait))
    speeds: list[float] = []
    for moved in copies:
        source = torch.ones(moved // (2 * kind.itemsize), dtype=kind, device=device)
        target = torch.empty_like(source)
        call = lambda a=target, b=source: a.copy_(b)  # noqa: E731 - timed below
        speeds.append(1e-9 * moved / _best(call, wait))
    return Roofline(max(rates), tuple(speeds), copies)


def _best(call: Callable[[], Any], wait: Callable[[], Any] | None) -> float:
    """Seconds of the fastest call."""
    call()
    best = float("inf")
    end = time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if wait is not None:
            wait()
        best = min(best, time.perf_counter() - start)
    return best


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {k: v for k, v in found.items() if _is_row(v)}
    except (OSError, ValueError, AttributeError):
        return {}  # no cache yet, or not one of ours


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {*ROW}:
        return False
    if not isinstance(row["gbs"], list) or len(row["gbs"]) != len(COPIES):
        return False
    numbers = [row["runs"], row["gflops"], *row["gbs"]]
    known = all(type(number) in (int, float) for number in numbers)
    return known and all(map(math.isfinite, numbers)) and _is_day(row["bettered"])


def _is_day(text: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except (TypeError, ValueError):
        return False


def _write(path: Path, known: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be kept is no error
        path.parent.mkdir(parents=True, exist_ok=True)
        with all_or_nothing([path]) as (temporary,):
            temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
