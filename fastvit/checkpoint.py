"""Checkpoints: whole or not at all, and read back only by the run they belong to."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fastvit.errors import CheckpointError, ResumeError
from fastvit.recipe_files import from_toml, read_recipe
from fastvit.recipes import SECTIONS, Recipe

FORMAT = "fastvit-repcompiler/train/1"
LAST = "last.pt"
BEST = "best.safetensors"

# How the work is done, not what is computed: these may change when a run goes on.
FREE_KEYS = frozenset(
    {"workers", "checkpoint_minutes", "checkpoint_updates", "keep_best"}
)


@dataclass(frozen=True)
class Position:
    """Where a run stands: `update` of `epoch` is the next to be done.

    Attributes:
        loss_sum: of the epoch's losses so far, over `losses` of them.
        averaged: whether the epoch's batch norm statistics were averaged already.
    """

    epoch: int = 0
    update: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    averaged: bool = False


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at any moment the old or the new one is there, whole.

    Raises:
        CheckpointError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = f"{path} is as it was before." if path.exists() else "Nothing is left."
        raise CheckpointError(
            f"{path} could not be written: {error.strerror}. {kept}",
            hint="Make room, then continue with --resume.",
        ) from error


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state for `read_state`.

    Raises:
        CheckpointError: see `write_whole`.
    """
    # In memory first: torch's own writer turns a full disk into a nameless error.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_whole(path, buffer.getvalue())


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write named tensors as safetensors.

    Raises:
        CheckpointError: see `write_whole`.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_whole(path, to_safetensors(state, metadata))


def read_state(path: Path) -> dict[str, Any]:
    """The state that `write_state` wrote, without running what is inside.

    Raises:
        ResumeError: it is damaged, or another program's.
    """
    hint = "Start again in another folder, with --weights from its best.safetensors."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ResumeError(
            f"{path} is damaged or cannot be read ({type(error).__name__}).", hint=hint
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ResumeError(f"{path} is not a checkpoint of a run.", hint=hint)
    return state


def position_of(state: dict[str, Any], rank: int, size: int) -> Position:
    """Where one process of `size` stands: the epoch's losses are those that it saw.

    Of another number of processes the first one takes them all.
    """
    at = Position(**state["position"])
    # An older checkpoint has the first process's alone.
    shares = state.get("shares", [[at.loss_sum, at.losses]])
    if len(shares) != size:
        sums = [sum(column) for column in zip(*shares, strict=True)]
        shares = [sums, *[[0.0, 0]] * (size - 1)]
    loss_sum, losses = shares[rank]
    return replace(at, loss_sum=loss_sum, losses=losses)


def recipe_of_run(folder: Path) -> Recipe | None:
    """The recipe of the run in a folder; None where there is no run.

    Raises:
        RecipeError: its `recipe.toml` was edited and is none any more.
        ResumeError: there is none, and the checkpoint that has it too is damaged.
    """
    own, last = folder / "recipe.toml", folder / LAST
    if own.exists():
        return read_recipe(own)
    if not last.exists():
        return None
    return from_toml(read_state(last)["recipe"], str(last))


def check_same_run(path: Path, state: dict[str, Any], recipe: Recipe) -> None:
    """Refuse to go on with another recipe.

    Raises:
        ResumeError: a key that changes what is computed differs.
    """
    old = from_toml(state["recipe"], str(path))
    changed = [
        f"{field.name} was {old.get(field.name)!r}, is {recipe.get(field.name)!r}"
        for kind in SECTIONS.values()
        for field in fields(kind)
        if field.name not in FREE_KEYS and old.get(field.name) != recipe.get(field.name)
    ]
    if changed:
        raise ResumeError(
            f"{path} was made with another recipe: {'; '.join(changed[:5])}.",
            hint="Leave --recipe and --set out, or start in another folder.",
        )


def check_same_model(path: Path, state: dict[str, Any], model: nn.Module) -> None:
    """Refuse to go on with another model.

    Raises:
        ResumeError: its parameters and buffers differ in name or shape.
    """
    old, new = state["model"], model.state_dict()
    shapes = [{name: tuple(v.shape) for name, v in have.items()} for have in (old, new)]
    if shapes[0] != shapes[1]:
        names = shapes[0].keys() | shapes[1].keys()
        other = sorted(n for n in names if shapes[0].get(n) != shapes[1].get(n))
        raise ResumeError(
            f"{path} holds another model: {len(other)} of {len(names)} tensors differ, "
            f"{other[0]} first.",
            hint="Name the --model and --model-arg that the run was started with.",
        )


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
