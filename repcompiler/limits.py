"""The sizes for which an exported graph is the model: where it took no other turn.

`torch.export` follows one path through the model's code. Where that code asks a size
(`if x.shape[2] > 6`, `range(len(x))`), the graph holds for inputs that answer alike,
and says nothing of the others. Its own guards say too much: they also hold what the
exporter assumed for itself, such as that no size is one. So the questions are recorded
as the code asks them, and become assertions at the head of the fused graph.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.sym_node import SymNode
from torch.utils._sympy.functions import FloorDiv

from repcompiler.errors import CaptureError

LIMIT = "limit"  # in `Node.meta`: an assertion that the graph cannot do without
# An expression with more is not worth its time: where sizes nest, as where each of
# several stages pads to its own multiple, the next takes the exporter several times as
# long. Of the models that stay open, few come to 200 parts; from 400 on it is minutes.
MOST_PARTS = 400
_TORCH = str(Path(torch.__file__).parent)
_CONVERSIONS = (f"{_TORCH}/__init__.py", f"{_TORCH}/fx/experimental/")
# Code that a model's author may have written as well; the rest is the exporter.
_MODELLED = (f"{_TORCH}/nn/", f"{_TORCH}/functional.py", f"{_TORCH}/_tensor.py")


@dataclass(frozen=True)
class Limits:
    """Conditions on the sizes of the graph's inputs.

    Attributes:
        ranks: for each input its number of axes; None for what is no tensor.
        values: what the inputs that are no tensors were, by their place.
        conditions: over symbols `s<input>_<axis>`, each true where the graph holds.
    """

    ranks: tuple[int | None, ...] = ()
    values: tuple[tuple[int, Any], ...] = ()
    conditions: tuple[Any, ...] = ()

    def hold(self, inputs: list[Any]) -> bool:
        """Whether the graph is the model on these inputs."""
        sizes: dict[Any, Any] = {}
        for index, (leaf, rank) in enumerate(zip(inputs, self.ranks)):
            if rank is None:
                continue
            if not isinstance(leaf, Tensor) or leaf.dim() != rank:
                return False
            sizes |= {_symbol(index, i): int(n) for i, n in enumerate(leaf.shape)}
        return all(bool(c.xreplace(sizes)) for c in self.conditions)


def _symbol(index: int, axis: int) -> Any:
    return sympy.Symbol(f"s{index}_{axis}", integer=True, nonnegative=True)


# ---- while the model is exported ---------------------------------------------------


def _has_outgrown(expression: Any) -> bool:
    """Whether an expression over the sizes has more than `MOST_PARTS` parts."""
    if not isinstance(expression, sympy.Basic):
        return False
    parts: Any = sympy.preorder_traversal(expression)
    return next(islice(parts, MOST_PARTS, None), None) is not None


@contextmanager
def recorded() -> Generator[list[tuple[Any, Any]], None, None]:
    """The expressions that the model's code asked for the value of, and the values.

    Raises:
        CaptureError: in the code that computes a size with more than `MOST_PARTS`.
    """
    asked: list[tuple[Any, Any]] = []
    begin = SymNode.__init__

    def initialise(self: Any, expr: Any, *args: Any, **kwargs: Any) -> None:
        if _has_outgrown(expr):
            raise CaptureError("its sizes are too long to compute with")
        begin(self, expr, *args, **kwargs)

    names = ("guard_bool", "guard_int", "guard_float")
    originals = {name: getattr(SymNode, name) for name in names}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def guard(self: Any, *args: Any, **kwargs: Any) -> Any:
            expression = self.expr
            value = original(self, *args, **kwargs)
            if name != "guard_bool" or _asked_by_model(sys._getframe(1)):
                asked.append((expression, value))
            return value

        return guard

    for name, original in originals.items():
        setattr(SymNode, name, wrap(name, original))
    SymNode.__init__ = initialise
    try:
        yield asked
    finally:
        SymNode.__init__ = begin
        for name, original in originals.items():
            setattr(SymNode, name, original)


def _asked_by_model(frame: FrameType | None) -> bool:
    """Whether code that is no part of the exporter turned a size into a truth value.

    It does so through `SymBool`; C++ code asks for its own sake. A number, whoever asks
    for it, is one that the graph then holds.
    """
    converted = False
    while frame is not None and frame.f_code.co_filename.startswith(_CONVERSIONS):
        converted = converted or frame.f_code.co_filename == _CONVERSIONS[0]
        frame = frame.f_back
    if frame is None or not converted:
        return False
    file = frame.f_code.co_filename
    return not file.startswith(_TORCH) or file.startswith(_MODELLED)


def limits_of(module: GraphModule, asked: list[tuple[Any, Any]]) -> Limits:
    """The limits of an exported graph, over the sizes of its inputs.

    A size that was not left open stays what it is, and sizes that the exporter took for
    equal stay equal. One that it fixed because an op takes no other, the op will tell.
    """
    known: dict[Any, Any] = {}  # by the symbol that the exporter began with
    example: dict[Any, Any] = {}
    ranks: list[int | None] = []
    values: list[tuple[int, Any]] = []
    conditions: list[Any] = []
    environment: Any = None
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(nodes):
        value: Any = node.meta.get("val")
        ranks.append(value.dim() if isinstance(value, Tensor) else None)
        if isinstance(value, (type(None), bool, int, float, str)):
            values.append((index, value))
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            here = _symbol(index, axis)
            if not isinstance(size, SymInt):
                conditions.append(sympy.Eq(here, int(size)))
                continue
            environment = size.node.shape_env
            example[here] = size.node.hint
            symbols: list[Any] = [size.node._expr, size.node.expr]
            for expression in dict.fromkeys(symbols):
                if expression in known:
                    conditions.append(sympy.Eq(here, known[expression]))
                elif expression.is_Symbol:
                    known[expression] = here
    for expression, value in (*asked, *_lengths(module)):
        found = sympy.sympify(expression).xreplace(known)
        if not found.free_symbols <= {*known.values()} and environment is not None:
            found = environment.replace(found).xreplace(known)
        if found.free_symbols <= {*known.values()}:
            conditions += _states(found, value, example)
        # Else it turns on data, which a size cannot tell of.
    held = dict.fromkeys(c for c in conditions if c is not sympy.true)
    return Limits(tuple(ranks), tuple(values), tuple(held))


def limits_of_program(
    program: torch.export.ExportedProgram, module: GraphModule
) -> Limits:
    """Those of a program that was exported before: its fixed sizes and its ranges."""
    ranges: list[tuple[Any, Any]] = []
    for symbol, found in program.range_constraints.items():
        if found.lower > 2:  # where the exporter begins; its graph takes one too
            ranges.append((sympy.Ge(symbol, found.lower), True))
        if found.upper.is_Integer:
            ranges.append((sympy.Le(symbol, found.upper), True))
    return limits_of(module, ranges)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(int(size))


def _lengths(module: GraphModule) -> Generator[tuple[Any, Any], None, None]:
    """How many blocks each split has, where sizes tell: the graph has as many."""
    for node in module.graph.nodes:
        if node.target not in (torch.ops.aten.split.Tensor, torch.ops.aten.unbind.int):
            continue
        value, *more = node.args
        if node.target is torch.ops.aten.unbind.int:
            more = [1, *more]
        block, axis = (*more, 0)[:2]
        step = _expression(block.meta["val"] if isinstance(block, Node) else block)
        whole = _expression(value.meta["val"].shape[axis])
        yield FloorDiv(whole + step - 1, step), len(node.meta["val"])


def _states(expression: Any, value: Any, example: dict[Any, Any]) -> list[Any]:
    """That the expression has the value; of an odd one, that its sizes are the same."""
    if not all(_is_plain(part) for part in sympy.preorder_traversal(expression)):
        symbols = sorted(expression.free_symbols, key=str)
        return [sympy.Eq(symbol, example[symbol]) for symbol in symbols]
    if isinstance(value, bool):
        return [expression if value else sympy.Not(expression)]
    return [sympy.Eq(expression, value)]


def _is_plain(part: Any) -> bool:
    known = (
        part.is_Symbol or part.is_Integer or type(part).__name__ in (*_BINARY, "Not")
    )
    return bool(known) or part in (sympy.true, sympy.false)


# ---- in the fused graph ------------------------------------------------------------


def assert_limits(module: GraphModule, limits: Limits) -> None:
    """Begin the graph with assertions: an error, where it could be a wrong result."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if not inputs or len(inputs) != len(limits.ranks):
        return
    with module.graph.inserting_before(inputs[-1].next):
        writer = _Writer(module.graph, inputs)
        for node, rank in zip(inputs, limits.ranks):
            if rank is not None:
                found = module.graph.call_method("dim", (node,))
                same = module.graph.call_function(operator.eq, (found, rank))
                writer.claim(same, f"{node.name} has {rank} axes")
        for index, value in limits.values:
            same = operator.is_ if value is None else operator.eq
            found = module.graph.call_function(same, (inputs[index], value))
            writer.claim(found, f"{inputs[index].name} is {value!r}")
        for condition in limits.conditions:
            writer.claim(writer.value(condition), writer.words(condition))
    module.recompile()


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictLessThan": operator.lt,
    "LessThan": operator.le,
    "StrictGreaterThan": operator.gt,
    "GreaterThan": operator.ge,
    "And": operator.and_,
    "Or": operator.or_,
}


class _Writer:
    """Writes conditions as nodes."""

    def __init__(self, graph: Graph, inputs: list[Node]) -> None:
        self.graph = graph
        self.sizes = {
            f"s{index}_{axis}": (node, axis)
            for index, node in enumerate(inputs)
            for axis in range(16)
        }
        self.written: dict[Any, Any] = {}

    def claim(self, holds: Any, words: str) -> None:
        """An assertion of what `holds`."""
        message = (
            f"the graph was captured for inputs where {words}: on others the model "
            "may compute something else; fuse it with an example of those"
        )
        node = self.graph.call_function(torch._assert, (holds, message))
        node.meta[LIMIT] = True

    def words(self, condition: Any) -> str:
        """The condition for people."""
        names = {
            sympy.Symbol(k): sympy.Symbol(f"{node.name}.shape[{axis}]")
            for k, (node, axis) in self.sizes.items()
        }
        plain = {s: names[sympy.Symbol(str(s))] for s in condition.free_symbols}
        return str(condition.xreplace(plain)).replace("Eq(", "equal(")

    def value(self, expression: Any) -> Any:
        """A node, or a plain number, with the expression's value."""
        if expression not in self.written:
            self.written[expression] = self._value(expression)
        return self.written[expression]

    def _value(self, expression: Any) -> Any:
        if expression.is_Symbol:
            node, axis = self.sizes[str(expression)]
            return self.graph.call_method("size", (node, axis))
        if expression.is_Integer:
            return int(expression)
        kind, args = type(expression).__name__, [*map(self.value, expression.args)]
        if kind == "Not":
            return self.graph.call_function(operator.not_, (args[0],))
        result = args[0]
        for arg in args[1:]:
            result = self.graph.call_function(_BINARY[kind], (result, arg))
        return result
