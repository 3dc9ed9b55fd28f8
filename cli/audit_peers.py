"""Other fusers, each run on one model in a process of its own.

A worker is started as `python -m fastvit_cli.audit_peers REQUEST ANSWER`: it builds the
model, lets one peer rewrite it, and compares. What hangs or crashes there is one row.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvit_cli.runners import Runner
    from torch import Tensor, nn

REPEATS = 5


@dataclass(frozen=True)
class Rewritten:
    """What a peer made: a module, or a graph in a file, and what it made that of."""

    model: nn.Module | None = None
    file: str = ""
    source: str = ""


def ours(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Rewritten:
    """This project's compiler, for comparison."""
    import repcompiler as rc

    return Rewritten(rc.fuse(model, inputs).model)


def timm_reparameterize(
    model: nn.Module, inputs: tuple[Tensor, ...], folder: Path
) -> Rewritten:
    """timm's own method: every block that has `reparameterize`, `fuse` or the like."""
    from timm.utils.model import reparameterize_model

    return Rewritten(reparameterize_model(model, inplace=False).eval())


def torch_fx(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Rewritten:
    """torch.fx.experimental.optimization.fuse: conv and batch norm, by pattern."""
    from torch.fx.experimental.optimization import fuse

    return Rewritten(fuse(copy.deepcopy(model)))


def inductor(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Rewritten:
    """TorchInductor with frozen weights."""
    import torch

    torch._inductor.config.freezing = True
    compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=False)
    with torch.no_grad():
        compiled(*inputs)
    return Rewritten(compiled)


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> str:
    """The model as an ONNX graph, before any optimiser."""
    import torch

    path = folder / "plain.onnx"
    program = torch.export.export(model, inputs)
    made = torch.onnx.export(
        program, dynamo=True, external_data=False, verbose=False, optimize=False
    )
    assert made is not None
    made.save(path)
    return str(path)


def onnxruntime(
    model: nn.Module, inputs: tuple[Tensor, ...], folder: Path
) -> Rewritten:
    """onnxruntime's optimiser, with every level that keeps the format."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    source = exported(model, inputs, folder)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return Rewritten(file=options.optimized_model_filepath, source=source)


def onnxslim(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Rewritten:
    """onnxslim's simplifier."""
    import onnx
    import onnxslim as peer

    source = exported(model, inputs, folder)
    onnx.save(peer.slim(source), folder / "slim.onnx")
    return Rewritten(file=str(folder / "slim.onnx"), source=source)


def onnxsim(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Rewritten:
    """onnxsim's simplifier."""
    import onnx
    import onnxsim as peer

    source = exported(model, inputs, folder)
    simple, _ = peer.simplify(onnx.load(source))
    onnx.save(simple, folder / "simple.onnx")
    return Rewritten(file=str(folder / "simple.onnx"), source=source)


PEERS: dict[str, Callable[[Any, Any, Path], Rewritten]] = {
    "this project": ours,
    "timm": timm_reparameterize,
    "torch fx": torch_fx,
    "inductor": inductor,
    "onnxruntime": onnxruntime,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
}


def run_peer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One peer on one model: its verdict, ops and latency."""
    import torch
    from fastvit_cli import check_cases, checking, runners
    from fastvit_cli.builders import ModelOptions

    torch.set_num_threads(request["threads"])
    options = request["options"]
    size = options.pop("input_size")
    loaded = ModelOptions(**options, input_size=tuple(size) if size else None)
    reference = runners.load(request["model"], loaded)
    assert reference.model is not None
    module = runners.as_module(reference.model)
    try:
        made = PEERS[request["peer"]](module, reference.inputs, folder)
    except ImportError as error:
        return {"verdict": "not installed", "note": str(error)}
    candidate = _as_runner(made, reference)
    cases = check_cases.make(reference, request["samples"], loaded.seed)
    if made.file:  # exported with a batch of one
        cases = [_last_row(case) for case in cases]
    trace = request["peer"] != "inductor"
    outcome = checking.decide(
        reference, candidate, cases, None, lambda stage: None, place=trace
    )
    if made.file:
        before, after = _graph_ops(made.source), _graph_ops(made.file)
    else:
        before = _ops(module, reference.inputs)
        after = _ops(made.model, reference.inputs)
    return {
        "verdict": outcome.verdict,
        "error_ratio": outcome.largest("error_ratio"),
        "max_abs": outcome.largest("max_abs"),
        "where": _where(outcome),
        "ops_before": before,
        "ops": after,
        "milliseconds": _milliseconds(candidate),
        "milliseconds_before": _milliseconds(reference),
        "note": "",
    }


def _last_row(case: Any) -> Any:
    from fastvit_cli.check_cases import Case

    return Case(case.name, tuple(x[-1:] for x in case.inputs), case.strict)


def _as_runner(made: Rewritten, reference: Runner) -> Runner:
    from dataclasses import replace

    from fastvit_cli import runners
    from fastvit_cli.builders import ModelOptions

    if made.file:
        size = tuple(reference.inputs[0].shape[1:])
        told = size if len(size) == 3 else None
        return runners.load(made.file, ModelOptions(input_size=told))
    return replace(reference, model=made.model, call=made.model, recorded=None)


def _ops(model: Any, inputs: Any) -> int | None:
    """ATen compute ops of one forward pass; None where they cannot be counted."""
    # ONNX graphs count their own nodes, before and after.
    from repcompiler.counting import count

    if type(model).__name__ == "OptimizedModule":
        return None
    return count(model, inputs)[0].total()


def _graph_ops(path: str) -> int:
    import onnx

    free = {"Constant", "Identity", "Reshape", "Transpose", "Flatten", "Squeeze"}
    free |= {"Unsqueeze", "Slice", "Concat", "Split", "Shape", "Gather", "Cast"}
    return sum(node.op_type not in free for node in onnx.load(path).graph.node)


def _milliseconds(runner: Runner) -> float:
    """The least of a few runs, batch one."""
    runner(*runner.inputs)
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        runner(*runner.inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def _where(outcome: Any) -> str:
    if outcome.verdict == "equal":
        return ""
    if outcome.first is not None:
        return f"{outcome.first['region']}: {outcome.first['detail']}"
    bad = [f for f in outcome.findings if f.verdict != "equal"]
    return f"{bad[0].case}: {bad[0].note}" if bad else ""


def main(request: str, answer: str) -> None:
    """Read a request, run the peer, write the answer as JSON."""
    from fastvit_cli.console import to_json
    from fastvit_cli.errors import Stop, summary

    told = json.loads(Path(request).read_text(encoding="utf-8"))
    try:
        row = run_peer(told, Path(answer).parent)
    except Stop as error:
        row = {"verdict": "failed", "note": error.line}
    except Exception as error:  # a peer may raise anything
        row = {"verdict": "failed", "note": summary(error, 160)}
    Path(answer).write_text(to_json(row), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
