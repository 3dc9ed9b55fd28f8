"""How the modules of a model are called, and used otherwise, in one forward pass.

A submodule may be replaced only if it is used through its call alone. So the pass notes
for each candidate the arguments of its calls, whether a call wrote to them, and whether
code outside of the candidate read a parameter or a child of it (a parent that shares
a weight, or a method other than `forward`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MOST_CALLS = 8


@dataclass
class Usage:
    """How one module was used.

    Attributes:
        calls: (args, kwargs) of calls, one for each combination of shapes and
            constants, tensors copied.
        count: how many calls there were.
        read: the name of what code outside of it read, if any.
        writes: whether a call wrote to its own arguments.
        nested: whether it was called while it ran.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list[tuple[tuple[Any, ...], dict[str, Any]]]
    )
    count: int = 0
    read: str | None = None
    writes: bool = False
    nested: bool = False
    kinds: set[Any] = field(default_factory=set[Any])


class _Watch:
    """Hooks on the candidates, and a look at each attribute of what they hold."""

    def __init__(self, wanted: Mapping[str, nn.Module]) -> None:
        self.usage = {path: Usage() for path in wanted}
        self.active: list[str] = []
        self.versions: list[list[tuple[Tensor, int]]] = []
        self.owners: dict[int, set[str]] = {}
        for path, module in wanted.items():
            for inner in module.modules():
                self.owners.setdefault(id(inner), set()).add(path)

    def before(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        usage = self.usage[path]
        usage.count += 1
        usage.nested |= path in self.active
        kind = _kind((args, kwargs))
        if kind not in usage.kinds and len(usage.calls) < MOST_CALLS:
            usage.calls.append(pytree.tree_map(_copied, (args, kwargs)))
        usage.kinds.add(kind)
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.versions.append([(t, t._version) for t in tensors])
        self.active.append(path)

    def after(self, path: str) -> None:
        """A call ends."""
        self.active.pop()
        seen = self.versions.pop()
        self.usage[path].writes |= any(t._version != before for t, before in seen)

    def read(self, module: nn.Module, name: str) -> None:
        """An attribute of a module inside some candidate is read."""
        for path in self.owners.get(id(module), ()):
            if path not in self.active and self.usage[path].read is None:
                self.usage[path].read = name


def usage_of(
    root: nn.Module, inputs: tuple[Any, ...], wanted: Mapping[str, nn.Module]
) -> dict[str, Usage]:
    """Run `root` once, in eval mode and without gradients, and watch `wanted`.

    `root` must be a copy that nobody else uses: its modules are watched by changing
    them, which is taken back at the end; what its forward stores stays.
    """
    watch = _Watch(wanted)
    with torch.no_grad(), _hooked(wanted, watch), _watched(wanted, watch):
        root(*pytree.tree_map(_copied, inputs))
    return watch.usage


@contextmanager
def _hooked(
    wanted: Mapping[str, nn.Module], watch: _Watch
) -> Generator[None, None, None]:
    handles: list[Any] = []
    for path, module in wanted.items():

        def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            watch.before(path, args, kwargs)

        def after(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            watch.after(path)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched(
    wanted: Mapping[str, nn.Module], watch: _Watch
) -> Generator[None, None, None]:
    """Give each module inside the candidates a class that tells what is read of it."""
    inner = {id(m): m for module in wanted.values() for m in module.modules()}
    classes = {key: type(module) for key, module in inner.items()}
    watching: dict[type[nn.Module], type[nn.Module]] = {}
    for key, module in inner.items():
        kind = classes[key]
        if kind not in watching:
            watching[kind] = _watching(kind, watch)
        with suppress(TypeError):  # a scripted module has no other class
            module.__class__ = watching[kind]
    try:
        yield
    finally:
        for key, module in inner.items():
            if type(module) is not classes[key]:
                module.__class__ = classes[key]


_CONTAINER = ("__iter__", "__getitem__", "__len__")


def _watching(kind: Any, watch: _Watch) -> type[nn.Module]:
    """A subclass that reports reads of parameters, buffers and children."""

    def read(self: nn.Module, name: str) -> Any:
        watch.read(self, name)
        return kind.__getattr__(self, name)

    def through(name: str) -> Any:
        def method(self: nn.Module, *args: Any) -> Any:
            watch.read(self, name)
            return getattr(kind, name)(self, *args)

        return method

    members: dict[str, Any] = {"__getattr__": read, "__module__": kind.__module__}
    members.update({n: through(n) for n in _CONTAINER if hasattr(kind, n)})
    return type(kind.__name__, (kind,), members)


def _kind(values: Any) -> Any:
    flat, spec = pytree.tree_flatten(values)
    return str(spec), tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in flat
    )


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
