"""Makers of operators with weights: modules, functions and overloads for a shape.

A maker takes Hypothesis's `draw` and a shape that the operator must run on, and returns
a module: one of torch's own, or a `Call`. `strategies.PIECES` has one per target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

Shape = tuple[int, ...]
Draw = Callable[[Any], Any]
Maker = Callable[[Draw, Shape], nn.Module]
aten: Any = torch.ops.aten


class Name(str):
    """An argument that is an attribute of the `Call`, or `X`, the value itself."""


X = Name("x")


class Call(nn.Module):
    """One function, method or overload, called with its own weights in one spelling."""

    def __init__(self, target: Any, *args: Any, tensors: Any = None, **kwargs: Any):
        super().__init__()
        self.target, self.arguments, self.named = target, args, kwargs
        for name, tensor in (tensors or {}).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def __repr__(self) -> str:
        shapes = {name: tuple(t.shape) for name, t in self.state_dict().items()}
        name = getattr(self.target, "__name__", self.target)
        return f"{name}{self.arguments} {self.named} {shapes}"

    def forward(self, x: Any) -> Any:
        """The call; traces to one node and its attributes."""

        def value(arg: Any) -> Any:
            if isinstance(arg, list):
                return [value(item) for item in arg]
            if not isinstance(arg, Name):
                return arg
            return x if arg == X else getattr(self, arg)

        args = [value(arg) for arg in self.arguments]
        named = {key: value(arg) for key, arg in self.named.items()}
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **named)
        return self.target(*args, **named)


@dataclass(frozen=True)
class Piece:
    """How one target is drawn: for values of which ranks, and what module calls it.

    `writes`: it writes into its input, so that a graph may hold it only by hand.
    `splits`: it gives a tuple, of which a graph reads one block.
    """

    ranks: tuple[int, ...]
    make: Maker
    writes: bool = False
    splits: bool = False


class BlockOf(nn.Module):
    """One block of what a call splits its input into."""

    def __init__(self, call: nn.Module, index: int) -> None:
        super().__init__()
        self.call, self.index = call, index

    def forward(self, x: Any) -> Any:
        """The block."""
        return self.call(x)[self.index]


def few(draw: Draw, *options: Any) -> Any:
    """One of the options."""
    return draw(st.sampled_from(options))


def weight(*shape: int) -> nn.Parameter:
    """A weight that keeps the size of what it meets."""
    fan = max(1, torch.Size(shape[1:]).numel())
    return nn.Parameter(torch.randn(shape) / fan**0.5)


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


# ---- convs and linear layers --------------------------------------------------------


def conv_settings(draw: Draw, shape: Shape, *, same: bool | None = None) -> dict:
    """Settings of a conv that runs on `shape`; with `same` it keeps size and stride."""
    spatial, inputs = len(shape) - 2, shape[1]
    outputs = few(draw, inputs, inputs, 2, 4, 6)
    groups = draw(st.sampled_from(divisors(gcd(inputs, outputs))))
    taps, strides, pads, steps = [], [], [], []
    for size in shape[2:]:
        k, d = few(draw, 1, 1, 2, 3, 3, 5), few(draw, 1, 1, 2)
        keeps = draw(st.booleans()) if same is None else same
        if keeps and k % 2 == 0:
            k += 1
        pad = d * (k - 1) // 2 if keeps else few(draw, 0, 0, 1, 2)
        if size + 2 * pad < d * (k - 1) + 1 or pad >= size:
            k, d, pad = 1, 1, 0
        taps.append(k)
        steps.append(d)
        pads.append(pad)
        strides.append(1 if keeps else few(draw, 1, 1, 2, 3))
    mode = few(draw, "zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    return {
        "shape": (outputs, inputs // groups, *taps),
        "stride": strides,
        "padding": pads,
        "dilation": steps,
        "groups": groups,
        "bias": draw(st.booleans()),
        "mode": mode,
        "spatial": spatial,
    }


def conv_weights(settings: dict) -> dict[str, nn.Parameter]:
    """The parameters of a functional conv."""
    tensors = {"weight": weight(*settings["shape"])}
    if settings["bias"]:
        tensors["bias"] = nn.Parameter(torch.randn(settings["shape"][0]))
    return tensors


def make_conv(draw: Draw, shape: Shape, **options: Any) -> nn.Module:
    """nn.ConvNd."""
    s = conv_settings(draw, shape, **options)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[s["spatial"]]
    padding = s["padding"]
    if all(x == 1 for x in s["stride"]) and few(draw, False, False, True):
        padding = "same"
        if s["mode"] == "reflect":
            s["mode"] = "zeros"
    return kind(
        shape[1],
        s["shape"][0],
        s["shape"][2:],
        stride=tuple(s["stride"]),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(s["dilation"]),
        groups=s["groups"],
        bias=s["bias"],
        padding_mode=s["mode"],
    )


def make_conv_call(target: Any) -> Maker:
    """F.convNd or aten.convNd.default, by position."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        s = conv_settings(draw, shape)
        bias = Name("bias") if s["bias"] else None
        rest = (s["stride"], s["padding"], s["dilation"], s["groups"])
        if target in (F.conv1d, F.conv2d, F.conv3d) and draw(st.booleans()):
            names = dict(zip(("stride", "padding", "dilation", "groups"), rest))
            named = {"weight": Name("weight"), "bias": bias, **names}
            return Call(target, X, tensors=conv_weights(s), **named)
        return Call(target, X, Name("weight"), bias, *rest, tensors=conv_weights(s))

    return make


def make_conv_padding(target: Any) -> Maker:
    """aten.convNd.padding, which takes `same` or `valid`."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        s = conv_settings(draw, shape, same=True)
        bias = Name("bias") if s["bias"] else None
        name = few(draw, "same", "valid")
        if any(n < d * (k - 1) + 1 for n, k, d in zip(*_spans(s, shape))):
            name = "same"
        rest = (s["stride"], name, s["dilation"], s["groups"])
        return Call(target, X, Name("weight"), bias, *rest, tensors=conv_weights(s))

    return make


def _spans(settings: dict, shape: Shape) -> tuple[Any, Any, Any]:
    return shape[2:], settings["shape"][2:], settings["dilation"]


def _transposed_settings(draw: Draw, shape: Shape) -> dict:
    inputs = shape[1]
    outputs = few(draw, inputs, 2, 6)
    groups = draw(st.sampled_from(divisors(gcd(inputs, outputs))))
    spatial = len(shape) - 2
    taps = [few(draw, 1, 2, 3) for _ in range(spatial)]
    stride = [few(draw, 1, 2) for _ in range(spatial)]
    padding = [
        few(draw, 0, 1) if k == 3 and n > 1 else 0 for k, n in zip(taps, shape[2:])
    ]
    return {
        "shape": (inputs, outputs // groups, *taps),
        "outputs": outputs,
        "stride": stride,
        "padding": padding,
        "output_padding": [few(draw, 0, s - 1) for s in stride],
        "groups": groups,
        "dilation": [few(draw, 1, 2) for _ in range(spatial)],
        "bias": draw(st.booleans()),
    }


def make_transposed(draw: Draw, shape: Shape) -> nn.Module:
    """nn.ConvTransposeNd."""
    s = _transposed_settings(draw, shape)
    kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    names = "stride padding output_padding dilation".split()
    return kinds[len(shape) - 2](
        shape[1],
        s["outputs"],
        s["shape"][2:],
        groups=s["groups"],
        bias=s["bias"],
        **{name: tuple(s[name]) for name in names},
    )


def make_transposed_call(target: Any) -> Maker:
    """F.conv_transposeNd or its overload, by position."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        s = _transposed_settings(draw, shape)
        tensors = {"weight": weight(*s["shape"])}
        if s["bias"]:
            tensors["bias"] = nn.Parameter(torch.randn(s["outputs"]))
        bias = Name("bias") if s["bias"] else None
        names = "stride padding output_padding groups dilation".split()
        return Call(
            target, X, Name("weight"), bias, *(s[n] for n in names), tensors=tensors
        )

    return make


def make_linear(draw: Draw, shape: Shape) -> nn.Module:
    """nn.Linear on the last axis."""
    return nn.Linear(shape[-1], few(draw, shape[-1], 3, 4), bias=draw(st.booleans()))


def make_linear_call(target: Any) -> Maker:
    """F.linear and its overload."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        outputs = few(draw, shape[-1], 3, 4)
        tensors = {"weight": weight(outputs, shape[-1])}
        if draw(st.booleans()):
            return Call(target, X, Name("weight"), tensors=tensors)
        tensors["bias"] = nn.Parameter(torch.randn(outputs))
        return Call(target, X, Name("weight"), Name("bias"), tensors=tensors)

    return make


def make_matmul(target: Any) -> Maker:
    """The value times a constant matrix."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        matrix = weight(few(draw, shape[-1], 3, 4), shape[-1]).detach().t().contiguous()
        return Call(target, X, Name("matrix"), tensors={"matrix": matrix})

    return make


def make_addmm(target: Any) -> Maker:
    """bias + value · matrix, with and without the factors that it takes."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        outputs = few(draw, shape[-1], 3)
        tensors = {
            "bias": torch.randn(outputs),
            "matrix": torch.randn(shape[-1], outputs),
        }
        named = few(draw, {}, {}, {"alpha": 2}, {"beta": 0.5})
        return Call(target, Name("bias"), X, Name("matrix"), tensors=tensors, **named)

    return make


def make_convolution(target: Any) -> Maker:
    """ATen's one op for every conv, transposed ones as well."""

    def make(draw: Draw, shape: Shape) -> nn.Module:
        spatial = len(shape) - 2
        transposed = draw(st.booleans())
        if transposed:
            s = _transposed_settings(draw, shape)
            channels, extra = s["outputs"], s["output_padding"]
        else:
            s = conv_settings(draw, shape)
            channels, extra = s["shape"][0], [0] * spatial
        tensors = {"weight": weight(*s["shape"])}
        if s["bias"]:
            tensors["bias"] = nn.Parameter(torch.randn(channels))
        bias = Name("bias") if s["bias"] else None
        rest = (
            s["stride"],
            s["padding"],
            s["dilation"],
            transposed,
            extra,
            s["groups"],
        )
        return Call(target, X, Name("weight"), bias, *rest, tensors=tensors)

    return make
