"""Multiply-accumulates of ATen operators, from the sizes of what they are given.

Sums, norms and activations count as none. The kernels in which torch runs a whole
attention, an encoder layer or a recurrent layer at once count what they multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

Shape = tuple[int, ...]


def multiplications(name: str, given: Sequence[Any], result: Shape) -> int:
    """Multiply-accumulates of one call of the operator `name`, by its schema's order.

    Args:
        given: its arguments, with shapes in the place of tensors.
        result: the shape of its (first) result.
    """
    if "scaled_dot_product" in name:
        return attention(*given[:3])
    formula = FORMULAS.get(name)
    return 0 if formula is None else formula(given, result)


def attention(query: Shape, key: Shape, value: Shape) -> int:
    """softmax(Q Kᵀ) V for Q (…, L, E), K (…, S, E), V (…, S, F): L·S·(E + F) each."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _conv(given: Sequence[Any], result: Shape) -> int:
    source, weight, transposed = given[0], given[1], given[6]
    # Transposed: every input element meets every tap.
    return prod(source if transposed else result) * prod(weight[1:])


def _product(given: Sequence[Any], result: Shape) -> int:
    return prod(result) * given[0][-1]


def _added_product(given: Sequence[Any], result: Shape) -> int:
    return prod(result) * given[1][-1]


def _added_products(given: Sequence[Any], result: Shape) -> int:
    return prod(result) * given[1][0] * given[1][-1]


def _bilinear(given: Sequence[Any], result: Shape) -> int:
    """x₁ᵀ W x₂ for W (out, in₁, in₂): each product of two inputs meets its weight."""
    return prod(result) * prod(given[2][1:])


def _trilinear(given: Sequence[Any], result: Shape) -> int:
    return prod(result) * prod(given[1][-2:])


def _heads(given: Sequence[Any], result: Shape) -> int:
    """Projections (E, 3E) and (E, E) of every token, and attention between them."""
    query, key = given[0], given[1]
    width = query[-1]
    inputs = 2 * prod(query) + 2 * prod(key)
    return inputs * width + attention(query, key, key)


def _encoder_layer(given: Sequence[Any], result: Shape) -> int:
    source, first, second = given[0], given[14], given[16]
    tokens = prod(source[:-1])
    return _heads((source, source), result) + tokens * (prod(first) + prod(second))


def _recurrent(given: Sequence[Any], result: Shape) -> int:
    """Every step meets every matrix: those of all layers and directions in a list."""
    lists = (item for item in given if isinstance(item, list))
    matrices = (shape for shape in chain.from_iterable(lists) if _is_matrix(shape))
    return prod(given[0][:-1]) * sum(map(prod, matrices))


def _is_matrix(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) == 2


def _recurrent_layer(given: Sequence[Any], result: Shape) -> int:
    return prod(given[0][:-1]) * (prod(given[1]) + prod(given[2]))


FORMULAS: Mapping[str, Callable[[Sequence[Any], Shape], int]] = {
    "convolution": _conv,
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "inner"), _product),
    **dict.fromkeys(("matmul", "linear"), _product),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added_product),
    "addbmm": _added_products,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrent),
    "mkldnn_rnn_layer": _recurrent_layer,
    "bilinear": _bilinear,
    "_trilinear": _trilinear,
    "_native_multi_head_attention": _heads,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
