"""Times of single ops on this device, each measured once and kept.

The cache has one table for each device, dtype, number of threads, version of torch and
runtime; an op in it is known by its geometry and the shape that it reads.
A time is the best of the first three runs that ask for it, because one may fall on a
busy moment. A cache that is damaged, or cannot be written, is measured again.

One run times ops for `BUDGET` seconds, half of it at most those that the cache knows
already; then ops have the time that the cache has, or none. The next run goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import machine
from fastvit_cli.files import all_or_nothing

if TYPE_CHECKING:
    from repcompiler.cost import Known, Sized

RUNS = 3  # of the command, after which a time is taken as it is
SECONDS = 0.01  # of calls of one op
BUDGET = 60.0  # seconds that one run times single ops for
KNOWN_SHARE = 0.5  # of the budget, after which a time that is known is not improved
CALLS = (3, 40)  # at least, at most
SLOW = 0.1  # seconds of one call after which no other is made
FILE = "ops.json"

Call = Callable[[], Any]
Row = list[float]  # microseconds, runs


@dataclass(frozen=True)
class Setting:
    """What all times of one run are of.

    Attributes:
        batch: the number of samples.
        backend: what runs the ops: a key of `backends.BACKENDS`.
    """

    device: str
    dtype: str
    threads: int
    batch: int
    backend: str = "eager"

    @property
    def place(self) -> str:
        """The key of its table in the cache."""
        name = machine.name(self.device)
        runtimes = ["torch"] + [self.backend] * (self.backend != "eager")
        versions = (f"{it} {machine.package_version(it)}" for it in runtimes)
        return "|".join((name, self.dtype, str(self.threads), *versions))


@dataclass
class OpTimes:
    """The times of one setting.

    Attributes:
        rows: what the cache holds.
        fresh: what was measured in this run.
        found: the keys that were asked for and came from the cache.
        missed: the keys that were asked for when the time for it was up.
        spent: seconds of timing ops.
    """

    setting: Setting
    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    fresh: dict[str, Row] = field(default_factory=dict[str, Row])
    found: set[str] = field(default_factory=set[str])
    missed: set[str] = field(default_factory=set[str])
    spent: float = 0.0

    @classmethod
    def opened(cls, setting: Setting) -> OpTimes:
        """With what the cache holds."""
        return cls(setting, _read(_path()).get(setting.place, {}))

    @property
    def counts(self) -> dict[str, Any]:
        """How many were measured in this run, were known, and were not timed at all."""
        return {
            "ops_measured": len(self.fresh),
            "ops_from_cache": len(self.found),
            "ops_not_timed": len(self.missed),
            "ops_seconds": self.spent,
            "ops_budget": BUDGET,
        }

    def microseconds(self, key: str, make: Callable[[], Call]) -> float | None:
        """The time of an op, of four digits; None where the time for it is up.

        Args:
            key: what is measured: op, shape and layout.
            make: builds what runs it once and waits for the result.
        """
        key = f"{key}, batch {self.setting.batch}"
        if key in self.fresh:
            return self.fresh[key][0]
        best, runs = self.rows.get(key, [math.inf, 0])
        late = self.spent >= BUDGET * (KNOWN_SHARE if runs else 1.0)
        if runs >= RUNS or (runs and late):
            self.found.add(key)
            return best
        if late:
            self.missed.add(key)
            return None
        start = time.perf_counter()
        try:
            best = min(best, _best(make()))
        finally:
            self.spent += time.perf_counter() - start
        self.fresh[key] = [best, runs + 1]
        return best

    def save(self) -> None:
        """Add what is new to the cache, which others may have written meanwhile."""
        if not self.fresh:
            return
        path = _path()
        known = _read(path)
        known[self.setting.place] = {**known.get(self.setting.place, {}), **self.fresh}
        with contextlib.suppress(OSError):  # a cache that cannot be kept is no error
            path.parent.mkdir(parents=True, exist_ok=True)
            with all_or_nothing([path]) as (temporary,):
                temporary.write_text(json.dumps(known, indent=0), encoding="utf-8")

    def costs(self, *, channels_last: bool) -> Costs:
        """What the compiler asks for the cost of an op."""
        return Costs(self, channels_last)


@dataclass
class Costs:
    """Measured costs as the compiler takes them.

    Attributes:
        used: all that it asked for and got.
        complete: whether it got the time of every op that runs by itself. Where not,
            measured and nominal microseconds were compared with each other.
    """

    times: OpTimes
    channels_last: bool
    used: dict[str, float] = field(default_factory=dict[str, float])
    complete: bool = True

    def __call__(self, sized: Sized) -> float | None:
        """Microseconds of an op; None where it cannot run by itself."""
        if sized.key not in self.used:
            layout = "channels last" if self.channels_last else "contiguous"
            key = f"{sized.key}, {layout}"
            try:
                time = self.times.microseconds(key, lambda: self._call(sized))
            except RuntimeError:  # more memory than there is, or no such kernel
                return None
            if time is None:
                self.complete = False
                return None
            self.used[sized.key] = time
        return self.used[sized.key]

    def _call(self, sized: Sized) -> Call:
        import torch

        from repcompiler.tuning import alone

        setting = self.times.setting
        dtype = getattr(torch, setting.dtype)
        shape = (sized.shape[0] * setting.batch, *sized.shape[1:])
        module = alone(sized, dtype).to(setting.device)
        count = 2 if sized.op == "add" else 1
        inputs = [torch.randn(shape).to(setting.device, dtype) for _ in range(count)]
        return caller(module, inputs, setting.device, channels_last=self.channels_last)


def recorded(costs: Mapping[str, float]) -> Known:
    """Costs that were measured elsewhere, as the compiler takes them."""
    return lambda sized: costs.get(sized.key)


def caller(module: Any, inputs: list[Any], device: str, *, channels_last: bool) -> Call:
    """What runs a module once; in channels last its result ends in that layout too."""
    import torch

    form = torch.channels_last
    wait = torch.cuda.synchronize if device.startswith("cuda") else None
    if channels_last:
        module = module.to(memory_format=form)
        inputs = [x.to(memory_format=form) if x.dim() == 4 else x for x in inputs]

    def run() -> Any:
        with torch.inference_mode():
            result = module(*inputs)
            if channels_last and result.dim() == 4:
                result = result.contiguous(memory_format=form)
        if wait is not None:
            wait()
        return result

    return run


def _best(call: Call) -> float:
    """Microseconds of the fastest call, in four digits."""
    start = time.perf_counter()
    call()
    if time.perf_counter() - start < SLOW:
        call()
    best, end = math.inf, time.perf_counter() + SECONDS
    for done in range(CALLS[1]):
        if done >= CALLS[0] and time.perf_counter() > end:
            break
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if best > SLOW:
            break
    return float(f"{1e6 * best:.4g}")


def _path() -> Path:
    return machine.cache_folder() / FILE


def _read(path: Path) -> dict[str, dict[str, Row]]:
    """The rows of the cache that are of our making."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            place: {key: row for key, row in rows.items() if _is_row(row)}
            for place, rows in found.items()
        }
    except (OSError, ValueError, AttributeError):
        return {}  # no cache yet, or not one of ours


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 2:
        return False
    numbers = all(type(number) in (int, float) for number in row)
    return numbers and 0 < row[0] < math.inf and row[1] >= 0
