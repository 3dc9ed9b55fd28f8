"""Inputs of any structure, leaf by leaf."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def copied(tree: Any) -> Any:
    """The structure with its tensors cloned: a model may write to its inputs."""
    return pytree.tree_map(_clone, tree)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
