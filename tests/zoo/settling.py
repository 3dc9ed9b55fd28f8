"""Norm statistics for models that drawn ones let overflow, or make chaotic."""

from __future__ import annotations

from typing import Any

import torch
from helpers import NORMS
from torch import Tensor
from torch.utils._pytree import tree_leaves

from repcompiler.errors import first_line


def first_run(model: Any, inputs: tuple[Any, ...]) -> bool | str:
    """Whether no output is infinite or no number; why there is none, as a text."""
    try:
        with torch.no_grad():
            output = model(*inputs)
    except Exception as error:  # it takes something else than an image
        return f"{type(error).__name__}: {first_line(error)}"
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def settle(model: Any, inputs: tuple[Any, ...]) -> None:
    """Give every norm the statistics of what reaches it: drawn ones let it overflow."""
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(*inputs)
    model.eval()
    for norm, momentum in zip(norms, kept):
        norm.momentum = momentum
