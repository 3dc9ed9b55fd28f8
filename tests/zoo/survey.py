"""Fuse every model of the installed packages, one process each, and keep score.

    python tests/zoo/survey.py run [--package timm …] [--families] [--minutes M]
    python tests/zoo/survey.py report          # docs/coverage.md from the JSON

A record is kept for each model in `tests/zoo/survey.json`, under the versions of its
package and of torch and a fingerprint of the compiler's source; what is there and
current is not run again. The smallest member of every family of every package comes
first, then the second, and so on to every name. The first of each family is fused
through the other door as well, and compared with every peer; the others with the first
of the peers that keeps the function, strongest first. Of a model that is too large for
the machine the graph is captured, without weights. Several surveys may run side by
side, each on a share of the models (`--share 1/2`).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDS = HERE / "survey.json"
SECONDS = 300  # of the processor, for one model
OTHER_DOOR = 45  # of these, for what comes after its verdict
PATIENCE = 4  # times as long by the clock, on a machine that has other work
MOST_PARAMETERS = 120e6
PEERS = ("timm", "torch", "both")
Records = Mapping[str, Mapping[str, Any]]
# In the note of a verdict that says little: drawn statistics can make a model chaotic.
MAGNIFIES = "magnifies its own rounding"
MEMORY_PER_PARAMETER = 90  # bytes: the model and its fused form, in two precisions


def fingerprint() -> str:
    """Changes whenever the compiler's source does."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "repcompiler").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def rounds(package: str) -> Iterator[list[tuple[str, str]]]:
    """(family, model): the smallest of each family, the next of each, and so on."""
    from packages import PACKAGES

    families: dict[str, list[str]] = {}
    for family, name in PACKAGES[package].listed():
        families.setdefault(family, []).append(name)
    ordered = {f: sorted(names, key=_smallness) for f, names in families.items()}
    for place in range(max(map(len, ordered.values()))):
        yield [(f, names[place]) for f, names in ordered.items() if names[place:]]


def _smallness(name: str) -> tuple[int, int, str]:
    """Names that promise a small model come first."""
    order = "test_ atto femto pico nano xx_small xxs tiny small _s _b0 _050 _18 _t _0"
    words = order.split()
    rank = next((i for i, word in enumerate(words) if word in name), len(words))
    return rank, len(name), name


# ---- one model, in a process of its own --------------------------------------------


def survey_one(
    package: str, name: str, first: bool, most: float, known: Records
) -> Iterator[dict[str, Any]]:
    """Fuse one model and compare it with the best peer that keeps the function.

    The record grows: each that is given holds what was in the one before. A model that
    is one of the `known`, under another name, has that one's.
    """
    import torch
    from helpers import randomise
    from leftovers import leftovers
    from op_counts import left_by, peers
    from outsized import captured_only, parameters_on_meta
    from packages import PACKAGES, TRAINED
    from settling import first_run, settle
    from twins import digest, same_net

    torch.set_num_threads(1)
    torch.manual_seed(0)
    parameters = parameters_on_meta(package, name)
    if parameters > most:
        yield {"params": parameters, **captured_only(package, name)}
        return
    model, inputs = PACKAGES[package].build(name)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > most:
        yield {"status": "too large", "params": parameters}
        return
    net = digest(model, inputs)
    if not first and (twin := same_net(package, net, parameters, known)) is not None:
        yield twin
        return
    drawn = package not in TRAINED
    model = randomise(model) if drawn else model.eval()
    if isinstance(finite := first_run(model, inputs), str):
        yield {"status": "no input here", "note": finite}
        return
    if drawn and not finite:
        settle(model, inputs)
    fused, share = _fused(model, inputs, 2 if first else 1)
    if drawn and MAGNIFIES in fused.report.equivalence.note:
        settle(model, inputs)
        fused, share = _fused(model, inputs, 2 if first else 1)
    record = {
        **record_of(fused.report),
        "params": parameters,
        "net": net,
        "share": share,
        "leftovers": leftovers(fused.model, fused.report.kept),
    }
    yield record
    rivals = {k: partial(left_by, p, model, inputs) for k, p in peers().items()}
    record["peers"] = compared(rivals, every=first)
    yield record
    if first:
        yield {**record, **through_the_other(fused.report, model, inputs)}


def _fused(model: Any, inputs: tuple[Any, ...], samples: int) -> tuple[Any, float]:
    """The result, and the share of a processor that this process had meanwhile."""
    import repcompiler

    clock, processor = time.perf_counter(), time.process_time()
    result = repcompiler.fuse(model, inputs, samples=samples)
    share = (time.process_time() - processor) / (time.perf_counter() - clock)
    return result, round(min(1.0, share), 3)


def compared(rivals: Mapping[str, Callable[[], Any]], *, every: bool) -> dict[str, Any]:
    """What the peers leave, the strongest first: it does what the others do."""
    left: dict[str, Any] = {}
    for name, run in reversed(rivals.items()):
        left[name] = run()
        if not every and isinstance(left[name], int):
            break
    return left


def through_the_other(report: Any, model: Any, inputs: Any) -> dict[str, Any]:
    """The verdict and the ops through `torch.export`, where tracing came first.

    `differs` holds each kind of op that the two doors leave a different number of.
    """
    import repcompiler
    from repcompiler.errors import first_line

    if report.capture != "symbolic_trace":
        return {}
    try:
        other = repcompiler.fuse(model, inputs, samples=1, capture="export").report
    except repcompiler.RepCompilerError as error:
        return {"export": {"status": "closed", "note": first_line(error)}}
    ours, theirs = report.ops.after_by_type, other.ops.after_by_type
    differs = {
        op: [ours.get(op, 0), theirs.get(op, 0)]
        for op in sorted({*ours, *theirs})
        if ours.get(op, 0) != theirs.get(op, 0)
    }
    status, left = other.equivalence.verdict, other.ops.after
    return {"export": {"status": status, "ops": left, "differs": differs}}


def record_of(report: Any) -> dict[str, Any]:
    """What the survey keeps of a report."""
    equal, before, after = report.equivalence, *_by_type(report)
    return {
        "status": equal.verdict,
        "note": equal.note,
        "door": report.capture,
        "ops": [report.ops.before, report.ops.after],
        "norms": [before.get("batch_norm", 0), after.get("batch_norm", 0)],
        "exactness": equal.exactness,
        "error_ratio": equal.error_ratio,
        "seconds": {k: round(v, 2) for k, v in report.seconds.items()},
        "regions": len(report.regions),
        "kept": dict(Counter(f"{kept.op}: {kept.reason}" for kept in report.kept)),
    }


def _by_type(report: Any) -> tuple[dict[str, int], dict[str, int]]:
    return report.ops.before_by_type, report.ops.after_by_type


def child(
    model: tuple[str, str, bool], most: float, known: Records, answer: Connection
) -> None:
    """Survey one model within the limits, and send the record each time it grows."""
    import resource

    from repcompiler.errors import first_line

    def limit(seconds: int) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))

    hard = SECONDS + OTHER_DOOR + 5
    memory = int(MEMORY_PER_PARAMETER * most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    limit(SECONDS)
    warnings.simplefilter("ignore")
    sent = False
    try:
        for record in survey_one(*model, most, known):
            answer.send({"processor": round(time.process_time(), 1), **record})
            sent = True
            limit(min(SECONDS, int(time.process_time())) + OTHER_DOOR)
    except Exception as error:
        note = f"{type(error).__name__}: {first_line(error)}"
        answer.send({"unfinished": note} if sent else {"status": "error", "note": note})


# ---- the survey --------------------------------------------------------------------


def run(wanted: Iterator[tuple[str, str, str]], options: argparse.Namespace) -> None:
    """Survey models; what is recorded under the current stamp is left alone."""
    from packages import PACKAGES

    compiler = fingerprint()
    deadline = time.monotonic() + 60 * options.minutes
    families: set[tuple[str, str]] = set()
    share, shares = options.share
    for place, (package, family, name) in enumerate(wanted):
        key, first = f"{package}:{name}", (package, family) not in families
        families.add((package, family))
        stamp = f"{PACKAGES[package].stamp()} torch-{version('torch')} {compiler}"
        others = options.match not in name or place % shares != share - 1
        records = _records()
        record = records.get(key, {})
        if others or is_current(record, stamp, options.parameters):
            continue
        if options.missing and is_complete(record, first):
            continue
        if time.monotonic() > deadline:
            break
        model = (package, name, first)
        known = {
            k: v
            for k, v in records.items()
            if k != key and (options.missing or v["stamp"] == stamp)
        }
        record = _in_process(model, options.parameters, known)
        _keep(key, {"stamp": stamp, "family": family, **record})
        print(f"{key}: {record['status']} {record.get('ops', record.get('note'))}")
        sys.stdout.flush()


def is_current(record: dict[str, Any], stamp: str, most: float) -> bool:
    """Whether a record says what a run now would: of that stamp, and not set aside."""
    aside = record.get("status") == "too large" and record["params"] <= most
    return record.get("stamp") == stamp and not aside


def is_complete(record: dict[str, Any], first: bool) -> bool:
    """Whether any revision did all that there is to do with a model.

    The first of a family has its ops through every peer, and through the other door.
    """
    if "captured" in record or not first:
        return bool({"captured", "ops"} & {*record})
    both = "export" in record or record.get("door") != "symbolic_trace"
    compared = len(record.get("peers", ())) == len(PEERS)
    return "ops" in record and ((both and compared) or "unfinished" in record)


def load() -> None:
    """Import once what every model needs: each is surveyed in a fork of this process.

    So the compiler that runs is the one whose fingerprint was taken, even if its source
    changes meanwhile.
    """
    import leftovers  # noqa: F401
    import op_counts  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    import repcompiler  # noqa: F401


def _records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def _keep(key: str, record: dict[str, Any]) -> None:
    """Add a record; another survey may add one at the same time."""
    with open(HERE / ".survey.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = {**_records(), key: record}
        temporary = RECORDS.with_suffix(".tmp")
        temporary.write_text(json.dumps(records, indent=0, sort_keys=True) + "\n")
        temporary.replace(RECORDS)


def _in_process(
    model: tuple[str, str, bool],
    most: float = MOST_PARAMETERS,
    known: Records | None = None,
) -> dict[str, Any]:
    """The last record that the model's process sent, or how that process ended."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    task = (model, most, known or {}, theirs)
    process = context.Process(target=child, args=task)
    process.start()
    theirs.close()
    record: dict[str, Any] = {}
    end = ("timeout", f"over {SECONDS * PATIENCE} s")
    try:
        while ours.poll(SECONDS * PATIENCE):
            record.update(ours.recv())
    except EOFError:
        process.join()
        end = _end(process.exitcode)
    finally:
        process.kill()
        process.join()
    if end is None:
        return record
    if not record:
        return dict(zip(("status", "note"), end))
    return {**record, "unfinished": end[1]}


def _end(exitcode: int | None) -> tuple[str, str] | None:
    """What ended a process before its time."""
    if exitcode == -signal.SIGXCPU:
        return "timeout", f"over {SECONDS} s of processor time"
    return ("crash", f"exit code {exitcode}") if exitcode else None


def wanted(packages: Iterable[str], families: bool) -> Iterator[tuple[str, str, str]]:
    """(package, family, model) of all packages, in rounds of one of each family."""
    rows = [zip(itertools.repeat(package), rounds(package)) for package in packages]
    for together in itertools.zip_longest(*rows):
        for package, batch in filter(None, together):
            yield from ((package, family, name) for family, name in batch)
        if families:
            return


def _share(text: str) -> tuple[int, int]:
    share, shares = map(int, text.split("/"))
    if not 1 <= share <= shares:
        raise argparse.ArgumentTypeError("expected K/N with 1 <= K <= N")
    return share, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["run", "report"])
    parser.add_argument("--package", nargs="+", default=["all"])
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--match", default="")
    parser.add_argument("--parameters", type=float, default=MOST_PARAMETERS)
    parser.add_argument("--families", action="store_true", help="one of each family")
    parser.add_argument(
        "--missing", action="store_true", help="only what no revision fused or captured"
    )
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="K/N")
    options = parser.parse_args()
    sys.path[:0] = [str(p) for p in (HERE, ROOT, ROOT / "tests", ROOT / "benchmarks")]
    from packages import PACKAGES, missing

    if options.task == "report":
        from survey_report import write

        write(_records(), ROOT / "docs" / "coverage.md")
        return
    chosen = list(PACKAGES) if options.package == ["all"] else options.package
    absent = {package: missing(package) for package in chosen}
    for problem in filter(None, absent.values()):
        print(problem, file=sys.stderr)
    load()
    present = [package for package in chosen if absent[package] is None]
    run(wanted(present, options.families), options)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    main()
