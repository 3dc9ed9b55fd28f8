"""Fuse every model of the installed packages, one process each, and keep score.

    python tests/zoo/survey.py run [--package timm] [--minutes M] [--match TEXT]
    python tests/zoo/survey.py report          # docs/coverage.md from the JSON

A record is kept for each model in `tests/zoo/survey.json`, under the versions of its
package and of torch and a fingerprint of the compiler's source; what is there and
current is not run again. Every family comes first, by its smallest member, then every
name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
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


def names(package: str) -> list[str]:
    """Every model of a package: one of each family first, then the rest."""
    families: dict[str, list[str]] = {}
    for family, name in _listed(package):
        families.setdefault(family, []).append(name)
    ordered = [sorted(members, key=_smallness) for members in families.values()]
    first = [members[0] for members in ordered]
    second = [members[1] for members in ordered if len(members) > 1]
    rest = [name for members in ordered for name in members[2:]]
    return first + second + rest


def _listed(package: str) -> Iterator[tuple[str, str]]:
    if package == "timm":
        import timm
        from timm.models import _registry

        for name in timm.list_models():
            yield _registry._model_to_module[name], name
    elif package == "torchvision":
        import torchvision

        for name in torchvision.models.list_models():
            yield name.rstrip("0123456789_bslmht"), name


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

    import repcompiler

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, size = _build(package, name)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        return {"status": "too large", "params": parameters}
    model, x = randomise(model), torch.randn(size)
    with torch.no_grad():
        output = model(x)
    report = repcompiler.fuse(model, (x,), samples=2).report
    reasons: dict[str, int] = {}
    for kept in report.kept:
        key = f"{kept.op}: {kept.reason}"
        reasons[key] = reasons.get(key, 0) + 1
    tensor = isinstance(output, torch.Tensor)
    rivals = {k: left_by(p, model, x) for k, p in peers().items()} if tensor else {}
    equal = report.equivalence
    return {
        "status": equal.verdict,
        "note": equal.note,
        "door": report.capture,
        "params": parameters,
        "ops": [report.ops.before, report.ops.after],
        "norms": [
            report.ops.before_by_type.get("batch_norm", 0),
            report.ops.after_by_type.get("batch_norm", 0),
        ],
        "peers": rivals,
        "exactness": equal.exactness,
        "error_ratio": equal.error_ratio,
        "seconds": {k: round(v, 2) for k, v in report.seconds.items()},
        "regions": len(report.regions),
        "kept": reasons,
    }


def _build(package: str, name: str) -> tuple[Any, tuple[int, ...]]:
    if package == "timm":
        import timm

        model = timm.create_model(name)
        return model, (1, *model.pretrained_cfg["input_size"])
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    video = "video" in type(model).__module__
    return model, (1, 3, 8, 112, 112) if video else (1, 3, 224, 224)


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


def run(package: str, minutes: float, match: str) -> None:
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    stamp = f"{version(package)} torch-{version('torch')} {fingerprint()}"
    deadline = time.monotonic() + 60 * minutes
    for name in names(package):
        key = f"{package}:{name}"
        if match not in name or records.get(key, {}).get("stamp") == stamp:
            continue
        if time.monotonic() > deadline:
            break
        record = _in_process(package, name)
        records[key] = {"stamp": stamp, **record}
        print(f"{key}: {record['status']} {record.get('ops', record.get('note'))}")
        sys.stdout.flush()
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
    parser.add_argument("--package", default="timm")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--match", default="")
    options = parser.parse_args()
    if options.task == "child":
        child(*options.words)
    elif options.task == "run":
        run(options.package, options.minutes, options.match)
    else:
        from survey_report import write

        write(json.loads(RECORDS.read_text()), ROOT / "docs" / "coverage.md")


if __name__ == "__main__":
    main()
