"""Where the time goes: every op of a graph, timed in its place, against the roofline.

An interpreter runs the graph node by node, so that each op finds its inputs where the
op before left them. Time is that of the op alone, in eager mode; other backends fuse
ops, and have no layers to time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import backends, roofline
from fastvit_cli.errors import summary
from fastvit_cli.roofline import Roofline

if TYPE_CHECKING:
    from fastvit_cli.backends import Subject
    from fastvit_cli.cells import Grid
    from torch.fx import GraphModule, Node

REPEATS = 7


@dataclass(frozen=True)
class Layer:
    """One op of a graph.

    Attributes:
        node: its name in the graph.
        name: the module it came from.
        op: what it is, with its geometry.
        milliseconds: its fastest run, as the roofline is the fastest of its own.
        moved: bytes that it reads and writes, weights included.
    """

    node: str
    name: str
    op: str
    milliseconds: float
    macs: int
    moved: int

    @property
    def gflops(self) -> float:
        """Achieved, 2 operations a multiply-accumulate."""
        return 2e-6 * self.macs / self.milliseconds if self.milliseconds else 0.0

    @property
    def gbs(self) -> float:
        """Achieved, of what it reads and writes once."""
        return 1e-6 * self.moved / self.milliseconds if self.milliseconds else 0.0

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return 2 * self.macs / self.moved if self.moved else 0.0

    def share(self, roof: Roofline) -> float:
        """Least time on this device over its own."""
        least = roof.milliseconds(self.macs, self.moved)
        return least / self.milliseconds if self.milliseconds else 0.0

    def to_dict(self, roof: Roofline) -> dict[str, Any]:
        """The layer by JSON names."""
        return {
            "name": self.name,
            "op": self.op,
            "milliseconds": self.milliseconds,
            "macs": self.macs,
            "bytes": self.moved,
            "gflops": self.gflops,
            "gbs": self.gbs,
            "bound": roof.bound(self.macs, self.moved),
            "share_of_roofline": self.share(roof),
        }


def measure(
    module: Any, inputs: Sequence[Any], device: str, repeats: int = REPEATS
) -> list[Layer]:
    """Every op that computes, in the order of the graph."""
    import torch

    facts: dict[Node, tuple[int, int]] = {}
    times: dict[Node, list[float]] = {}
    wait = torch.cuda.synchronize if device.startswith("cuda") else None
    with torch.no_grad():  # inference mode would not show convs as one op
        _pass(module, inputs, _Counting(facts))
    with torch.inference_mode():
        _pass(module, inputs, _Timing({}, wait))
        for _ in range(repeats):
            _pass(module, inputs, _Timing(times, wait))
    return [
        Layer(
            node=node.name,
            name=_path(node),
            op=_words(node, module),
            milliseconds=1e3 * min(times[node]),
            macs=facts[node][0],
            moved=facts[node][1],
        )
        for node in module.graph.nodes
        if node in facts
    ]


@dataclass(frozen=True)
class Survey:
    """The roofline, for each model its ops and regions as JSON, and what has none."""

    roofline: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str]


def survey(grids: Sequence[Grid], states: Mapping[str, Any], job: Any) -> Survey:
    """Every op of every model, at the first batch size and in the first dtype.

    A model that has no graph, or whose graph takes no other batch, is left out.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    roofs: dict[str, Roofline] = {}
    for grid in grids:
        first, dtype = next(iter(grid.forms.values())), grid.dtypes[0]
        if dtype not in roofs:  # once a run: it takes seconds, and is counted
            roofs[dtype] = roofline.measured(first.device, dtype, job.threads)
        asked = job.batches[0], dtype
        try:
            row = _model(grid, states[grid.name], asked, roofs[dtype])
        except Exception as error:  # an op may have no kernel for the dtype
            notes.append(f"{grid.name}: no op is timed in {dtype}: {summary(error)}")
            continue
        if row["forms"]:
            rows.append(row)
        else:
            why = _obstacle(first, job.batches[0])
            notes.append(f"{grid.name}: {why}, so that no op is timed")
    return Survey(next(iter(roofs.values())).to_dict(), rows, notes)


def _obstacle(subject: Subject, batch: int) -> str:
    if subject.model is None:
        return "a graph of a runtime runs whole in it"
    fixed = not subject.dynamic_batch and batch != 1
    return "a fixed batch size" if fixed else "no one graph"


def _model(
    grid: Grid, state: Any, asked: tuple[int, str], roof: Roofline
) -> dict[str, Any]:
    batch, dtype = asked
    found: dict[str, list[Layer]] = {}
    for form, module in _graphs(grid, state).items():
        subject = replace(grid.forms[form], model=module)
        if batch == 1 or subject.dynamic_batch:
            subject = backends.in_dtype(subject, dtype)
            inputs = backends.of_batch(subject, batch)
            found[form] = measure(subject.model, inputs, subject.device)
    forms = {
        form: {
            "milliseconds": sum(layer.milliseconds for layer in layers),
            "at_roofline": sum(roof.milliseconds(x.macs, x.moved) for x in layers),
            "layers": [layer.to_dict(roof) for layer in layers],
        }
        for form, layers in found.items()
    }
    both = state is not None and {"train", "fused"} <= found.keys()
    regions = saved(found["train"], found["fused"], state) if both else []
    return {
        "model": grid.name,
        "batch": batch,
        "dtype": dtype,
        "forms": forms,
        "regions": regions,
    }


def _graphs(grid: Grid, state: Any) -> dict[str, GraphModule]:
    """The graph of each form, where there is one."""
    import torch.fx

    if state is not None:
        own = {"train": state.captured.module, "fused": state.rewritten.module}
    else:
        own = {}
    pairs = {form: own.get(form, subject.model) for form, subject in grid.forms.items()}
    kind = torch.fx.GraphModule
    return {form: graph for form, graph in pairs.items() if isinstance(graph, kind)}


def saved(
    before: Sequence[Layer], after: Sequence[Layer], state: Any
) -> list[dict[str, Any]]:
    """For each region: its name, kind, and milliseconds before and after."""
    own = {layer.node: layer.milliseconds for layer in before}
    new = {layer.node: layer.milliseconds for layer in after}
    gone = state.rewritten.removed
    return [
        {
            "name": region.name,
            "kind": region.kind,
            "before": sum(own.get(n.name, 0.0) for n in region.nodes if n in gone),
            "after": sum(new.get(n, 0.0) for n in state.rewritten.nodes[region.value]),
        }
        for region in state.regions
    ]


def _pass(module: Any, inputs: Sequence[Any], run_node: Any) -> None:
    from torch.fx import Interpreter

    class Walk(Interpreter):
        def run_node(self, n: Node) -> Any:
            return run_node(n, super().run_node, self)

    Walk(module).run(*inputs)


class _Counting:
    """Multiply-accumulates and bytes of every op that is not a layout op."""

    def __init__(self, facts: dict[Node, tuple[int, int]]) -> None:
        self.facts = facts

    def __call__(self, node: Node, run: Any, walk: Any) -> Any:
        from repcompiler.counting import OpCounter

        with OpCounter() as counter:
            result = run(node)
        if counter.calls and node.op.startswith("call_"):
            read = [walk.env.get(i) for i in node.all_input_nodes]
            weights = _weights(node, walk.module)
            self.facts[node] = (counter.macs, _bytes([read, result, weights]))
        return result


class _Timing:
    """Seconds of every op."""

    def __init__(self, times: dict[Node, list[float]], wait: Any) -> None:
        self.times, self.wait = times, wait

    def __call__(self, node: Node, run: Any, walk: Any) -> Any:
        start = time.perf_counter()
        result = run(node)
        if self.wait is not None:
            self.wait()
        self.times.setdefault(node, []).append(time.perf_counter() - start)
        return result


def _weights(node: Node, module: Any) -> list[Any]:
    if node.op != "call_module":
        return []
    leaf = module.get_submodule(str(node.target))
    return [*leaf.parameters(), *leaf.buffers()]


def _bytes(values: Any) -> int:
    import torch
    from torch.utils import _pytree as pytree

    found = [v for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in found)


def _path(node: Node) -> str:
    from repcompiler.regions import module_path

    return module_path(node) or node.name


def _words(node: Node, module: Any) -> str:
    from repcompiler.describe import leaf_text

    if node.op == "call_module":
        return leaf_text(module.get_submodule(str(node.target)))
    name = getattr(node.target, "__name__", str(node.target))
    return name.removesuffix(".default")
