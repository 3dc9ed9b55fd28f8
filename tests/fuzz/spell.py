"""Source text of modules, calls and tensors, so that a program can be pasted."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pieces import Call, Name, X
from torch import Tensor, nn
from torchvision.ops.stochastic_depth import stochastic_depth

INFIX = {
    operator.add: "{} + {}",
    operator.sub: "{} - {}",
    operator.mul: "{} * {}",
    operator.truediv: "{} / {}",
    operator.matmul: "{} @ {}",
}
PREFIX = {operator.neg: "-{}", operator.pos: "+{}"}
INDEXING = {operator.getitem: "{}[{}]"}
# torch's own modules print strings bare, as in `padding=same`.
BARE = re.compile(r"=([a-z][a-z_-]*)(?=[,)])")
# Written by name, so that tracing keeps the operator that writes as a node.
WRITERS = {
    operator.iadd: "iadd",
    operator.isub: "isub",
    operator.imul: "imul",
    operator.itruediv: "itruediv",
}


def target_text(target: Any) -> str:
    """An expression that is the function or overload."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    if target is stochastic_depth:
        return "stochastic_depth"
    if target in WRITERS:
        return WRITERS[target]
    if target is getattr:
        return "getattr"
    name = target.__name__
    for home, prefix in ((F, "F"), (torch, "torch"), (operator, "operator")):
        if getattr(home, name, None) is target:
            return f"{prefix}.{name}"
    raise ValueError(f"no spelling for {target}")


def module_text(module: nn.Module) -> str:
    """An expression that builds the module, with weights drawn anew."""
    assert not list(module.children()), module
    text = BARE.sub(lambda found: f"='{found[1]}'", repr(module))
    if getattr(module, "count_include_pad", None) is not None:  # not in its repr
        names = "kernel_size stride padding ceil_mode count_include_pad".split()
        names += ["divisor_override"] if hasattr(module, "divisor_override") else []
        settings = ", ".join(f"{n}={getattr(module, n)!r}" for n in names)
        text = f"{type(module).__name__}({settings})"
    if isinstance(module, (nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)):
        text = re.sub(r", mode='\w+'", "", text)  # which they do not take
    return f"nn.{text}"


def tensor_text(tensor: Tensor) -> str:
    """An expression that draws such a tensor: positive if it is, away from zero."""
    shape = tuple(tensor.shape)
    if bool((tensor > 0).all()) and tensor.numel() > 1:
        return f"torch.rand({shape}) + 0.5"
    return f"away(torch.randn({shape}))"


def call_text(call: Call, value: str, hold: Callable[[Tensor], str]) -> str:
    """The call as an expression of `value`; `hold` names each of its tensors."""
    names = {
        name: hold(tensor)
        for name, tensor in (*call.named_parameters(), *call.named_buffers())
    }

    def text(arg: Any) -> str:
        if isinstance(arg, list):
            return f"[{', '.join(map(text, arg))}]"
        if not isinstance(arg, Name):
            return repr(arg)
        return value if arg == X else names[str(arg)]

    args = [text(arg) for arg in call.arguments]
    named = [f"{key}={text(arg)}" for key, arg in call.named.items()]
    if isinstance(call.target, str):
        return f"{args[0]}.{call.target}({', '.join([*args[1:], *named])})"
    for forms in (INFIX, PREFIX, INDEXING):
        if call.target in forms and not named:
            return forms[call.target].format(*args)
    return f"{target_text(call.target)}({', '.join([*args, *named])})"
