"""False alarms of `fastvit check`, and the planted faults that it finds.

    python benchmarks/false_alarms.py [--models M …] [--seeds N] [--json FILE]

Every model is fused in three dtypes with norm statistics of several seeds, and each
fusion is compared with its original by the code that `fastvit check` runs; in float32
also through .pt2 and .onnx, and as timm's method and torch fx fuse it. All of them are
honest: a verdict other than `equal` is a false alarm. Then `faults.py` plants one fault
of each kind in the fused model (float32), and it is counted how many are found and put
in the right place. One torch thread, inputs of 64 pixels.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from fastvit_cli import artefacts, checking, comparing, runners, seeing, sources
from fastvit_cli.builders import ModelOptions
from fastvit_cli.check_cases import Case
from fastvit_cli.errors import Stop, summary
from faults import KINDS, plant
from timm.utils.model import reparameterize_model
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse

import repcompiler

MODELS = (
    "fastvit_t8 timm:repvgg_a0 timm:mobileone_s0 timm:repvit_m0_9 timm:resnet18 "
    "timm:mobilenetv3_small_050 timm:efficientnet_b0 timm:ghostnet_050 "
    "timm:repghostnet_050 timm:convnext_atto timm:edgenext_xx_small "
    "timm:mobilevit_xxs timm:poolformer_s12 timm:dla46_c timm:densenet121 "
    "timm:ese_vovnet19b_slim_dw timm:regnety_002 timm:mixnet_s timm:starnet_s1 "
    "timm:levit_128s torchvision:resnet18 torchvision:mobilenet_v2 "
    "torchvision:shufflenet_v2_x0_5 torchvision:googlenet"
).split()
PLANTED_IN = (
    "fastvit_t8 fastvit_sa12 timm:repvgg_a0 timm:mobileone_s0 timm:repvit_m0_9 "
    "timm:resnet18 timm:efficientnet_b0 timm:regnety_002 torchvision:mobilenet_v2"
).split()
DTYPES = ("float32", "bfloat16", "float16")
SIZE = (3, 64, 64)
SIZES = {"timm:levit_128s": (3, 224, 224)}  # its position biases are of one size


def randomise(model: nn.Module, size: tuple[int, ...], seed: int) -> None:
    """Norm statistics as trained nets have them, other with each seed.

    They are those of noise, moved at random: with statistics from nowhere deep nets
    grow to 1e14, which float16 cannot hold.
    """
    generator = torch.Generator().manual_seed(seed + 7919)

    def normal(value: Any, mean: float, spread: float) -> None:
        if isinstance(value, torch.Tensor):
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(mean + spread * noise)

    norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name or "layer_scale" in name:
                normal(parameter, 0.0, 1.0)
        for norm in norms:
            normal(norm.weight, 1.0, 0.3)
            normal(norm.bias, 0.0, 0.3)
            norm.momentum = 1.0
        model.train()(torch.randn((4, *size), generator=generator))
        model.eval()
        for norm in norms:
            noise = torch.rand(norm.running_var.shape, generator=generator)
            norm.running_var.mul_(0.5 + 1.5 * noise)
            noise = torch.randn(norm.running_var.shape, generator=generator)
            norm.running_mean.add_(0.3 * norm.running_var.sqrt() * noise)


def load(name: str, dtype: str, seed: int) -> sources.Loaded:
    """A model in a dtype; its weights and statistics are those of the seed."""
    options = ModelOptions(input_size=SIZES.get(name, SIZE), seed=seed)
    loaded = sources.load(name, options)
    assert isinstance(loaded.model, nn.Module)
    randomise(loaded.model, options.input_size or SIZE, seed)
    wide = getattr(torch, dtype)
    inputs = runners.cast(loaded.inputs, wide)
    return replace(loaded, model=loaded.model.to(wide), inputs=inputs, dtype=dtype)


def judge(
    reference: sources.Loaded, candidate: runners.Runner, seed: int
) -> dict[str, Any]:
    """One row: what the command says about the pair."""
    start = time.perf_counter()
    outcome = checking.ask(runners.of(reference), candidate, samples=4, seed=seed)
    bad = [f for f in outcome.findings if f.verdict not in ("equal", "skipped")]
    return {
        "verdict": outcome.verdict,
        "error_ratio": outcome.largest("error_ratio"),
        "compared": "op by op" if outcome.decided else "outputs only",
        "inputs": sum(f.verdict != "skipped" for f in outcome.findings),
        "first": outcome.first,
        "failing": [asdict(f) for f in bad[:2]],
        "seconds": time.perf_counter() - start,
    }


def forms(loaded: sources.Loaded, fused: nn.Module, folder: Path) -> dict[str, Any]:
    """The fused model through files, and what timm's own method makes."""
    made: dict[str, Any] = {}
    card = replace(loaded.card, form="fused")
    artefact = artefacts.Artefact(fused, loaded.inputs, card)
    for suffix in (".pt2", ".onnx"):
        path = folder / f"fused{suffix}"
        try:
            artefacts.write(artefact, path, path)
            made[suffix] = runners.load(str(path), ModelOptions())
        except Stop as error:
            made[suffix] = error.line
    other = reparameterize_model(copy.deepcopy(loaded.model))
    try:
        other = torch_fuse(other)
    except Exception as error:  # no symbolic trace: timm's method alone then
        print(f"    {loaded.name}: torch fx {summary(error, 60)}")
    made["timm and torch fx"] = runners.of(replace(loaded, model=other.eval()))
    return made


def honest(name: str, dtype: str, seed: int, *, files: bool) -> list[dict[str, Any]]:
    """Rows of one model, dtype and seed."""
    loaded = load(name, dtype, seed)
    base = {"model": name, "dtype": dtype, "seed": seed}
    result = repcompiler.fuse(loaded.model, loaded.inputs)
    regions = len(result.report.regions)
    fusion = {**base, "regions": regions, "fuse": result.report.equivalence.verdict}
    fused = {"module": runners.of(replace(loaded, model=result.model))}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if files:
            fused |= forms(loaded, result.model, Path(folder))
        for form, candidate in fused.items():
            row = {**fusion, "form": form}
            if isinstance(candidate, str):
                rows.append({**row, "verdict": "not written", "note": candidate})
            else:
                rows.append({**row, **judge(loaded, candidate, seed)})
    return rows


def visible(name: str) -> dict[str, Any] | None:
    """The smallest change of one weight that outputs alone would show."""
    loaded = load(name, "float32", 0)
    fused = repcompiler.fuse(loaded.model, loaded.inputs, verify=False).model
    other = runners.of(replace(loaded, model=fused))
    models = comparing.pair(runners.of(loaded), other)
    return seeing.smallest_change(models, Case("example", loaded.inputs), 8.0)


def planted(name: str) -> list[dict[str, Any]]:
    """One row for each kind of fault."""
    loaded = load(name, "float32", 0)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        made = plant(kind, loaded.model, loaded.inputs)
        if made is None:
            continue
        row = judge(loaded, runners.of(replace(loaded, model=made.model)), 0)
        named = (row["first"] or {}).get("region")
        found = row["verdict"] == "different"
        by_outputs = any(f["verdict"] == "different" for f in row["failing"])
        rows.append(
            {
                "model": name,
                "fault": kind,
                "place": made.place,
                "found": found,
                "named": named,
                "right": found and named == made.place,
                "outputs_see_it": by_outputs,
                "seconds": row["seconds"],
            }
        )
    return rows


def say(row: dict[str, Any]) -> None:
    """One line of an honest fusion."""
    ratio = row.get("error_ratio")
    shown = "" if ratio is None else f"{ratio:.2f}"
    cells = (row["model"], row["dtype"], row["seed"], row["form"], row["verdict"])
    print(*cells, shown, row.get("compared", ""), sep="\t", flush=True)
    if row["verdict"] != "equal":
        print("   ", row.get("note") or row["first"] or row["failing"], flush=True)


def tried(name: str, dtype: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one model, dtype and seed, or one that says what went wrong."""
    files = dtype == "float32" and seed == 0
    try:
        return honest(name, dtype, seed, files=files)
    except Exception as error:  # a model that the compiler refuses, or a bug
        base = {"model": name, "dtype": dtype, "seed": seed, "form": ""}
        return [{**base, "verdict": "failed", "note": summary(error)}]


def run(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[None]:
    """Everything, printed and added to `found` as it comes."""
    for name in options.models:
        for dtype, seed in itertools.product(DTYPES, range(options.seeds)):
            rows = tried(name, dtype, seed)
            found["honest"] += rows
            for row in rows:
                say(row)
        seen = visible(name)
        found["smallest"].append({"model": name, "outputs": seen})
        if seen and seen["median"]:
            least = f"{seen['median']:.2%} of a median weight"
            print(f"    smallest fault that outputs show: {least}", flush=True)
        yield
    for name in options.planted:
        rows = planted(name)
        found["faults"] += rows
        for row in rows:
            cells = (row["model"], row["fault"], row["place"], row["named"])
            print(*cells, "found" if row["found"] else "MISSED", sep="\t", flush=True)
        yield


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that the docs state."""
    rows, faults = found["honest"], found["faults"]
    ran = [r for r in rows if r["verdict"] not in ("failed", "not written")]
    medians = [row["outputs"]["median"] for row in found["smallest"] if row["outputs"]]
    medians = sorted(value for value in medians if value)
    return {
        "honest_fusions": len(ran),
        "false_alarms": sum(row["verdict"] != "equal" for row in ran),
        "op_by_op": sum(row["compared"] == "op by op" for row in ran),
        "largest_error_ratio": max((row["error_ratio"] or 0 for row in ran), default=0),
        "not_run": [r for r in rows if r["verdict"] in ("failed", "not written")],
        "faults": len(faults),
        "found": sum(row["found"] for row in faults),
        "named_right": sum(row["right"] for row in faults),
        "seen_by_outputs": sum(row["outputs_see_it"] for row in faults),
        "smallest_by_outputs": medians and [medians[0], medians[-1]],
    }


def header() -> dict[str, Any]:
    """What the figures were taken with."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "input_size": SIZE,
        "argv": sys.argv[1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--planted", nargs="*", default=PLANTED_IN, metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=3, help="of statistics, per dtype")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(json.dumps(header()))
    found: dict[str, Any] = {"honest": [], "smallest": [], "faults": []}
    figures: dict[str, Any] = {}
    for _ in run(options, found):
        figures = summarise(found)
        figures["seconds"] = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures["peak_mib"] = peak // 1024
        if options.json:
            document = {"header": header(), "summary": figures, **found}
            text = json.dumps(document, indent=1, default=str) + "\n"
            Path(options.json).write_text(text, encoding="utf-8")
    print(json.dumps(figures, indent=2))
    sys.exit(bool(figures["false_alarms"] or figures["not_run"]))


if __name__ == "__main__":
    main()
