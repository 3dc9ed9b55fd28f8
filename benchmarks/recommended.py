"""What the recommended form takes, over timm's reparameterised form in eager float32.

    python benchmarks/recommended.py [MODEL] [--batch N] [--threads N] [--json FILE]

Our fused form, and the one tuned for it, in every backend, in float32 and where the
device has it in bfloat16, run in one process against timm's form, in interleaved rounds
of random order. `timm again` is the noise: more than 5% of it makes no record. A form
that is further from float64 than 8 times timm's own rounding in its dtype is marked,
and never the best. The roofline is the least time that this device allows for the ops
of the fused form.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from fastvit_cli import backends, layers, machine, roofline, timing, tuner
from fastvit_cli.backends import BACKENDS, TUNED_IN, Subject
from fastvit_cli.card import Card
from fastvit_cli.cells import flat
from fastvit_cli.measured import Setting
from fastvit_cli.plans import Task
from op_counts import randomise
from timm.utils.model import reparameterize_model
from torch import Tensor

import repcompiler

RECORDS = Path(__file__).resolve().parent / "records"
QUIET = 0.05  # how far timm's form may be from itself in what is kept as a record
WRONG = 8.0  # times the rounding of timm's form in the same dtype
PEER = ("timm", "eager", "float32")
AGAIN = ("timm again", "eager", "float32")
Name = tuple[str, str, str]  # form, backend, dtype
Run = Callable[[], Any]


def subjects(options: argparse.Namespace, scratch: Path) -> dict[str, Subject]:
    """timm's form, ours, and ours tuned where a plan beats the default."""
    model = randomise(timm.create_model(options.model))
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    weights = {"origin": "random", "seed": 0}
    card = Card(f"timm:{options.model}", {"input_size": list(size)}, weights=weights)
    forms = {
        "train": model,
        "timm": reparameterize_model(copy.deepcopy(model)).eval(),
        "fused": repcompiler.fuse(model, (x,)).model,
    }
    kernels: dict[str, tuple[str, ...]] = {}
    for home in [name for name in TUNED_IN if not BACKENDS[name].lacks()]:
        setting = Setting("cpu", "float32", options.threads, options.batch, home)
        tuned = tuner.tune(Task(model, (x,), setting), lambda _: None)
        if tuned.plan is not None:
            print(f"tuned for {home}: {tuned.plan.name}")
            fused = repcompiler.fuse(model, (x,), tuning=tuned.tuning).model
            forms[tuned_key(home)] = fused
            kernels[tuned_key(home)] = tuned.kernels
    make = functools.partial(Subject, inputs=(x,), card=card, dtype="float32")
    more = {"device": "cpu", "threads": options.threads, "scratch": scratch}
    return {
        name: make(form, kernels=kernels.get(name, ()), **more)
        for name, form in forms.items()
    }


def tuned_key(backend: str) -> str:
    """The form that was tuned for a backend, or for eager torch if it cannot be."""
    return f"tuned for {backend if backend in TUNED_IN else 'eager'}"


def names(forms: dict[str, Subject]) -> Iterator[Name]:
    """What is timed beside timm's form."""
    dtypes = ["float32"] + ["bfloat16"] * machine.has_bfloat16("cpu")
    for dtype in dtypes:
        for name, backend in BACKENDS.items():
            if dtype not in backend.dtypes or backend.lacks():
                continue
            for form in ("fused", tuned_key(name)):
                if form in forms:
                    yield form, name, dtype


def prepare(
    forms: dict[str, Subject], batch: int
) -> tuple[dict[Name, Run], dict[Name, dict[str, float]], dict[Name, str]]:
    """(runs, distance from float64 and error ratio of each, why others have none)."""
    truth = outputs(forms, ("train", "eager", "float64"), batch)[1]
    runs: dict[Name, Run] = {}
    errors: dict[Name, dict[str, float]] = {}
    failed: dict[Name, str] = {}
    own: dict[str, float] = {}
    for name in (PEER, *names(forms)):
        peer = ("timm", "eager", name[2])
        if name[2] not in own:
            own[name[2]] = distance(outputs(forms, peer, batch)[1], truth)
        try:
            runs[name], output = outputs(forms, name, batch)
        except Exception as error:  # a runtime may refuse in any way
            failed[name] = f"{type(error).__name__}: {error}"[:120]
            continue
        found = distance(output, truth)
        errors[name] = {"distance": found, "error_ratio": found / own[name[2]]}
    runs[AGAIN] = runs[PEER]
    return runs, errors, failed


def outputs(
    forms: dict[str, Subject], name: Name, batch: int
) -> tuple[Run, list[Tensor]]:
    """(what runs the form, what it computes)."""
    form, backend, dtype = name
    subject = backends.in_dtype(forms[form], dtype)
    run = BACKENDS[backend].prepare(subject, backends.of_batch(subject, batch))
    return run, flat(run())


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """‖found - truth‖ / ‖truth‖."""
    pairs = zip(found, truth, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def least(subject: Subject, batch: int) -> float:
    """Milliseconds that this device needs at least for the ops of a form."""
    roof = roofline.measured("cpu", "float32", subject.threads)
    inputs = backends.of_batch(subject, batch)
    graph: Any = subject.model
    ops = layers.measure(graph, inputs, "cpu", repeats=1)
    return sum(roof.milliseconds(op.macs, op.moved) for op in ops)


def rows(
    runs: dict[Name, Run], errors: dict[Name, dict[str, float]], seconds: float
) -> list[dict[str, Any]]:
    """One row for each form, fastest first."""
    rounds = timing.interleave(runs, seconds)
    found = [
        {
            **dict(zip(("form", "backend", "dtype"), name)),
            **timing.summarise(times).to_dict(),
            "over_timm": timing.ratio(times, rounds[PEER]),
            **errors.get(name, errors[PEER]),
        }
        for name, times in rounds.items()
    ]
    return sorted(found, key=lambda row: row["over_timm"])


def best(found: list[dict[str, Any]], *dtypes: str) -> dict[str, Any]:
    """The fastest of our rows that computes the model."""
    ours = [row for row in found if not row["form"].startswith("timm")]
    return next(r for r in ours if r["dtype"] in dtypes and r["error_ratio"] <= WRONG)


def show(found: list[dict[str, Any]]) -> None:
    """The table."""
    for row in found:
        name = f"{row['form']}, {row['backend']}, {row['dtype']}"
        mark = "" if row["error_ratio"] <= WRONG else "  wrong"
        print(
            f"{name:<48} {row['milliseconds']:8.2f} ms ±{row['spread']:4.0%} "
            f"{row['over_timm']:6.3f}  off by {row['distance']:.1e}{mark}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fastvit_t8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", metavar="FILE", help="default: a dated record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = Path("/proc/loadavg").read_text("ascii").split()[0]
    header = {**machine.describe("cpu", options.threads), "load": load}
    print(f"{machine.line(header)}; load {load}")
    with tempfile.TemporaryDirectory() as scratch:
        forms = subjects(options, Path(scratch))
        runs, errors, failed = prepare(forms, options.batch)
        found = rows(runs, errors, options.seconds)
    show(found)
    for name, why in failed.items():
        print(f"left out: {', '.join(name)}: {why}")
    floor = least(replace(forms["fused"]), options.batch)
    chosen = {"float32": best(found, "float32")}
    chosen["any dtype"] = best(found, "float32", "bfloat16")
    for kind, row in chosen.items():
        print(
            f"recommended, {kind}: {row['form']} in {row['backend']}, {row['dtype']}: "
            f"{row['over_timm']:.3f} of timm's form, {row['milliseconds'] / floor:.2f} "
            f"times the float32 roofline of {floor:.3g} ms"
        )
    date = datetime.date.today().isoformat()
    command = " ".join(["python", "benchmarks/recommended.py", *sys.argv[1:]])
    header |= {"date": date, "command": command, "batch": options.batch}
    record = {"header": header, "model": options.model, "rows": found}
    record |= {"roofline_milliseconds": floor, "recommended": chosen}
    again = next(row["over_timm"] for row in found if row["form"] == AGAIN[0])
    print(f"noise: timm's form is {abs(again - 1):.1%} off itself")
    if abs(again - 1) > QUIET and not options.json:
        sys.exit("The machine is busy: no record is written. Run it again.")
    path = Path(options.json or RECORDS / f"{date}-recommended.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
