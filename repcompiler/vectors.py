"""Sums and products of per-channel numbers, and whether a sum has cancelled."""

from __future__ import annotations

from collections.abc import Callable

import torch

from repcompiler.affine import Vector


def constant(number: float) -> Vector:
    """One number for all channels."""
    return Vector(None, lambda: torch.tensor(number, dtype=torch.float64))


def scale_vectors(a: Vector | None, b: Vector | None) -> Vector | None:
    """a·b, where None is one."""
    if a is None or b is None:
        return a or b
    size = a.size if a.size is not None else b.size
    dear = a.dear or b.dear
    return Vector(size, lambda: a.value() * b.value(), _product(a, b), dear)


def add_vectors(a: Vector | None, b: Vector | None) -> Vector | None:
    """a + b, where None is zero."""
    if a is None or b is None:
        return a or b
    size = a.size if a.size is not None else b.size

    def parts() -> torch.Tensor:
        return _magnitude(a) + _magnitude(b)

    return Vector(size, lambda: a.value() + b.value(), parts, a.dear or b.dear)


def _product(a: Vector, b: Vector) -> Callable[[], torch.Tensor] | None:
    if a.parts is None and b.parts is None:
        return None
    return lambda: _magnitude(a) * _magnitude(b)


def _magnitude(vector: Vector) -> torch.Tensor:
    return vector.value().abs() if vector.parts is None else vector.parts()


def vanishes(vector: Vector | None) -> bool:
    """Whether what was added up in it cancels, to the rounding of float64.

    Only asked of sums whose numbers cost next to nothing: a constant that was pushed
    through a kernel would need the kernel.
    """
    if vector is None:
        return True
    if vector.dear or vector.parts is None:
        return False
    limit = 16 * torch.finfo(torch.float64).eps * vector.parts()
    return bool((vector.value().abs() <= limit).all())
