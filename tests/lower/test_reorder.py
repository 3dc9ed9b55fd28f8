"""Channels change their order only where nobody outside sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equality import Net, assert_same, draw, randomise
from torch import Tensor, nn

import repcompiler as rc
from repcompiler import forms

TOLD = rc.Tuning(forms={"split": "concatenated"})


def net(forward: Callable[[nn.Module, Tensor], object], **parts: nn.Module) -> Net:
    """A net that begins with a depthwise conv of three outputs a channel."""
    split = nn.Conv2d(4, 12, 3, padding=1, groups=4)
    return randomise(Net(forward, split=split, **parts))


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(mean))))


def residual(n: nn.Module, x: Tensor) -> Tensor:
    y = F.gelu(n.split(x))
    return n.dense(F.relu(n.depthwise(y) + y * 2) + n.wide(x))


FREE = {
    "pointwise": net(
        lambda n, x: n.dense(F.relu(n.split(x))), dense=nn.Conv2d(12, 5, 1)
    ),
    "dense, behind an activation": net(
        lambda n, x: n.dense(F.silu(n.split(x))), dense=nn.Conv2d(12, 5, 3, stride=2)
    ),
    "two readers": net(
        lambda n, x: (n.one(y := F.relu(n.split(x))), n.two(y)),
        one=nn.Conv2d(12, 5, 1),
        two=nn.Conv2d(12, 3, 3),
    ),
    "a gate, a pool and a head": net(
        lambda n, x: n.head(n.pool(F.gelu(n.gate(F.relu(n.split(x))))).flatten(1)),
        gate=Gate(),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(12, 7),
    ),
    "a gate, a pool and a head of modules": net(
        lambda n, x: n.head(n.flat(n.pool(n.gate(n.split(x))))),
        gate=Gate(),
        pool=nn.AdaptiveAvgPool2d((1, 1)),
        flat=nn.Flatten(),
        head=nn.Linear(12, 7),
    ),
    "a pool and a head of functions": net(
        lambda n, x: n.head(
            torch.flatten(F.adaptive_avg_pool2d(n.split(x), 1), start_dim=1)
        ),
        head=nn.Linear(12, 7),
    ),
    "a mean that keeps its axes": net(
        lambda n, x: n.head(n.split(x).mean((2, 3), keepdim=True).flatten(1)),
        head=nn.Linear(12, 7),
    ),
    "a mean and a head": net(
        lambda n, x: n.head(F.relu(n.split(x)).mean((-2, -1))), head=nn.Linear(12, 7)
    ),
    "a sum with other layers": net(
        residual,
        depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        wide=nn.Conv2d(4, 12, 1),
        dense=nn.Conv2d(12, 6, 1, bias=False),
    ),
}
KEPT = {
    "returned": net(lambda n, x: F.relu(n.split(x))),
    "returned as well": net(
        lambda n, x: ((y := F.relu(n.split(x))), n.dense(y)), dense=nn.Conv2d(12, 5, 1)
    ),
    "read in groups": net(
        lambda n, x: n.two(F.relu(n.split(x))), two=nn.Conv2d(12, 4, 1, groups=2)
    ),
    "a softmax": net(
        lambda n, x: n.dense(F.relu(n.split(x)).softmax(1)), dense=nn.Conv2d(12, 5, 1)
    ),
    "a norm of all channels": net(
        lambda n, x: n.dense(n.norm(F.relu(n.split(x)))),
        norm=nn.GroupNorm(3, 12),
        dense=nn.Conv2d(12, 5, 1),
    ),
    "a mean over channels": net(
        lambda n, x: n.dense((y := F.relu(n.split(x))) * y.mean(1, keepdim=True)),
        dense=nn.Conv2d(12, 5, 1),
    ),
    "a slice": net(
        lambda n, x: n.dense(F.relu(n.split(x))[:, 2:]), dense=nn.Conv2d(10, 5, 1)
    ),
    "a concat": net(
        lambda n, x: n.dense(torch.cat([F.relu(n.split(x)), x], 1)),
        dense=nn.Conv2d(16, 5, 1),
    ),
    "a sum with the input": net(
        lambda n, x: n.dense(F.relu(n.split(x)) + x[:, :1]), dense=nn.Conv2d(12, 5, 1)
    ),
    "a reader that is called twice": net(
        lambda n, x: n.same(F.relu(n.same(F.relu(n.split(x))))),
        same=nn.Conv2d(12, 12, 1),
    ),
    "called twice": net(
        lambda n, x: n.dense(F.relu(n.split(x))) + n.dense(F.relu(n.split(x + 1))),
        dense=nn.Conv2d(12, 5, 1),
    ),
    "flattened with places": net(
        lambda n, x: n.head(F.relu(n.split(x)).flatten(1)), head=nn.Linear(12 * 63, 5)
    ),
    "flattened with places, by a module": net(
        lambda n, x: n.head(n.flat(F.relu(n.split(x)))),
        flat=nn.Flatten(),
        head=nn.Linear(12 * 63, 5),
    ),
    "pooled to more than one place": net(
        lambda n, x: n.head(n.flat(n.pool(n.split(x)))),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        head=nn.Linear(12 * 4, 5),
    ),
    "flattened together with the batch": net(
        lambda n, x: n.flat(n.pool(n.split(x))).reshape(-1, 12) @ n.head.weight,
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(0),
        head=nn.Linear(5, 12),
    ),
    "a mean of one axis": net(
        lambda n, x: n.head(n.split(x).mean(3, keepdim=True).flatten(1)),
        head=nn.Linear(12 * 9, 5),
    ),
    "a linear layer along another axis": net(
        lambda n, x: n.head(F.relu(n.split(x))), head=nn.Linear(7, 12)
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_the_order_is_free(name: str) -> None:
    model, x = FREE[name], (draw((2, 4, 9, 7)),)
    result = rc.fuse(model, x, tuning=TOLD)
    assert result.report.equivalence.verdict == "equal"
    assert result.report.equivalence.exactness < 1e-12
    assert isinstance(result.model.get_submodule("split"), nn.ModuleList)
    assert_same(model, result.model, [x, (draw((1, 4, 9, 7)),)])


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_layers_that_took_norms_in(door: str) -> None:
    body = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(12),
        nn.GELU(),
        nn.Conv2d(12, 5, 1),
        nn.BatchNorm2d(5),
    )
    model, x = randomise(body), (draw((2, 4, 9, 7)),)
    tuning = rc.Tuning(forms={"0": "concatenated"})
    result = rc.fuse(model, x, tuning=tuning, capture=door)
    assert result.report.equivalence.verdict == "equal"
    assert isinstance(result.model.get_submodule("0"), nn.ModuleList)
    assert_same(model, result.model, [x])


@pytest.mark.parametrize("name", KEPT)
def test_the_order_is_kept(name: str) -> None:
    model, x = KEPT[name], (draw((2, 4, 9, 7)),)
    result = rc.fuse(model, x, tuning=TOLD)
    assert isinstance(result.model.get_submodule("split"), nn.Conv2d)
    assert_same(model, result.model, [x])


def test_tied_layers_keep_their_order() -> None:
    model = net(
        lambda n, x: n.one(F.relu(n.split(x))) + n.two(n.wide(x)),
        one=nn.Conv2d(12, 5, 1),
        two=nn.Conv2d(12, 5, 1),
        wide=nn.Conv2d(4, 12, 1),
    )
    model.two.weight = model.one.weight
    result = rc.fuse(model, (draw((2, 4, 9, 7)),), tuning=TOLD)
    assert_same(model, result.model, [(draw((2, 4, 9, 7)),)])
    held = dict(result.model.named_modules())
    if "one" in held and "two" in held:
        assert isinstance(held["split"], nn.Conv2d)


def test_certificates_keep_the_order() -> None:
    model, x = FREE["pointwise"], (draw((2, 4, 9, 7)),)
    result = rc.fuse(model, x, tuning=TOLD, certify=True)
    assert result.certificate is not None
    assert isinstance(result.model.get_submodule("split"), nn.Conv2d)


def test_forms_that_change_the_order_are_offered_where_it_is_free() -> None:
    x = (draw((2, 4, 9, 7)),)
    free = rc.fuse(FREE["pointwise"], x).model
    kept = rc.fuse(KEPT["returned"], x).model
    assert "concatenated" in forms.alternatives(free)["split"]
    assert "concatenated" not in forms.alternatives(free, in_order=True)["split"]
    assert "concatenated" not in forms.alternatives(kept)["split"]
    assert "stacked" in forms.alternatives(kept)["split"]


def test_settings_of_parameters_stay() -> None:
    model, x = FREE["pointwise"], (draw((2, 4, 9, 7)),)
    fused = rc.fuse(model, x, tuning=TOLD).model
    weights = dict(fused.named_parameters())
    assert all(p.requires_grad for p in weights.values())
    assert {p.dtype for p in weights.values()} == {next(model.parameters()).dtype}


BESIDE = {
    "a linear layer across another axis": (
        lambda n, x: n.dense(F.gelu((y := F.gelu(n.split(x))) + n.fc(y.mean((2, 3))))),
        {"fc": nn.Linear(12, 12), "dense": nn.Conv2d(12, 3, 1)},
        (12, 4, 12, 12),
    ),
    "a conv of another rank": (
        lambda n, x: n.dense(n.split(x) + n.line(x.mean(2))),
        {"line": nn.Conv1d(4, 12, 1), "dense": nn.Conv2d(12, 3, 1)},
        (12, 4, 12, 5),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_broadcast_from_another_axis_keeps_the_order(name: str) -> None:
    forward, parts, shape = BESIDE[name]
    model, x = net(forward, **parts), (draw(shape),)
    result = rc.fuse(model, x, tuning=TOLD)
    assert isinstance(result.model.get_submodule("split"), nn.Conv2d)
    assert_same(model, result.model, [x])


@pytest.mark.parametrize(
    ("pool", "free"),
    [
        (nn.MaxPool2d(3, 1, 1), False),
        (nn.AdaptiveAvgPool2d((12, 4)), False),
        (nn.MaxPool1d(3, 1, 1), True),
        (nn.AdaptiveAvgPool1d(4), True),
    ],
)
def test_a_pool_over_channels_keeps_the_order(pool: nn.Module, free: bool) -> None:
    model = randomise(
        Net(
            lambda n, x: n.dense(n.pool(n.split(x))),
            split=nn.Conv1d(4, 12, 3, padding=1, groups=4),
            pool=pool,
            dense=nn.Conv1d(12, 3, 1),
        )
    )
    x = (draw((2, 4, 9)),)
    result = rc.fuse(model, x, tuning=TOLD)
    assert isinstance(result.model.get_submodule("split"), nn.Conv1d) is not free
    assert_same(model, result.model, [x])
