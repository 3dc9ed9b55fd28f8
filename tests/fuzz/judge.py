"""Run a program's text, fuse it, and hold the result to the original's values.

The oracle is the original in its own arithmetic, on other batches and sizes as well;
equality is relative to the largest value inside it, since sums may cancel. Nothing here
reads the compiler's own verdict, but for float32, where only it has the reference.
A graph from `torch.export` holds for sizes of two and more, and for those that take the
turns that the example took, as its guards and assertions say; and a conv refuses a map
of no positions, which a crop behind it would give. There an exception is counted apart,
but a wrong value never is.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from grammar import Script
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as symbolic_trace_module
from torch.utils import _pytree as pytree

import repcompiler as rc

# Kernels are rounded in float64 once; depth multiplies that by a few hundred at most.
LIMIT = 1e-9
# A value that is rounded to float32 on the way may round to its neighbour.
CAST_LIMIT = 1e-5

HEAD = '''"""Program {number}: fused, it must be the same function."""

import operator
from operator import iadd, imul, isub, itruediv

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops.stochastic_depth import stochastic_depth

for writer in ("iadd", "imul", "isub", "itruediv", "stochastic_depth"):
    fx.wrap(writer)


def away(numbers):
    return numbers + 0.5 * torch.where(numbers < 0, -1.0, 1.0).to(numbers.dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
'''
BUILD = """

def build():
    torch.default_generator.manual_seed({key})
    torch.set_default_dtype(torch.{dtype})
    try:
        model = Model()
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape) * 1.5 + 0.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(torch.randn(tensor.shape))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def inputs(shape={shape}):
    torch.default_generator.manual_seed(sum(shape))
    return tuple(torch.randn(shape, dtype=torch.{dtype}) for _ in range({count}))
"""
TAIL = """

if __name__ == "__main__":
    import copy

    import repcompiler as rc

    model, example = build(), inputs()
    print(copy.deepcopy(model)(*inputs({failing})))
    result = rc.fuse(model, {given}, verify={verify}, capture="{door}")
    print(result.report.equivalence, result.model.graph)
    print(result.model(*inputs({failing})))
"""


@dataclass(frozen=True)
class Mode:
    """How a program is fused."""

    door: str = "auto"
    blind: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Failure:
    """What went wrong: a kind, for comparing while it is made smaller, and details."""

    kind: str
    detail: str
    shape: tuple[int, ...]


@dataclass
class Tally:
    """What was run: calls of each operator, answers of each rule, and counts.

    Attributes:
        called: how often each operator of the table stood in a program.
        understood: how often its rule was asked and found it affine or a layout op.
        counts: programs, failures, inputs compared, and so on.
    """

    called: Counter[Any] = field(default_factory=Counter)
    understood: Counter[Any] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def table(self) -> dict[Any, rc.Rule]:
        """The table, with each rule counting how often it is asked and answers."""

        def counted(target: Any, rule: rc.Rule) -> rc.Rule:
            def meaning(op: rc.Op) -> Any:
                found = rule.meaning(op)
                self.understood[target] += not isinstance(found, rc.Opaque)
                return found

            return replace(rule, meaning=meaning)

        return {target: counted(target, rule) for target, rule in rc.RULES.items()}

    def note(self, model: nn.Module) -> None:
        """Count the operators that the program calls, as they are traced."""
        try:
            graph = fx.symbolic_trace(model).graph
        except (TypeError, fx.proxy.TraceError):  # plain fx assigns no items
            return
        for node in graph.nodes:
            target: Any = node.target
            if node.op == "call_module":
                target = type(model.get_submodule(str(node.target)))
            home = getattr(target, "__module__", "")
            by_path = f"{home}.{getattr(target, '__name__', '')}"
            self.called[by_path if by_path in rc.RULES else target] += 1


def text(
    script: Script, number: int = 0, mode: Mode = Mode(), failing: Any = None
) -> str:
    """The program as a file that can be run."""
    setup = [line for s in script.statements for line in s.setup] or ["pass"]
    forward = [s.line for s in script.statements]
    body = "".join(f"        {line}\n" for line in setup)
    body += f"\n    def forward(self, {', '.join(script.inputs)}):\n"
    body += "".join(f"        {line}\n" for line in forward)
    body += f"        return {script.outputs}\n"
    return (
        HEAD.format(number=number)
        + body
        + BUILD.format(
            key=script.seed % 2**31,
            dtype=script.dtype,
            shape=script.shape,
            count=len(script.inputs),
        )
        + TAIL.format(
            given="None" if mode.blind else "example",
            verify=mode.verify,
            door=mode.door,
            failing=failing or script.shape,
        )
    )


def loaded(script: Script) -> dict[str, Any]:
    """The names that the program's text defines."""
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(text(script), f"<program {script.seed}>", "exec"), names)
    return names


def other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The example's, other batches, odd and even sizes, and very small ones."""
    channels, sizes = shape[1], shape[2:]
    shapes = [shape, (3, channels, *sizes), (1, channels, *sizes)]
    for change in (1, -1, 4):
        shapes.append((2, channels, *(max(1, size + change) for size in sizes)))
    shapes += [(1, channels, *[small] * len(sizes)) for small in (1, 2)]
    return list(dict.fromkeys(shapes))


@contextmanager
def _wrapping_undone() -> Generator[None, None, None]:
    """Forget what programs gave to `fx.wrap`: every later trace would wrap it again."""
    table: Any = symbolic_trace_module._wrapped_fns_to_patch
    before = set(table)
    try:
        yield
    finally:
        for key in set(table) - before:
            del table[key]


@_wrapping_undone()
def try_program(script: Script, mode: Mode, tally: Tally) -> Failure | None:
    """Fuse the program and compare; what went wrong, or None."""
    names = loaded(script)
    model = names["build"]()
    if _run(names["build"](), names["inputs"](script.shape)) is None:  # it may write
        tally.counts["does not run"] += 1
        return None
    tally.note(model)
    example = None if mode.blind else names["inputs"](script.shape)
    try:
        result = rc.fuse(
            model, example, rules=tally.table(), capture=mode.door, verify=mode.verify
        )
    except rc.CaptureError as error:
        if mode.door != "export":
            return Failure("CaptureError", str(error), script.shape)
        tally.counts["not exported"] += 1
        return None
    except Exception as error:
        return Failure(type(error).__name__, str(error), script.shape)
    tally.counts[f"fused by {mode.door}"] += 1
    tally.counts["regions"] += len(result.report.regions)
    return _judge(script, mode, result, names, tally)


def _judge(
    script: Script,
    mode: Mode,
    result: rc.FuseResult,
    names: Mapping[str, Any],
    tally: Tally,
) -> Failure | None:
    equal = result.report.equivalence
    undone = [k for k in result.report.kept if k.reason == "not_equal"]
    if undone:
        return Failure("undone", str(undone), script.shape)
    if mode.verify and not equal.ok and equal.verdict != "not comparable":
        return Failure("not verified", str(equal), script.shape)
    if script.dtype == "float32":
        return None
    for shape in other_shapes(script.shape):
        failure = _compare(script, result, names, shape, tally)
        if failure is not None:
            return failure
    return None


def _compare(
    script: Script,
    result: rc.FuseResult,
    names: Mapping[str, Any],
    shape: tuple[int, ...],
    tally: Tally,
) -> Failure | None:
    expected = _run(names["build"](), names["inputs"](shape))
    if expected is None:
        return None
    scale = _largest_inside(script, names, shape)
    if not math.isfinite(scale):
        return None
    tally.counts["inputs compared"] += 1
    try:
        with torch.no_grad():
            found = copy.deepcopy(result.model)(*names["inputs"](shape))
    except Exception as error:
        refusal = _allowed(error, result.report.capture, shape, expected)
        if refusal is None:
            return Failure("fused " + type(error).__name__, str(error), shape)
        tally.counts[refusal] += 1
        return None
    problem = _difference(expected, found, scale, script.casts)
    return None if problem is None else Failure("mismatch", problem, shape)


def _allowed(
    error: Exception, door: str, shape: tuple[int, ...], expected: Any
) -> str | None:
    """Why a fused model may refuse what the original takes, if it may."""
    if door == "export" and (1 in shape[2:] or "was captured for inputs" in str(error)):
        return "sizes that export leaves out"
    outputs = pytree.tree_leaves(expected)
    empty = any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in outputs)
    return "empty maps, which convs refuse" if empty else None


def _difference(expected: Any, found: Any, scale: float, casts: bool) -> str | None:
    if pytree.tree_structure(expected) != pytree.tree_structure(found):
        return "another structure of outputs"
    limit = CAST_LIMIT if casts else LIMIT
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        error = float((a.double() - b.double()).abs().amax()) if a.numel() else 0.0
        if not error <= limit * scale:
            return f"off by {error:.2e} where values reach {scale:.2e}"
    return None


def _run(model: Callable[..., Any], given: tuple[Tensor, ...]) -> Any:
    """The outputs, or None where torch refuses the input."""
    try:
        with torch.no_grad():
            return model(*given)
    except (RuntimeError, ValueError, IndexError):
        return None


def _largest_inside(
    script: Script, names: Mapping[str, Any], shape: tuple[int, ...]
) -> float:
    """The largest magnitude among all values of the program; nan where one has nan."""
    lines = [s.line for s in script.statements]
    made = [line.split(" = ")[0] for line in lines if " = " in line and line[0] == "v"]
    every = [f"{name}.clone()" for name in dict.fromkeys(made) if name.isidentifier()]
    wide = replace(script, outputs=f"[{', '.join([*every, *script.inputs])}]")
    found = _run(loaded(wide)["build"](), names["inputs"](shape)) or []
    sizes = [float(v.double().abs().amax()) for v in found if v.numel()]
    return float(torch.tensor([0.0, *sizes]).max())  # Python's own max drops nan


# ---- a smaller program that fails in the same way ------------------------------------


def shrink(script: Script, mode: Mode, failure: Failure) -> tuple[Script, Failure]:
    """Leave out statements, then outputs, as long as it still fails."""
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(script):
            again = _fails(smaller, mode)
            if again is not None and again.kind == failure.kind:
                script, failure, changed = smaller, again, True
                break
    return script, failure


def _smaller(script: Script) -> list[Script]:
    found: list[Script] = []
    for index in reversed(range(len(script.statements))):
        rows = script.statements
        found.append(script.with_statements(rows[:index] + rows[index + 1 :]))
        made, _, expression = rows[index].line.partition(" = ")
        for name in ("x", *(f"v{n}" for n in range(index * 4))):
            if made.isidentifier() and f"{name}" in _words(expression):
                alias = replace(rows[index], line=f"{made} = {name}", setup=())
                rest = (*rows[:index], alias, *rows[index + 1 :])
                if rows[index].line != alias.line:
                    found.append(script.with_statements(rest))
    names = [w for w in _words(script.outputs) if w[0] in "vx"]
    if len(names) > 1:
        found += [replace(script, outputs=name) for name in names]
    return found


def _words(expression: str) -> list[str]:
    cleaned = "".join(c if c.isalnum() or c == "_" else " " for c in expression)
    return list(dict.fromkeys(cleaned.split()))


def _fails(script: Script, mode: Mode) -> Failure | None:
    try:
        return try_program(script, mode, Tally())
    except Exception:  # it names what was left out
        return None


def summary(tally: Tally) -> str:
    """Counts, as JSON."""
    return json.dumps(dict(sorted(tally.counts.items())))
