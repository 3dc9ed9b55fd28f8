"""A tuned plan overwrites what nobody else reads, and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from equality import Net, assert_same, draw, ops, randomise
from torch import nn

import repcompiler as rc

X = (draw((2, 4, 6, 5)),)
IN_PLACE = rc.Tuning(in_place=True)


def net(forward) -> nn.Module:
    """Two convs with norms, and an activation of each kind that the body may call."""
    return randomise(
        Net(
            forward,
            one=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
            two=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
            gelu=nn.GELU(approximate="tanh"),
            silu=nn.SiLU(),
        )
    )


def written(module: nn.Module) -> int:
    """Ops that write to their first argument, seen by its version."""
    count = 0

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            nonlocal count
            first = self.env.get(n.args[0]) if n.args else None
            tensor = isinstance(first, torch.Tensor) and n.op != "output"
            before = first._version if tensor else 0
            result = super().run_node(n)
            count += tensor and first._version > before
            return result

    with torch.no_grad():
        Watch(module, garbage_collect_values=False).run(*copy.deepcopy(X))
    return count


PRIVATE = {
    "GELU module": lambda n, x: n.gelu(n.one(x)),
    "GELU function": lambda n, x: F.gelu(n.one(x)),
    "module with a flag": lambda n, x: n.silu(n.one(x)),
    "function with a flag": lambda n, x: F.hardswish(n.one(x)),
    "relu": lambda n, x: torch.relu(n.one(x)),
    "sum, first": lambda n, x: n.two(F.max_pool2d(x, 1)) + torch.sin(x),
    "sum, second": lambda n, x: torch.sin(x) + n.two(x),
    "a module called twice": lambda n, x: n.silu(n.two(n.silu(n.one(x)))),
}
SEEN = {
    "an input": lambda n, x: n.gelu(x),
    "read again": lambda n, x: (lambda y: n.gelu(y) * y)(n.one(x)),
    "an output": lambda n, x: (lambda y: (n.gelu(y), y))(n.one(x)),
    "an output that is kept for the gradient": lambda n, x: n.gelu(torch.exp(x)),
    "a view": lambda n, x: n.gelu(x.flatten(1)),
    "twice in one sum": lambda n, x: (lambda y: torch.sin(y) + y)(n.one(x)),
    "another module call": lambda n, x: n.silu(n.one(x)) + n.silu(x),
    "smaller than the sum": lambda n, x: n.one(x[:1]) + torch.sin(x),
    "of another size": lambda n, x: n.two(x.mean((2, 3), keepdim=True)) + torch.sin(x),
}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", PRIVATE)
def test_what_is_private_is_overwritten(name: str, door: str) -> None:
    model = net(PRIVATE[name])
    result = rc.fuse(model, X, tuning=IN_PLACE, capture=door)
    assert result.report.equivalence.ok
    assert written(result.model) == 1 + ("twice" in name)
    assert written(rc.fuse(model, X, capture=door).model) == 0
    assert_same(model, result.model, [X, (draw((1, 4, 9, 7)),)])
    assert_same(model, pickle.loads(pickle.dumps(result.model)), [X])


@pytest.mark.parametrize("name", SEEN)
def test_what_somebody_sees_is_left(name: str) -> None:
    model = net(SEEN[name])
    result = rc.fuse(model, X, tuning=IN_PLACE)
    assert result.report.equivalence.ok
    assert written(result.model) == 0
    given = X[0].clone()
    assert_same(model, result.model, [X])
    assert torch.equal(given, X[0])


def test_gradients_are_those_of_the_original() -> None:
    model = net(lambda n, x: n.two(n.gelu(n.one(x))) + torch.sin(x))
    fused = rc.fuse(model, X, tuning=IN_PLACE).model
    assert written(fused) == 2
    grads = []
    for each in (model, fused):
        x = X[0].clone().requires_grad_()
        each(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


def test_fusing_again_changes_nothing() -> None:
    model = net(lambda n, x: n.two(n.gelu(n.one(x))) + torch.sin(x))
    fused = rc.fuse(model, X, tuning=IN_PLACE).model
    again = rc.fuse(fused, X)
    assert again.report.regions == ()
    assert ops(again.model) == ops(fused)
    assert_same(model, again.model, [X])


def test_without_inputs_no_sum_is_overwritten() -> None:
    model = net(lambda n, x: n.two(n.gelu(n.one(x))) + torch.sin(x))
    fused = rc.fuse(model, tuning=IN_PLACE).model
    assert written(fused) == 1
    assert_same(model, fused, [X])


def test_a_hooked_conv_keeps_its_output() -> None:
    seen: list[torch.Tensor] = []
    model = net(lambda n, x: n.gelu(n.two[0](torch.sin(x))))
    model.two[0].register_forward_hook(lambda m, args, out: seen.append(out))
    fused = rc.fuse(model, X, tuning=IN_PLACE).model
    seen.clear()
    fused(*X)
    expected = model(*X)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(F.gelu(seen[0], approximate="tanh"), expected)
