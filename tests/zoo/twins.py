"""Nets that a package offers under several names: one is run, the others are it.

Data sets with as many classes (`resnet20_cifar10`, `resnet20_svhn`) and recipes of
training make names without making nets. Two models are one net if they consist of the
same classes with the same settings, sizes and constants, and take the same input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Records = Mapping[str, Mapping[str, Any]]


def same_net(
    package: str, net: str, parameters: int, records: Records
) -> dict[str, Any] | None:
    """The record of a model that is the same net, if there is one.

    Args:
        package: where both come from.
        net, parameters: the digest of a model, and how many it has.
        records: of surveyed models, by `package:name`.
    """
    from packages import PACKAGES

    for key, record in records.items():
        home, _, name = key.partition(":")
        run = "ops" in record and "same_as" not in record
        if not run or home != package or record.get("params") != parameters:
            continue
        # Records of older surveys have no digest.
        if net == (record.get("net") or digest(*PACKAGES[package].build(name))):
            kept = {k: v for k, v in record.items() if k != "family"}
            return {**kept, "net": net, "same_as": key}
    return None


def digest(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Equal for two models only if nothing but drawn numbers tells them apart.

    Args:
        model, inputs: as the package makes them, before any number is drawn.
    """
    found = hashlib.sha256()
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: _plain(v) for k, v in sorted(module.__dict__.items())}
        parameters = {
            k: None if p is None else (tuple(p.shape), str(p.dtype))
            for k, p in sorted(module._parameters.items())
        }
        own |= {"_parameters": parameters, "_modules": [*module._modules]}
        found.update(repr((name, _plain(type(module)), own)).encode())
    shapes = [_plain(leaf, numbers=False) for leaf in tree_leaves(inputs)]
    found.update(repr(shapes).encode())
    return found.hexdigest()


def _plain(value: Any, numbers: bool = True) -> Any:
    """What a setting is, without where it lies in memory."""
    if isinstance(value, Tensor):
        bits = value.detach().cpu().contiguous().numpy().tobytes() if numbers else b""
        return (*value.shape, str(value.dtype), hashlib.sha256(bits).hexdigest())
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=str)}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, partial):
        return [
            "partial",
            _plain(value.func),
            _plain(value.args),
            _plain(value.keywords),
        ]
    if isinstance(value, nn.Module):
        return "module"  # listed by itself
    named = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{named}" if named else repr(value)
