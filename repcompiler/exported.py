"""The second door: `torch.export`, with every size dynamic that the model allows."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from repcompiler.counting import count
from repcompiler.errors import CaptureError, first_line
from repcompiler.held import kept
from repcompiler.limits import limits_of, recorded
from repcompiler.normalise import clean
from repcompiler.trees import copied


def exported(model: nn.Module, inputs: tuple[Any, ...] | None) -> GraphModule:
    """The first attempt whose graph takes the inputs and adds no lasting ops.

    A size left dynamic can send the trace down a dearer branch (a position embedding
    that is resampled for good), or one that the inputs do not take. If every graph runs
    more ops than the model, the one that runs fewest is taken. Ops that no input
    reaches do not count: they are folded to constants later.
    """
    if inputs is None:
        raise CaptureError("needs example_inputs")
    apart: tuple[Any, ...] = copied(inputs)  # a tensor given twice is two inputs
    limit = count(model, apart)[0].total()
    errors: list[BaseException] = []
    dearer: list[tuple[int, int, GraphModule]] = []
    for args, shapes in _attempts(model, apart):
        try:
            module = _export_once(model, args, shapes)
            if not module.meta["limits"].hold(pytree.tree_leaves(list(apart))):
                raise CaptureError("the model takes another turn at the example's size")
            ops = count(module, apart)[0].total()
            if ops > limit:
                ops = _lasting(module, apart)
        except Exception as error:  # the model's own code runs here, and its guards
            errors.append(error)
            continue
        if ops <= limit:
            return module
        dearer.append((ops, len(dearer), module))
    if not dearer:
        raise CaptureError(first_line(errors[0]))
    return min(dearer)[2]


def _lasting(module: GraphModule, inputs: tuple[Any, ...]) -> int:
    """The ops of a run without those that constants are computed by."""
    twin = GraphModule(module, copy.deepcopy(module.graph))
    cleaned = clean(twin).module
    cleaned.recompile()
    return count(cleaned, inputs)[0].total()


def _export_once(model: nn.Module, args: tuple[Any, ...], shapes: Any) -> GraphModule:
    """The graph; its `meta` says for which sizes it is the model."""
    with _quiet(), kept(model), recorded() as asked:
        program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
        module = program_module(program)
        module.meta["limits"] = limits_of(module, asked)
        return module


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without what torch.export warns of and prints on the way: it may just fail."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    silent = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(silent),
            redirect_stderr(silent),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _attempts(
    model: nn.Module,
    inputs: tuple[Any, ...],
) -> list[tuple[tuple[Any, ...], Any]]:
    """Dynamic in every size, dynamic in the batch, as given; a batch of one is doubled.

    torch.export takes a size of one for a constant, so a batch of one would stay one.
    """
    auto = torch.export.Dim.AUTO

    def every(leaf: Any) -> Any:
        return (
            dict.fromkeys(range(leaf.dim()), auto) if isinstance(leaf, Tensor) else None
        )

    def batch(leaf: Any) -> Any:
        return {0: auto} if isinstance(leaf, Tensor) and leaf.dim() else None

    wide = pytree.tree_map(_doubled, inputs)
    return [
        (wide, _by_parameter(model, pytree.tree_map(every, wide))),
        (wide, _by_parameter(model, pytree.tree_map(batch, wide))),
        (inputs, None),
    ]


def _by_parameter(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry for each parameter of forward: what `*args` takes is a tuple of its."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    place = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:place], shapes[place:])


def _doubled(leaf: Any) -> Any:
    single = isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == 1
    return torch.cat([leaf, leaf]) if single else leaf


def program_module(program: torch.export.ExportedProgram) -> GraphModule:
    """The graph module of an exported program."""
    module = program.module()
    assert isinstance(module, GraphModule)
    return module
