"""Fuse random whole programs and hold each to the original, from one seed.

    python tests/fuzz/run.py --programs 20000 --seed 0 [--first N] [--minutes M]

A failure is printed as a program that can be pasted into a file and run. At the end
stands how many programs were run, what failed, and which operators of the table were
exercised. The exit code is 1 where something failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from grammar import Script, write  # noqa: E402
from judge import Failure, Mode, Tally, shrink, summary, text, try_program  # noqa: E402
from steps import STEPS  # noqa: E402
from strategies import PIECES  # noqa: E402

SECONDS = 120


def program(seed: int, number: int) -> Script:
    """The program of that number; each operator of the table has its turn."""
    featured = list(PIECES)[number % len(PIECES)]
    return write(seed * 10_000_019 + number, STEPS, featured)


def mode(number: int) -> Mode:
    """Mostly symbolic tracing with an example; each other way has its share."""
    if number % 40 == 7:
        return Mode("export")
    if number % 5 == 1:
        return Mode(blind=True)
    return Mode("symbolic_trace", verify=number % 5 != 3)


def failures(numbers: range, seed: int, tally: Tally) -> Iterator[tuple[int, Failure]]:
    """Run the programs, and yield what fails."""
    for number in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failure = _limited(program(seed, number), mode(number), tally)
        tally.counts["programs"] += 1
        if failure is not None:
            tally.counts["failures"] += 1
            yield number, failure


def _limited(script: Script, how: Mode, tally: Tally) -> Failure | None:
    def late(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return try_program(script, how, tally)
    finally:
        signal.alarm(0)


def report(seed: int, number: int, failure: Failure) -> str:
    """The failure with its program, made as small as it gets."""
    script, how = program(seed, number), mode(number)
    script, failure = shrink(script, how, failure)
    lines = [f"# ---- program {number} of seed {seed}: {failure.kind}"]
    lines += [f"# {line}" for line in failure.detail.splitlines()[:12]]
    return "\n".join([*lines, text(script, number, how, failure.shape)])


def missing(tally: Tally) -> list[str]:
    """Operators of the table that no program exercised."""
    return [str(target) for target in PIECES if not tally.called[target]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--minutes", type=float, default=1e9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally, begin = Tally(), time.monotonic()
    numbers = range(options.first, options.first + options.programs)
    for start in range(numbers.start, numbers.stop, 100):
        chunk = range(start, min(start + 100, numbers.stop))
        for number, failure in failures(chunk, options.seed, tally):
            print(report(options.seed, number, failure), flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(
            f"{chunk.stop} after {minutes:.1f} min: {summary(tally)}", file=sys.stderr
        )
        if minutes > options.minutes:
            break
    print(summary(tally))
    absent = missing(tally)
    print(f"operators exercised: {len(PIECES) - len(absent)} of {len(PIECES)}", absent)
    return 1 if tally.counts["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
