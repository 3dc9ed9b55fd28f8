"""The first door: `fx` tracing that sees in-place writes and leaves the model alone.

`fx`'s own proxies turn ``x += y`` into ``x = x + y``, which other names of x then miss,
and refuse ``x[i] = y``. Here both are nodes, for `mutation` to judge. What the model's
code stores on its modules while it is traced is taken back.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import product
from types import FrameType
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx import GraphModule
from torch.fx.proxy import Attribute
from torch.nn.utils import parametrize

from repcompiler.errors import CaptureError, first_line
from repcompiler.held import Held
from repcompiler.hooks import is_hooked
from repcompiler.limits import LIMIT
from repcompiler.mutation import written_names
from repcompiler.partial import op_name


def _asserts(frame: FrameType) -> bool:
    """Whether the instruction at hand jumps over the raise of an `assert`."""
    ahead = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti]
    ahead = [i for i in ahead[:8] if i.opname not in ("CACHE", "TO_BOOL", "NOT_TAKEN")]
    if len(ahead) < 2 or "JUMP" not in ahead[0].opname:
        return False
    raises = ("LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT")
    return ahead[0].opname.endswith("IF_TRUE") and ahead[1].opname in raises


class _Proxy(fx.Proxy):
    """A proxy whose in-place operators and item assignments are nodes.

    Its attributes are such proxies too: `x.mT` is a view that may be written to.
    """

    def __getattr__(self, k: str) -> Attribute:
        return _Attribute(self, k)

    def __bool__(self) -> bool:
        """True for an `assert`, which goes anyway; other decisions are an error."""
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if caller is not None and _asserts(caller):
            return True
        return super().__bool__()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy(
            "call_function", operator.setitem, (self, index, value), {}
        )


class _Attribute(Attribute, _Proxy):
    """An attribute of a proxy, or its method about to be called."""


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split():
    setattr(_Proxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Leaves: torch.nn's own modules, and those whose call does more than forward."""

    trace_asserts = True

    def __init__(self, *, proxy_buffers: bool) -> None:
        super().__init__()
        self.proxy_buffers = proxy_buffers

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Every value is one of our proxies."""
        return _Proxy(node, self)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace, with a dictionary of tensors in place of a search for each of them."""
        self._names: dict[int, str] = {}
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._names.setdefault(id(tensor), name)
        self.own_names = frozenset(self._names.values())
        return super().trace(root, concrete_args)

    def create_arg(self, a: Any) -> Any:
        """A tensor of the root as a `get_attr` node; an ordered dict as one that is.

        A node's arguments hold plain dicts only, and a result would change its type.
        """
        name = self._names.get(id(a)) if isinstance(a, Tensor) else None
        if name is not None:
            return self.create_node("get_attr", name, (), {})
        if type(a) is OrderedDict:
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Parameters are proxies; other attributes are what they are."""
        name = self._names.get(id(attr_val))
        if name is None or not self._is_proxied(attr_val):
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _is_proxied(self, tensor: Tensor) -> bool:
        """Parameters are; so are floating buffers, until one decides control flow."""
        floating = self.proxy_buffers and tensor.is_floating_point()
        return isinstance(tensor, nn.Parameter) or floating

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """The blocks of a split whose number its arguments tell."""
        count = _number_of_blocks(obj.node)
        if count is None:
            return super().iter(obj)
        blocks = cast(Any, obj)
        return (blocks[index] for index in range(count))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if parametrize.is_parametrized(m):
            return False
        return is_hooked(m) or super().is_leaf_module(m, module_qualified_name)


def _number_of_blocks(node: fx.Node) -> int | None:
    if op_name(node) not in ("chunk", "split", "split_with_sizes"):
        return None
    named = ("split_size_or_sections", "split_size", "split_sizes", "chunks")
    given = [node.args[1]] if len(node.args) > 1 else []
    given += [node.kwargs[name] for name in named if name in node.kwargs]
    if not given or isinstance(given[0], fx.Node):
        return None
    if isinstance(given[0], (list, tuple)):
        return len(given[0])
    return int(cast(int, given[0])) if op_name(node) == "chunk" else None


def symbolic(model: nn.Module, inputs: tuple[Any, ...] | None) -> GraphModule:
    """Trace with proxies; if that fails, with default arguments bound, then with
    buffers as the plain tensors that they are now.

    An example that is None, a flag or a word is bound at once, and an argument that is
    left at None: code that asks whether it is None would be told that a proxy is not.
    """
    if is_hooked(model):
        raise CaptureError("the model itself has hooks, which a trace would lose")
    errors: list[BaseException] = []
    defaults = _defaults(model, inputs)
    unset = {name: value for name, value in defaults.items() if value is None}
    fixed = {**unset, **_constants(model, inputs)}
    choices = [fixed or None]
    if bound := {**defaults, **_constants(model, inputs, (int, float))}:
        choices.append({**bound, **fixed})
    for proxy_buffers, arguments in product((True, False), choices):
        found = Held(model)
        try:
            tracer = _Tracer(proxy_buffers=proxy_buffers)
            graph = tracer.trace(model, concrete_args=arguments)
            if found.buffer_written():
                raise CaptureError("forward writes to a buffer")
            if arguments:
                _hold_bound(graph, arguments)
            traced = GraphModule(tracer.root, graph, type(model).__name__)
            made = written_names(traced) - tracer.own_names
            if any(name.startswith("_tensor_constant") for name in made):
                raise CaptureError("forward writes to a tensor that it makes itself")
            return traced
        except Exception as error:  # the model's own code runs here
            errors.append(error)
        finally:
            found.restore()
    raise CaptureError(first_line(errors[0]))


def _hold_bound(graph: fx.Graph, bound: dict[str, Any]) -> None:
    """Give bound arguments their own names again, and keep fx's assertions of them."""
    for node in graph.nodes:
        name = str(node.target).rpartition("_")[0]
        if node.op == "placeholder" and name in bound:
            node.target = name
            asserts = [u for user in node.users for u in (user, *user.users)]
            for user in asserts:
                if op_name(user) in ("_assert", "_assert_is_none"):
                    user.meta[LIMIT] = True


_FIXED = (type(None), bool, str)


def _constants(
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    kinds: tuple[type, ...] = _FIXED,
) -> dict[str, Any]:
    """The example inputs of these types, by the name of their parameter."""
    names = inspect.signature(model.forward).parameters
    given = zip(names, inputs or ())
    return {name: value for name, value in given if isinstance(value, kinds)}


def _defaults(model: nn.Module, inputs: tuple[Any, ...] | None) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    given = len(inputs) if inputs is not None else 0
    return {
        p.name: p.default
        for index, p in enumerate(parameters)
        if index >= given
        and p.default is not inspect.Parameter.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
