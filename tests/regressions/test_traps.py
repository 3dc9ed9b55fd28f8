"""Models that other fusers get wrong: the right value, and what must be fused is."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from equality import (
    Net,
    assert_same,
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
from torch import nn

import repcompiler as rc

# ---- who reads what ----------------------------------------------------------------


def test_conv_called_twice_with_a_norm_after_one_call_only():
    net = Net(
        lambda s, x: s.norm(s.conv(x)).relu() + s.conv(x.tanh()).relu(),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (2, 0)


def test_conv_value_with_a_norm_on_one_path_only():
    net = Net(
        lambda s, x: torch.cat([s.norm(y := s.conv(x)).relu(), y.relu()], 1),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    result = check(net, images(4))
    # The conv is needed as it is, so merging the norm would only add a second conv.
    assert (convs(result.model), norms(result.model)) == (1, 1)
    assert reason_of(result, "norm") == "other_reader"


def test_conv_under_two_norms():
    net = Net(
        lambda s, x: s.one(y := s.conv(x)).relu() - s.two(y).relu(),
        conv=conv(),
        one=nn.BatchNorm2d(4),
        two=nn.BatchNorm2d(4),
    )
    result = check(net, images(4))
    # One conv and two norms, or two convs: what may not be is one norm in place of two.
    assert convs(result.model) + norms(result.model) in (2, 3)


def test_conv_read_by_a_norm_and_by_an_add_is_one_conv():
    net = Net(
        lambda s, x: s.norm(y := s.conv(x)) + y, conv=conv(), norm=nn.BatchNorm2d(4)
    )
    fused = check(net, images(4)).model
    assert ops(fused) == {"Conv2d": 1}


def test_norm_shared_by_two_convs():
    net = Net(
        lambda s, x: s.norm(s.one(x)).relu() + s.norm(s.two(x)).relu(),
        one=conv(),
        two=conv(kernel=1),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (2, 0)


def test_weight_that_is_also_read_functionally():
    net = Net(
        lambda s, x: s.norm(s.conv(x)).relu() + F.conv2d(x, s.conv.weight.abs()).relu(),
        conv=nn.Conv2d(4, 4, 1),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, images(4)).model
    assert norms(fused) == 0


def test_weight_read_functionally_in_the_same_sum_as_its_conv():
    """One region then reads the weight as an attribute and as its module's."""
    net = Net(
        lambda s, x: s.norm(s.conv(x)) + F.conv2d(x, s.conv.weight, padding=1),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (1, 0)


def test_tied_weights_are_not_edited_in_place():
    net = Net(
        lambda s, x: s.norm(s.one(x)).relu() + s.two(x).relu(),
        one=conv(),
        two=conv(),
        norm=nn.BatchNorm2d(4),
    )
    net.two.weight = net.one.weight
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (2, 0)


def test_modules_registered_in_another_order_than_called():
    net = Net(
        lambda s, x: s.last(s.norm(s.first(x)).relu()),
        norm=nn.BatchNorm2d(4),
        last=conv(),
        first=conv(),
    )
    fused = check(net, images(4)).model
    assert (convs(fused), norms(fused)) == (2, 0)
    backwards = Net(
        lambda s, x: s.conv(s.norm(x).relu()), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    result = check(backwards, images(4))
    assert (convs(result.model), norms(result.model)) == (1, 1)
    assert reason_of(result, "norm") == "no_neighbour"


# ---- what a call does beside forward -----------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "replaced"])
def test_hooked_conv_is_left_as_it_is(kind):
    net = Net(
        lambda s, x: s.norm(s.conv(x)).relu(), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    if kind == "forward":
        net.conv.register_forward_hook(lambda _, __, out: out * 2 + 1)
    elif kind == "forward_pre":
        net.conv.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    else:
        net.conv.forward = MethodType(
            lambda self, x: F.conv2d(x, self.weight, padding=1) * 3, net.conv
        )
    result = check(net, images(4))
    assert norms(result.model) == 1
    assert reason_of(result, "conv") == "hooked"


def test_hook_on_a_norm_keeps_the_norm():
    net = Net(
        lambda s, x: s.norm(s.conv(x)).relu(), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    net.norm.register_forward_hook(lambda _, __, out: out + 1)
    result = check(net, images(4))
    assert norms(result.model) == 1
    assert reason_of(result, "norm") == "hooked"


@pytest.mark.parametrize("kind", ["forward", "replaced"])
def test_hook_on_the_model_itself_is_not_lost(kind):
    net = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    if kind == "forward":
        net.register_forward_hook(lambda _, __, out: out * 2)
    else:
        net.forward = MethodType(lambda s, x: s[1](s[0](x)) * 2, net)
    batches = [(draw((2, 4, 8, 8)),), (draw((3, 4, 5, 6)),)]
    result = rc.fuse(net, batches[0])
    assert_same(net, result.model, batches)
    assert (convs(result.model), norms(result.model)) == (1, 0)
    with pytest.raises(rc.CaptureError, match="hooks"):
        rc.fuse(net)


def test_hooked_container_is_said_to_be_kept():
    block = nn.Sequential(conv(), nn.BatchNorm2d(4))
    block.register_forward_hook(lambda _, __, out: out * 2)
    net = nn.Sequential(block, nn.ReLU(), conv(), nn.BatchNorm2d(4))
    result = check(net, images(4))
    assert convs(result.model) == 1
    assert reason_of(result, "0") == "hooked"


# ---- axes --------------------------------------------------------------------------


def test_linear_then_norm_on_three_axes_acts_on_the_channels():
    for width in (6, 4):  # with 6 the channels and the positions are as many
        net = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(6))
        result = check(net, [(1, 6, 5), (3, 6, 5)])
        assert ops(result.model) == {"Linear": 1, "BatchNorm1d": 1}
        assert reason_of(result, "1") == "axis_mismatch"


def test_linear_then_norm_on_two_axes_is_one_linear():
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    fused = check(net, [(2, 5), (1, 5), (3, 5)]).model
    assert ops(fused) == {"Linear": 1}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_conv_then_norm(groups, stride):
    # As many input as output channels: a factor on the wrong weight axis has the shape.
    first = nn.ConvTranspose2d(
        4, 4, 3, stride=stride, padding=1, output_padding=stride - 1, groups=groups
    )
    fused = check(nn.Sequential(first, nn.BatchNorm2d(4)), images(4)).model
    assert ops(fused) == {"ConvTranspose2d": 1}


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_conv_of_other_width_then_norm(groups):
    first = nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), groups=groups, bias=False)
    fused = check(nn.Sequential(first, nn.BatchNorm2d(6)), images(4)).model
    assert ops(fused) == {"ConvTranspose2d": 1}


def test_conv_times_a_vector_on_the_last_axis():
    net = Net(
        lambda s, x: s.conv(x) * s.scale,
        conv=conv(),
        scale=nn.Parameter(torch.randn(4)),
    )
    # Four channels and a width of four: only the axis tells them apart.
    result = check(net, images(4, (4, 4), (3, 4), (1, 4)))
    assert ops(result.model)["mul"] == 1
    assert reason_of(result, "mul") == "broadcast"


def test_conv_times_a_vector_on_the_channel_axis():
    net = Net(
        lambda s, x: s.conv(x) * s.scale,
        conv=conv(),
        scale=nn.Parameter(torch.randn(4, 1, 1)),
    )
    fused = check(net, images(4)).model
    assert ops(fused) == {"Conv2d": 1}


# ---- statistics and modes ----------------------------------------------------------


def test_norm_without_statistics_is_kept():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))
    result = check(net, images(4, (8, 8), (5, 7), (2, 3)))
    assert (convs(result.model), norms(result.model)) == (1, 1)
    assert reason_of(result, "1") == "train_mode"


def test_train_mode_is_refused_by_name():
    root = nn.Sequential(conv(), nn.BatchNorm2d(4))
    with pytest.raises(rc.NotEval, match="the model itself"):
        rc.fuse(root)
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(conv(), nn.BatchNorm2d(4)))
    net.eval().stem[1].train()
    with pytest.raises(rc.NotEval, match=r"stem\.1") as caught:
        rc.fuse(net, (draw((1, 4, 8, 8)).float(),))
    assert "eval()" in caught.value.hint
    with pytest.raises(rc.NotEval, match=r"stem\.1"):
        rc.capture(net)
