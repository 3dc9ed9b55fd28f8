"""A fused submodule in the place of the original, called just as that was called.

A graph is right for calls of the form that it was captured with: so many arguments, of
these structures and ranks, with these constants. `Form` is that form; `Part` checks it
at each call, so that another call is an error and never a wrong result.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from repcompiler.errors import UnsupportedInput

CONSTANTS = (type(None), bool, int, float, complex, str)


@dataclass(frozen=True)
class Signature:
    """The parameters of a `forward`: their names and defaults, in order.

    `open_ended`: it takes any number of arguments.
    """

    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    keyword_only: frozenset[str] = frozenset()
    open_ended: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Signature:
        """The signature of a module's `forward`."""
        parameters = inspect.signature(module.forward).parameters.values()
        plain = [
            p
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
        ]
        named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        return cls(
            tuple(p.name for p in plain),
            {p.name: p.default for p in (*plain, *named) if p.default is not p.empty},
            frozenset(p.name for p in named),
            any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters),
        )

    def positional(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The call with positional arguments alone, without trailing defaults.

        Raises:
            UnsupportedInput: it cannot be written so.
        """
        if not kwargs and self.open_ended:
            return tuple(args)
        given = dict(zip(self.names, args)) | dict(kwargs)
        unknown = [name for name in given if name not in self.names]
        unknown = [n for n in unknown if not self._is_default(n, given[n])]
        if unknown or len(args) > len(self.names):
            what = ", ".join(unknown) or f"{len(args)} arguments"
            raise UnsupportedInput(
                f"forward does not take {what} by position.",
                hint=f"It takes {', '.join(self.names) or 'nothing'}. A module around "
                "it can pass on what it takes by keyword alone.",
            )
        last = max((self.names.index(n) for n in given if n in self.names), default=-1)
        while last >= len(args) and self._is_default(
            self.names[last], given.get(self.names[last], self._default(last))
        ):
            last -= 1
        return tuple(self._value(name, given) for name in self.names[: last + 1])

    def _default(self, index: int) -> Any:
        return self.defaults.get(self.names[index])

    def _is_default(self, name: str, value: Any) -> bool:
        if name not in self.defaults or isinstance(value, Tensor):
            return False
        default = self.defaults[name]
        return value is default or (isinstance(value, CONSTANTS) and value == default)

    def _value(self, name: str, given: Mapping[str, Any]) -> Any:
        if name not in given and name not in self.defaults:
            raise UnsupportedInput(f"forward needs {name}.")
        return given.get(name, self.defaults.get(name))


@dataclass(frozen=True)
class Form:
    """What all calls of one module have in common.

    Attributes:
        signature: of the original's `forward`.
        spec: the nesting of the positional arguments.
        leaves: for each leaf its rank (a tensor), or the constant in a tuple of one;
            None for a number that may be any.
    """

    signature: Signature
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, signature: Signature, args: tuple[Any, ...]) -> Form | None:
        """The form of one positional call; None if it holds what no graph takes."""
        flat, spec = pytree.tree_flatten(args)
        if any(not isinstance(leaf, (Tensor, *CONSTANTS)) for leaf in flat):
            return None
        return cls(signature, spec, tuple(_leaf(leaf) for leaf in flat))

    def accepts(self, args: tuple[Any, ...]) -> bool:
        """Whether a positional call has this form."""
        flat, spec = pytree.tree_flatten(args)
        if any(isinstance(leaf, fx.Proxy) for leaf in flat):
            return True
        return spec == self.spec and all(map(_fits, self.leaves, flat))

    def check(self, args: tuple[Any, ...]) -> None:
        """Raise `UnsupportedInput` for a call of another form."""
        if self.accepts(args):
            return
        raise UnsupportedInput(
            "A fused part of the model is called in another way than when it was "
            f"fused: {self}.",
            hint="Fuse with example inputs that take this path.",
        )

    def __str__(self) -> str:
        return f"({', '.join(map(_describe, self.leaves))})"


def _leaf(leaf: Any) -> Any:
    return leaf.dim() if isinstance(leaf, Tensor) else (leaf,)


def _fits(expected: Any, leaf: Any) -> bool:
    if isinstance(expected, tuple):
        return type(leaf) is type(expected[0]) and leaf == expected[0]
    return isinstance(leaf, Tensor) and leaf.dim() == expected


def _describe(expected: Any) -> str:
    return (
        repr(expected[0]) if isinstance(expected, tuple) else f"a {expected}-d tensor"
    )


class Part(nn.Module):
    """A fused submodule: the graph, and the form of call that it is right for.

    Plain attributes of the original are kept. Its parameters and children are in the
    graph now, in another form, so reading one of them here is an error.
    """

    fused: nn.Module

    def __init__(self, fused: GraphModule, form: Form, original: nn.Module) -> None:
        super().__init__()
        known = set(self.__dict__)
        for name, value in original.__dict__.items():
            plain = not isinstance(value, (nn.Module, Tensor)) and not callable(value)
            if name not in known and not name.startswith("_") and plain:
                setattr(self, name, value)
        self.fused = fused
        self.form = form
        self.original_class = type(original).__qualname__
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result, for calls of the form it was fused for."""
        given = self.form.signature.positional(args, kwargs)
        self.form.check(given)
        return self.fused(*given)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("original_class", "?")
            raise AttributeError(
                f"{name} is not an attribute of this fused {kind}: what it held is in "
                "`fused`, in another form."
            ) from None
