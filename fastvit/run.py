"""What a run is given and what it tells: the words between the loop and its caller."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastvit.checkpoint import Position
from fastvit.config import Preprocessing
from fastvit.data import Splits
from fastvit.engine import Engine
from fastvit.parallel import World
from fastvit.recipes import Recipe
from fastvit.runfiles import Row


@dataclass
class StopRequest:
    """The signal that asked the run to stop; None before it came."""

    signal: int | None = None


@dataclass
class Clock:
    """Time since this process began with an epoch, at its update `first`.

    Attributes:
        stopped: when the last update was done; what comes then is no training.
    """

    first: int = 0
    began: float = field(default_factory=time.monotonic)
    stopped: float | None = None

    def stop(self) -> None:
        """The epoch's updates are done."""
        self.stopped = time.monotonic()

    def updates_per_second(self, update: int) -> float:
        """The mean rate of this process so far."""
        now = time.monotonic() if self.stopped is None else self.stopped
        return (update - self.first) / max(1e-9, now - self.began)


@dataclass(frozen=True)
class Job:
    """What is to be trained, and where its files go.

    Attributes:
        preprocessing: of training and evaluation, at the size that is trained at.
        describe: the metadata of a weights file, from the row of its epoch.
    """

    recipe: Recipe
    splits: Splits
    preprocessing: Preprocessing
    output: Path
    world: World
    resume: bool = False
    strict: bool = False
    describe: Callable[[Row], dict[str, str]] = lambda row: {}


@dataclass(frozen=True)
class Progress:
    """A moment of a run: epochs and updates count from 1; rates are of this epoch."""

    epoch: int
    epochs: int
    update: int
    updates: int
    loss: float
    lr: float
    images_per_second: float
    seconds_left: float


class Listener(Protocol):
    """Who is told what happens; on the first process only."""

    def started(self, engine: Engine, position: Position) -> None: ...
    def stepped(self, progress: Progress) -> None: ...
    def evaluating(self, done: int, images: int) -> None: ...
    def epoch_ended(self, row: Row, best: Row) -> None: ...
    def noted(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        signal: what stopped it before its end; None where nothing did.
    """

    history: list[Row]
    best: Row | None
    problems: dict[str, str]
    position: Position
    signal: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGTERM and SIGINT as a wish that the loop answers; the second one acts at once.

    Elsewhere than in the main thread Python allows no handlers: nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(kind: int, frame: Any) -> None:
        request.signal = kind
        for other in kinds:
            signal.signal(other, before[other])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield request
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
