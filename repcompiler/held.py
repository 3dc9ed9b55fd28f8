"""What the modules of a model hold, so that running its code leaves no trace.

A forward pass may write to buffers, put others in their place, count its calls or keep
what it computed; a check must not change a model by that.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn


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

    def buffer_written(self) -> bool:
        """Whether a buffer was written to or replaced, which no graph would show."""
        now = [id(b) for b in self.model.buffers()]
        same = [id(b) for b, _, _ in self.copies] == now
        return not same or any(b._version != version for b, version, _ in self.copies)

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
        for buffer, version, copy in self.copies:
            if buffer._version != version:
                buffer.data.copy_(copy)


@contextmanager
def left_as_found(*models: nn.Module) -> Generator[None, None, None]:
    """Undo what the forward passes inside do to the models."""
    found = [Held(model) for model in models]
    try:
        yield
    finally:
        for held in found:
            held.restore()
