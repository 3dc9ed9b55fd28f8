"""The last door: submodule by submodule, where the model as a whole has no graph.

The model is copied, and the copy run once to see how its modules are called (`calls`).
From the root down, the largest modules that a door opens are fused, each by the whole
pipeline and with its own verification, and put in their place as a `Part`. What no door
opens stays as it is. At the end the model is compared with the copy as a whole.

A submodule is replaced only if

1. it is called, in eval mode, has no hooks, and is used through its call alone;
2. no call writes to its arguments, and results share memory as they did before;
3. all calls have one form, up to sizes, and the fused part agrees on each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from repcompiler.calls import Usage, usage_of
from repcompiler.errors import CaptureError, RepCompilerError
from repcompiler.held import left_as_found
from repcompiler.hooks import is_hooked
from repcompiler.part import Form, Part, Signature
from repcompiler.report import FuseReport
from repcompiler.rewrite import rewrite
from repcompiler.state import State
from repcompiler.trees import copied
from repcompiler.verify import compare

Pipeline = Callable[[nn.Module, tuple[Any, ...]], State]


@dataclass(frozen=True)
class Opened:
    """A submodule that a door opened, with the fused part in both precisions."""

    path: str
    module: nn.Module
    part: Part
    wide: Part
    report: FuseReport


@dataclass
class Search:
    """What was found on the way down.

    `left`: the reason for each module that was not opened as a whole; `idle`: opened,
    and nothing in it to fuse.
    """

    opened: list[Opened] = field(default_factory=list[Opened])
    idle: dict[str, FuseReport] = field(default_factory=dict[str, FuseReport])
    left: dict[str, str] = field(default_factory=dict[str, str])


def open_parts(model: nn.Module, inputs: tuple[Any, ...], pipeline: Pipeline) -> Search:
    """Fuse the largest submodules of `model` that a door opens.

    Raises:
        CaptureError: none opened, or the model does not run.
    """
    twin = copy.deepcopy(model)
    found = Search()
    frontier = _children(twin, "")
    while frontier:
        try:
            with left_as_found(twin):  # a part starts from the state before any call
                usage = usage_of(twin, inputs, frontier)
        except Exception as error:
            raise CaptureError(f"The model does not run: {error}") from error
        below: dict[str, nn.Module] = {}
        for path, module in frontier.items():
            reason = _open(path, module, usage[path], found, pipeline)
            if reason is not None:
                found.left[path] = reason
                below.update(_children(module, path))
        taken = {id(opened.module) for opened in found.opened}
        frontier = _unique(below, taken)
    return found


def _children(module: nn.Module, path: str) -> dict[str, nn.Module]:
    """The children worth a look: those that hold numbers and are more than one op."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        single = type(child).__module__.startswith("torch.nn.") and not any(
            True for _ in child.children()
        )
        numbers = any(True for _ in (*child.parameters(), *child.buffers()))
        if numbers and not single:
            found[f"{path}.{name}" if path else name] = child
    return _unique(found, set())


def _unique(modules: Mapping[str, nn.Module], taken: set[int]) -> dict[str, nn.Module]:
    """Each module once, by its first path."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if id(module) not in taken:
            found[path] = module
            taken.add(id(module))
    return found


# ---- one submodule -----------------------------------------------------------------


def _open(
    path: str, module: nn.Module, usage: Usage, found: Search, pipeline: Pipeline
) -> str | None:
    """Fuse one submodule into `found`; the reason if it has to stay."""
    reason = _unfit(module, usage)
    if reason is not None:
        return reason
    signature = Signature.of(module)
    try:
        calls = [signature.positional(*call) for call in usage.calls]
    except RepCompilerError as error:
        return str(error)
    form = _common_form(signature, calls)
    if form is None:
        return "its calls differ in more than sizes, or pass what no graph takes"
    try:
        state = pipeline(module, calls[0])
    except RepCompilerError as error:
        return str(error.args[0])
    return _accept(path, module, state, form, calls, found)


def _unfit(module: nn.Module, usage: Usage) -> str | None:
    if isinstance(module, Part):
        return "it was fused before"
    if usage.count == 0:
        return "it is not called in eval mode"
    if usage.read is not None:
        return f"other code reads its {usage.read}"
    if usage.writes:
        return "a call writes to its arguments"
    if usage.nested:
        return "it is called from within itself"
    if is_hooked(module):
        return "it has hooks or a replaced forward"
    if len(usage.kinds) > len(usage.calls):
        return "it is called with too many different sizes to check"
    return None


def _common_form(signature: Signature, calls: list[tuple[Any, ...]]) -> Form | None:
    forms = [Form.of(signature, call) for call in calls]
    first = forms[0]
    same = all(form is not None and form == first for form in forms)
    return first if same else None


def _accept(
    path: str,
    module: nn.Module,
    state: State,
    form: Form,
    calls: list[tuple[Any, ...]],
    found: Search,
) -> str | None:
    assert state.rewritten is not None and state.facts is not None
    assert state.report is not None
    if not state.regions:
        found.idle[path] = state.report
        return None
    fused = state.rewritten.module
    wide = rewrite(state.graph_module, state.regions, state.facts, dtype=torch.float64)
    if state.check and not state.report.equivalence.ok:
        return f"fused, it was {state.report.equivalence.verdict}"
    if not _agrees(module, fused, wide.module, calls[1:]):
        return "fused, it differs on another of its calls"
    if _sharing(module, calls[0]) != _sharing(fused, calls[0]):
        return "its results share memory with each other or with its arguments"
    part = Part(fused, form, module)
    found.opened.append(
        Opened(path, module, part, Part(wide.module, form, module), state.report)
    )
    return None


def _agrees(
    module: nn.Module,
    fused: GraphModule,
    wide: GraphModule,
    calls: list[tuple[Any, ...]],
) -> bool:
    if not calls:
        return True
    try:
        return compare(module, fused, wide, calls).ok
    except RepCompilerError:
        return False


def _sharing(module: nn.Module, call: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Pairs of tensors, of arguments and results, that share memory."""
    given = copied(call)
    with torch.no_grad(), left_as_found(module):
        leaves = pytree.tree_leaves((given, module(*given)))
    places = [_place(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    indices = range(len(places))
    return [(i, j) for j in indices for i in range(j) if places[i] == places[j]]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ---- the whole ---------------------------------------------------------------------


def assemble(model: nn.Module, opened: Iterable[Opened]) -> nn.Module:
    """A copy of the model with the parts in place, wherever it refers to them."""
    return _replaced(model, {o.path: copy.deepcopy(o.part) for o in opened})


def assemble_wide(model: nn.Module, opened: Iterable[Opened]) -> nn.Module | None:
    """`assemble` in float64, with the parts' kernels as they were computed."""
    parts = {o.path: copy.deepcopy(o.wide) for o in opened}
    graphs = {path: part.fused for path, part in parts.items()}
    for part in parts.values():  # whose constants no cast may reach
        part.fused = nn.Identity()
    try:
        whole = _replaced(model, parts).double()
    except Exception:  # any custom tensor may refuse
        return None
    for path, part in parts.items():
        part.fused = graphs[path]
    return whole


def _replaced(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    memo: dict[int, Any] = {
        id(model.get_submodule(path)): part for path, part in parts.items()
    }
    return copy.deepcopy(model, memo)
