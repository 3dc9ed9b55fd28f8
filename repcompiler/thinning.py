"""A few outputs of a dilated conv, which show as much as all of them do.

Outputs that lie `g` apart, where g divides the dilation and both pads, read one grid of
the input, on which the conv is an undilated one. Every grid meets the same borders. So
the check of a region looks at one grid: with the conv's own numbers and geometry, and a
stride of g. A branch of DeepLab (dilation 36, 2,048 channels) would take 20 seconds.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from repcompiler.affine import Axis, Meaning, Window
from repcompiler.forms import CONVS

_CALLS = frozenset(
    [F.conv1d, F.conv2d, F.conv3d]
    + [getattr(torch.ops.aten, f"conv{n}d").default for n in (1, 2, 3)]
)
_STRIDE = 3  # the place of the stride among a conv function's arguments


def thinned(
    meaning: Meaning, original: GraphModule, fused: GraphModule
) -> tuple[GraphModule, GraphModule] | None:
    """Copies of both forms that compute one grid of the outputs; None if they cannot.

    They can where a single conv reads the source, and all else reads the conv.
    """
    if len(meaning.terms) != 1:
        return None
    (term,) = meaning.terms
    if not isinstance(term.map, Window) or term.before or term.after:
        return None
    steps = [_grid(axis) for axis in term.map.axes]
    if max(steps, default=1) == 1:
        return None
    pair = copy.deepcopy(original), copy.deepcopy(fused)
    return pair if all(_set_stride(graph, steps) for graph in pair) else None


def _grid(axis: Axis) -> int:
    """How far apart the outputs of one grid are; 1 where there is only one."""
    if axis.stride != 1:
        return 1
    return max(1, math.gcd(axis.spacing, axis.pad_low, axis.pad_high))


def _set_stride(graph: GraphModule, steps: list[int]) -> bool:
    """Let the conv that reads the source take strides; False if none does."""
    sources = [node for node in graph.graph.nodes if node.op == "placeholder"]
    readers = [reader for source in sources for reader in source.users]
    if len(readers) != 1:
        return False
    (node,) = readers
    if node.op == "call_module":
        conv: Any = graph.get_submodule(str(node.target))
        if type(conv) not in CONVS or isinstance(conv.padding, str):
            return False  # torch takes no stride with padding='same'
        conv.stride = tuple(steps)
        return True
    if node.target not in _CALLS or "same" in (*node.args, *node.kwargs.values()):
        return False
    if len(node.args) > _STRIDE:
        node.args = (*node.args[:_STRIDE], steps, *node.args[_STRIDE + 1 :])
    else:
        node.kwargs = {**node.kwargs, "stride": steps}
    graph.recompile()
    return True
