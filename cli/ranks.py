"""The processes of one `torchrun`, as one command: they start and fail together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import typer
from fastvit_cli.errors import JobFailed, Stop

if TYPE_CHECKING:
    from fastvit.parallel import World

T = TypeVar("T")


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that torchrun started, for the time of the block.

    What fails in the block is said once, also where it fails in one process alone.

    Raises:
        BadInput: the device cannot be used.
        JobFailed: the processes cannot be reached.
    """
    from fastvit_cli import sources

    from fastvit.errors import TrainingError
    from fastvit.parallel import join_world, leave_world

    sources.check_device(device)
    try:
        world = join_world(device)
    except TrainingError as error:
        raise JobFailed(error.args[0], hint=error.hint) from error
    with said_once(world):
        yield world
    # Not after a failure: what others wait for cannot be ended together.
    leave_world()


@contextmanager
def said_once(world: World) -> Iterator[None]:
    """Errors of the block in one process; the others leave without a word.

    Nobody is asked to take part: where one process fails, the others wait for it in
    some collective, and only end with it. The first process speaks if it fails too.

    Raises:
        Stop: in the process that speaks, as it was raised there.
        typer.Exit: in the others.
    """
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, Stop) else 1
        if not world.speaks():
            raise typer.Exit(code) from error
        if world.leads or not isinstance(error, Stop):
            raise
        raise type(error)(
            f"process {world.rank} of {world.size}: {error.args[0]}", hint=error.hint
        ) from error


def together(world: World, work: Callable[[], T]) -> T:
    """What the work gives in this process, unless it fails in any.

    Then the first process says why, once; the others leave without a word.

    Raises:
        Stop: in the first process: its own, or that of the lowest rank that failed.
        typer.Exit: in the others.
    """
    failure: Stop | None = None
    result: list[T] = []
    try:
        result.append(work())
    except Stop as error:
        failure = error
    if not world.highest(failure is not None):
        return result[0]
    said = world.gather(failure and (type(failure), failure.args[0], failure.hint))
    if failure is not None and world.leads:
        raise failure
    if world.leads:
        rank = next(index for index, found in enumerate(said) if found)
        kind, message, hint = said[rank]
        raise kind(f"process {rank} of {world.size}: {message}", hint=hint)
    # torchrun ends every process as soon as one has ended: the first one speaks first.
    with suppress(RuntimeError):
        world.highest(0)
    raise typer.Exit(2)


def is_of_processes(error: RuntimeError) -> bool:
    """Whether an error of torch is about reaching the others; gloo's have no class."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()
