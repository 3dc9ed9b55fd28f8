"""What must hold whatever the model: norm settings, sharing, writes, quantisers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from equality import (
    Net,
    check,
    conv,
    convs,
    draw,
    images,
    norms,
    ops,
    randomise,
    reason_of,
)
from torch import Tensor, nn

import repcompiler as rc

DOORS = ["symbolic_trace", "export"]
both_doors = pytest.mark.parametrize("door", DOORS)
WIDE = images(4, (8, 8), (7, 9), (2, 3))


# ---- norm settings -----------------------------------------------------------------

FUSED_NORMS = {
    "plain": lambda: nn.BatchNorm2d(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no momentum": lambda: nn.BatchNorm2d(4, momentum=None),
    "large eps": lambda: nn.BatchNorm2d(4, eps=0.1),
    "sync": lambda: nn.SyncBatchNorm(4),
    "frozen": lambda: torchvision.ops.FrozenBatchNorm2d(4),
    "of images, stored": lambda: nn.InstanceNorm2d(
        4, affine=True, track_running_stats=True
    ),
}


@both_doors
@pytest.mark.parametrize("kind", FUSED_NORMS)
def test_norm_goes_into_the_conv(kind, door):
    net = nn.Sequential(conv(), FUSED_NORMS[kind]())
    fused = check(net, WIDE, door=door).model
    assert sum(ops(fused).values()) == convs(fused) == 1


KEPT_NORMS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm(8),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
}


@both_doors
@pytest.mark.parametrize("kind", KEPT_NORMS)
def test_norm_that_is_not_affine_is_kept(kind, door):
    net = nn.Sequential(conv(), KEPT_NORMS[kind](), conv())
    shapes = [(1, 4, 8, 8), (3, 4, 5, 8), (2, 4, 2, 8)]
    fused = check(net, shapes, door=door).model
    assert convs(fused) == 2
    assert sum(n for name, n in ops(fused).items() if "norm" in name.lower()) == 1


@pytest.mark.parametrize("setting", ["zero gamma", "tiny variance", "zero variance"])
def test_extreme_statistics(setting):
    net = nn.Sequential(conv(), nn.BatchNorm2d(4))
    randomise(net)
    with torch.no_grad():
        if setting == "zero gamma":
            net[1].weight[:2] = 0
        else:
            net[1].running_var[:2] = 1e-30 if setting == "tiny variance" else 0
    batches = [(draw(shape),) for shape in images(4)]
    result = rc.fuse(net, batches[0])
    assert ops(result.model) == {"Conv2d": 1}
    assert result.report.equivalence.ok
    with torch.no_grad():
        for batch in batches:  # each channel against itself: they differ by 1e3
            found, expected = result.model(*batch), net(*batch)
            error = (found - expected).abs().amax((0, 2, 3))
            limit = net[0](*batch).abs().amax() * 1e3
            assert (error < 1e-12 * limit).all()
            assert (error[2:] < 1e-12 * expected[:, 2:].abs().amax()).all()


@both_doors
def test_norm_in_train_mode_by_argument_is_kept(door):
    net = Net(
        lambda s, x: F.batch_norm(s.conv(x), None, None, training=True), conv=conv()
    )
    result = check(net, [(2, 4, 8, 8), (3, 4, 5, 6)], door=door)
    assert (convs(result.model), norms(result.model)) == (1, 1)
    assert {kept.reason for kept in result.report.kept} == {"train_mode"}


# ---- sharing -----------------------------------------------------------------------


def test_module_called_twice_in_a_row():
    net = Net(
        lambda s, x: s.norm(s.conv(s.norm(s.conv(x)).relu())),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (2, 0)


def test_value_that_is_also_an_output():
    net = Net(
        lambda s, x: (s.norm(y := s.conv(x)), {"feature": y}),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    result = check(net, images(4))
    assert (convs(result.model), norms(result.model)) == (1, 1)
    assert reason_of(result, "norm") == "other_reader"


def test_statistics_read_elsewhere():
    net = Net(
        lambda s, x: s.norm(s.conv(x)).relu() * s.norm.running_var.sum(),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (1, 0)


# ---- not an identity ---------------------------------------------------------------


def _add_to_view(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    part = y[:, :2]
    part += 1
    return s.norm(y)


def _add_to_alias(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    same = y
    same += x
    return s.norm(y)


def _relu_through_view(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    part = y[:, :2]
    F.relu_(y)
    return torch.cat([part, s.norm(y)], 1)


def _relu_module_through_view(s: nn.Module, x: Tensor) -> Tensor:
    y = s.norm(s.conv(x))
    flat = y.flatten(1)
    s.act(y)
    return flat


def _relu_argument(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    z = F.relu(y, inplace=True)
    return s.norm(y) + z


def _write_after_read(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    z = s.norm(y)
    y += 1
    return z * y


def _assign_item(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    y[:, 0] = 0.5
    y[:, 1:] += 1
    return s.norm(y)


def _out(s: nn.Module, x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    torch.mul(s.conv(x).detach(), 2, out=result)
    return s.norm(result)


def _copy(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    y.copy_(x)
    return s.norm(y)


def _detached(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    y.detach().mul_(2)
    return s.norm(y)


def _chunked(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    a, b = y.detach().chunk(2, 1)
    a.mul_(3)
    return s.norm(torch.cat([b, a], 1)) + y


def _reshaped(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x).flatten(2)
    z = y.unflatten(2, x.shape[2:])
    y.mul_(2)
    return s.norm(z)


def _clamped(s: nn.Module, x: Tensor) -> Tensor:
    y = s.conv(x)
    y.clamp_(0, 1)
    return s.norm(y)


WRITES = [
    _add_to_view,
    _add_to_alias,
    _relu_through_view,
    _relu_module_through_view,
    _relu_argument,
    _write_after_read,
    _assign_item,
    _out,
    _copy,
    _detached,
    _chunked,
    _reshaped,
    _clamped,
]


@pytest.mark.parametrize("body", WRITES)
def test_writes_reach_every_alias(body):
    # The values are checked with example inputs and without.
    parts = {"conv": conv(), "norm": nn.BatchNorm2d(4), "act": nn.ReLU(inplace=True)}
    net = Net(body, **parts)
    check(net, images(4))
    parts = {"conv": conv(), "norm": nn.BatchNorm2d(4), "act": nn.ReLU(inplace=True)}
    if body not in (_out, _chunked):  # which torch.export itself refuses
        check(Net(body, **parts), images(4), door="export", blind=False)


def test_harmless_writes_do_not_stop_fusion():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.norm(s.conv(F.relu_(x.clone())))
        y += x
        y.mul_(2).add_(1)
        return s.act(y)

    net = Net(body, conv=conv(), norm=nn.BatchNorm2d(4), act=nn.ReLU(inplace=True))
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (1, 0)
    assert "mul" not in ops(fused)


def test_write_to_the_input_leaves_the_caller_alone():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        x += 1
        return s.norm(s.conv(x))

    net = Net(body, conv=conv(), norm=nn.BatchNorm2d(4))
    randomise(net)
    given = draw((1, 4, 6, 7))
    before = given.clone()
    result = rc.fuse(net, (given,))
    assert torch.equal(given, before)
    assert norms(result.model) == 0
    with torch.no_grad():
        expected = net(before.clone())
        torch.testing.assert_close(result.model(before.clone()), expected)


@pytest.mark.parametrize("normed", [True, False])
def test_write_keeps_the_dtype_of_what_it_overwrites(normed):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.conv(x)
        y += s.wide
        y *= s.wide
        return s.norm(y) if normed else y

    net = Net(
        body,
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        wide=nn.Parameter(torch.ones(4, 1, 1)),
    )
    randomise(net).float()
    net.wide.data = draw((4, 1, 1))  # float64
    x = draw((2, 4, 6, 7)).float()
    result = rc.fuse(net, (x,))
    with torch.no_grad():
        expected, found = net(x), result.model(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Counter(nn.Module):
    """Counts its calls in a buffer, and adds the count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)
        self.register_buffer("count", torch.zeros(4, 1, 1))

    def forward(self, x):
        """The count is part of the value."""
        self.count += 1
        return self.norm(self.conv(x)) + self.count


def test_buffer_that_the_model_writes_is_no_constant():
    net = randomise(Counter())
    x = draw((2, 4, 6, 7))
    with pytest.raises(rc.CaptureError):
        rc.fuse(net)
    assert net.count.sum() == 0
    fused = rc.fuse(net, (x,), verify=False).model
    assert norms(fused) == 0
    assert net.count.sum() == 0
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), net(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.norm(s.conv(x)).float().double() * s.scale,
        lambda s, x: s.norm(s.conv(x)) * s.scale.int(),
        lambda s, x: torch.div(s.norm(s.conv(x)), s.scale, rounding_mode="floor"),
        lambda s, x: s.scale / (s.norm(s.conv(x)).abs() + 1),
        lambda s, x: s.norm(s.conv(x)) // 3,
        lambda s, x: s.norm(s.conv(x)) % 3,
        lambda s, x: s.norm(s.conv(x)).square() * s.scale,
        lambda s, x: s.norm(s.conv(x)) ** 2,
        lambda s, x: s.norm(s.conv(x)) * (s.conv(x) > 0),
    ],
)
def test_what_looks_affine_and_is_not(body):
    net = Net(
        body,
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        scale=nn.Parameter(torch.rand(4, 1, 1) + 1),
    )
    fused = check(net, images(4)).model
    assert norms(fused) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_order_and_sign_of_a_difference(sign):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        a, b = s.norm(s.one(x)), s.two(x)
        return a - b if sign > 0 else torch.sub(b, a, alpha=2)

    net = Net(body, one=conv(), two=conv(kernel=1), norm=nn.BatchNorm2d(4))
    assert ops(check(net, images(4)).model) == {"Conv2d": 1}


# ---- quantisers --------------------------------------------------------------------


@both_doors
def test_quantisers_are_not_folded_through(door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = torch.fake_quantize_per_tensor_affine(s.conv(x), 0.1, 0, -128, 127)
        return s.norm(y)

    net = Net(body, conv=conv(), norm=nn.BatchNorm2d(4))
    # The quantiser computes in float32 and rounds: the result is the same, bit for bit.
    # torch cannot export the quantiser but for one size, and its graph stays at that.
    result = check(net, images(4)[:1] if door == "export" else images(4), door=door)
    assert (convs(result.model), norms(result.model)) == (1, 1)


def test_weight_quantiser_is_a_constant():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        weight = s.conv.weight.float()
        weight = torch.fake_quantize_per_tensor_affine(weight, 0.1, 0, -8, 7).double()
        return s.norm(F.conv2d(x, weight, padding=1))

    net = Net(body, conv=conv(), norm=nn.BatchNorm2d(4))
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (1, 0)
