"""Exported programs: read with what they say about their inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

EXTRA_FILE = "fastvit_repcompiler.json"


def load(path: Path) -> tuple[ExportedProgram, Card | None]:
    """The program in a .pt2, and its card if this project wrote it.

    Raises:
        BadInput: there is no such file, or torch cannot read it.
    """
    import torch

    if not path.is_file():
        raise BadInput(f"there is no file {path}.", hint="Check the path.")
    extra = {EXTRA_FILE: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise BadInput(
            f"{path} is not an exported program that torch {torch.__version__} reads: "
            f"{summary(error)}.",
            hint="Write it with torch.export.save, and with the same torch.",
        ) from error
    try:
        return program, Card.from_metadata(json.loads(extra[EXTRA_FILE]))
    except ValueError:  # another program's file
        return program, None


def example_inputs(name: str, program: ExportedProgram) -> tuple[Tensor, ...]:
    """Inputs of batch 1 where the batch is dynamic, else of the program's own sizes.

    Raises:
        BadInput: the program takes something else than tensors by position.
    """
    import torch

    args, kwargs = program.example_inputs or ((), {})
    if kwargs or not args or not all(isinstance(arg, torch.Tensor) for arg in args):
        raise BadInput(
            f"{name} takes inputs other than tensors by position, or records none.",
            hint="Export it with a tuple of example tensors.",
        )
    count = 1 if has_dynamic_batch(program) else None
    return tuple(arg[:count] if arg.dim() else arg for arg in args)


def has_dynamic_batch(program: ExportedProgram) -> bool:
    """Whether the first axis of every input may have any size."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    return all(
        value.dim() > 0 and not isinstance(value.shape[0], int) for value in values
    )


def floating_dtype(program: ExportedProgram) -> str:
    """The dtype of the first floating-point weight; float32 where there is none."""
    for tensor in program.state_dict.values():
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return "float32"
