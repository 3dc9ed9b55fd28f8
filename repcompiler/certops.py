"""The ops that a certificate may hold: how each runs, and how far off it may be.

A certificate is a file from anywhere. Only what the two tables below name is run, and
what a sum may lose is counted here from the sizes, not read from the file.

The length of a value is the number of roundings that a term of it goes through in the
longest order of summing: a product of two values has the sum of their lengths and one
more, a sum of n products the longest of them and n - 1 more. A constant has length 1,
its own rounding. Layout ops, pads, concat and slices are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Ops = Sequence[Mapping[str, Any]]

LAYERS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    **{f"conv{n}d": getattr(F, f"conv{n}d") for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": getattr(F, f"conv_transpose{n}d") for n in (1, 2, 3)},
}
LAYOUT: dict[str, Callable[..., Tensor]] = {
    "cat": torch.cat,
    "contiguous": Tensor.contiguous,
    "flatten": torch.flatten,
    "moveaxis": torch.moveaxis,
    "movedim": torch.movedim,
    "narrow": torch.narrow,
    "pad": F.pad,
    "permute": Tensor.permute,
    "reshape": Tensor.reshape,
    "squeeze": torch.squeeze,
    "stack": torch.stack,
    "swapaxes": torch.swapaxes,
    "swapdims": torch.swapdims,
    "transpose": torch.transpose,
    "unflatten": Tensor.unflatten,
    "unsqueeze": torch.unsqueeze,
    "view": Tensor.view,
}
MEANS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean,
    **{f"avg_pool{n}d": getattr(F, f"avg_pool{n}d") for n in (1, 2, 3)},
    **{
        f"adaptive_avg_pool{n}d": getattr(F, f"adaptive_avg_pool{n}d")
        for n in (1, 2, 3)
    },
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "addcmul": torch.addcmul,
    # Its weights are rounded sums of positions: run, but with no bound.
    "interpolate": F.interpolate,
    **LAYOUT,
    **MEANS,
}
UNBOUNDED = ("interpolate",)
# Numbers of one input, and half of what the ops of one region may make: a file from
# anywhere may ask for any pad or batch, and the memory is not its own.
MOST = 1 << 28


@dataclass(frozen=True)
class Sized:
    """A value's size, on the meta device, and its length (infinity for no bound)."""

    value: Tensor
    length: float


def bound_of(
    ops: Ops,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    sizes: Sequence[Sequence[int]],
) -> float | None:
    """γ(n) for the length n of the ops' result; None where n·u reaches 1.

    Args:
        sizes: of the sources. They count where an op is a mean, and nowhere else.

    Raises:
        ValueError: the ops are none of those that a certificate may hold, or make more
            than 2 `MOST` numbers. Only then does running them need the memory.
    """
    made: list[Sized] = []
    total = 0
    sources = [Sized(torch.empty(*size, device="meta"), 0) for size in sizes]
    for op in ops:
        args = [_value(arg, sources, made) for arg in op.get("args", ())]
        held = [_on_meta(tensors, op.get(key)) for key in ("weight", "bias")]
        if op["op"] == "constant":
            constant = _on_meta(tensors, op["constant"])
            assert constant is not None
            made.append(Sized(constant, 1))
            total += constant.numel()
            continue
        plain = [_unsized(arg) for arg in args]
        made.append(Sized(apply(op, plain, *held), _length(op, args, *held)))
        total += made[-1].value.numel()
        if total > 2 * MOST:
            raise ValueError(f"its ops make more than {2 * MOST} numbers")
    unit = torch.finfo(dtype).eps / 2
    reach = (made[-1].length if made else 0) * unit
    return reach / (1 - reach) if reach < 1 else None


def _on_meta(tensors: Mapping[str, Tensor], name: str | None) -> Tensor | None:
    if name is None:
        return None
    return torch.empty(tensors[name].shape, device="meta")


def _length(
    op: Mapping[str, Any], args: Sequence[Any], kernel: Any, bias: Any
) -> float:
    name = op["op"]
    lengths = [part.length for part in _flat(args)]
    if kernel is not None:
        return lengths[0] + 1 + _fan_in(op, kernel) + (bias is not None)
    if name == "mul":
        return sum(lengths) + 1
    if name == "addcmul":
        return max(lengths[0], lengths[1] + lengths[2] + 1) + 1
    if name in UNBOUNDED:
        return math.inf
    if name in MEANS:
        return lengths[0] + _summed(op, args[0].value)
    return max(lengths) + (name == "add")


def _fan_in(op: Mapping[str, Any], kernel: Tensor) -> int:
    if "transpose" not in op["op"]:
        return math.prod(kernel.shape[1:])
    # (I, O / groups, *taps): each output sums over the inputs of its group, all taps.
    return kernel.shape[0] // op["groups"] * math.prod(kernel.shape[2:])


def _summed(op: Mapping[str, Any], x: Tensor) -> int:
    """How many numbers the longest sum of a mean holds."""
    name, args = op["op"], op["args"][1:]
    if name.startswith("avg_pool"):
        spatial = int(name[-2])
        return math.prod([args[0]] * spatial if isinstance(args[0], int) else args[0])
    out = FUNCTIONS[name](x, *args, **op.get("kwargs", {}))
    if name == "mean":
        return x.numel() // max(out.numel(), 1)
    # Windows of an adaptive pool start at floor(i·n/m) and end at ceil((i + 1)·n/m).
    spatial = int(name[-2])
    pairs = zip(x.shape[-spatial:], out.shape[-spatial:])
    return math.prod(n // m if n % m == 0 else n // m + 2 for n, m in pairs)


def run_ops(
    ops: Ops,
    sources: Sequence[Tensor],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    absolute: bool = False,
) -> Tensor:
    """The ops of a region on its sources; `absolute` with |A| and |b| for A and b.

    Raises:
        ValueError: an op is not one of those that a certificate may hold.
    """
    made: list[Tensor] = []

    def held(name: str | None) -> Tensor | None:
        if name is None:
            return None
        value = tensors[name].detach().cpu().to(dtype)
        return value.abs() if absolute else value

    for op in ops:
        args = [_value(arg, sources, made) for arg in op.get("args", ())]
        if op["op"] == "constant":
            constant = held(op["constant"])
            assert constant is not None
            made.append(constant)
        else:
            made.append(apply(op, args, held(op.get("weight")), held(op.get("bias"))))
    return made[-1] if made else sources[0]


def _value(arg: Any, sources: Sequence[Any], made: Sequence[Any]) -> Any:
    """`s0` is a source, `o0` what the first op made; lists hold either."""
    if isinstance(arg, str) and arg[:1] in ("s", "o") and arg[1:].isdigit():
        return (sources if arg[0] == "s" else made)[int(arg[1:])]
    return [_value(item, sources, made) for item in arg] if _is_list(arg) else arg


def _is_list(arg: Any) -> bool:
    return isinstance(arg, (list, tuple))


def _unsized(arg: Any) -> Any:
    if isinstance(arg, Sized):
        return arg.value
    return [_unsized(item) for item in arg] if _is_list(arg) else arg


def _flat(args: Any) -> list[Sized]:
    if isinstance(args, Sized):
        return [args]
    return [part for arg in args for part in _flat(arg)] if _is_list(args) else []


def apply(
    op: Mapping[str, Any],
    args: Sequence[Any],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One op on its operands.

    Raises:
        ValueError: it is not one of those that a certificate may hold.
    """
    name = op["op"]
    if weight is None:
        if name not in FUNCTIONS:
            raise ValueError(f"{name} is not an op that a certificate may hold")
        return FUNCTIONS[name](*args, **op.get("kwargs", {}))
    if name not in LAYERS:
        raise ValueError(f"{name} is not a layer that a certificate may hold")
    x = args[0]
    if name == "linear":
        return F.linear(x, weight, bias)
    if "transpose" in name:
        settings = [
            op[key] for key in ("stride", "padding", "output_padding", "groups")
        ]
        return LAYERS[name](x, weight, bias, *settings, op["dilation"])
    padding = op["padding"]
    if op["mode"] != "zeros":
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)], op["mode"])
        padding = 0
    return LAYERS[name](
        x, weight, bias, op["stride"], padding, op["dilation"], op["groups"]
    )
