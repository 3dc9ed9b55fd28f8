"""Ops and MACs of one forward pass, counted apart from the compiler's own counters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Layout and view ops compute nothing.
LAYOUT = frozenset(
    "view reshape _unsafe_view _reshape_alias view_as transpose permute t expand slice "
    "select unsqueeze squeeze split split_with_sizes chunk unbind unfold detach alias "
    "as_strided clone contiguous lift_fresh _to_copy empty".split()
)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in LAYOUT:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count_ops(model: nn.Module, *inputs: Tensor) -> Counter[str]:
    """ATen compute ops dispatched in one forward pass without gradients."""
    with torch.no_grad(), _Counter() as counter:
        model(*inputs)
    return counter.calls


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates, by torch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2
