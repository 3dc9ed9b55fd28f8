"""Certificates on the command line: read, re-verified from two models, shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import graphfiles, onnxsteps
from fastvit_cli.errors import BadInput, summary
from fastvit_cli.options import DTYPES
from fastvit_cli.render import new_table
from fastvit_cli.runners import Runner, as_module
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from repcompiler.certify import RegionCheck

SHOWN = 12


@dataclass(frozen=True)
class Verified:
    """What re-verifying a certificate showed, region by region."""

    rows: tuple[RegionCheck, ...]
    trouble: str = ""

    @property
    def problems(self) -> list[str]:
        """What does not hold."""
        found = [f"{row.name}: {row.problem}" for row in self.rows if row.problem]
        return [self.trouble, *found] if self.trouble else found

    @property
    def ok(self) -> bool:
        """Whether all of it holds."""
        return not self.problems

    @property
    def open(self) -> list[RegionCheck]:
        """Regions that could not be checked."""
        return [row for row in self.rows if row.open]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "ok": self.ok,
            "problems": self.problems,
            "regions": [dict(vars(row)) for row in self.rows],
        }

    def show(self, out: Console) -> None:
        """Bound beside measured error, the tightest first."""
        if self.trouble:
            out.print(f"Certificate: {self.trouble}.")
            return
        known = [row for row in self.rows if row.bound and row.measured]
        known.sort(key=lambda row: (row.bound or 0) / (row.measured or 1))
        bad = [row for row in self.rows if row.problem]
        title = f"Certificate: {len(self.rows)} regions, {len(bad)} do not hold"
        rows = new_table("Region", "Kind", "Bound", "Measured", "Verdict", title=title)
        for row in [*bad, *known][:SHOWN]:
            bound = "" if row.bound is None else f"{row.bound:.1e}"
            measured = "" if row.measured is None else f"{row.measured:.1e}"
            rows.add_row(row.name, row.kind, bound, measured, row.problem or "holds")
        out.print(rows)
        rest = len(bad) + len(known) - SHOWN
        if rest > 0:
            out.print(f"and {rest} more, each with a wider margin; see --json")
        if self.open:
            why = self.open[0].open
            out.print(f"{len(self.open)} regions are not re-verified: {why}.")


def read(path: str) -> dict[str, Any]:
    """The certificate in a file.

    Raises:
        BadInput: there is none, or it is another program's.
    """
    from repcompiler.certify import FORMAT

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"--certificate {path} cannot be read: {summary(error, 120)}.",
            hint="Give the file that fastvit fuse --certificate wrote.",
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadInput(
            f"--certificate {path} is no certificate: it does not say {FORMAT!r}.",
            hint="Give the file that fastvit fuse --certificate wrote.",
        )
    return document


def verify(document: dict[str, Any], reference: Runner, candidate: Runner) -> Verified:
    """Every claim of a certificate, from the two models.

    Raises:
        BadInput: the reference is a graph of a runtime, whose nodes have other names;
            the candidate is one of OpenVINO; or the certificate is not put together as
            one.
    """
    from repcompiler.capture import run_capture
    from repcompiler.certify import check_digest, check_regions, unclaimed
    from repcompiler.operators import RULES
    from repcompiler.prepare import prepare

    if reference.model is None:
        kind = graphfiles.KINDS[reference.form]
        raise BadInput(
            f"a certificate is about PyTorch graphs, and {reference.name} is {kind}.",
            hint="Give the model that was fused as the REFERENCE.",
        )
    if candidate.form == "ir":
        raise BadInput(
            f"{candidate.name} is an OpenVINO graph, whose constants have lost the "
            "names that a certificate gives them.",
            hint="Check it without --certificate, or the .onnx with it.",
        )
    trouble = check_digest(document)
    if trouble:
        return Verified((), trouble)
    fault = _fault(document)
    if fault:
        raise BadInput(
            f"the certificate is not put together as one: {fault}.",
            hint="Give the file that fastvit fuse --certificate wrote.",
        )
    door = document["capture"]
    door = door if door in ("symbolic_trace", "export") else "auto"
    try:
        captured = run_capture(reference.model, reference.inputs, door=door, check=True)
        prepare(captured, RULES)
        held = tensors_of(candidate, document)
        rows = check_regions(
            document,
            captured.module,
            captured.exact,
            held,
            captured.inputs or reference.inputs,
        )
        if candidate.form != "onnx":  # whose writer lays weights out in its own way
            known = _read(captured.module) | tensors_of(reference, document)
            rows += unclaimed(document, known, held)
    except Exception as error:  # its ops are a stranger's, and torch refuses many ways
        said = f"it is not about these two models: {summary(error, 120)}"
        return Verified((), said)
    return Verified(tuple(rows))


def _fault(document: dict[str, Any]) -> str:
    """The first part of a certificate that has another type than it should."""
    capture, sizes, regions = (document.get(k) for k in ("capture", "sizes", "regions"))
    if not isinstance(capture, str):
        return "capture is no text"
    if not _are(sizes, list) or not all(map(_is_size, sizes)):
        return "sizes is no list of sizes that can be run"
    if not _are(regions, dict):
        return "regions is no list of regions"
    for index, row in enumerate(regions):
        wrong = [key for key, fits in PARTS.items() if not fits(row.get(key, row))]
        if wrong:
            return f"{wrong[0]} of region {index} is not what it should be"
    made = [row["reference"]["value"] for row in regions]
    twice = next((value for value in made if made.count(value) > 1), None)
    return f"two regions make {twice}" if twice else ""


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_size(sizes: list[Any]) -> bool:
    from repcompiler.certops import MOST

    whole = all(type(side) is int and side > 0 for side in sizes)
    return whole and math.prod(sizes) <= MOST


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_reference(value: Any) -> bool:
    if not isinstance(value, dict) or not _are_texts(value.get("tensors")):
        return False
    named = _are(value.get("sources"), str) and _are(value.get("nodes"), str)
    return named and _is_text(value.get("value"))


def _is_candidate(value: Any) -> bool:
    if not isinstance(value, dict) or not _are_texts(value.get("tensors")):
        return False
    ops = value.get("ops", 0)
    if ops is None:
        return True
    return _are(ops, dict) and all(_is_text(op.get("op")) for op in ops)


PARTS: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "kind": _is_text,
    "dtype": lambda value: value in DTYPES,
    "reference": _is_reference,
    "candidate": _is_candidate,
    "exactness": _is_number,
    "bound": _is_number,
}


def tensors_of(candidate: Runner, document: dict[str, Any]) -> dict[str, Tensor]:
    """The candidate's tensors under the names that the certificate gives them."""
    if candidate.form == "onnx":
        return _of_graph(candidate, document)
    if candidate.form == "program":
        program: Any = candidate.model
        return {**program.state_dict, **program.constants}
    return _held(as_module(candidate.model))


def _read(graph: GraphModule) -> dict[str, Tensor]:
    """What a graph holds, tensors that are no parameter and no buffer among it."""
    from repcompiler.facts import fetch

    names = [str(n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    return _held(graph) | {name: fetch(graph, name) for name in names}


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _of_graph(candidate: Runner, document: dict[str, Any]) -> dict[str, Tensor]:
    """ONNX leaves out a bias of zeros, and holds the weights of a matmul transposed."""
    import torch

    from repcompiler.certify import fingerprint

    held = onnxsteps.constants_of(onnxsteps.read(candidate.file).graph)
    flipped = {
        fingerprint(value.T): value.T for value in held.values() if value.dim() == 2
    }
    found = dict(held)
    for row in document["regions"]:
        for op in row["candidate"]["ops"] or ():
            weight, bias = op.get("weight"), op.get("bias")
            wanted = row["candidate"]["tensors"].get(weight)
            if weight is not None and weight not in found and wanted in flipped:
                found[weight] = flipped[wanted]
            if bias is not None and bias not in found and weight in found:
                kernel = found[weight]
                spread = "transpose" in op["op"]
                size = kernel.shape[1] * op["groups"] if spread else kernel.shape[0]
                found[bias] = torch.zeros(size, dtype=kernel.dtype)
    return found
