"""Random numbers that are the same for every model that is compared.

A model that adds noise, or drops some of what it computes, has one output only for one
seed. Two are compared on the same draws; and the float64 model, which would draw other
numbers, draws those of float32, or its output would be no reference for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def same_draws(seed: int = 0) -> Generator[None]:
    """Random numbers from one seed; what the caller would draw next stays the same."""
    devices = range(torch.cuda.device_count()) if _on_cuda() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


# A draw that a trace took for a constant must not be the one of the comparison.
TRACING = 1


def drawn_alike(call: Callable[[], Any]) -> Any:
    """What `call` returns, on draws that do not depend on the precision of a model.

    A call that draws is made again: its draws are looked at in the second call only.
    """
    with same_draws():
        before = _states()
        output = call()
        if all(map(torch.equal, before, _states())):
            return output
        torch.manual_seed(0)
        with _InSingle():
            return call()


def _on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if _on_cuda() else []
    return [torch.get_rng_state(), *cuda]


# What these give does not depend on the numbers in the tensor that they are given.
_LIKE = frozenset("randn_like rand_like".split())
_FILL = frozenset(
    "normal_ uniform_ bernoulli_ exponential_ cauchy_ log_normal_ geometric_".split()
)


class _InSingle(TorchDispatchMode):
    """Draws of float64 are those of float32."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        wide = bool(args) and isinstance(args[0], Tensor)
        wide = wide and args[0].dtype is torch.float64
        numbers = not any(isinstance(arg, Tensor) for arg in args[1:])
        if not (wide and numbers and name in _LIKE | _FILL):
            return func(*args, **(kwargs or {}))
        given, *rest = args
        like = torch.empty_like(given, dtype=torch.float32)
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "dtype"}
        drawn = func(like, *rest, **kwargs).double()
        return given.copy_(drawn) if name in _FILL else drawn
