"""One writer for each kind of artefact, each of which reads back what it wrote.

A writer gets the artefact and a path, and returns what the result's JSON says about
the file beside its name. It raises `JobFailed` when the file does not compute what the
model computes; whoever called it removes the file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, JobFailed, root, summary
from fastvit_cli.programs import EXTRA_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

BATCHES = (1, 3)
STATIC_HINT = "Try it without --dynamic-size."
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Artefact:
    """What is to be written: a model with example inputs and its card."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    card: Card
    dynamic_batch: bool = True
    dynamic_size: bool = False

    @cached_property
    def program(self) -> ExportedProgram:
        """The model as torch.export sees it, made once for all writers.

        Raises:
            BadInput: its height and width cannot be dynamic.
            JobFailed: it cannot be exported at all.
        """
        import torch

        dynamic = torch.export.Dim.DYNAMIC
        shapes = tuple(dict.fromkeys(axes, dynamic) for axes in self.axes)
        inputs = rebatch(self.inputs, 2) if self.dynamic_batch else self.inputs
        try:
            return torch.export.export(self.model, inputs, dynamic_shapes=shapes)
        except Exception as error:
            reason = f"{self.card.source} cannot be exported: {summary(error)}."
            if not self.dynamic_size:
                raise JobFailed(reason) from error
            raise BadInput(reason, hint=STATIC_HINT) from error

    @cached_property
    def exported(self) -> Any:
        """The model as an ONNX program of torch, made once for all writers.

        Raises:
            JobFailed, BadInput: see `export_onnx`.
        """
        return export_onnx(self)

    @cached_property
    def samples(self) -> list[tuple[Tensor, ...]]:
        """Inputs that what was written must take: each batch, and another height.

        Raises:
            BadInput: the model itself takes no other height.
        """
        if not self.dynamic_batch:
            return [self.inputs]
        samples = [rebatch(self.inputs, batch) for batch in BATCHES]
        if self.dynamic_size:
            samples.append(self._taller())
        return samples

    def _taller(self) -> tuple[Tensor, ...]:
        import torch

        # Twice the height keeps whatever divisibility the model asks for.
        inputs = tuple(
            torch.cat([x, x], dim=2) if x.dim() == 4 else x for x in self.inputs
        )
        try:
            with torch.no_grad():
                self.model(*inputs)
        except Exception as error:
            raise BadInput(
                f"{self.card.source} takes no other size: {summary(error)}.",
                hint=STATIC_HINT,
            ) from error
        return inputs

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """The dynamic axes of each input."""
        batch = (0,) if self.dynamic_batch else ()
        space = (2, 3) if self.dynamic_size else ()
        return tuple((*batch, *space) if x.dim() == 4 else batch for x in self.inputs)


def rebatch(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Inputs of another batch size: the first sample, each time scaled differently.

    Whole numbers stay what they are: they may be places in a table.

    Raises:
        BadInput: there is not so much memory.
    """
    found: list[Tensor] = []
    for value in inputs:
        try:
            made = value.new_empty((batch, *value.shape[1:]))
        except RuntimeError as error:
            raise BadInput(
                f"a batch of {batch} does not fit into memory.",
                hint="Use a smaller --batch.",
            ) from error
        made[:] = value[:1]
        for index in range(1, batch if value.is_floating_point() else 0):
            made[index] *= 1 + index
        found.append(made)
    return tuple(found)


def write_pt2(artefact: Artefact, path: Path) -> dict[str, Any]:
    """torch.export's file, with the card as an extra file."""
    import torch

    card = json.dumps(artefact.card.to_metadata())
    torch.export.save(artefact.program, path, extra_files={EXTRA_FILE: card})
    loaded = torch.export.load(path).module()
    check_same(artefact, loaded, "the exported program")
    return {"format": "torch.export"}


def export_onnx(artefact: Artefact) -> Any:
    """The model as an ONNX program of torch, its card in the metadata.

    Raises:
        JobFailed: an operator has no counterpart, or the model cannot be exported.
    """
    import torch

    for spec in artefact.program.graph_signature.output_specs:
        value = getattr(spec.arg, "value", None)  # of a constant, which is no tensor
        if value is not None:
            raise JobFailed(
                f"{artefact.card.source} cannot be written as ONNX: it returns "
                f"{value!r}, and a graph returns tensors only.",
                hint="Return tensors only, or write a .pt2.",
            )
    names = {axis: torch.export.Dim(name) for axis, name in AXES.items()}
    shapes = tuple({axis: names[axis] for axis in axes} for axes in artefact.axes)
    try:
        exported = torch.onnx.export(
            artefact.program,
            dynamo=True,
            dynamic_shapes=shapes,
            output_names=_output_names(artefact.program),
            external_data=False,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise JobFailed(
            f"{artefact.card.source} cannot be written as ONNX: "
            f"{summary(root(error))}.",
            hint="A .pt2 holds any operator.",
        ) from error
    assert exported is not None
    opset = exported.model.opset_imports[""]
    exported.model.metadata_props.update(artefact.card.to_metadata(opset=opset))
    return exported


def write_onnx(artefact: Artefact, path: Path) -> dict[str, Any]:
    """An ONNX graph in one file, checked in onnxruntime."""
    exported = artefact.exported
    exported.save(path)
    check_same(artefact, onnx_runner(artefact, path), "the ONNX graph in onnxruntime")
    return {"format": "onnx", "opset": exported.model.opset_imports[""]}


def write_safetensors(artefact: Artefact, path: Path) -> dict[str, Any]:
    """Weights alone; the card says how to build what they belong to."""
    from safetensors.torch import load_file, save_file

    # A clone each: the format refuses tensors that share memory.
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in artefact.model.state_dict().items()
    }
    save_file(state, path, metadata=artefact.card.to_metadata())
    back = load_file(path)
    wrong = [name for name in state if not _same_bytes(state[name], back.get(name))]
    if wrong or back.keys() != state.keys():
        raise JobFailed(f"the weights read back differ: {', '.join(wrong[:5])}.")
    return {"format": "safetensors"}


def write_ir(artefact: Artefact, path: Path) -> dict[str, Any]:
    """OpenVINO's .xml, its .bin beside it, checked in OpenVINO."""
    from fastvit_cli import irgraphs

    exported, told = artefact.exported, artefact.card.tuning.get("kernels", ())
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.onnx"
            exported.save(source)
            graph = irgraphs.core().read_model(source)
        here = irgraphs.kinds_in(graph)
        kernels = [kind for kind in here if kind in told]
        irgraphs.mark(graph, kernels)
        irgraphs.write(graph, path, artefact.card.to_metadata())
        run = irgraphs.runner(irgraphs.read(path))
    except BadInput as error:
        raise JobFailed(str(error), hint="No file was written.") from error
    except RuntimeError as error:
        why = irgraphs.refused("the graph", error)
        raise JobFailed(str(why), hint="Write an .onnx, or a .pt2.") from error
    check_same(artefact, as_module(artefact, run), "the graph in OpenVINO")
    weights = path.with_suffix(irgraphs.WEIGHTS).read_bytes()
    return {
        "format": "openvino",
        "kernels": kernels,
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


WRITERS: dict[str, Callable[[Artefact, Path], dict[str, Any]]] = {
    ".pt2": write_pt2,
    ".onnx": write_onnx,
    ".xml": write_ir,
    ".safetensors": write_safetensors,
}


def onnx_runner(artefact: Artefact, path: Path) -> nn.Module:
    """An ONNX graph as a module with the outputs of the artefact's model.

    Raises:
        JobFailed: onnxruntime does not take the file.
    """
    from fastvit_cli import onnxgraphs

    try:
        run = onnxgraphs.runner(onnxgraphs.open_session(path))
    except BadInput as error:
        raise JobFailed(str(error), hint="A .pt2 holds any operator.") from error
    return as_module(artefact, run)


def as_module(artefact: Artefact, run: Callable[..., list[Tensor]]) -> nn.Module:
    """What runs a graph, as a module with the outputs of the artefact's model."""
    import torch
    from torch.utils import _pytree as pytree

    spec = artefact.program.call_spec.out_spec

    class Graph(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return pytree.tree_unflatten(run(*inputs), spec)

    return Graph().eval()


def onnx_can_run(dtype: str) -> bool:
    """Whether onnxruntime's CPU provider has a convolution for a dtype."""
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = {"float32": "FLOAT", "float64": "DOUBLE"}
    kind = getattr(TensorProto, kinds.get(dtype, dtype.upper()))
    one = helper.make_tensor("w", kind, [1, 1, 1, 1], [1.0])
    values = [helper.make_tensor_value_info(n, kind, [1, 1, 1, 1]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "probe",
        values[:1],
        values[1:],
        [one],
    )
    opset = helper.make_opsetid("", 22 if dtype == "bfloat16" else 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except Exception:  # NotImplemented has no public name in onnxruntime
        return False
    return True


def check_same(artefact: Artefact, candidate: nn.Module, what: str) -> None:
    """Compare what was read back with the model, at more than one batch size.

    Raises:
        JobFailed: they are not the same function.
    """
    import repcompiler as rc

    for inputs in artefact.samples:
        batch = inputs[0].shape[0]
        try:
            verdict = rc.verify(artefact.model, candidate, inputs)
        except rc.RepCompilerError as error:
            reason = f"{what} does not run with batch {batch}: {error}"
            raise JobFailed(reason, hint="No file was written.") from error
        if not verdict.ok:
            raise JobFailed(
                f"{what} does not compute what the model computes: {verdict.verdict}, "
                f"error ratio {verdict.error_ratio}, batch {batch}.",
                hint="No file was written.",
            )


def _output_names(program: ExportedProgram) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _same_bytes(one: Tensor, other: Tensor | None) -> bool:
    import torch

    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    # Bytes, so that NaN equals NaN.
    views = [value.reshape(-1).view(torch.uint8) for value in (one, other)]
    return torch.equal(*views)
