"""Modules whose call is more than their class says."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does anything beside its class's own forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    patched = ("forward", "_conv_forward")  # on the instance, as tiling tricks do
    return any(hooks) or any(name in module.__dict__ for name in patched)
