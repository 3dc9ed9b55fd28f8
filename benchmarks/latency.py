"""What fusing gains in time: ours against timm's and torch's forms, in every runtime.

    python benchmarks/latency.py [MODEL …] [--budget SECONDS] [--keep-memory]

All forms of a model in one runtime run in one process, in interleaved rounds of random
order. `again` is our form a second time: what it differs from itself is the noise.

    train   the model as timm makes it
    timm    timm's reparameterize_model
    torch   torch.fx.experimental.optimization.fuse of that
    ours    repcompiler.fuse
    tuned   as `fuse --tune` writes it for this runtime and batch size, by forms of
            convs, layout, writes in place and, in OpenVINO, kernels; `default` where
            no plan beats ours. A runtime that cannot be tuned for runs the plan of
            eager torch
    direct  timm's form in the kernels of the tuned plan, where it has any of its own:
            what they give without our forms

Every form is compared with the float64 original first; one that is off by more than
eight times the model's own rounding is marked `wrong`, and one that fails says so. The
record says what was left out when the budget ran out.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import datetime
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from fastvit_cli import irgraphs, machine, timing, tuner
from fastvit_cli.backends import TUNED_IN
from fastvit_cli.measured import Setting
from fastvit_cli.onnx_plans import Exports
from fastvit_cli.plans import Plan, Task
from op_counts import randomise
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as torch_fuse

import repcompiler

MODELS = (
    "fastvit_t8 fastvit_sa12 fastvit_ma36 repvgg_a0 mobileone_s1 repvit_m1 resnet50"
).split()
BATCHES = (1, 8)
RUNTIMES = ("eager", "onnxruntime", "openvino", "eager-channels-last", "compile")
PEERS = ("train", "timm", "torch")
FORMS = (*PEERS, "ours", "tuned", "direct", "again")
RECORDS = Path(__file__).resolve().parent / "records"
MIN_ROUNDS = 4
Run = Callable[[], Any]


# ---- forms -------------------------------------------------------------------------


@functools.cache
def forms(name: str) -> tuple[dict[str, nn.Module | str], Tensor, nn.Module]:
    """(each form, or why there is none; one input; the model in float64)."""
    model = randomise(timm.create_model(name))
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    made: dict[str, nn.Module | str] = {"train": model}
    made["timm"] = attempt(lambda: reparameterize_model(copy.deepcopy(model)).eval())
    base = made["timm"] if isinstance(made["timm"], nn.Module) else model
    made["torch"] = attempt(lambda: torch_fuse(copy.deepcopy(base)).eval())
    made["ours"] = repcompiler.fuse(model, (x,), verify=False).model.eval()
    return made, x, copy.deepcopy(model).double()


@functools.cache
def tuned(name: str, home: str, batch: int, threads: int) -> Plan | None:
    """Our form tuned for one of `TUNED_IN`; None where the default plan stays."""
    made, x, _ = forms(name)
    setting = Setting("cpu", "float32", threads, batch, home)
    more = {"regions": False, "exports": exports(name)}
    return tuner.tune(Task(made["train"], (x,), setting, **more), lambda _: None).plan


@functools.cache
def exports(name: str) -> Exports:
    """The model's plans as ONNX files, for all runtimes and batch sizes."""
    folder = tempfile.TemporaryDirectory(prefix=f"{name}-")
    atexit.register(folder.cleanup)
    return Exports(Path(folder.name))


def attempt(make: Callable[[], nn.Module]) -> nn.Module | str:
    """What `make` returns, or the name of its error: peers fail on some models."""
    try:
        return make()
    except Exception as error:
        return type(error).__name__


def wrong(found: Tensor, own: Tensor, truth: Tensor) -> bool:
    """Whether a form is more than 8 times as far from float64 as plain rounding."""
    rounding = float((own.double() - truth).norm())
    floor = torch.finfo(torch.float32).eps * float(truth.norm())
    return not float((found.double() - truth).norm()) <= 8 * max(rounding, floor)


# ---- runtimes ----------------------------------------------------------------------


def prepare(
    runtime: str, model: nn.Module, x: Tensor, threads: int, kernels: tuple[str, ...]
) -> Run:
    """What runs the model once; OpenVINO with some kinds of convs in direct kernels."""
    if runtime == "onnxruntime":
        return in_onnxruntime(model, x, threads)
    if runtime == "openvino":
        return in_openvino(model, x, threads, kernels)
    if runtime == "eager-channels-last":
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    if runtime == "compile":
        torch._dynamo.config.recompile_limit = 4096
        model = torch.compile(model, dynamic=False, options={"freezing": True})

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def in_onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
    """The graph that torch.onnx writes, for static sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False, opset_version=18)
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def in_openvino(
    model: nn.Module, x: Tensor, threads: int, kernels: tuple[str, ...]
) -> Run:
    """OpenVINO's own conversion of the module, in float32."""
    import openvino

    graph = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    if kernels:
        graph = irgraphs.prefer_direct(graph, kernels)
    request = irgraphs.request(graph, "float32", threads)
    feed = [x.numpy()]

    def run() -> Tensor:
        request.infer(feed, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


# ---- measuring ---------------------------------------------------------------------


def measure(name: str, runtime: str, seconds: float, threads: int) -> list[dict]:
    """One row for each batch size: milliseconds of each form, and ratios."""
    made, one, wide = forms(name)
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        x = torch.cat([one * (1 + index) for index in range(batch)])
        with torch.no_grad():
            truth, own = wide(x.double()), made["train"](x)
        home = runtime if runtime in TUNED_IN else "eager"
        plan = tuned(name, home, batch, threads)
        made["tuned"] = plan.module if plan else "default"
        kernels = plan.kernels if plan else ()
        made["direct"] = made["timm"] if kernels else "no kernels"
        told = (runtime, x, threads, kernels)
        runs, marks = usable(made, told, (own, truth))
        rounds = timing.interleave(runs, seconds / len(BATCHES), min_rounds=MIN_ROUNDS)
        row = {"model": name, "runtime": runtime, "batch": batch, "left_out": marks}
        row["plan"] = plan.name if plan else "default"
        rows.append({**row, **figures(rounds)})
    return rows


def usable(
    made: dict[str, Any], told: tuple, judged: tuple
) -> tuple[dict[str, Run], dict[str, str]]:
    """(form → run, form → why there is none)."""
    runtime, x, threads, kernels = told
    runs: dict[str, Run] = {}
    marks: dict[str, str] = {}
    for form in FORMS:
        model = made["ours" if form == "again" else form]
        if isinstance(model, str):
            marks[form] = model
            continue
        try:
            own = kernels if form in ("tuned", "direct") else ()
            run = prepare(runtime, model, x, threads, own)
            output = run()
        except Exception as error:
            marks[form] = type(error).__name__
            continue
        runs[form] = run
        if wrong(output, *judged):
            marks[form] = "wrong"
    return runs, marks


def figures(rounds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians, spreads, and our forms' ratios to every other, round by round."""
    summaries = {form: timing.summarise(rows) for form, rows in rounds.items()}
    return {
        "milliseconds": {form: row.median for form, row in summaries.items()},
        "spread": {form: row.spread for form, row in summaries.items()},
        "ratio": ratios("ours", rounds),
        "tuned_ratio": ratios("tuned" if "tuned" in rounds else "ours", rounds),
    }


def ratios(form: str, rounds: dict[str, list[list[float]]]) -> dict[str, float]:
    """A form over each of the others."""
    if form not in rounds:
        return {}
    others = {name: rows for name, rows in rounds.items() if name != form}
    return {name: timing.ratio(rounds[form], rows) for name, rows in others.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; 1 of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.mean(logs)) if logs else float("nan")


# ---- showing -----------------------------------------------------------------------


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    cells = [f"{row['milliseconds'].get(form, math.nan):9.2f}" for form in FORMS]
    found = [f"{row['ratio'].get(form, math.nan):6.2f}" for form in PEERS]
    found.append(f"{row['tuned_ratio'].get('timm', math.nan):6.2f}")
    noise = abs(row["ratio"].get("again", math.nan) - 1)
    note = " ".join(f"{form}:{why}" for form, why in row["left_out"].items())
    print(
        f"{row['model']:<13} {row['runtime']:<19} {row['batch']:>2}"
        f"{''.join(cells)}  {' '.join(found)}  {noise:5.1%}  {note}",
        flush=True,
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each runtime: FastViT against timm's form, and the best peer's, any model."""
    found: dict[str, Any] = {}
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        mine = [row for row in rows if row["runtime"] == runtime and row["ratio"]]
        fast = [row for row in mine if row["model"].startswith("fastvit")]
        found[runtime] = {
            "fastvit_over_timm": over_timm(fast, "ratio"),
            "fastvit_tuned_over_timm": over_timm(fast, "tuned_ratio"),
            "worst_over_best_peer": worst(mine, "ratio"),
            "worst_tuned_over_best_peer": worst(mine, "tuned_ratio"),
            "noise": max(
                (abs(r["ratio"]["again"] - 1) for r in mine), default=math.nan
            ),
        }
    return found


def over_timm(rows: list[dict[str, Any]], key: str) -> float:
    """The geometric mean of our form, or the tuned one, over timm's."""
    return geometric_mean(row[key]["timm"] for row in rows if "timm" in row[key])


def worst(rows: list[dict[str, Any]], key: str) -> float:
    """The largest ratio to the fastest peer; those that compute otherwise are none."""
    best = [
        max(row[key][f] for f in PEERS if f in row[key] and f not in wrongs(row))
        for row in rows
    ]
    return max(best, default=math.nan)


def wrongs(row: dict[str, Any]) -> set[str]:
    """Forms that do not compute the model."""
    return {form for form, why in row["left_out"].items() if why == "wrong"}


def header(threads: int) -> dict[str, Any]:
    """Where, with what and how the record was made."""
    return {
        **machine.describe("cpu", threads),
        "date": datetime.date.today().isoformat(),
        "load": Path("/proc/loadavg").read_text("ascii").split()[0],
        "repcompiler": repcompiler.__file__ and machine.package_version(),
        "command": " ".join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
        "method": "interleaved rounds in random order, one process; ratios are medians "
        "over rounds of ours over the other",
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole record: what the budget left out is listed."""
    start, rows, missed = time.perf_counter(), [], []
    pairs = [(name, runtime) for runtime in options.runtimes for name in options.models]
    for name, runtime in pairs:
        if time.perf_counter() - start > options.budget:
            missed.append(f"{name} in {runtime}")
            continue
        share = options.budget / len(pairs) / 6  # the rest is exporting and tuning
        try:
            found = measure(name, runtime, share, options.threads)
        except Exception as error:  # the other cells are still worth having
            missed.append(f"{name} in {runtime}: {type(error).__name__}: {error}"[:200])
            continue
        for row in found:
            show(row)
        rows += found
    return {
        "header": header(options.threads),
        "rows": rows,
        "summary": summary(rows),
        "left_out": missed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES, choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--json", metavar="FILE", help="default: a dated record")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="have glibc keep what is freed: no page faults in the times of eager",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_memory and not timing.keep_memory():
        parser.error("--keep-memory: this C library has no mallopt")
    print(machine.line(machine.describe("cpu", options.threads)))
    titles = "".join(f"{form:>9}" for form in FORMS)
    peers = " ".join(PEERS)
    over = f"ours over: {peers}  tuned over timm"
    print(f"{'model':<13} {'runtime':<19}  n{titles}   {over}  noise")
    record = run(options)
    for runtime, row in record["summary"].items():
        print(f"{runtime}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
    for text in record["left_out"]:
        print(f"left out: {text}")
    today = record["header"]["date"]
    path = Path(options.json or RECORDS / f"{today}-latency.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
