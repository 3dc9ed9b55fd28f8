"""Timing of several callables against one another, and what they need in memory.

Runs are interleaved: each round visits every callable, so that what else the machine
does falls on all of them alike. A visit starts with calls that are not counted: the
threads of the runtime before may still spin, and its data still fill the caches.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

Key = TypeVar("Key")
Call = Callable[[], Any]

MIN_ROUNDS = 5
MAX_ROUNDS = 60
VISIT_SECONDS = 0.03
WARM_CALLS = 1
RESET_PEAK = "5"  # what the kernel's clear_refs takes to forget the peak
FAULT_SECONDS = 0.1
MOST_INT = 2**31 - 1
# What glibc reads to keep what is freed; by its name and its number in mallopt.
KEPT = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, MOST_INT)}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: over all counted calls.
        spread: half the distance of the quartiles, relative to the median.
        best: the fastest call.
        calls: how many were counted.
        tail: the time that nine calls of ten stay below.
    """

    median: float
    spread: float
    best: float
    calls: int
    tail: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The fields by their JSON names."""
        return {
            "milliseconds": self.median,
            "spread": self.spread,
            "best_milliseconds": self.best,
            "p90_milliseconds": self.tail,
            "calls": self.calls,
        }


def interleave(
    calls: Mapping[Key, Call], seconds: float, *, min_rounds: int = MIN_ROUNDS
) -> dict[Key, list[list[float]]]:
    """For each callable the seconds of its counted calls, one list a round.

    Args:
        calls: what to time; each waits for its own result.
        seconds: when to stop, once `min_rounds` are done.
        min_rounds: rounds that are made however long they take.
    """
    times: dict[Key, list[list[float]]] = {key: [] for key in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and time.perf_counter() > end:
            break
        shuffle(order)  # no callable always follows the same other one
        for key in order:
            times[key].append(_visit(calls[key]))
    return times


def _visit(call: Call) -> list[float]:
    for _ in range(WARM_CALLS):
        call()
    counted: list[float] = []
    while not counted or (sum(counted) < VISIT_SECONDS and len(counted) < 10):
        start = time.perf_counter()
        call()
        counted.append(time.perf_counter() - start)
    return counted


def summarise(rounds: list[list[float]]) -> Timing:
    """The calls of all rounds in four figures."""
    calls = [1e3 * seconds for counted in rounds for seconds in counted]
    middle = statistics.median(calls)
    spread, tail = 0.0, middle
    if len(calls) > 1:
        low, _, high = statistics.quantiles(calls, n=4)
        spread = (high - low) / 2 / middle
        tail = statistics.quantiles(calls, n=10, method="inclusive")[-1]
    return Timing(middle, spread, min(calls), len(calls), tail)


def ratio(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Median over rounds of the ratio within the round: slow spells cancel."""
    pairs = zip(ours, theirs)
    return statistics.median(
        statistics.median(mine) / statistics.median(other) for mine, other in pairs
    )


# ---- page faults -------------------------------------------------------------------


class Faults(NamedTuple):
    """Page faults of one call, and the kernel's share of its processor time."""

    count: float
    share: float


def page_faults(call: Call) -> Faults | None:
    """What a call needs of the kernel; None where nobody counts.

    A heap that hands large blocks back to the system as soon as they are freed, as
    glibc's does, gets them again page by page: a third of the time of an eager model at
    batch 8.
    """
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    call()
    before = resource.getrusage(resource.RUSAGE_SELF)
    calls, end = 0, time.perf_counter() + FAULT_SECONDS
    while not calls or time.perf_counter() < end:
        call()
        calls += 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    whole = kernel + after.ru_utime - before.ru_utime
    faults = after.ru_minflt - before.ru_minflt
    return Faults(faults / calls, kernel / whole if whole > 0 else 0.0)


def keep_memory() -> bool:
    """Have glibc keep what is freed, for the rest of the process; False elsewhere."""
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(*told) for told in KEPT.values())


# ---- memory ------------------------------------------------------------------------


def peak_growth(call: Call, device: str = "cpu") -> tuple[Any, int | None]:
    """(result, bytes by which memory grew at most while `call` ran).

    On a CPU it is the growth of the resident set, which the kernel keeps count of
    (Linux), after the free heap has been handed back; None elsewhere.
    """
    if device.startswith("cuda"):
        return _cuda_growth(call)
    gc.collect()
    _trim()
    before = _resident("VmRSS") if _forget_peak() else None
    result = call()
    after = _resident("VmHWM")
    known = before is not None and after is not None
    return result, max(after - before, 0) if known else None


def _cuda_growth(call: Call) -> tuple[Any, int]:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _trim() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another libc keeps its heap to itself
        return


def _forget_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write(RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            row = next(line for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return None
    return int(row.split()[1]) * 1024
