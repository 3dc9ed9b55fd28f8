"""What one forward pass costs: ATen compute ops by type, and MACs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from repcompiler.draws import same_draws
from repcompiler.errors import does_not_run
from repcompiler.held import left_as_found
from repcompiler.multiplications import multiplications
from repcompiler.trees import copied

# Layout and view ops, and bookkeeping, which compute nothing.
LAYOUT_OPS = frozenset(
    "view reshape _unsafe_view _reshape_alias view_as transpose permute t expand slice "
    "select unsqueeze squeeze split split_with_sizes chunk unbind unfold detach alias "
    "as_strided as_strided_ clone contiguous lift_fresh _to_copy empty".split()
)


_NORM_KERNELS = ("batch_norm", "batch_norm_legit", "batch_norm_legit_no_training")


class OpCounter(TorchDispatchMode):
    """Counts what is dispatched, and the MACs of convs and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        # Which of its kernels a norm reaches depends on device and capture.
        name = "batch_norm" if name.endswith(_NORM_KERNELS) else name
        result = func(*args, **(kwargs or {}))
        if name not in LAYOUT_OPS:
            self.calls[name] += 1
            self.macs += _macs(name, args, result)
        return result


def _macs(name: str, args: Sequence[Any], result: Any) -> int:
    first = next(iter(result), None) if isinstance(result, (tuple, list)) else result
    if not isinstance(first, Tensor):
        return 0
    leaves = [leaf for leaf in (*pytree.tree_leaves(args), first) if _is_nested(leaf)]
    if any(leaf.layout is not torch.strided for leaf in leaves):
        return 0  # of jagged ones no sizes are known
    if not leaves:
        return multiplications(name, _sizes(args), _size(first))
    rows = range(len(leaves[0]._nested_tensor_size()))
    return sum(multiplications(name, _sizes(args, i), _size(first, i)) for i in rows)


def _sizes(args: Sequence[Any], row: int = 0) -> list[Any]:
    """Arguments with shapes in the place of tensors; nested ones are one row alone."""
    return list(pytree.tree_map(partial(_size, row=row), tuple(args)))


def _size(leaf: Any, row: int = 0) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if not leaf.is_nested:
        return tuple(leaf.shape)
    return (1, *leaf._nested_tensor_size()[row].tolist())


def _is_nested(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.is_nested


def count(model: nn.Module, inputs: Sequence[Any] | None) -> tuple[Counter[str], int]:
    """(ATen compute ops by name, MACs) of one forward pass on the first sample.

    A model that takes no batch but its own is counted on the inputs as they are.

    Raises:
        UnsupportedInput: it does not run on them either.
    """
    if inputs is None:
        return Counter(), 0
    try:
        return _count(model, first_samples(inputs))
    except Exception:  # the model's own code runs here
        pass
    try:
        return _count(model, copied(tuple(inputs)))
    except Exception as error:
        raise does_not_run(error) from error


def _count(model: nn.Module, inputs: Sequence[Any]) -> tuple[Counter[str], int]:
    with same_draws(), torch.no_grad(), left_as_found(model), OpCounter() as counter:
        model(*inputs)
    return counter.calls, counter.macs


def first_samples(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Inputs of batch 1: the first sample of each."""
    return pytree.tree_map(_first_sample, tuple(inputs))


def _first_sample(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (leaf[:1] if leaf.dim() > 1 else leaf).clone()  # it may be written to
