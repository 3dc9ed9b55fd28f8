"""The live line of a run: whole at any width, and only where a terminal can move."""

from __future__ import annotations

import io

import pytest
from fastvit_cli.console import Screen
from fastvit_cli.train_view import Lively, Plain, listening
from rich.console import Console

from fastvit.run import Progress


def terminal(width: int = 80, term: str = "xterm") -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        color_system=None,
        _environ={"TERM": term},
    )


def line(console: Console, view: Lively) -> str:
    with console.capture() as captured:
        console.print(view)
    return captured.get().strip("\n").splitlines()[-1].rstrip()


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_the_line_is_whole_at_any_width_and_says_what_fits(width):
    console = terminal(width)
    view = Lively(console)
    row = {"epoch": 12, "train_loss": 1.0, "val_loss": 1.0, "top1": 97.18, "top5": 99.0}
    view.epoch_ended({**row, "images_per_second": 3}, row)
    view.stepped(Progress(113, 300, 700, 1251, 2.345, 9.6e-4, 1024.4, 86399))
    said = line(console, view)
    assert len(said) <= width
    assert "…" not in said
    assert "epoch 113/300" in said
    facts = ["loss 2.345", "23:59:59 left", "best 97.18 %", "1024 img/s", "lr 9.6e-04"]
    shown = [fact in said for fact in facts]
    assert shown == sorted(shown, reverse=True)  # the last ones go first
    assert sum(shown) == {40: 2, 60: 3, 80: 4, 160: 5}[width]


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_the_table_of_epochs_cuts_no_figure(width):
    console = terminal(width)
    view = Lively(console)
    row = {
        "epoch": 12,
        "train_loss": 2.3,
        "val_loss": 1.0,
        "top1": 97.18,
        "top5": 100.0,
    }
    view.epoch_ended({**row, "images_per_second": 1024}, row)
    with console.capture() as captured:
        console.print(view._table())
    assert "…" not in captured.get()
    assert all(figure in captured.get() for figure in ("12", "2.3000", "97.18"))


def test_the_line_follows_the_terminal(monkeypatch):
    console = terminal(160)
    view = Lively(console)
    view.stepped(Progress(1, 3, 2, 9, 2.0, 1e-3, 10.0, 60))
    assert "lr 1.0e-03" in line(console, view)
    console.width = 40
    assert "lr 1.0e-03" not in line(console, view)
    console.width = 160
    assert "lr 1.0e-03" in line(console, view)


@pytest.mark.parametrize(("term", "kind"), [("xterm", Lively), ("dumb", Plain)])
def test_a_terminal_that_cannot_move_gets_plain_lines(term, kind, tmp_path):
    console = terminal(term=term)
    screen = Screen(console, console, None, debug=False)
    with listening(screen, False, tmp_path) as listener:
        assert type(listener) is kind
