"""Makers of norms and of arithmetic with one number per channel; see `pieces`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from hypothesis import strategies as st
from pieces import Call, Draw, Maker, Name, Shape, X, few
from torch import Tensor, nn

# ---- norms --------------------------------------------------------------------------


def make_norm(kind: Any, **fixed: Any) -> Maker:
    """A norm module, in each of its settings."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        return kind(
            shape[1],
            eps=few(draw, 1e-5, 1e-3, 0.5),
            momentum=few(draw, 0.1, None),
            affine=draw(st.booleans()),
            **fixed,
        )

    return make


def _statistics(draw: Draw, channels: int) -> tuple[dict[str, Tensor], list[Any]]:
    tensors: dict[str, Tensor] = {
        "mean": torch.randn(channels),
        "var": torch.rand(channels) * 1.5 + 0.5,
    }
    for name in ("weight", "bias"):
        if draw(st.booleans()):
            tensors[name] = nn.Parameter(torch.randn(channels))
    given = [Name(n) if n in tensors else None for n in ("weight", "bias")]
    return tensors, given


def make_functional_norm(target: Any, flag: str) -> Maker:
    """A norm of `F` by name or by position; `flag`: for statistics of the input."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        tensors, (gamma, beta) = _statistics(draw, shape[1])
        stored = (X, Name("mean"), Name("var"))
        if draw(st.booleans()):
            named = {"weight": gamma, "bias": beta, flag: False, "eps": 0.25}
            return Call(target, *stored, tensors=tensors, **named)
        return Call(target, *stored, gamma, beta, False, 0.1, 1e-3, tensors=tensors)

    return make


def make_aten_norm(target: Any) -> Maker:
    """A norm of torch or aten, whose arguments stand in another order."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        tensors, given = _statistics(draw, shape[1])
        rest = (Name("mean"), Name("var"), False, 0.1, 0.125, False)
        return Call(target, X, *given, *rest, tensors=tensors)

    return make


# ---- arithmetic with constants ------------------------------------------------------


def constant(draw: Draw, shape: Shape) -> Any:
    """One number per channel of some axis, or one for all, in each way to write it."""
    kind = few(draw, "channel", "channel", "channel", "number", "scalar", "one", "last")
    if kind == "number":
        return few(draw, 2.0, -0.5, 3)
    sign = torch.randn(1).sign()
    if kind == "scalar":
        return torch.randn(()) + 2 * sign.reshape(())
    if kind == "one":
        return torch.randn([1] * draw(st.integers(1, len(shape)))) + 2 * sign
    axis = len(shape) - 1 if kind == "last" else min(1, len(shape) - 1)
    trailing = [1] * (len(shape) - 1 - axis)
    leading = [1] * draw(st.integers(0, axis))
    # Away from zero, because it may be a divisor.
    numbers = torch.randn(shape[axis])
    return (numbers + 0.5 * numbers.sign()).reshape(*leading, shape[axis], *trailing)


def make_binary(target: Any, *names: str) -> Maker:
    """An operator with a constant on the right, or on the left where it can be.

    `names` are keyword arguments with a number (`alpha`) that the spelling takes.
    """

    def make(draw: Draw, shape: Shape) -> nn.Module:
        value, tensors = constant(draw, shape), {}
        if isinstance(value, Tensor):
            learnt = draw(st.booleans())
            tensors["other"] = nn.Parameter(value) if learnt else value
            value = Name("other")
        named = {n: few(draw, 2, -1) for n in names if draw(st.booleans())}
        sides: list[tuple[Any, Any]] = [(X, value)]
        if not isinstance(target, str) and isinstance(value, Name):
            if target not in (torch.div, torch.true_divide, operator.truediv):
                sides.append((value, X))
        return Call(target, *few(draw, *sides), tensors=tensors, **named)

    return make


def make_addcmul(target: Any) -> Maker:
    """shift + value · x · scale, with the factors in either order."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        trailing = [1] * (len(shape) - 2)
        tensors = {
            name: torch.randn(shape[1], *trailing) for name in ("shift", "scale")
        }
        pair = few(draw, (X, Name("scale")), (Name("scale"), X))
        named = few(draw, {}, {"value": -1.5})
        return Call(target, Name("shift"), *pair, tensors=tensors, **named)

    return make
