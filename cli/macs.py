"""Multiply-accumulates of one forward pass, counted by fvcore, with what it leaves out.

fvcore counts convs, linear layers and matrix products. It has no handles for torch's
fused attention, recurrent layers or products of vectors, which get them here, and it
also counts the work of norms and pools, which are no multiply-accumulates: they are
listed with the ops that have no count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

ATTENTION = "scaled_dot_product_attention"
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# Without a handle of fvcore's, or with one that takes no vectors.
PRODUCTS = ("matmul", "mv", "dot", "vdot", "inner", "addmv", "baddbmm", "addbmm")
OURS = (ATTENTION, *PRODUCTS, "bilinear", *RECURRENT)
MULTIPLYING = ("conv", "linear", "addmm", "mm", "bmm", "einsum", *OURS)


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
    for name in OURS:
        analysis.set_op_handle(f"aten::{name}", partial(_by_formula, name))
    analysis.set_op_handle("aten::einsum", _einsum)
    counted = {k: int(v) for k, v in analysis.by_operator().items()}
    macs = {k: v for k, v in counted.items() if k in MULTIPLYING and v}
    missing = {
        name.removeprefix("aten::"): times
        for name, times in analysis.unsupported_ops().items()
    }
    return Macs(macs, {**missing, **{k: 0 for k in counted if k not in macs}})


def _by_formula(name: str, inputs: list[Any], outputs: list[Any]) -> Any:
    from repcompiler.multiplications import multiplications

    given = [_sizes(value) for value in inputs]
    return Counter({name: multiplications(name, given, tuple(_shape(outputs[0])))})


def _sizes(value: Any) -> Any:
    """The shape of a tensor, shapes of a list of tensors, None for anything else."""
    if value.node().kind() == "prim::ListConstruct":
        return [_sizes(item) for item in value.node().inputs()]
    return tuple(_shape(value)) if value.isCompleteTensor() else None


def _einsum(inputs: list[Any], outputs: list[Any]) -> Any:
    """A product over every letter; fvcore reads it from a text that numpy rounds."""
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
