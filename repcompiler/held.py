"""What the modules of a model hold, so that running its code leaves no trace.

A forward pass may write to buffers, put others in their place, count its calls or keep
what it computed; a check must not change a model by that.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Held:
    """What a model's modules held before their code ran."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.lists: list[tuple[list[Any], list[Any]]] = []
        for module in model.modules():
            inner = vars(module).values()
            stores = [value for value in inner if isinstance(value, dict)]
            for store in (vars(module), *cast(list[dict[Any, Any]], stores)):
                self.held.append((store, dict(store)))
            lists = [value for value in inner if isinstance(value, list)]
            self.lists += [(value, list(value)) for value in cast(Any, lists)]
        self.copies = [(b, b._version, b.clone()) for b in model.buffers()]
        self.data = [(p, p.data) for p in model.parameters() if not is_lazy(p)]

    def buffer_written(self) -> bool:
        """Whether a buffer was written to or replaced, which no graph would show."""
        now = [id(b) for b in self.model.buffers()]
        same = [id(b) for b, _, _ in self.copies] == now
        return not same or any(
            b._version != version or not same_values(b, copy)
            for b, version, copy in self.copies
        )

    def restore(self) -> None:
        """Put everything back, what is kept in a dict or a list of a module as well."""
        for kept, before in self.lists:
            kept[:] = before
        for store, before in self.held:
            if store.keys() != before.keys() or any(
                store[name] is not value for name, value in before.items()
            ):
                store.clear()
                store.update(before)
        for parameter, data in self.data:
            if _memory(parameter) != _memory(data):  # others were put under it
                parameter.data = data
        for buffer, version, copy in self.copies:
            if buffer._version != version or not same_values(buffer, copy):
                buffer.data.copy_(copy)


def same_values(buffer: Tensor, copy: Tensor) -> bool:
    """Whether nothing was written, as through `.data`, which counts no version.

    Of what torch cannot compare (sparse, nested, without numbers) the version tells.
    """
    plain = buffer.layout is torch.strided and not buffer.is_nested
    return torch.equal(buffer, copy) if plain and not buffer.is_meta else True


class Spared(TorchDispatchMode):
    """Copies a parameter before the first op that writes to it.

    There may be no memory for a copy of them all, and hardly a model writes to one.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.sharing: dict[int, list[Tensor]] = {}
        for parameter in {id(p): p for m in models for p in m.parameters()}.values():
            self.sharing.setdefault(_memory(parameter), []).append(parameter)
        self.copies: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled model is compiled and runs as it does without this."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the op, after a copy where it is the first to write."""
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
            written = [
                given.get(a.name)
                for a in schema.arguments
                if a.alias_info is not None and a.alias_info.is_write
            ]
            for leaf in pytree.tree_leaves(written):
                if isinstance(leaf, Tensor):
                    found = self.sharing.pop(_memory(leaf), [])
                    self.copies += [(p, p.detach().clone()) for p in found]
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Put back what was written to."""
        with torch.no_grad():
            for parameter, copy in self.copies:
                parameter.data.copy_(copy)


def _memory(tensor: Tensor) -> int:
    """What tells tensors of shared memory, whole or in part; own ones where unknown."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, and other subclasses
        return id(tensor)


@contextmanager
def left_as_found(*models: nn.Module) -> Generator[None, None, None]:
    """Undo what the forward passes inside do to the models."""
    with undone(*models) as spared, spared:
        yield


@contextmanager
def undone(*models: nn.Module) -> Generator[Spared, None, None]:
    """`left_as_found`, for what runs under the mode that this gives alone.

    The mode looks at every op, which takes longer than small ops themselves; what runs
    of other models is better left out of it.
    """
    found, spared = [Held(model) for model in models], Spared(models)
    try:
        yield spared
    finally:
        spared.restore()
        for held in found:
            held.restore()


@contextmanager
def kept(model: nn.Module) -> Generator[None, None, None]:
    """`left_as_found` for what computes no numbers: no parameter is written to."""
    found = Held(model)
    try:
        yield
    finally:
        found.restore()
