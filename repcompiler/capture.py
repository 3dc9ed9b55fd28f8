"""From a module to one FX graph that computes the same: two doors, one check.

`symbolic_trace` keeps names and dynamic sizes and is tried first; `torch.export` opens
what it cannot, with every size left dynamic that the model leaves dynamic. A capture is
compared with the module on fresh random weights before anything else relies on it,
since tracing can be silently wrong. `normalise` then brings both doors' graphs to one
form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from repcompiler.draws import TRACING, same_draws
from repcompiler.errors import (
    CaptureError,
    NotEval,
    UnsupportedInput,
    does_not_run,
    first_line,
)
from repcompiler.exported import exported, program_module
from repcompiler.facts import fetch
from repcompiler.hooks import is_hooked
from repcompiler.limits import Limits, limits_of_program
from repcompiler.normalise import Clean, clean
from repcompiler.outputs import tensors
from repcompiler.tracer import symbolic
from repcompiler.trees import copied

Model = nn.Module | torch.export.ExportedProgram
DOORS = ("symbolic_trace", "export")


@dataclass(frozen=True)
class Captured:
    """One graph in normal form.

    Attributes:
        module: the graph; it shares parameters with the model it came from.
        door: `symbolic_trace`, `export`, `graph_module` or `exported_program`.
        exact: float64 values of constants that were folded, by attribute name.
        frozen: attributes that the graph itself writes, which are no constants.
        baked: constants that tracing made, which the model does not own.
        mutated: nodes that are written in place in a way that could not be undone.
        inputs: the example inputs, flat, in the order of the placeholders; or None.
    """

    module: GraphModule
    door: str
    exact: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    frozen: frozenset[str] = frozenset()
    baked: frozenset[str] = frozenset()
    mutated: frozenset[fx.Node] = frozenset()
    inputs: tuple[Any, ...] | None = None
    limits: Limits = field(default_factory=Limits)


def capture(
    model: Model, example_inputs: Sequence[Any] | None = None, *, door: str = "auto"
) -> GraphModule:
    """The model as one FX graph in normal form: functional, folded, without guards.

    Args:
        model: a module in eval mode, a graph module or an exported program.
        example_inputs: positional inputs; `torch.export` and the check need them.
        door: `auto`, `symbolic_trace` or `export`.

    Raises:
        NotEval: the model or a norm inside it is in train mode.
        CaptureError: no door opened, or what was captured computes something else.
    """
    return run_capture(model, example_inputs, door=door, check=True).module


def run_capture(
    model: Model,
    example_inputs: Sequence[Any] | None,
    *,
    door: str,
    check: bool,
) -> Captured:
    """`capture`, with everything the later stages need."""
    inputs = None if example_inputs is None else tuple(example_inputs)
    if isinstance(model, torch.export.ExportedProgram):
        module = program_module(model)
        module.meta["limits"] = limits_of_program(model, module)
        _require_eval_graph(module)
        return _finish(module, "exported_program", inputs)
    if not isinstance(cast(object, model), nn.Module):
        raise UnsupportedInput(
            f"Cannot fuse a {type(model).__name__}.",
            hint="Pass an nn.Module, an fx.GraphModule or an ExportedProgram.",
        )
    require_eval(model)
    _require_leaves(model)
    if isinstance(model, GraphModule):
        if is_hooked(model):
            raise CaptureError(
                "The graph module itself has hooks.", hint="Remove them before fusing."
            )
        graph = copy.deepcopy(model.graph)
        return _finish(GraphModule(model, graph), "graph_module", inputs)
    return _through_doors(model, inputs, door, check)


def require_eval(model: nn.Module) -> None:
    """Raise `NotEval` with the names of the modules that are in train mode."""
    names = [
        name or "the model itself" for name, m in model.named_modules() if m.training
    ]
    if names:
        shown = ", ".join(names[:3]) + (
            f" and {len(names) - 3} more" if names[3:] else ""
        )
        raise NotEval(
            f"In train mode: {shown}.", hint="Call model.eval() before fusing."
        )


def require_numbers(model: object) -> None:
    """Raise `UnsupportedInput` for a module that has no code or no numbers to read."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedInput(
            "A TorchScript module has no Python code to trace.",
            hint="Fuse the nn.Module that it was made from.",
        )
    if not isinstance(model, nn.Module):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            problem, hint = "has no size yet", "Run the model once before fusing."
        elif tensor.is_meta:
            problem = "is on the meta device, which holds no numbers"
            hint = "Load the weights before fusing."
        elif tensor.is_inference():
            problem = "was made in torch.inference_mode()"
            hint = "Build the model outside of it."
        else:
            continue
        raise UnsupportedInput(f"{name} {problem}.", hint=hint)


def _require_leaves(model: nn.Module) -> None:
    """Raise for tensors that cannot be copied, such as the old weight norm leaves."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            held: list[object] = pytree.tree_leaves(value)
            if any(isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in held):
                path = f"{name}.{attribute}" if name else attribute
                raise UnsupportedInput(
                    f"{path} was computed with gradients on.",
                    hint="Run the model once under torch.no_grad() before fusing.",
                )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # an attribute of any class may refuse
        raise UnsupportedInput(
            f"The model cannot be copied: {first_line(error)}.",
            hint="Take what copy.deepcopy refuses off the model before fusing.",
        ) from error


def _through_doors(
    model: nn.Module, inputs: tuple[Any, ...] | None, door: str, check: bool
) -> Captured:
    if door not in ("auto", *DOORS):
        raise UnsupportedInput(
            f"Unknown capture door {door!r}.",
            hint="Use auto, symbolic_trace or export.",
        )
    failures: list[str] = []
    for name in DOORS if door == "auto" else (door,):
        try:
            with same_draws(TRACING):
                module = _OPEN[name](model, inputs)
        except CaptureError as error:
            failures.append(f"{name}: {error}")
            continue
        if not check or inputs is None or same_function(model, module, inputs):
            return _finish(module, name, inputs, model)
        failures.append(f"{name}: the graph computes something else than the module")
    hint = (
        "Pass example_inputs, so that torch.export can be tried."
        if inputs is None
        else "Fuse the submodules that can be captured one by one."
    )
    raise CaptureError(
        "Cannot capture the model. " + "; ".join(failures) + ".", hint=hint
    )


def _finish(
    module: GraphModule,
    door: str,
    inputs: tuple[Any, ...] | None,
    owner: nn.Module | None = None,
) -> Captured:
    baked = frozenset[str]() if owner is None else _baked(module, owner)
    flat = None if inputs is None else tuple(pytree.tree_leaves(list(inputs)))
    if inputs is not None and not _is_flattened(module):
        flat = inputs
    cleaned: Clean = clean(module, baked, inputs)
    return Captured(
        module=cleaned.module,
        door=door,
        exact=cleaned.exact,
        frozen=cleaned.frozen,
        baked=cleaned.baked,
        mutated=cleaned.mutated,
        inputs=flat,
        limits=module.meta.get("limits", Limits()),
    )


def _baked(module: GraphModule, owner: nn.Module) -> frozenset[str]:
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    own = (*owner.named_parameters(), *owner.named_buffers())
    tensors = {id(tensor) for _, tensor in own}
    names = {name for name, _ in own}
    return frozenset(
        name
        for name in read
        if name not in names and id(fetch(module, name)) not in tensors
    )


def _is_flattened(module: GraphModule) -> bool:
    return isinstance(module.graph._codegen, _PyTreeCodeGen)


def _require_eval_graph(module: GraphModule) -> None:
    """Raise `NotEval` for a norm or dropout that was exported in train mode.

    A norm without stored statistics uses those of the batch in either mode.
    """
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        stateless = "running_mean" in given and given["running_mean"] is None
        if (given.get("training") or given.get("train")) is True and not stateless:
            raise NotEval(
                f"The exported program holds {node.target} in train mode.",
                hint="Export the model after model.eval().",
            )


_OPEN: dict[str, Callable[[nn.Module, tuple[Any, ...] | None], GraphModule]] = {
    "symbolic_trace": symbolic,
    "export": exported,
}


def same_function(
    model: nn.Module,
    captured: GraphModule,
    inputs: tuple[Any, ...],
    *,
    anew: bool = True,
) -> bool:
    """Whether graph and module agree on fresh random weights, drawn anew for both.

    A graph that baked in a weight, or reads a stale one, differs here. The graph runs
    with the very parameters of a copy of the module; no number of the model changes.
    Where the module does not run on random weights, it keeps its own.

    Raises:
        UnsupportedInput: the model cannot be copied, or does not run on the inputs.
    """
    twin = _copy(model)
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    if anew:
        randomise(state.values())
    owned = {**dict(captured.named_parameters()), **dict(captured.named_buffers())}
    with torch.no_grad():
        # Each may write to its inputs, its buffers and even its parameters.
        replaced = {name: state[name].clone() for name in owned if name in state}
        one, two = (copied(inputs) for _ in range(2))
        try:
            with same_draws():
                expected = tensors(twin(*one))
        except Exception as error:  # the model's own code runs here
            if anew:  # which may not take every weight
                return same_function(model, captured, inputs, anew=False)
            raise does_not_run(error) from error
        try:
            call = torch.func.functional_call
            with same_draws():
                found = tensors(call(captured, replaced, two))
        except Exception:  # traced past a branch that the module takes
            return False
    return len(expected) == len(found) and all(map(_close, expected, found))


def randomise(tensors: Any) -> None:
    """Overwrite floating tensors in place with positive, well-scaled random numbers.

    Positive, so that they may serve as variances too.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            dense = tensor.layout is torch.strided
            if dense and tensor.is_floating_point() and tensor.numel():
                noise = torch.rand(tensor.shape, generator=generator) + 0.5
                fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
                sign = torch.randn(tensor.shape, generator=generator).sign()
                tensor.copy_(noise if fan_in == 1 else noise * sign / fan_in**0.5)


def _close(a: Tensor, b: Tensor) -> bool:
    """Same ops on same numbers: only kernels' own nondeterminism is allowed for."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = a.double().abs().nan_to_num().amax() if a.numel() else torch.tensor(0.0)
    limit = float(scale) * torch.finfo(a.dtype).eps * 64
    return torch.allclose(a.double(), b.double(), rtol=0, atol=limit, equal_nan=True)
