"""Concat, split and slice: maps of blocks of channels."""

from __future__ import annotations

import pytest
import torch
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
    reasons,
)
from torch import Tensor, nn

import repcompiler as rc

both_doors = pytest.mark.parametrize("door", ["symbolic_trace", "export"])
SIZES = images(4, (8, 8), (7, 9), (6, 5), (3, 3))
WIDE = images(8, (8, 8), (7, 9), (6, 5), (3, 3))


def same(inputs: int, outputs: int, taps: int, **settings: int) -> nn.Conv2d:
    """A conv that keeps the size."""
    return nn.Conv2d(inputs, outputs, taps, padding=taps // 2, **settings)


def left(model: nn.Module) -> dict[str, int]:
    """Convs, norms, concats and sums that are left, in either spelling."""
    found = ops(model)
    cats = sum(n for name, n in found.items() if name.split(".")[0] == "cat")
    adds = sum(n for name, n in found.items() if name.split(".")[0] == "add")
    return {"conv": convs(model), "norm": norms(model), "cat": cats, "add": adds}


# ---- concat ------------------------------------------------------------------------


@both_doors
def test_norm_behind_a_concat_goes_into_the_convs_before_it(door):
    net = Net(
        lambda s, x: s.norm(torch.cat([s.a(x.relu()), s.b(x.sigmoid())], 1)).relu(),
        a=same(4, 6, 3),
        b=same(4, 5, 1, bias=False),
        norm=nn.BatchNorm2d(11),
    )
    fused = check(net, SIZES, door=door).model
    assert left(fused) == {"conv": 2, "norm": 0, "cat": 1, "add": 0}


@both_doors
def test_convs_of_one_source_side_by_side_are_one_conv(door):
    net = Net(
        lambda s, x: s.norm(torch.cat([s.a(x), s.b(x), s.c(x)], 1)).relu(),
        a=same(4, 6, 3, groups=2),
        b=same(4, 5, 1),
        c=same(4, 2, 5),
        norm=nn.BatchNorm2d(13),
    )
    fused = check(net, SIZES, door=door).model
    assert left(fused) == {"conv": 1, "norm": 0, "cat": 0, "add": 0}


@both_doors
def test_pointwise_conv_over_a_concat_of_branches_is_one_conv(door):
    net = Net(
        lambda s, x: s.mix(torch.cat([s.a(x), s.b(x), x], dim=-3)).relu(),
        a=same(4, 6, 3),
        b=same(4, 5, 1),
        mix=same(15, 7, 1),
    )
    fused = check(net, SIZES, door=door).model
    assert left(fused) == {"conv": 1, "norm": 0, "cat": 0, "add": 0}


def test_depthwise_conv_over_a_concat_takes_in_what_lies_before_each_part():
    net = Net(
        lambda s, x: s.norm(s.dw(torch.cat([s.a(x.relu()), s.b(x.sigmoid())], 1))),
        a=same(4, 4, 1, bias=False),
        b=same(4, 2, 1, bias=False),
        dw=same(6, 6, 3, groups=6),
        norm=nn.BatchNorm2d(6),
    )
    fused = check(net, SIZES).model
    assert left(fused) == {"conv": 2, "norm": 0, "cat": 1, "add": 0}


def test_branches_of_unequal_size_are_not_stacked():
    """Padding 1 and 2 agree on no size: the original stops, and so does the result."""
    net = Net(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1),
        a=nn.Conv2d(4, 4, 3, stride=2, padding=1),
        b=nn.Conv2d(4, 4, 1, stride=2),
    )
    fused = check(net, images(4, (8, 8), (6, 4), (2, 2))).model
    assert left(fused)["conv"] == 1  # the sizes agree for every input
    net.b.stride = 1
    with pytest.raises(RuntimeError):
        net(draw((1, 4, 8, 8)))


def test_a_concat_along_positions_is_left_alone():
    net = Net(
        lambda s, x: s.norm(torch.cat([s.a(x), s.b(x)], 2)).relu(),
        a=same(4, 4, 3),
        b=same(4, 4, 1),
        norm=nn.BatchNorm2d(4),
    )
    fused = check(net, SIZES).model
    assert left(fused) == {"conv": 2, "norm": 1, "cat": 1, "add": 0}


def test_concats_cut_in_different_places_are_added_as_they_are():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        one = torch.cat([s.a(x.relu()), s.b(x.sigmoid())], 1)
        return one + torch.cat([s.b(x.tanh()), s.a(x.sin())], 1)

    net = Net(body, a=same(4, 6, 3), b=same(4, 2, 1))
    assert left(check(net, SIZES).model) == {"conv": 4, "norm": 0, "cat": 2, "add": 1}


def test_a_concat_that_is_read_twice_stays():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        both = torch.cat([s.a(x.relu()), s.b(x.sigmoid())], 1)
        return s.norm(both).relu() + both

    net = Net(body, a=same(4, 6, 3), b=same(4, 2, 1), norm=nn.BatchNorm2d(8))
    assert left(check(net, SIZES).model) == {"conv": 2, "norm": 1, "cat": 1, "add": 1}


def test_a_conv_over_a_concat_is_not_split_in_two():
    """Two convs and a sum move fewer bytes, and are one op more."""

    def body(s: nn.Module, x: Tensor) -> Tensor:
        both = torch.cat([s.a(x).relu(), s.b(x).relu()], 1)
        return s.norm(s.after(both))

    layers = {"a": same(4, 16, 1), "b": same(4, 16, 3), "after": same(32, 4, 1)}
    net = Net(body, **layers, norm=nn.BatchNorm2d(4))
    fused = check(net, images(4, (64, 64), (7, 9))).model
    assert left(fused) == {"conv": 3, "norm": 0, "cat": 1, "add": 0}


# ---- split and slice ---------------------------------------------------------------

SPLITS = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: torch.split(y, 4, dim=1),
    "sizes": lambda y: torch.split(y, [4, 4], 1),
    "slices": lambda y: (y[:, :4], y[:, -4:]),
    "narrow": lambda y: (y.narrow(1, 0, 4), torch.narrow(y, 1, 4, 4)),
}


PARTS = {
    "chunk": lambda y: y.chunk(2, -1)[0],
    "aten.chunk": lambda y: torch.ops.aten.chunk.default(y, 2, -1)[0],
    "aten.tensor_split": lambda y: torch.ops.aten.tensor_split.sections(y, 2, 3)[0],
    "aten.split": lambda y: torch.ops.aten.split.Tensor(y, 2, -1)[1],
}


@pytest.mark.parametrize("spelling", PARTS)
def test_a_part_of_the_width_is_one_of_any_width(spelling):
    """ATen's splits return a list, and were taken for the example's size alone."""
    check(Net(lambda s, x: PARTS[spelling](x * 2) * s.p, p=torch.tensor(3.0)), SIZES)


@both_doors
@pytest.mark.parametrize("spelling", SPLITS)
def test_norms_behind_a_split_go_into_the_conv_before_it(spelling, door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        blocks = SPLITS[spelling](s.conv(x))
        return s.first(blocks[0]).relu() * s.second(blocks[1]).sigmoid()

    net = Net(
        body, conv=same(4, 8, 3), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)
    )
    fused = check(net, SIZES, door=door).model
    assert left(fused)["norm"] == 0


@both_doors
def test_splitting_what_was_concatenated_gives_the_parts(door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        both = torch.cat([s.a(x.relu()), s.b(x.sigmoid())], 1)
        one, two = both.chunk(2, 1)
        return s.first(one).relu() * s.second(two).sigmoid()

    net = Net(
        body,
        a=same(4, 6, 3),
        b=same(4, 6, 1),
        first=nn.BatchNorm2d(6),
        second=nn.BatchNorm2d(6),
    )
    fused = check(net, SIZES, door=door).model
    assert left(fused) == {"conv": 2, "norm": 0, "cat": 0, "add": 0}


@both_doors
def test_mixed_depthwise_convs_over_a_split_take_the_norm_behind_them(door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        blocks = torch.split(s.pre(x).relu(), [2, 2, 4], 1)
        mixed = [branch(block) for branch, block in zip(s.branches, blocks)]
        return s.norm(torch.cat(mixed, 1)).relu()

    branches = [same(n, n, k, groups=n) for n, k in ((2, 3), (2, 5), (4, 7))]
    net = Net(
        body,
        pre=same(4, 8, 1),
        branches=nn.ModuleList(branches),
        norm=nn.BatchNorm2d(8),
    )
    fused = check(net, SIZES, door=door).model
    assert left(fused) == {"conv": 4, "norm": 0, "cat": 1, "add": 0}


def test_a_grouped_conv_is_cut_between_its_groups_only():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.conv(x)
        return s.norm(y[:, : s.cut]).relu()

    for cut in (4, 3):
        net = Net(body, conv=same(8, 8, 3, groups=4), norm=nn.BatchNorm2d(cut))
        net.cut = cut
        assert left(check(net, WIDE).model)["norm"] == (0 if cut == 4 else 1)


def test_a_slice_of_positions_lets_a_norm_pass_but_no_window():
    net = Net(
        lambda s, x: s.norm(s.conv(x)[:, :, 1:]).relu(),
        conv=same(4, 8, 3),
        norm=nn.BatchNorm2d(8),
    )
    assert left(check(net, SIZES).model)["norm"] == 0
    net = Net(
        lambda s, x: s.dw(s.conv(x)[:, :, 1:]).relu(),
        conv=same(4, 8, 3, bias=False),
        dw=same(8, 8, 3, groups=8),
    )
    assert left(check(net, SIZES).model)["conv"] == 2
    net.conv = same(4, 8, 1, bias=False)
    assert left(check(net, SIZES).model)["conv"] == 1


def test_a_slice_of_a_sum_that_broadcasts_is_left_alone():
    """At one row, x[:, :, 1:] of the pooled operand would be empty."""
    net = Net(
        lambda s, x: s.norm((s.conv(x) + s.gate(x.mean((2, 3), True)))[:, :, :2]),
        conv=same(4, 8, 3),
        gate=same(4, 8, 1),
        norm=nn.BatchNorm2d(8),
    )
    check(net, images(4, (1, 1), (7, 9), (2, 2)))


def test_blocks_of_tokens():
    """q, k and v of one projection, each with a norm of its own."""

    def body(s: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = s.qkv(tokens).chunk(3, -1)
        return (q * s.scale).relu() + (k / s.scale).relu() + v

    net = Net(body, qkv=nn.Linear(8, 24), scale=nn.Parameter(torch.rand(8) + 0.5))
    fused = check(net, WIDE, blind=False).model
    assert not {"mul", "div", "truediv"} & set(ops(fused))


def test_the_parts_are_kept_where_a_channel_of_an_image_may_be_one_pixel():
    """Blocks along the width are none of channels, whatever the example's width."""
    net = Net(
        lambda s, x: s.norm(torch.cat([x, s.conv(x)], 3)).relu(),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    check(net, SIZES)


def test_a_fused_model_is_not_stacked_again():
    net = Net(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1).relu(),
        a=same(4, 6, 3),
        b=same(4, 5, 1),
    )
    once = check(net, SIZES).model
    twice = rc.fuse(randomise(once), (draw(SIZES[0]),))
    assert not twice.report.regions


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_part_without_channels(door):
    def body(s, x):
        return s.head(torch.cat([s.conv(x), x[:, :0]], 1))

    net = randomise(Net(body, conv=conv(), head=conv()))
    batches = [(draw(shape),) for shape in ((2, 4, 6, 6), (1, 4, 5, 3))]
    result = rc.fuse(net, batches[0], capture=door)
    assert result.report.equivalence.ok
    assert_same(net, result.model, batches)


def test_a_slice_of_all_channels_is_the_value_itself():
    """The probe of the region takes as many channels as the slice has numbers for."""
    net = Net(lambda s, x: x[..., -2:].add(x))
    result = check(net, [(2, 2), (5, 2)], blind=False)
    assert not reasons(result)
