"""Random modules of many pieces: branches that are summed, chains, skips, shared parts.

A `Program` is a list of steps over earlier values, so that it traces to a plain graph.
It is drawn by running it: a step that torch refuses on the value at hand is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from helpers import randomise
from hypothesis import strategies as st
from pieces import BlockOf, Call, Draw, X, few, make_conv
from strategies import PIECES
from torch import Tensor, nn

MOST_NUMBERS = 6000
SIZES = {2: (), 3: (7,), 4: (6, 5), 5: (4, 3, 4)}


class Sum(nn.Module):
    """Two values added or subtracted, in one spelling."""

    SPELLINGS = ("+", "-", "add", "sub", "method", "alpha")

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, a: Any, b: Any) -> Any:
        """a ± b."""
        if self.spelling == "+":
            return a + b
        if self.spelling == "-":
            return a - b
        if self.spelling == "add":
            return torch.add(a, b)
        if self.spelling == "sub":
            return torch.sub(a, b, alpha=2)
        return a.add(b) if self.spelling == "method" else torch.add(a, b, alpha=-0.5)


class Concat(nn.Module):
    """Two values one after the other."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, a: Any, b: Any) -> Any:
        """[a, b]"""
        return torch.cat([a, b], self.axis)


class Tokens(nn.Module):
    """An image as a sequence of its positions, with sizes taken from the value."""

    def forward(self, x: Any) -> Any:
        """(N, C, *positions) to (N, L, C)."""
        return x.flatten(2).transpose(1, 2)


class Heads(nn.Module):
    """Channels split in two heads and put together again, as attention does."""

    def forward(self, x: Any) -> Any:
        """(N, L, C) to (N, 2, L, C / 2) and back."""
        batch, length, channels = x.shape
        heads = x.reshape(batch, length, 2, channels // 2).transpose(1, 2)
        return heads.transpose(1, 2).reshape(batch, length, channels)


class Program(nn.Module):
    """Steps over values: (module, indices of its operands); then the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.outputs: tuple[int, ...] = (0,)

    def __repr__(self) -> str:
        rows = [f"v{n + 1} = {self.parts[p]}{o}" for n, (p, o) in enumerate(self.steps)]
        return "\n".join(["Program v0 = x", *rows, f"return {self.outputs}"])

    def forward(self, x: Any) -> Any:
        """One value, or a tuple of several."""
        values = [x]
        for part, operands in self.steps:
            values.append(self.parts[part](*(values[i] for i in operands)))
        found = tuple(values[i] for i in self.outputs)
        return found if len(found) > 1 else found[0]


class Writer:
    """Adds steps to a program, and keeps the values to know their shapes."""

    def __init__(self, draw: Draw, x: Tensor) -> None:
        self.draw, self.program, self.values = draw, Program(), [x]

    def add(self, module: nn.Module, *operands: int, part: int | None = None) -> bool:
        """Append a step if it runs and stays small."""
        try:
            with torch.no_grad():
                value = module(*(self.values[i] for i in operands))
        except (RuntimeError, ValueError, IndexError):
            return False
        if not 0 < value.numel() <= MOST_NUMBERS or value.dim() > 5 or value.dim() < 2:
            return False
        if not value.isfinite().all():  # a division by what a relu left
            return False
        if part is None:
            self.program.parts.append(module)
            part = len(self.program.parts) - 1
        self.program.steps.append((part, operands))
        self.values.append(value)
        return True

    @property
    def last(self) -> int:
        """The newest value."""
        return len(self.values) - 1

    def some(self) -> int:
        """The newest value, or sometimes an earlier one."""
        return few(self.draw, self.last, self.last, *range(len(self.values)))

    def module(self, made: nn.Module) -> nn.Module:
        """The module with numbers drawn anew."""
        return randomise(made, self.draw(st.integers(0, 999))).eval()


def piece_for(writer: Writer, value: int) -> nn.Module | None:
    """Any operator of the table that takes a value of this rank."""
    shape = tuple(writer.values[value].shape)
    keys = [
        index
        for index, piece in enumerate(PIECES.values())
        if len(shape) in piece.ranks and not piece.writes
    ]
    if not keys or min(shape[1:]) < 1:
        return None
    piece = list(PIECES.values())[writer.draw(st.sampled_from(keys))]
    made = writer.module(piece.make(writer.draw, shape))
    return BlockOf(made, writer.draw(st.integers(0, 1))) if piece.splits else made


def add_piece(writer: Writer) -> None:
    """One operator of the table."""
    value = writer.some()
    made = piece_for(writer, value)
    if made is not None:
        writer.add(made, value)


def add_sum(writer: Writer) -> None:
    """Two values of one shape, a skip among others."""
    a = writer.last
    same = [i for i, v in enumerate(writer.values) if v.shape == writer.values[a].shape]
    spelling = few(writer.draw, *Sum.SPELLINGS)
    pair = (a, few(writer.draw, *same))
    writer.add(Sum(spelling), *few(writer.draw, pair, pair[::-1]))


def add_concat(writer: Writer) -> None:
    """Two values that differ on one axis at most, with a norm behind them perhaps."""
    axis = few(writer.draw, 1, 1, -1)
    pair = writer.last, writer.some()
    if writer.add(Concat(axis), *pair) and writer.draw(st.booleans()):
        writer.add(writer.module(norm_for(writer.values[writer.last])), writer.last)


def add_branches(writer: Writer) -> None:
    """Convs, norms and the value itself, side by side, summed."""
    root = writer.some()
    shape = tuple(writer.values[root].shape)
    if len(shape) < 3:
        return
    ends: list[int] = []
    for _ in range(writer.draw(st.integers(2, 3))):
        end = root
        for _ in range(writer.draw(st.integers(0, 2))):
            if writer.draw(st.booleans()):
                made = make_conv(
                    writer.draw, tuple(writer.values[end].shape), same=True
                )
            else:
                made = norm_for(writer.values[end])
            if writer.add(writer.module(made), end):
                end = writer.last
        ends.append(end)
    total = ends[0]
    for end in ends[1:]:
        if writer.values[end].shape == writer.values[total].shape:
            if writer.add(Sum(few(writer.draw, *Sum.SPELLINGS)), total, end):
                total = writer.last


def norm_for(value: Tensor) -> nn.Module:
    """The batch norm of a value's rank."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return kinds[value.dim()](value.shape[1])


def add_nonlinear(writer: Writer) -> None:
    """An op that no map passes."""
    made = few(
        writer.draw,
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.GELU(),
        Call(torch.sigmoid, X),
        Call(torch.relu, X),
        Call("softmax", X, -1),
        nn.LayerNorm(writer.values[writer.last].shape[-1]),
    )
    if getattr(made, "inplace", False):
        # Written to by its own reader alone, as in nets that people write.
        if not writer.add(norm_for(writer.values[writer.last]), writer.last):
            return
        writer.values[-1] = writer.values[-1].clone()
    writer.add(writer.module(made), writer.last)


def add_shared(writer: Writer) -> None:
    """A module that was called before, called again."""
    if len(writer.program.parts) == 0:
        return
    part = writer.draw(st.integers(0, len(writer.program.parts) - 1))
    module = writer.program.parts[part]
    if not isinstance(module, (Sum, Concat, nn.ReLU)):
        writer.add(module, writer.some(), part=part)


def add_tokens(writer: Writer) -> None:
    """Positions as a sequence, then a norm of heads or a linear layer."""
    value = writer.some()
    if writer.values[value].dim() < 3 or not writer.add(Tokens(), value):
        return
    shape = writer.values[writer.last].shape
    if writer.draw(st.booleans()):
        writer.add(writer.module(nn.Linear(shape[-1], 4)), writer.last)
    if shape[-1] % 2 == 0 and writer.draw(st.booleans()):
        writer.add(Heads(), writer.last)


STEPS = (
    *(add_piece,) * 5,
    *(add_branches,) * 3,
    *(add_sum,) * 2,
    add_concat,
    add_nonlinear,
    add_shared,
    add_tokens,
)


@st.composite
def programs(draw) -> tuple[Program, Tensor]:
    """(a module in eval mode, an input that it takes)."""
    rank = draw(st.sampled_from((2, 3, 4, 4, 4, 5)))
    torch.manual_seed(draw(st.integers(0, 999)))
    batch, channels = draw(st.sampled_from((1, 2))), draw(st.sampled_from((2, 4, 6)))
    x = torch.randn(batch, channels, *SIZES[rank])
    writer = Writer(draw, x)
    for _ in range(draw(st.integers(1, 7))):
        draw(st.sampled_from(STEPS))(writer)
    program = writer.program
    extra = {
        few(draw, *range(len(writer.values))) for _ in range(few(draw, 0, 0, 1, 2))
    }
    program.outputs = tuple(dict.fromkeys((writer.last, *sorted(extra))))
    return program.eval(), x
