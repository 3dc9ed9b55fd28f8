"""Where the time of one form goes: each op of its graph against the machine's roofline.

Attainable time of an op is the larger of its arithmetic at the rate of a large matrix
product and its traffic (inputs, weights, output, once each) at that of a large copy.
Both rates are measured once for a device, dtype and number of threads, and kept.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fastvit_cli import machine
from fastvit_cli.files import all_or_nothing

ROUNDS = 7
SIDE = 1024  # of the square matrices
COPIED = 2**24  # numbers: far more than a cache level of one core holds


@dataclass(frozen=True)
class Roofline:
    """Measured limits: multiply-adds count as two operations."""

    gflops: float
    gigabytes: float


@dataclass(frozen=True)
class Layer:
    """One op: median milliseconds of its calls, work, and what limits it."""

    name: str
    op: str
    milliseconds: float
    macs: int
    bytes: int
    gflops: float
    gigabytes: float
    bound: str
    of_roofline: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def roofline(device: str, dtype: str, threads: int) -> Roofline:
    """The limits of a device, from the cache or measured now."""
    key = f"{machine.name(device)}, {dtype}, {threads} threads"
    path = machine.cache_folder() / "roofline.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Roofline(**known[key])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    found = _measure_roofline(device, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with all_or_nothing([path]) as (temporary,):
            temporary.write_text(json.dumps({**known, key: asdict(found)}))
    except OSError:  # a read-only home only costs the next run some time
        pass
    return found


def _measure_roofline(device: str, dtype: str) -> Roofline:
    import torch

    kind = getattr(torch, dtype)
    square = torch.ones(SIDE, SIDE, dtype=kind, device=device)
    long = torch.ones(COPIED, dtype=kind, device=device)
    target = torch.empty_like(long)
    product = _fastest(lambda: square @ square, device)
    copy = _fastest(lambda: target.copy_(long), device)
    return Roofline(
        2 * SIDE**3 / product / 1e9, 2 * COPIED * long.element_size() / copy / 1e9
    )


def _fastest(call: Callable[[], Any], device: str) -> float:
    return min(_timed(call, device)[0] for _ in range(ROUNDS))


def _timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    import torch

    start = time.perf_counter()
    result = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(graph: Any, inputs: tuple[Any, ...], limits: Roofline) -> list[Layer]:
    """Every op of an fx.GraphModule, the slowest first; views are left out."""
    import torch

    device = str(inputs[0].device)
    seconds: dict[Any, list[float]] = {}
    values: dict[Any, Any] = {}

    class Timer(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            if node.op not in ("call_module", "call_function", "call_method"):
                values[node] = super().run_node(node)
                return values[node]
            run = super().run_node
            taken, values[node] = _timed(lambda: run(node), device)
            seconds.setdefault(node, []).append(taken)
            return values[node]

    with torch.no_grad():
        for _ in range(ROUNDS):
            Timer(graph).run(*inputs)
    rows = [
        _layer(graph, node, statistics.median(taken[1:]), values, limits)
        for node, taken in seconds.items()
    ]
    return sorted((r for r in rows if r), key=lambda row: -row.milliseconds)


def _layer(
    graph: Any, node: Any, taken: float, values: dict[Any, Any], limits: Roofline
) -> Layer | None:
    import torch

    ops, macs = _work(graph, node, values)
    if not ops:
        return None
    reads = [values[source] for source in node.all_input_nodes]
    tensors = [v for v in (*reads, values[node]) if isinstance(v, torch.Tensor)]
    if node.op == "call_module":
        tensors += graph.get_submodule(str(node.target)).parameters()
    moved = sum(t.numel() * t.element_size() for t in tensors)
    compute, traffic = 2 * macs / limits.gflops / 1e9, moved / limits.gigabytes / 1e9
    return Layer(
        name=str(node.target) if node.op == "call_module" else node.name,
        op=ops,
        milliseconds=1e3 * taken,
        macs=macs,
        bytes=moved,
        gflops=2 * macs / taken / 1e9,
        gigabytes=moved / taken / 1e9,
        bound="compute" if compute > traffic else "memory",
        of_roofline=max(compute, traffic) / taken,
    )


def _work(graph: Any, node: Any, values: dict[Any, Any]) -> tuple[str, int]:
    """(names of the ATen ops that it runs, multiply-accumulates)."""
    import torch

    from repcompiler.counting import _OpCounter

    interpreter = torch.fx.Interpreter(graph)
    interpreter.env = dict(values)
    with torch.no_grad(), _OpCounter() as counter:
        interpreter.run_node(node)
    return ", ".join(counter.calls), counter.macs
