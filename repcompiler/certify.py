"""Check a certificate from the two models alone; shares no code with the compiler.

A region replaced nodes of the captured graph by a few ops. Both are affine functions of
the same sources, so that noise and zero decide whether they are one function: both are
run here, in float64, and the difference is judged against |A||x| + |b|. Rounding the
kernels once to the unit u costs at most u of that. Run in their own dtype, n products
and sums of each output add (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1) at most

    γ(n) · (|A||x| + |b|),   γ(n) = n·u / (1 - n·u),

in whatever order they are summed; underflow, Winograd and FFT are outside of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from repcompiler.certops import bound_of, run_ops

FORMAT = "fastvit-repcompiler/certificate/2"
# What composing in float64 and folding constants may cost beside the one rounding.
SLACK = 1e-9
SCALES = (0.0, 1.0, 1e4)


@dataclass(frozen=True)
class RegionCheck:
    """What re-verifying one region showed.

    Attributes:
        exactness: of the candidate's kernels in float64, against |A||x| + |b|.
        bound, measured: of the candidate's ops in its own dtype, likewise. A float64
            model has nothing wider to be measured by.
        problem: what does not hold; empty if all does.
        open: why it could not be checked; empty if it could.
    """

    name: str
    kind: str
    exactness: float | None = None
    bound: float | None = None
    measured: float | None = None
    problem: str = ""
    open: str = ""


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and numbers."""
    held = tensor.detach().cpu().contiguous()
    head = f"{held.dtype} {tuple(held.shape)} ".encode()
    body = held.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + body).hexdigest()


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a certificate but the digest itself."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_digest(document: Mapping[str, Any]) -> str:
    """What is wrong with a certificate as a file; empty if nothing is."""
    if document.get("format") != FORMAT:
        return f"it does not say format {FORMAT!r}"
    if document.get("digest") != digest(document):
        return "its numbers are not those that it was written with"
    return ""


def check_regions(
    document: Mapping[str, Any],
    graph: GraphModule,
    exact: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
) -> list[RegionCheck]:
    """Each region of a certificate, from the two models.

    Args:
        graph: the reference, captured through the door that the certificate names.
        exact: float64 values of folded constants of the graph, by name.
        candidate: the candidate's tensors by name.
        inputs: of the reference; they give the sources their sizes.

    Raises:
        ValueError: the certificate is about inputs of other sizes.
    """
    inputs = _widened(inputs, document["sizes"])
    with torch.no_grad():
        recorder = _recorded(graph, exact, inputs)
        return [
            _check_region(row, graph, recorder, candidate)
            for row in document["regions"]
        ]


def unclaimed(
    document: Mapping[str, Any],
    reference: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
) -> list[RegionCheck]:
    """Tensors of the candidate that no region vouches for and the reference lacks.

    A region that is left out of a certificate would hold otherwise. Two tensors of one
    fingerprint are one, whatever their names are.
    """
    claimed = {k for row in document["regions"] for k in row["candidate"]["tensors"]}
    known = {fingerprint(tensor) for tensor in reference.values()}
    return [
        RegionCheck(name, "", problem="it is in no region, and not the reference's")
        for name, tensor in candidate.items()
        if name not in claimed and fingerprint(tensor) not in known
    ]


def _widened(inputs: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The inputs with the batch that the certificate's sizes were taken at."""
    made: list[Tensor] = []
    for value, shape in zip(inputs, sizes):
        if value.dim() and list(value.shape[1:]) == list(shape[1:]):
            value = torch.cat([value] * -(-shape[0] // len(value)))[: shape[0]]
        if list(value.shape) != list(shape):
            raise ValueError(f"it is about inputs of size {list(shape)}")
        made.append(value)
    return made


class _Recorder(Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.graph_module = graph
        self.nodes = {node.name: node for node in graph.graph.nodes}


def _recorded(
    graph: GraphModule, exact: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> _Recorder:
    """The graph in float64, with the sizes of all values and with its own constants.

    Sizes are those of a run in the graph's own dtype: one that names a dtype, as in
    ``x.float()``, does not run in another.
    """
    own = _Recorder(copy.deepcopy(graph))
    own.run(*inputs)
    wide = _Recorder(_in_float64(graph, exact))
    wide.env = {wide.nodes[node.name]: value for node, value in own.env.items()}
    for node in wide.nodes.values():
        if node.op == "get_attr":
            wide.env[node] = wide.fetch_attr(str(node.target))
    return wide


def _in_float64(graph: GraphModule, exact: Mapping[str, Tensor]) -> GraphModule:
    wide = copy.deepcopy(graph).double()
    for name, value in exact.items():
        owner, _, field = name.rpartition(".")
        place = wide.get_submodule(owner)
        if hasattr(place, field):
            delattr(place, field)
            place.register_buffer(field, value.double())
    return wide


def _check_region(
    row: Mapping[str, Any],
    graph: GraphModule,
    recorder: _Recorder,
    candidate: Mapping[str, Tensor],
) -> RegionCheck:
    base = RegionCheck(row["name"], row["kind"])
    problem = _fingerprints(row, graph, candidate)
    if problem:
        return _with(base, problem=problem)
    ops = row["candidate"]["ops"]
    if ops is None:
        said = "its layout depends on sizes known at run time, or it is too large"
        return _with(base, open=said)
    dtype = getattr(torch, row["dtype"])
    sources = [recorder.nodes[name] for name in row["reference"]["sources"]]
    sizes = [recorder.env[source].shape for source in sources]
    bound = bound_of(ops, candidate, dtype, sizes)
    if bound != row["bound"]:
        said = f"its bound is {bound}, not {row['bound']}"
        return _with(base, problem=said)
    exactness, measured = _errors(row, recorder, candidate, dtype)
    measured = None if dtype == torch.float64 else measured
    base = _with(base, exactness=exactness, bound=bound, measured=measured)
    unit = torch.finfo(dtype).eps / 2
    if not exactness <= 2 * unit + SLACK:
        said = f"in float64 it is off by {exactness:.2g} of |A||x| + |b|"
        return _with(base, problem=said)
    if bound is not None and measured is not None:
        if not measured <= bound * (1 + 4 * unit):
            said = f"its error is {measured:.2g} of |A||x| + |b|, above {bound:.2g}"
            return _with(base, problem=said)
    claimed = row["exactness"]
    if claimed is None or not 0 <= claimed <= SLACK:
        return _with(base, problem=f"it claims an exactness of {claimed}")
    return base


def _with(check: RegionCheck, **changes: Any) -> RegionCheck:
    return RegionCheck(**{**vars(check), **changes})


def _fingerprints(
    row: Mapping[str, Any], graph: GraphModule, candidate: Mapping[str, Tensor]
) -> str:
    """Which tensor of either model is not the one that the certificate is about."""
    for name, wanted in row["reference"]["tensors"].items():
        found = _fetch(graph, name)
        if found is None or fingerprint(found) != wanted:
            return f"the reference's {name} is another"
    for name, wanted in row["candidate"]["tensors"].items():
        if name not in candidate:
            return f"the candidate has no {name}"
        if fingerprint(candidate[name]) != wanted:
            return f"the candidate's {name} is another"
    return ""


def _fetch(graph: GraphModule, name: str) -> Tensor | None:
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def _errors(
    row: Mapping[str, Any],
    recorder: _Recorder,
    candidate: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Errors in float64 and in the candidate's dtype, each relative to |A||x| + |b|."""
    ops = row["candidate"]["ops"]
    sources = [recorder.nodes[name] for name in row["reference"]["sources"]]
    generator = torch.Generator().manual_seed(0)
    exactness, measured = 0.0, 0.0
    for scale in SCALES:
        probes = [
            (torch.randn(recorder.env[s].shape, generator=generator) * scale).to(dtype)
            for s in sources
        ]
        wide = [probe.double() for probe in probes]
        truth = _original(row, recorder, dict(zip(sources, wide)))
        limits = run_ops(ops, [x.abs() for x in wide], candidate, absolute=True)
        found = run_ops(ops, wide, candidate)
        if found.shape != truth.shape:
            return math.inf, math.inf
        exactness = max(exactness, _ratio(found - truth, limits))
        own = run_ops(ops, probes, candidate, dtype=dtype).double()
        measured = max(measured, _ratio(own - truth, limits))
    return exactness, measured


def _ratio(error: Tensor, limit: Tensor) -> float:
    """max |error| / limit over all elements; 0 / 0 is 0."""
    if not error.numel():
        return 0.0
    ratio = torch.where(error == 0, torch.zeros_like(error), error.abs() / limit)
    return float(ratio.nan_to_num(nan=math.inf).amax())


def _original(
    row: Mapping[str, Any], recorder: _Recorder, given: Mapping[Node, Tensor]
) -> Tensor:
    """What the region's nodes compute from these sources, in float64."""
    env: dict[Node, Any] = {**recorder.env, **given}
    for name in row["reference"]["nodes"]:
        node = recorder.nodes[name]
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = getattr(recorder, node.op)(node.target, args, kwargs)
    return env[recorder.nodes[row["reference"]["value"]]]
