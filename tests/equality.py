"""Fuse a model and hold the result to the right value: the original's, in float64.

Nothing here reads the compiler's own verdict to decide whether two outputs are equal.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

import repcompiler as rc

Shape = tuple[int, ...]

# Two float64 evaluations of one affine function differ by a few hundred roundings.
LIMIT = 1e-10


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm statistics as trained nets have them, zero biases and scales drawn anew."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(noise * std + mean)

    for module in model.modules():
        if isinstance(module, _NormBase) or hasattr(module, "running_var"):
            if getattr(module, "running_mean", None) is not None:
                normal(module.running_mean, 0.0, 1.0)
                spread = torch.rand(module.running_var.shape, generator=generator)
                module.running_var.data.copy_(spread * 1.5 + 0.5)
            if getattr(module, "weight", None) is not None:
                normal(module.weight, 1.0, 0.3)
                normal(module.bias, 0.0, 0.3)
        elif isinstance(getattr(module, "bias", None), nn.Parameter):
            normal(module.bias, 0.0, 0.3)
    return model.double().eval()


def draw(shape: Shape, seed: int = 1) -> Tensor:
    """Noise in float64, a tensor that is the same every time."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, flat."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def distance(found: Any, expected: Any) -> float:
    """Largest relative distance of the tensors in two outputs; same structure."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    worst = 0.0
    for a, b in zip(tensors(found), tensors(expected)):
        assert a.shape == b.shape, (a.shape, b.shape)
        error = (a.double() - b.double()).abs().max()
        worst = max(worst, float(error / b.double().abs().max().clamp_min(1e-30)))
    return worst


def assert_same(
    original: nn.Module, fused: nn.Module, batches: Iterable[Sequence[Any]]
) -> None:
    """Both give the same values on every batch."""
    for batch in batches:
        with torch.no_grad():
            expected = original(*copy.deepcopy(tuple(batch)))
            found = fused(*copy.deepcopy(tuple(batch)))
        shapes = [tuple(leaf.shape) for leaf in tensors(tuple(batch))]
        assert distance(found, expected) < LIMIT, f"differs on inputs of {shapes}"


def images(channels: int, *sizes: tuple[int, int]) -> list[Shape]:
    """Batch 1 and 3, even and odd, larger and smaller than a kernel."""
    chosen = sizes or ((8, 8), (7, 9), (6, 5), (2, 3), (1, 1))
    return [(1 if i % 2 == 0 else 3, channels, *s) for i, s in enumerate(chosen)]


def check(
    model: nn.Module,
    shapes: Sequence[Shape],
    *,
    blind: bool = True,
    door: str = "auto",
) -> rc.FuseResult:
    """Randomise, fuse on the first shape, compare on all; then without any inputs."""
    randomise(model)
    batches = [(draw(shape),) for shape in shapes]
    result = rc.fuse(model, batches[0], capture=door)
    assert_same(model, result.model, batches)
    assert result.report.equivalence.ok, result.report.equivalence
    if blind:
        assert_same(model, rc.fuse(model).model, batches)
    return result


def ops(model: nn.Module) -> Counter[str]:
    """Nodes by kind: `Conv2d`, `BatchNorm2d`, `Linear`, `add`, …; views count too.

    Assertions are none, nor is what only they read.
    """
    assert isinstance(model, fx.GraphModule)
    found: Counter[str] = Counter()
    asserted: set[fx.Node] = set()
    for node in reversed(model.graph.nodes):
        told = bool(node.users) and asserted.issuperset(node.users)
        if told or node.target is torch._assert:
            asserted.add(node)
    for node in model.graph.nodes:
        if node in asserted:
            continue
        if node.op == "call_module":
            found[type(model.get_submodule(str(node.target))).__name__] += 1
        elif node.op in ("call_function", "call_method"):
            found[getattr(node.target, "__name__", str(node.target))] += 1
    return found


def norms(model: nn.Module) -> int:
    """Norms left that may be affine, in any spelling."""
    kinds = ("batch_norm", "BatchNorm", "instance_norm", "InstanceNorm")
    return sum(n for name, n in ops(model).items() if any(k in name for k in kinds))


def convs(model: nn.Module) -> int:
    """Convs left, in any spelling; transposed ones are not among them."""
    return sum(
        n
        for name, n in ops(model).items()
        if name.lower().startswith("conv") and "transpose" not in name.lower()
    )


def reasons(result: rc.FuseResult) -> set[str]:
    """The codes of everything that was kept."""
    return {kept.reason for kept in result.report.kept}


def reason_of(result: rc.FuseResult, name: str) -> str:
    """The code of the op that was kept at `name`."""
    found = {kept.name: kept.reason for kept in result.report.kept}
    assert name in found, found
    return found[name]


class Net(nn.Module):
    """Named parts, and a forward given as a function of self and the inputs."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        """What was given."""
        return self.body(self, x)


def conv(
    inputs: int = 4, outputs: int = 4, kernel: int = 3, **settings: Any
) -> nn.Conv2d:
    """A same-sized conv."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


class Branches(nn.Module):
    """Conv branches, each with its norm, and a norm of the input; no block at hand."""

    def __init__(self, *branches: nn.Conv2d, skip: bool = True) -> None:
        super().__init__()
        width = branches[0].out_channels
        self.skip = nn.BatchNorm2d(width) if skip else None
        self.branches = nn.ModuleList(
            nn.Sequential(branch, nn.BatchNorm2d(width)) for branch in branches
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of all branches."""
        total: Any = 0 if self.skip is None else self.skip(x)
        for branch in self.branches:
            total = total + branch(x)
        return total
