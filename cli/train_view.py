"""What people see of a run: its recipe first, then a live line, or plain lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli.console import Screen
from fastvit_cli.errors import BadInput
from fastvit_cli.render import human
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastvit_cli.train import Request
    from fastvit_cli.trainees import Trainee

    from fastvit.checkpoint import Position
    from fastvit.data import Splits
    from fastvit.engine import Engine
    from fastvit.parallel import World
    from fastvit.run import Outcome
    from fastvit.run import Progress as Moment

SHOWN = 8  # epochs under the bar
NOTES = 5  # skipped images that are named as they come; the file has all
WIDEST, NARROWEST = 20, 6  # the bar, characters
COLUMNS = ("epoch", "train_loss", "val_loss", "top1", "top5", "images_per_second")
NARROW, ROOM = ("epoch", "train_loss", "top1"), 60  # on a terminal below ROOM columns


def introduce(
    out: Console, request: Request, splits: Splits, trainee: Trainee, world: World
) -> None:
    """Say what is about to happen: model, data, and the whole recipe."""
    count = sum(p.numel() for p in trainee.model.parameters())
    size = "x".join(str(side) for side in trainee.preprocessing.input_size)
    where = f"{world.size} x {world.device.type}" if world.size > 1 else world.device
    out.print(
        Text.assemble(
            (request.model, "bold"), f"  {human(count)} parameters, {size} on {where}"
        )
    )
    out.print(
        f"{request.data}: {len(splits.train)} training and {len(splits.val)} "
        f"validation images, {len(splits.class_names)} classes"
    )
    for note in (*splits.notes, *trainee.notes):
        out.print(Text(f"Note: {note}", "yellow"))
    out.print(recipe_table(request.recipe))


def recipe_table(recipe: Any) -> Table:
    """A line for each section of a recipe."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("recipe", recipe.name)
    for section in fields(recipe):
        if section.name == "name":
            continue
        values = getattr(recipe, section.name)
        said = [f"{f.name}={_short(getattr(values, f.name))}" for f in fields(values)]
        table.add_row(section.name, " ".join(said))
    return table


def conclude(out: Console, request: Request, outcome: Outcome) -> None:
    """The best epoch, what was left out, and where things are."""
    best = outcome.best
    assert best is not None
    out.print(
        Text.assemble(
            (f"Best: top-1 {best['top1']:.2f} %", "bold green"),
            f", top-5 {best['top5']:.2f} %, loss {best['val_loss']:.4f}, "
            f"epoch {best['epoch']} of {len(outcome.history)}",
        )
    )
    if outcome.problems:
        path = request.output / "skipped.csv"
        out.print(
            Text(
                f"{len(outcome.problems)} images could not be read: see {path}",
                "yellow",
            )
        )
    out.print(f"Wrote {request.output}/best.safetensors, summary.html, curves.png")


class Plain:
    """One line an epoch, for logs."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.skipped = 0

    def started(self, engine: Engine, position: Position) -> None:
        if position.epoch or position.update:
            self.out.print(
                f"Resumed at epoch {position.epoch + 1}, update {position.update + 1}"
            )

    def stepped(self, moment: Moment) -> None:
        """Nothing: a log of every update helps nobody."""

    def evaluating(self, done: int, images: int) -> None:
        """Nothing, for the same reason."""

    def epoch_ended(self, row: dict[str, Any], best: dict[str, Any]) -> None:
        self.out.print(
            f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, val loss "
            f"{row['val_loss']:.4f}, top-1 {row['top1']:.2f} % (best "
            f"{best['top1']:.2f} %), lr {row['lr']:.2e}, "
            f"{row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s",
            soft_wrap=True,
        )

    def noted(self, text: str) -> None:
        self.skipped += text.startswith("Skipped ")
        if not text.startswith("Skipped ") or self.skipped <= NOTES:
            self.out.print(Text(text, "yellow"), soft_wrap=True)
        elif self.skipped == NOTES + 1:
            self.out.print(Text("More images skipped: skipped.csv has all.", "yellow"))


class Lively(Plain):
    """A bar over the epoch and a table of the last epochs, on a terminal."""

    def __init__(self, out: Console) -> None:
        super().__init__(out)
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=WIDEST),
            TextColumn("{task.fields[facts]}"),
            console=out,
            auto_refresh=False,
        )
        self.facts: list[str] = []
        self.task = self.bar.add_task("starting", total=None, facts="")
        self.live = Live(self, console=out, refresh_per_second=4, transient=True)

    def __rich__(self) -> Group:
        self._fit()
        return Group(self._table(), self.bar) if self.rows else Group(self.bar)

    def _fit(self) -> None:
        """Fit the line to the terminal as it is now: a shorter bar, then less said."""
        task = self.bar.tasks[0]
        room = self.out.width - len(task.description) - 2
        facts = list(self.facts)
        while len(facts) > 2 and len("  ".join(facts)) + NARROWEST > room:
            del facts[1]
        text = "  ".join(facts)
        column = self.bar.columns[1]
        assert isinstance(column, BarColumn)
        column.bar_width = max(NARROWEST, min(WIDEST, room - len(text)))
        self.bar.update(self.task, facts=text)

    def stepped(self, moment: Moment) -> None:
        best = [f"best {self.best['top1']:.2f} %"] if self.best else []
        self.facts = [  # on a narrow terminal the second one goes first
            f"loss {moment.loss:.3f}",
            f"lr {moment.lr:.1e}",
            f"{moment.images_per_second:.0f} img/s",
            *best,
            f"{clock(moment.seconds_left)} left",
        ]
        self.bar.update(
            self.task,
            description=f"epoch {moment.epoch}/{moment.epochs}",
            completed=moment.update,
            total=moment.updates,
        )

    def evaluating(self, done: int, images: int) -> None:
        self.facts = [f"{done}/{images} images"]
        self.bar.update(
            self.task,
            description="evaluating",
            completed=done,
            total=images,
        )

    def epoch_ended(self, row: dict[str, Any], best: dict[str, Any]) -> None:
        self.rows.append(row)
        self.best = best

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        names = COLUMNS if self.out.width >= ROOM else NARROW
        for name in names:
            table.add_column(HEADINGS.get(name, name), justify="right", no_wrap=True)
        for row in self.rows[-SHOWN:]:
            style = "bold green" if row is self.best else ""
            table.add_row(*(cell(name, row[name]) for name in names), style=style)
        return table


HEADINGS = {
    "train_loss": "train loss",
    "val_loss": "val loss",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "images_per_second": "img/s",
}
FORMATS = {"epoch": "d", "top1": ".2f", "top5": ".2f", "images_per_second": ".0f"}


def cell(name: str, value: Any) -> str:
    """A figure of a row as people read it."""
    return format(value, FORMATS.get(name, ".4f"))


class Board:
    """TensorBoard's events beside another listener."""

    def __init__(self, inner: Plain, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput(
                "--tensorboard needs a package that is not installed.",
                hint="pip install tensorboard",
            ) from error
        self.inner = inner
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def epoch_ended(self, row: dict[str, Any], best: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()
        self.inner.epoch_ended(row, best)


@contextmanager
def listening(screen: Screen, board: bool, folder: Path) -> Iterator[Any]:
    """The listener for a run: lively on a terminal, plain lines elsewhere."""
    out = screen.progress
    lively = out.is_terminal and not out.is_dumb_terminal and not out.quiet
    inner: Plain = Lively(out) if lively else Plain(out)
    listener: Any = Board(inner, folder) if board else inner
    with contextlib.ExitStack() as stack:
        if isinstance(inner, Lively):
            stack.enter_context(inner.live)
        if board:
            stack.callback(listener.writer.close)
        yield listener
    if isinstance(inner, Lively) and inner.rows:
        out.print(inner._table())


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they go."""
    whole = int(min(seconds, 1e7))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _short(value: Any) -> str:
    if value is None:
        return "own"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_short(part) for part in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) or "none"
