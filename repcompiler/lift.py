"""What one operator means over its own direct inputs: the table, and how it is read.

`RULES` maps a target (module class, function, ATen overload, method name) to a `Rule`:
the names of its positional arguments and one function from the named arguments to a
`Lifted`. All spellings of an operator share that function. A target that is not in the
table is opaque. To teach the compiler an operator, pass ``{**RULES, target: rule}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from repcompiler.affine import Map, Step, Vector
from repcompiler.facts import Facts, op_name
from repcompiler.hooks import is_hooked
from repcompiler.reasons import Reason


@dataclass(frozen=True)
class Affine:
    """value = Σ map(input) + bias, where the bias and the maps act on `axis`.

    `weightless`: the op itself reads no weights (pooling, padding), so that as it
    stands it costs what it moves. `step`: the same op as a layout op, where it is one
    as well (an average whose weights sum to one everywhere).
    """

    parts: tuple[tuple[Node, Map], ...]
    bias: Vector | None = None
    axis: int | None = None
    channels: int | None = None
    weightless: bool = False
    step: Step | None = None


@dataclass(frozen=True)
class Carry:
    """A layout op, or a mean or resize over positions: channels pass through it."""

    source: Node
    step: Step

    @property
    def is_view(self) -> bool:
        """Whether it costs nothing and leaves nothing out."""
        return not (self.step.computes or self.step.cuts)


@dataclass(frozen=True)
class Stack:
    """The parts one after the other on `axis`, with these sizes."""

    parts: tuple[Node, ...]
    axis: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Bundle:
    """A tuple of blocks of one value, which are carried by the nodes that read it."""

    source: Node


@dataclass(frozen=True)
class Alias:
    """The same value as another node."""

    source: Node


@dataclass(frozen=True)
class Opaque:
    """Not affine, or not known; `reason` says why an affine op had to be refused."""

    reason: Reason | None = None


Lifted = Affine | Carry | Stack | Bundle | Alias | Opaque


@dataclass(frozen=True)
class Op:
    """One node with its arguments by name."""

    node: Node
    facts: Facts
    args: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where it was not given."""
        value = self.args.get(name, default)
        return default if value is None else value

    def number(self, name: str, default: float) -> float | None:
        """The argument as a real number; None if it is another value, or complex."""
        value = self.get(name, default)
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def input(self) -> Any:
        """The first operand."""
        return self.args.get("input")


@dataclass(frozen=True)
class Rule:
    """How one target is read.

    Attributes:
        meaning: from named arguments to what the operator means.
        names: names of the positional arguments, separated by spaces; "..." at the end
            says that `meaning` has no use for any more. Otherwise more make it opaque.
        attributes: for modules, the arguments that the module itself holds.
        given: arguments that this spelling fixes.
    """

    meaning: Callable[[Op], Lifted]
    names: str = "input"
    attributes: Callable[[nn.Module], dict[str, Any]] | None = None
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])


Rules = Mapping[Any, Rule]


def lift(node: Node, facts: Facts, rules: Rules) -> Lifted:
    """What `node` means over its direct inputs."""
    rule = find_rule(node, facts, rules)
    if rule is None:
        return Opaque(Reason.HOOKED if _hooked_container(node, facts) else None)
    names = rule.names.split()
    if len(node.args) > len(names) and names[-1] != "...":
        return Opaque()
    args: dict[str, Any] = dict(rule.given)
    if node.op == "call_module":
        module = facts.submodule(node)
        if is_hooked(module):
            return Opaque(Reason.HOOKED)
        assert rule.attributes is not None
        args.update(rule.attributes(module))
    args.update(zip(names, node.args))
    args.update({_ALIASES.get(key, key): value for key, value in node.kwargs.items()})
    args["input"] = args.pop("self", args.get("input"))
    return rule.meaning(Op(node, facts, args))


def _hooked_container(node: Node, facts: Facts) -> bool:
    """Whether the node is one only because hooks kept its parts from being traced."""
    if node.op != "call_module":
        return False
    module = facts.submodule(node)
    return is_hooked(module) and any(module.children())


# torch accepts numpy's names for some arguments, and ATen calls the first one `self`.
_ALIASES = {"axis": "dim", "x": "input", "keepdims": "keepdim"}


def find_rule(node: Node, facts: Facts, rules: Rules) -> Rule | None:
    """The rule for a node, or None; module classes must match exactly."""
    if node.op == "call_module":
        return rules.get(type(facts.submodule(node)))
    if node.op == "call_method":
        return rules.get(str(node.target))
    if node.op != "call_function":
        return None
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):  # torch.ops.aten.mul
        overloads = ("default", "Tensor", "int", "dim", "input")
        known = (rules.get(getattr(target, name, None)) for name in overloads)
        return next((rule for rule in known if rule is not None), None)
    rule = rules.get(target)
    if rule is None and not isinstance(target, torch._ops.OpOverload):
        module, name = (
            getattr(target, "__module__", ""),
            getattr(target, "__name__", ""),
        )
        rule = rules.get(f"{module}.{name}")
    return rule


def affine_like(node: Node, facts: Facts, rules: Rules) -> bool:
    """Whether the node is an op that the report should account for if it stays."""
    if find_rule(node, facts, rules) is None:
        return False
    return op_label(node, facts) in _ACCOUNTED


# Norms that are affine where their statistics are stored, by their label.
NORMS = ("batch_norm", "instance_norm")
_ACCOUNTED = frozenset((*NORMS, "mul", "div", "neg"))


def op_label(node: Node, facts: Facts) -> str:
    """A short name of the op for people: `conv2d`, `batch_norm`, `linear`, `add`, …"""
    if node.op != "call_module":
        name = op_name(node).strip("_")
        return {"truediv": "div", "iadd": "add", "imul": "mul", "isub": "sub"}.get(
            name, name
        )
    name = type(facts.submodule(node)).__name__
    if "BatchNorm" in name:
        return "batch_norm"
    return "instance_norm" if "InstanceNorm" in name else name.lower()
