"""Fuse every model of the installed packages, one process each, and keep score.

    python tests/zoo/survey.py run [--package timm] [--families] [--minutes M]
    python tests/zoo/survey.py report          # docs/coverage.md from the JSON

A record is kept for each model in `tests/zoo/survey.json`, under the versions of its
package and of torch and a fingerprint of the compiler's source; what is there and
current is not run again. Every family comes first, by its smallest member, then every
name.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDS = HERE / "survey.json"
SECONDS = 240
MEMORY = 10 * 2**30
MOST_PARAMETERS = 120e6


def fingerprint() -> str:
    """Changes whenever the compiler's source does."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "repcompiler").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def names(package: str, *, families_only: bool = False) -> list[tuple[str, str]]:
    """(family, model) of a package: two of each family first, then the rest."""
    from packages import PACKAGES

    families: dict[str, list[str]] = {}
    for family, name in PACKAGES[package].listed():
        families.setdefault(family, []).append(name)
    ordered = {f: sorted(names, key=_smallness) for f, names in families.items()}
    first = [(family, names[0]) for family, names in ordered.items()]
    second = [(family, names[1]) for family, names in ordered.items() if names[1:]]
    rest = [(family, name) for family, names in ordered.items() for name in names[2:]]
    return first + ([] if families_only else second + rest)


def _smallness(name: str) -> tuple[int, int, str]:
    """Names that promise a small model come first."""
    order = "test_ atto femto pico nano xx_small xxs tiny small _s _b0 _050 _18 _t _0"
    words = order.split()
    rank = next((i for i, word in enumerate(words) if word in name), len(words))
    return rank, len(name), name


# ---- one model, in a process of its own --------------------------------------------


def survey_one(package: str, name: str) -> dict[str, Any]:
    """Fuse one model and compare it with the best peer that keeps the function."""
    import torch

    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    from helpers import randomise
    from op_counts import left_by, peers
    from packages import PACKAGES, TRAINED

    import repcompiler

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = PACKAGES[package].build(name)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        return {"status": "too large", "params": parameters}
    model = model.eval() if package in TRAINED else randomise(model)
    with torch.no_grad():
        model(*inputs)
    fused = repcompiler.fuse(model, inputs, samples=2)
    rivals = {k: left_by(p, model, inputs) for k, p in peers().items()}
    return {
        **record_of(fused.report),
        "params": parameters,
        "peers": rivals,
        "leftovers": _leftovers(fused),
    }


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


def _leftovers(fused: Any) -> list[str] | None:
    """What an independent reader of the fused graph finds; None where there is none."""
    if importlib.util.find_spec("leftovers") is None:
        return None
    from leftovers import leftovers

    return leftovers(fused.model, fused.report.kept)


def child(package: str, name: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        record = survey_one(package, name)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:200]
        record = {"status": "error", "note": f"{type(error).__name__}: {text}"}
    print("\n" + json.dumps(record))


# ---- the survey --------------------------------------------------------------------


def run(package: str, options: argparse.Namespace) -> None:
    """Survey one package; what is recorded under the current stamp is left alone."""
    from packages import PACKAGES

    stamp = f"{PACKAGES[package].stamp()} torch-{version('torch')} {fingerprint()}"
    deadline = time.monotonic() + 60 * options.minutes
    for family, name in names(package, families_only=options.families):
        key = f"{package}:{name}"
        known = _records().get(key, {})
        if options.match not in name or (known.get("stamp") == stamp):
            continue
        if time.monotonic() > deadline:
            break
        record = _in_process(package, name)
        _keep(key, {"stamp": stamp, "family": family, **record})
        print(f"{key}: {record['status']} {record.get('ops', record.get('note'))}")
        sys.stdout.flush()


def _records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def _keep(key: str, record: dict[str, Any]) -> None:
    records = {**_records(), key: record}
    temporary = RECORDS.with_suffix(".tmp")
    temporary.write_text(json.dumps(records, indent=0, sort_keys=True) + "\n")
    temporary.replace(RECORDS)


def _in_process(package: str, name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "child", package, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "note": f"over {SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        return {"status": "crash", "note": tail[0][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["run", "report", "child"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--package", default="all")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--match", default="")
    parser.add_argument("--families", action="store_true", help="one of each family")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from packages import PACKAGES, missing

    if options.task == "child":
        child(*options.words)
    elif options.task == "report":
        from survey_report import write

        write(_records(), ROOT / "docs" / "coverage.md")
    else:
        chosen = PACKAGES if options.package == "all" else [options.package]
        for package in chosen:
            absent = missing(package)
            print(absent or f"surveying {package}", file=sys.stderr)
            if absent is None:
                run(package, options)


if __name__ == "__main__":
    main()
