"""What depends on parameters alone, computed once.

Two values of it are kept: one in float64, which kernels are rounded from, and one in
the model's own dtypes. What jumps (a comparison, a rounding, an index made of numbers)
is taken from the second, since another rounding may be another turn:
`(place * n).long()` has other rows in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree

from repcompiler.aliases import is_foreign, is_view
from repcompiler.facts import fetch, op_name
from repcompiler.hooks import is_hooked
from repcompiler.mutation import is_write


@dataclass(frozen=True)
class _Known:
    """A constant: in float64, as the model computes it, and whether casts reach it.

    No cast of the model reaches what no parameter is in.
    """

    exact: Any
    own: Any
    follows: bool


def fold_constants(
    module: GraphModule,
    frozen: frozenset[str],
    mutated: frozenset[Node],
    baked: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Replace values that depend on parameters alone, in place.

    Returns their float64 values by name, and the names of those that no cast of the
    model reaches.
    """
    known: dict[Node, _Known] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = fetch(module, str(node.target))
            if isinstance(value, Tensor) and str(node.target) not in frozen:
                follows = str(node.target) not in baked
                value = value.detach()
                known[node] = _Known(_wide(value) if follows else value, value, follows)
        elif _foldable(node, known, module) and node not in mutated:
            found = _evaluate(node, known, module)
            if found is not None:
                known[node] = found
    _leave_complex(known, module)
    exact: dict[str, Tensor] = {}
    made: set[str] = set()
    for node, value in known.items():
        if node.op != "get_attr" and isinstance(value.exact, Tensor):
            if any(user not in known for user in node.users):
                name = _replace(module, node, known, exact)
                made.update([] if value.follows else [name])
    return exact, frozenset(made)


# ---- what may be folded --------------------------------------------------------------


def _foldable(node: Node, known: Mapping[Node, Any], module: GraphModule) -> bool:
    inputs = node.all_input_nodes
    if any(i not in known for i in inputs):
        return False
    if node.op == "call_module":
        leaf = module.get_submodule(str(node.target))
        if isinstance(leaf, ParametrizationList):  # a weight that torch.nn.utils makes
            return not is_hooked(leaf)
        return bool(inputs) and _is_function(leaf)
    if node.op not in ("call_function", "call_method") or is_write(node):
        return False
    return bool(inputs) and node.kwargs.get("max_norm") is None


def _is_function(leaf: nn.Module) -> bool:
    """Whether it is torch's own module, and a call does nothing but compute.

    No module is in train mode, in which some are random (see `capture.require_eval`).
    """
    parts = list(leaf.modules())
    own = all(type(part).__module__.startswith("torch.nn.modules.") for part in parts)
    writes = any(getattr(part, "max_norm", None) is not None for part in parts)
    return own and not writes and not any(map(is_hooked, parts))


def _leave_complex(known: dict[Node, _Known], module: GraphModule) -> None:
    """Forget complex values that are made of real ones.

    `Module.to(torch.float64)` would drop the imaginary part of such a buffer, where the
    model has none.
    """
    for node in reversed(list(known)):
        value = known[node].exact
        if isinstance(value, Tensor) and value.is_complex() and node.op != "get_attr":
            needed = any(user not in known for user in node.users)
            if needed and not any(r.is_complex() for r in _roots(node, module)):
                del known[node]


# ---- their values ------------------------------------------------------------------

# Where the operands move a little, so does what these give; of any other op that is not
# known. Of `max` and its like that holds for the values, not for the indices.
_CONTINUOUS = frozenset(
    "add sub rsub subtract mul multiply div divide truediv true_divide neg negative "
    "pos positive pow square sqrt rsqrt reciprocal exp exp2 expm1 log log1p log2 "
    "log10 sin cos tan tanh sinh cosh asin acos atan erf erfc sigmoid logsigmoid "
    "softmax log_softmax logsumexp softplus softsign relu relu6 leaky_relu prelu elu "
    "celu selu gelu silu mish hardtanh hardsigmoid hardswish clamp clamp_min "
    "clamp_max clip abs absolute maximum minimum max min amax amin sum mean prod "
    "cumsum cumprod var std var_mean std_mean norm vector_norm linalg_vector_norm "
    "normalize weight_norm _weight_norm _weight_norm_interface cosine_similarity lerp "
    "addcmul addcdiv where masked_fill deg2rad rad2deg matmul mm bmm addmm addmv "
    "addbmm baddbmm einsum dot vdot mv outer ger inner tensordot kron linear bilinear "
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d "
    "conv_transpose3d batch_norm layer_norm group_norm instance_norm "
    "native_batch_norm native_layer_norm native_group_norm matrix_exp cat concat "
    "concatenate stack hstack vstack dstack pad constant_pad_nd repeat tile "
    "repeat_interleave flip roll rot90 index_select index gather take embedding tril "
    "triu diag diag_embed diagonal fold unfold interpolate avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "max_pool1d max_pool2d max_pool3d clone zeros_like ones_like full_like new_zeros "
    "new_ones new_full _to_copy complex polar fft ifft rfft irfft fft2 ifft2 rfft2 "
    "irfft2 fftn ifftn rfftn irfftn fftshift ifftshift lift_fresh "
    "lift_fresh_copy".split()
)
_STEP_MODULES = (nn.Hardshrink, nn.Threshold)


def _evaluate(
    node: Node, known: Mapping[Node, _Known], module: GraphModule
) -> _Known | None:
    """The value of a node, or None where it does not run, or is random."""
    inputs = [known[i] for i in node.all_input_nodes]
    follows = node.op == "call_module" or any(i.follows for i in inputs)
    before = _generators()
    own = _compute(node, {n: known[n].own for n in node.all_input_nodes}, module)
    random = not all(map(torch.equal, before, _generators()))
    if random:
        _restore(before)
    if own is None or random or not _is_plain(own):
        return None
    if not follows:
        return _Known(own, own, follows)
    exact = None
    if not _jumps(node, own, [i.own for i in inputs], module):
        given = {n: known[n].exact for n in node.all_input_nodes}
        exact = _compute(node, given, module, nn.Module.double)
    # Where float64 does not mix with what no cast reaches, or bits are looked at as
    # another dtype, the model's own has to do.
    if exact is None or _shapes(exact) != _shapes(own):
        exact = _wide(own)
    return _Known(exact, own, follows)


def _jumps(node: Node, own: Any, inputs: list[Any], module: GraphModule) -> bool:
    """Whether another rounding of the operands may give quite another value."""
    if any(map(_is_real, inputs)) and not all(map(_is_real, _numbers(own))):
        return True  # indices, truth values, whole numbers
    if any(not t.is_complex() and t.element_size() < 2 for t in _tensors(own)):
        return True  # eight bits hold no small change
    if node.op == "call_module":
        parts = list(module.get_submodule(str(node.target)).modules())
        homes = ("torch.nn.modules.", "torch.nn.utils.")
        known = all(type(part).__module__.startswith(homes) for part in parts)
        return not known or any(isinstance(part, _STEP_MODULES) for part in parts)
    if is_foreign(node) or node.kwargs.get("rounding_mode"):
        return True
    return not (op_name(node) in _CONTINUOUS or is_view(op_name(node)))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _numbers(value: Any) -> list[Any]:
    kinds = (Tensor, bool, int, float, complex)
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, kinds)]


def _is_real(value: Any) -> bool:
    """Whether it holds numbers that rounding can move."""
    return any(
        leaf.is_floating_point() or leaf.is_complex()
        if isinstance(leaf, Tensor)
        else isinstance(leaf, (float, complex))
        for leaf in pytree.tree_leaves(value)
    )


def _is_plain(value: Any) -> bool:
    """Whether its tensors are of numbers in rows, which buffers hold."""
    tensors = _tensors(value)
    return all(t.layout is torch.strided and not t.is_quantized for t in tensors)


def _shapes(value: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in _tensors(value)]


def _compute(
    node: Node,
    values: Mapping[Node, Any],
    module: GraphModule,
    convert: Callable[[nn.Module], nn.Module] | None = None,
) -> Any:
    try:
        args: Any = map_arg(node.args, values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, values.__getitem__)
        with torch.no_grad():
            if node.op == "call_module":
                leaf = copy.deepcopy(module.get_submodule(str(node.target)))
                return (leaf if convert is None else convert(leaf))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
    except Exception:  # left in the graph, where it runs as before
        return None


def _wide(value: Any) -> Any:
    """The same in float64, or complex of float64."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if leaf.is_floating_point() else leaf

    return pytree.tree_map(widen, value)


def _generators() -> list[Tensor]:
    """What torch draws its random numbers from, as it is now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


# ---- in the graph --------------------------------------------------------------------

# Folded weights of these stay trainable. Elsewhere (an attention's bias, say) a tensor
# that asks for a gradient would keep torch from its fastest kernel.
_WEIGHTED = frozenset(
    "conv1d conv2d conv3d linear conv_transpose1d conv_transpose2d conv_transpose3d "
    "batch_norm layer_norm mul add".split()
)


def _replace(
    module: GraphModule,
    node: Node,
    known: Mapping[Node, _Known],
    exact: dict[str, Tensor],
) -> str:
    """Put a constant of the dtype that the model computes for the node; its name."""
    name = f"folded_{len(exact)}"
    while hasattr(module, name):
        name += "_"
    value, own = known[node].exact, known[node].own
    roots = _roots(node, module)
    trains = any(isinstance(r, nn.Parameter) and r.requires_grad for r in roots)
    trains = trains and any(op_name(user) in _WEIGHTED for user in node.users)
    stored = value.to(own.dtype, copy=True).contiguous()
    if trains and stored.is_floating_point():
        module.register_parameter(name, nn.Parameter(stored))
    else:
        module.register_buffer(name, stored)
    exact[name] = value
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta = copy.copy(node.meta)
    for user in list(node.users):
        if user not in known:
            user.replace_input_with(node, constant)
    return name


def _roots(node: Node, module: GraphModule) -> Iterator[Tensor]:
    """The tensors of the model that a constant was computed from."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            yield fetch(module, str(current.target))
        elif current.op == "call_module":
            yield from module.get_submodule(str(current.target)).parameters()
        fresh = [i for i in current.all_input_nodes if i not in seen]
        seen.update(fresh)
        stack.extend(fresh)
