"""Random whole programs as source text, one statement at a time.

A statement is kept if it runs on the example and its value stays small and finite.
Everything is drawn from one seeded source, and the text that comes out is what is run:
a failure can be pasted into a file as it stands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis.internal.conjecture.data import ConjectureData
from pieces import Call, Draw, few
from spell import WRITERS, call_text, module_text, tensor_text
from strategies import PIECES
from torch import Tensor, fx, nn
from torchvision.ops.stochastic_depth import stochastic_depth

SIZES = {2: (), 3: (7,), 4: (6, 5), 5: (4, 3, 4)}
MOST_NUMBERS = 6000
LARGEST = 1e6


@dataclass(frozen=True)
class Statement:
    """Lines of `__init__`, and one line of `forward`."""

    line: str
    setup: tuple[str, ...] = ()


@dataclass(frozen=True)
class Script:
    """A program before it is written out."""

    seed: int
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    statements: tuple[Statement, ...]
    outputs: str
    dtype: str = "float64"
    casts: bool = False

    def with_statements(self, statements: tuple[Statement, ...]) -> Script:
        """The same program with other statements."""
        return replace(self, statements=statements)


def away(numbers: Tensor) -> Tensor:
    """Moved away from zero: it may be a divisor."""
    return numbers + 0.5 * torch.where(numbers < 0, -1.0, 1.0).to(numbers.dtype)


def seeded(seed: int) -> Draw:
    """Hypothesis's `draw`, from one seed."""
    return ConjectureData(random=Random(seed)).draw


@dataclass
class Writer:
    """A program under way, run as it is written."""

    draw: Draw
    seed: int
    module: nn.Module
    inputs: tuple[str, ...]
    names: dict[str, Any]
    statements: list[Statement] = field(default_factory=list[Statement])
    modules: list[str] = field(default_factory=list[str])
    casts: bool = False
    made: int = 0

    # ---- names and values -----------------------------------------------------------

    @property
    def values(self) -> list[str]:
        """Names of all tensors, oldest first."""
        return [n for n in self.names if n in self.inputs or n.startswith("v")]

    @property
    def declared(self) -> list[str]:
        """Modules of statements that were kept: one that failed declares none."""
        setup = [line for statement in self.statements for line in statement.setup]
        return [
            m for m in self.modules if any(s.startswith(f"self.{m} =") for s in setup)
        ]

    def value(self, name: str) -> Tensor:
        """The tensor of that name, on the example."""
        return self.names[name]

    def some(self) -> str:
        """The newest value, or sometimes an earlier one."""
        values = self.values
        return few(self.draw, values[-1], values[-1], *values)

    def alike(self, name: str) -> str:
        """A value of the same shape and dtype, the value itself among others."""
        own = self.value(name)
        same = [
            n
            for n in self.values
            if self.value(n).shape == own.shape and self.value(n).dtype == own.dtype
        ]
        return few(self.draw, *same)

    def fresh(self, prefix: str) -> str:
        """A name that is not taken."""
        self.made += 1
        return f"{prefix}{self.made}"

    # ---- statements -----------------------------------------------------------------

    def assign(self, expression: str, setup: tuple[str, ...] = ()) -> str | None:
        """`vN = expression`, if it runs and stays small; returns vN."""
        name = self.fresh("v")
        return name if self.run(f"{name} = {expression}", setup, name) else None

    def run(
        self, line: str, setup: tuple[str, ...] = (), made: str | None = None
    ) -> bool:
        """Add a statement if it runs on the example."""
        names = {**self.names, "self": self.module}
        saved = {n: self.value(n).clone() for n in self.values}
        try:
            with torch.no_grad():
                for text in setup:
                    exec(text, self.scope(), names)
                self.module.eval()
                exec(line, self.scope(), names)
        except (RuntimeError, ValueError, IndexError, TypeError):
            self._restore(saved)
            return False
        names.pop("self")
        changed = [names[n] for n in (*saved, *((made,) if made else ()))]
        if not all(_small(value) for value in changed):
            self._restore(saved)
            return False
        self.names = names
        self.statements.append(Statement(line, setup))
        return True

    def _restore(self, saved: dict[str, Tensor]) -> None:
        for name, value in saved.items():
            if not torch.equal(self.names[name], value):
                self.names[name] = value

    @staticmethod
    def scope() -> dict[str, Any]:
        """What a program may name."""
        known = {"torch": torch, "nn": nn, "F": F, "fx": fx, "operator": operator}
        writers = {name: function for function, name in WRITERS.items()}
        return {**known, **writers, "stochastic_depth": stochastic_depth, "away": away}

    # ---- parts ----------------------------------------------------------------------

    def expression(self, made: nn.Module, value: str) -> tuple[str, tuple[str, ...]]:
        """(an expression that applies the module to the value, lines for __init__)."""
        if not isinstance(made, Call):
            name = self.fresh("m")
            self.modules.append(name)
            return f"self.{name}({value})", (f"self.{name} = {module_text(made)}",)
        setup: list[str] = []

        def hold(tensor: Tensor) -> str:
            name, text = self.fresh("p"), tensor_text(tensor)
            if isinstance(tensor, nn.Parameter):
                setup.append(f"self.{name} = nn.Parameter({text})")
            else:
                setup.append(f"self.register_buffer('{name}', {text})")
            return f"self.{name}"

        return call_text(made, value, hold), tuple(setup)

    def apply(self, made: nn.Module, value: str) -> str | None:
        """Add `vN = made(value)`."""
        return self.assign(*self.expression(made, value))

    def piece(self, target: Any, value: str) -> str | None:
        """The operator on the value, if it takes values of this rank."""
        piece = PIECES[target]
        shape = tuple(self.value(value).shape)
        if len(shape) not in piece.ranks or min(shape) < 1:
            return None
        made = piece.make(self.draw, shape)
        if not piece.splits:
            return self.apply(made, value)
        blocks, setup = self.expression(made, value)
        return self.assign(f"{blocks}[{few(self.draw, 0, 0, 1, -1)}]", setup)


def _small(value: Any) -> bool:
    if not isinstance(value, Tensor) or not 0 < value.numel() <= MOST_NUMBERS:
        return False
    if not 2 <= value.dim() <= 5:
        return False
    return bool(value.isfinite().all() and value.abs().max() < LARGEST)


def outputs(writer: Writer) -> str:
    """One value, or several in a tuple, a list or a dict."""
    values = writer.values
    count = few(writer.draw, 1, 1, 1, 2, 3)
    chosen = [values[-1], *(few(writer.draw, *values) for _ in range(count - 1))]
    chosen = list(dict.fromkeys(chosen))
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(chosen)
    named = ", ".join(f"'{name}': {name}" for name in chosen)
    return few(writer.draw, f"({listed})", f"[{listed}]", "{" + named + "}")


def write(
    seed: int, steps: tuple[Callable[[Writer], object], ...], featured: Any
) -> Script:
    """A program of a few steps, one of them the featured operator of the table."""
    draw = seeded(seed)
    ranks = [r for r in PIECES[featured].ranks if r in SIZES]
    rank = few(draw, *ranks, *(4 for _ in range(2 * (4 in ranks))))
    channels = few(draw, 2, 4, 6)
    shape = (few(draw, 1, 2), channels, *SIZES[rank])
    dtype = few(draw, *("float64",) * 9, "float32")
    inputs = few(draw, ("x",), ("x",), ("x", "y"))
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        names = {name: torch.randn(shape) for name in inputs}
        writer = Writer(draw, seed, nn.Module(), inputs, names)
        count = few(draw, 1, 2, 3, 4, 5, 6, 7)
        place = few(draw, *range(count))
        for index in range(count):
            if index == place:
                feature(writer, featured)
            few(draw, *steps)(writer)
        text = outputs(writer)
    finally:
        torch.set_default_dtype(before)
    statements = tuple(writer.statements)
    return Script(seed, shape, inputs, statements, text, dtype, writer.casts)


def feature(writer: Writer, target: Any) -> None:
    """The featured operator on some value that it takes, in several tries."""
    values = [writer.some(), *reversed(writer.values)]
    for value in values * 2:
        if writer.piece(target, value) is not None:
            return
