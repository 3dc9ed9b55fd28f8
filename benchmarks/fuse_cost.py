"""What fusing costs: time against torch's own fuser, growth with size, peak memory.

    python benchmarks/fuse_cost.py [--models fastvit_t8 …] [--runs N] [--json FILE]

One torch thread; runs of the two are interleaved and the median is printed. Time is
that of capture to lower (`verify=False` leaves out the check of the capture, of the
regions and of the whole). Peak memory is that of a process of its own which builds and
fuses the model, less that of one which only imports what the first imports, over the
model's size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse

import repcompiler
from fastvit import VARIANTS, create_model

STAGES = ("capture", "lift", "compose", "select", "lower")
MODELS = ("fastvit_t8", "fastvit_s12", "fastvit_sa12", "fastvit_sa24", "fastvit_ma36")


def build(name: str) -> nn.Module:
    """A model of this project, or `timm:NAME`."""
    if name in VARIANTS:
        return create_model(name).eval()
    return timm.create_model(name.removeprefix("timm:")).eval()


def stage_seconds(model: nn.Module, inputs: torch.Tensor) -> tuple[float, int]:
    """(seconds from capture to lower, nodes of the captured graph)."""
    result = repcompiler.fuse(model, inputs, verify=False)
    nodes = len(repcompiler.capture(model).graph.nodes)
    return sum(result.report.seconds[stage] for stage in STAGES), nodes


def torch_seconds(model: nn.Module) -> float:
    start = time.perf_counter()
    torch_fuse(model)
    return time.perf_counter() - start


def measure(name: str, runs: int) -> dict[str, float | str]:
    """Medians of both, their ratio, and time per node."""
    model, inputs = build(name), torch.randn(1, 3, 256, 256)
    ours: list[float] = []
    theirs: list[float] = []
    nodes = 0
    stage_seconds(model, inputs)  # the first run pays for imports and caches
    for _ in range(runs):
        theirs.append(torch_seconds(model))
        seconds, nodes = stage_seconds(model, inputs)
        ours.append(seconds)
    mine, peer = statistics.median(ours), statistics.median(theirs)
    return {
        "model": name,
        "nodes": nodes,
        "seconds": mine,
        "torch_fuse_seconds": peer,
        "ratio": mine / peer,
        "milliseconds_per_node": 1e3 * mine / nodes,
    }


def peak_bytes(name: str, fuse: bool) -> int:
    """Peak resident memory of a fresh process that does just this."""
    command = [sys.executable, __file__, "--child", name, "fuse" if fuse else "import"]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


def child(name: str, task: str) -> None:
    torch.set_num_threads(1)
    if task == "fuse":
        repcompiler.fuse(build(name), torch.randn(1, 3, 256, 256), verify=False)
    else:
        repcompiler.fuse(nn.Conv2d(3, 3, 1).eval(), torch.randn(1, 3, 8, 8))
    print(peak_resident())


def peak_resident() -> int:
    """Peak resident bytes of this process; `ru_maxrss` counts its parent's as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(row for row in status.splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(name: str) -> dict[str, float | str]:
    """Peak memory above the imports, in model sizes."""
    size = sum(p.numel() * p.element_size() for p in build(name).parameters())
    extra = peak_bytes(name, fuse=True) - peak_bytes(name, fuse=False)
    return {"model": name, "model_bytes": size, "peak_over_model": extra / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    torch.set_num_threads(1)
    header = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": 1,
        "command": " ".join(["python", "benchmarks/fuse_cost.py", *sys.argv[1:]]),
    }
    rows = [measure(name, options.runs) for name in options.models]
    last = memory(options.models[-1])
    print("  ".join(f"{key}={value}" for key, value in header.items()))
    print("model           nodes  seconds  torch fuse  ratio  ms/node")
    for row in rows:
        print(
            f"{row['model']:<15} {row['nodes']:>5}  {row['seconds']:7.2f}  "
            f"{row['torch_fuse_seconds']:10.2f}  {row['ratio']:5.2f}  "
            f"{row['milliseconds_per_node']:7.2f}"
        )
    print(f"peak memory of {last['model']}: {last['peak_over_model']:.2f} model sizes")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"header": header, "rows": rows, "memory": last}, file, indent=2)


if __name__ == "__main__":
    main()
