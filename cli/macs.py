"""Multiply-accumulates of one forward pass, counted by fvcore, with what it leaves out.

fvcore counts convs, linear layers and matrix products. It has no handle for torch's
fused attention, which gets one here, and it also counts the work of norms and pools,
which are no multiply-accumulates: they are listed with the ops that have no count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

MULTIPLYING = ("conv", "linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum")
ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Macs:
    """The count by operator, and how often each operator without one was met."""

    by_operator: dict[str, int]
    uncounted: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def total(self) -> int:
        """All multiply-accumulates."""
        return sum(self.by_operator.values())


def count(model: Any, inputs: Sequence[Any]) -> Macs:
    """The count for these inputs; of programs, the count of their module."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, tuple(inputs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle(f"aten::{ATTENTION}", attention)
    analysis.set_op_handle("aten::baddbmm", _baddbmm)
    analysis.set_op_handle("aten::einsum", _einsum)
    counted = {k: int(v) for k, v in analysis.by_operator().items()}
    macs = {k: v for k, v in counted.items() if k in (*MULTIPLYING, ATTENTION) and v}
    missing = {
        name.removeprefix("aten::"): times
        for name, times in analysis.unsupported_ops().items()
    }
    return Macs(macs, {**missing, **{k: 0 for k in counted if k not in macs}})


def attention(inputs: list[Any], outputs: list[Any]) -> Any:
    """softmax(Q Kᵀ) V for Q (…, L, E), K (…, S, E), V (…, S, F): L·S·(E + F) each."""
    from collections import Counter

    query, key, value = (_shape(item) for item in inputs[:3])
    return Counter({ATTENTION: prod(query[:-1]) * key[-2] * (query[-1] + value[-1])})


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> Any:
    from collections import Counter

    first, second = _shape(inputs[1]), _shape(inputs[2])
    return Counter({"baddbmm": prod(first) * second[-1]})


def _einsum(inputs: list[Any], outputs: list[Any]) -> Any:
    """A product over every letter; fvcore reads it from a text that numpy rounds."""
    from collections import Counter

    from fvcore.nn.jit_handles import einsum_flop_jit

    letters = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    if len(shapes) != 2 or "." in "".join(letters):
        return einsum_flop_jit(inputs, outputs)
    sizes: dict[str, int] = {}
    for letter, size in zip("".join(letters), [*shapes[0], *shapes[1]]):
        sizes[letter] = max(size, sizes.get(letter, 1))  # a size of one broadcasts
    return Counter({"einsum": prod(sizes.values())})


def _shape(value: Any) -> list[int]:
    return value.type().sizes()
