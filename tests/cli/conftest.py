"""Running the command in this process, against the real compiler or a stand-in."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastvit_cli import main, measured, timing
from fastvit_cli.measured import FILE, OpTimes
from reports import make_report

import repcompiler as rc
from repcompiler.report import FuseReport

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=5, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

class Small(Net):
    input_size = (3, 16, 16)

def build(num_classes=5, width=4):
    return Small(num_classes, width)

def undeclared():
    return Net()

def branching():
    class Branching(Small):
        def forward(self, x):
            if x.sum() > 0:
                return super().forward(x)
            raise_on = list(range(int(x.mean().item() * 0) + 1))
            return super().forward(x) * len(raise_on) * 2
    return Branching()

def pair():
    class Pair(Net):
        def forward(self, x, y):
            return super().forward(x) + super().forward(y * 2)
    return Pair(), (torch.randn(1, 3, 9, 9), torch.randn(1, 3, 5, 5))

def alone():
    return pair()[0]

def no_inputs():
    return Small(), ["x"]

def sound():
    class Sound(nn.Sequential):
        default_input_size = (2, 40)
    return Sound(nn.Conv1d(2, 4, 5, bias=False), nn.BatchNorm1d(4), nn.ReLU())

def chance():
    class Chance(Small):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) < 1e9 else x
    return Chance()

def fails():
    raise ValueError("no such backbone\\nsecond line")

def number():
    return 7

constant = 3
"""


ASKS = """
from torch import nn

class Asks(nn.Module):
    input_size = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.body(x)
        return -y if float(y.sum()) > 1e9 else y
"""

TUNED = """
import torch
from torch import nn

class Net(nn.Module):
    input_size = (3, 16, 16)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.row = nn.Conv2d(8, 8, (1, 5), padding=(0, 2))
        self.column = nn.Conv2d(8, 8, (5, 1), padding=(2, 0))
        self.head = nn.Linear(8, 5)
        for tensor in (self.norm.running_mean, self.norm.running_var):
            tensor.data.uniform_(0.5, 2.0)

    def forward(self, x):
        x = torch.relu(self.norm(self.down(torch.relu(self.stem(x)))))
        x = self.row(x) + self.column(x)
        return self.head(torch.relu(x).mean((2, 3)))

def build():
    return Net().eval()

class Bare(nn.Sequential):
    input_size = (3, 16, 16)

def bare():
    return Bare(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
"""


@dataclass(frozen=True)
class Result:
    """How one run of the command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error.

        Raises:
            AssertionError: it is not one line.
        """
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def fastvit(capsys) -> Callable[..., Result]:
    """Runs `fastvit ARGS…` in this process."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture(scope="session")
def net_source() -> str:
    """The text of a file with factories."""
    return textwrap.dedent(NET)


@pytest.fixture
def net(folder) -> str:
    """A MODEL that builds in no time, from a file in the working directory."""
    (folder / "net.py").write_text(textwrap.dedent(NET))
    return "net.py:build"


@pytest.fixture
def asks(folder) -> str:
    """A MODEL that asks for its values, so that only its parts have a graph."""
    (folder / "asks.py").write_text(ASKS)
    return "asks.py:Asks"


@pytest.fixture
def stand_in(monkeypatch) -> Callable[..., list[dict]]:
    """Replaces the compiler by one that fuses nothing and reports what it is told."""

    def install(report: FuseReport | None = None, error: Exception | None = None):
        calls: list[dict] = []

        def fuse(model, **options):
            calls.append({"model": model, **options})
            if error is not None:
                raise error
            captured = torch.fx.symbolic_trace(copy.deepcopy(model))
            return SimpleNamespace(model=captured, report=report or make_report())

        monkeypatch.setattr(rc, "fuse", fuse)
        return calls

    return install


@pytest.fixture
def cache(folder, monkeypatch):
    """The file with times, in a cache of its own; and a net to tune."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    (folder / "tuned.py").write_text(TUNED)
    return measured.machine.cache_folder() / FILE


@pytest.fixture
def clock(monkeypatch, cache):
    """Says how long ops and plans take: by their key, by their name."""

    def install(op=lambda key: 1.0, plan=lambda name: 1.0):
        def microseconds(self, key, make):
            make()()  # it runs all the same
            self.fresh[key] = [op(key), 1]
            return op(key)

        def interleave(calls, seconds, *, min_rounds=0):
            names = {name: plan(name) for name in calls}
            for call in calls.values():
                call()
            return {k: [[v * (1 + i % 2)] for i in range(8)] for k, v in names.items()}

        monkeypatch.setattr(OpTimes, "microseconds", microseconds)
        monkeypatch.setattr(timing, "interleave", interleave)

    return install
