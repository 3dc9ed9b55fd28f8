"""Several branches, borders and low precision: where other fusers give wrong values."""

from __future__ import annotations

import copy

import pytest
import torch
from equality import (
    Branches,
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
    reasons,
)
from torch import nn

import repcompiler as rc


def only_conv(model: nn.Module) -> nn.Conv2d:
    """The one conv of a model."""
    (found,) = (m for m in model.modules() if type(m) is nn.Conv2d)
    return found


# ---- several branches --------------------------------------------------------------


def test_block_as_the_root_module():
    fused = check(
        Branches(conv(bias=False), conv(kernel=1, bias=False)), images(4)
    ).model
    assert ops(fused) == {"Conv2d": 1}


def test_branches_with_dilation():
    wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
    fused = check(Branches(wide, conv(kernel=1)), images(4)).model
    assert ops(fused) == {"Conv2d": 1}
    assert only_conv(fused).dilation == (2, 2)


def test_branches_with_different_dilations():
    wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
    fused = check(Branches(wide, conv(groups=4)), images(4)).model
    assert ops(fused) == {"Conv2d": 1}


def test_kernels_that_are_not_square():
    row = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
    column = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
    fused = check(Branches(conv(), row, column), images(4)).model
    assert ops(fused) == {"Conv2d": 1}
    assert fused.fused.kernel_size == (3, 3)
    fused = check(Branches(row, column, skip=False), images(4)).model
    assert convs(fused) == 1
    wide = nn.Conv2d(4, 4, (3, 5), padding=(1, 2))
    tall = nn.Conv2d(4, 4, (7, 1), padding=(3, 0))
    fused = check(Branches(wide, tall), images(4)).model
    assert convs(fused) in (1, 2)  # one 7x5 conv, or two if that is dearer
    assert norms(fused) == 0


def test_even_kernels():
    twos = [nn.Conv2d(4, 4, 2, padding=1), nn.Conv2d(4, 4, 4, padding=2)]
    fused = check(Branches(*twos, skip=False), images(4)).model
    assert ops(fused) == {"Conv2d": 1}
    same = nn.Conv2d(4, 4, 2, padding="same")
    fused = check(Branches(same), images(4)).model
    assert (convs(fused), norms(fused)) == (1, 0)


def test_row_then_column():
    row = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), bias=False, groups=4)
    column = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4)
    fused = check(nn.Sequential(row, column), images(4)).model
    assert ops(fused) == {"Conv2d": 1}
    assert only_conv(fused).kernel_size == (3, 3)


def test_branches_whose_sizes_agree_for_odd_inputs_only():
    # With stride 2 the 3x3 gives (L + 1) // 2 and the unpadded 2x2 gives L // 2.
    small = nn.Conv2d(4, 4, 2, stride=2, groups=4)
    large = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
    net = Branches(small, large, skip=False)
    result = check(net, images(4, (8, 8), (6, 4), (2, 2)), blind=False)
    assert convs(result.model) == 2
    assert norms(result.model) == 0
    assert "size_mismatch" in reasons(result)
    # On 3x3 one branch has size 1 and broadcasts; the original runs, so must it.
    batch = [(draw((1, 4, 3, 3)),), (draw((3, 4, 2, 3)),)]
    assert_same(net, result.model, batch)
    with pytest.raises(RuntimeError):
        result.model(draw((1, 4, 7, 7)))


# ---- borders -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bias", "norm"])
def test_constant_in_front_of_a_padded_conv_stays(kind):
    first = nn.Conv2d(4, 4, 1) if kind == "bias" else nn.BatchNorm2d(4)
    result = check(nn.Sequential(first, conv()), images(4))
    assert sum(ops(result.model).values()) == 2
    assert {kept.reason for kept in result.report.kept} == {"padded_border"}


@pytest.mark.parametrize("shift", [lambda x: x + 1, lambda x: 0.5 - x])
def test_number_added_in_front_of_a_padded_conv_stays(shift):
    net = Net(
        lambda s, x: s.norm(s.conv(shift(x))), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    result = check(net, images(4))
    # Not one op, and the refusal does not keep the norm from its conv.
    assert (convs(result.model), norms(result.model)) == (1, 0)
    assert sum(ops(result.model).values()) == 2
    assert rc.fuse(net, verify=False).report.regions


def test_number_added_in_front_of_a_transposed_conv_stays():
    net = Net(lambda s, x: s.conv(x + 1), conv=nn.ConvTranspose2d(4, 4, 3, padding=1))
    assert sum(ops(check(net, images(4)).model).values()) == 2


@pytest.mark.parametrize("kind", ["bias", "norm"])
def test_constant_in_front_of_an_unpadded_conv_goes(kind):
    first = nn.Conv2d(4, 4, 1) if kind == "bias" else nn.BatchNorm2d(4)
    net = nn.Sequential(first, nn.Conv2d(4, 4, 3))
    fused = check(net, images(4, (8, 8), (7, 9), (3, 3), (3, 4))).model
    assert ops(fused) == {"Conv2d": 1}


def test_pointwise_without_bias_in_front_of_a_padded_conv_goes():
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), conv())
    fused = check(net, images(4)).model
    assert ops(fused) == {"Conv2d": 1}


def test_two_padded_convs_stay_two():
    net = nn.Sequential(conv(groups=4, bias=False), conv(groups=4, bias=False))
    result = check(net, images(4))
    assert convs(result.model) == 2
    assert reason_of(result, "1") == "padded_border"


# ---- numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_model_is_folded_in_float64_and_rounded_once(dtype):
    skip = nn.BatchNorm2d(8)
    net = Net(
        lambda s, x: x + s.scale * (s.norm(s.conv(x)) - s.skip(x)),
        conv=conv(8, 8, 7, groups=8, bias=False),
        norm=nn.BatchNorm2d(8),
        skip=skip,
        scale=nn.Parameter(torch.randn(8, 1, 1)),
    )
    randomise(net)
    low = copy.deepcopy(net).to(dtype)
    inputs = (draw((1, 8, 9, 8)).to(dtype),)
    result = rc.fuse(low, inputs)
    assert ops(result.model) == {"Conv2d": 1}
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    # The kernel is the float64 one of the rounded weights, rounded once.
    wide = copy.deepcopy(low).double()
    exact = rc.fuse(wide, (inputs[0].double(),)).model
    assert_same(wide, exact, [(draw((3, 8, 5, 6)),), (draw((1, 8, 2, 1)),)])
    for found, expected in zip(result.model.parameters(), exact.parameters()):
        assert torch.equal(found, expected.to(dtype))
    assert result.report.equivalence.ok
    assert result.model(inputs[0]).dtype == dtype
