"""What a run of a model leaves: the tensors that it returns, and those that it writes.

Tensors may be held by anything: a dict, a named tuple, a dataclass, an object of the
model's own. What is returned in a form that nothing here can open is not compared, and
a comparison of nothing is no comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repcompiler.draws import drawn_alike
from repcompiler.errors import VerificationError, first_line
from repcompiler.held import same_values
from repcompiler.trees import copied

Names = tuple[str, ...]  # of one tensor: a tied one has several


def run(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors in the model's output, flat, each in its plain form."""
    with torch.no_grad():
        try:
            output = drawn_alike(lambda: model(*copied(tuple(inputs))))
        except Exception as error:
            raise VerificationError(
                f"The model does not run on these inputs: {first_line(error)}"
            ) from error
    return tensors(output)


def try_run(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor] | None:
    """`run`; None where the model does not take the inputs."""
    try:
        return run(model, inputs)
    except VerificationError:
        return None


def tensors(output: Any) -> list[Tensor]:
    """The tensors, arrays and numbers in a model's output, flat, in plain form."""
    return [plain(leaf) for leaf in _opened(output, set())]


def _opened(value: Any, inside: set[int]) -> Iterator[Tensor]:
    """The leaves of a structure; `inside` are the objects that it is a part of."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, _NUMBERS) or hasattr(leaf, "__array__"):
            # An array is numpy's, on which nothing here depends; one of objects, or of
            # more than 64 bits, is no tensor.
            with suppress(TypeError, ValueError, RuntimeError, OverflowError):
                yield torch.as_tensor(leaf, dtype=_WIDEST.get(type(leaf)))
        elif id(leaf) not in inside:
            for part in _fields(leaf):
                yield from _opened(part, inside | {id(leaf)})


_NUMBERS = (bool, int, float, complex)
_WIDEST: dict[type, torch.dtype] = {float: torch.float64, complex: torch.complex128}


def _fields(value: Any) -> list[Any]:
    """What an object holds, by name; nothing for code, text and what torch keeps."""
    if isinstance(value, (type, nn.Module, str, bytes)) or callable(value):
        return []
    if dataclasses.is_dataclass(value):
        return [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    held: dict[str, Any] = getattr(value, "__dict__", {})
    return [held[name] for name in sorted(held)]


def plain(value: Tensor) -> Tensor:
    """The same numbers in a form that arithmetic and norms are defined for.

    Dense and padded; complex numbers as pairs; quantised and 8-bit ones in float32.
    """
    if value.is_nested:
        value = value.to_padded_tensor(0.0)
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.is_quantized:
        return value.dequantize()
    if value.is_complex():
        return torch.view_as_real(value.resolve_conj())
    if value.is_floating_point():
        return value.float() if value.element_size() < 2 else value
    unsigned = (torch.uint16, torch.uint32, torch.uint64)
    return value.long() if value.dtype in unsigned else value


# ---- what is written ---------------------------------------------------------------


def run_watched(
    model: nn.Module, inputs: Sequence[Any]
) -> tuple[list[Tensor], list[Names]]:
    """`run`, and the names of the parameters and buffers that it wrote to."""
    buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}
    before = [(n, t, _version(t)) for n, t in by_tensor(model)]
    outputs = run(model, inputs)
    written = [
        names
        for names, tensor, version in before
        if _version(tensor) != version
        or not same_values(tensor, buffers.get(id(tensor), tensor))
    ]
    return outputs, written


def tensor_under(model: nn.Module, names: Names) -> Tensor | None:
    """The tensor that the model has under one of the names, in plain form."""
    found = _named(model)
    return next((plain(found[name]) for name in names if name in found), None)


def by_tensor(model: nn.Module) -> list[tuple[Names, Tensor]]:
    """Every parameter and buffer once, with all its names."""
    names: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in _named(model).items():
        names.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(own), tensor) for own, tensor in names.values()]


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
