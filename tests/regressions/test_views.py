"""Maps that pass through layout ops, and those that must not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import (
    Net,
    assert_same,
    check,
    conv,
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
SIZES = images(8, (6, 6), (5, 7), (2, 3), (1, 1), (8, 1))


def kinds(model: nn.Module) -> set[str]:
    """What is left beside layout ops."""
    layout = "view reshape flatten transpose permute size sym_size getattr getitem"
    short = {name.split(".")[0] for name in ops(model)}
    return short - set(layout.split()) - {"contiguous", "unsqueeze", "squeeze"}


# ---- through -----------------------------------------------------------------------


@both_doors
def test_norm_before_flattened_projection(door):
    net = Net(
        lambda s, x: s.qkv(s.norm(x).flatten(2).transpose(1, 2)).relu(),
        norm=nn.BatchNorm2d(8),
        qkv=nn.Linear(8, 24, bias=False),
    )
    assert kinds(check(net, SIZES, door=door, blind=False).model) - {"relu"} == {
        "Linear"
    }


@both_doors
@pytest.mark.parametrize("spelling", ["(C, 1, 1)", "(C,)", "(1, C, 1, 1)", "first"])
def test_scale_behind_a_projection(spelling, door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = s.proj(x.flatten(2).transpose(1, 2).relu())
        if spelling == "(C,)":
            return (y * s.scale).transpose(1, 2).reshape(n, c, h, w)
        y = y.transpose(1, 2).reshape(n, c, h, w)
        if spelling == "(1, C, 1, 1)":
            return y * s.scale.view(1, -1, 1, 1)
        column = s.scale[:, None, None]
        return torch.mul(column, y) if spelling == "first" else y * column

    net = Net(body, proj=nn.Linear(8, 8), scale=nn.Parameter(torch.randn(8)))
    found = kinds(check(net, SIZES, door=door, blind=False).model)
    assert {name.lower() for name in found} - {"relu"} == {"linear"}


@both_doors
def test_norm_through_a_global_pool_into_a_head(door):
    for pool in (
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean((-2, -1), keepdim=True).flatten(1),
        lambda x: x.flatten(2).mean(2),
    ):
        net = Net(
            lambda s, x, pool=pool: s.head(pool(s.norm(x.relu()))),
            norm=nn.BatchNorm2d(8),
            head=nn.Linear(8, 3),
        )
        fused = check(net, SIZES, door=door, blind=False).model
        assert norms(fused) == 0
        assert sum("inear" in name for name in ops(fused)) == 1


@both_doors
def test_channels_last_block(door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.dw(x).permute(0, 2, 3, 1)
        y = s.wide(s.norm(y))
        y = s.scale * s.narrow(F.gelu(y))
        return x + y.permute(0, 3, 1, 2)

    net = Net(
        body,
        dw=conv(8, 8, 7, groups=8),
        norm=nn.LayerNorm(8),
        wide=nn.Linear(8, 16),
        narrow=nn.Linear(16, 8),
        scale=nn.Parameter(torch.randn(8)),
    )
    found = ops(check(net, SIZES, door=door, blind=False).model)
    assert not any("mul" in name for name in found)


@both_doors
def test_norm_through_a_resize(door):
    net = Net(
        lambda s, x: s.conv(F.interpolate(s.norm(x.relu()), scale_factor=2.0)),
        norm=nn.BatchNorm2d(8),
        conv=nn.Conv2d(8, 4, 1),
    )
    assert norms(check(net, SIZES, door=door, blind=False).model) == 0


# ---- not through -------------------------------------------------------------------

MIXING = {
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channels into the batch": lambda x: x.reshape(-1, 2, x.shape[2], x.shape[3]),
    "batch times channels": lambda x: x.reshape(
        x.shape[0] * x.shape[1] // 2, 2, x.shape[2], x.shape[3]
    ),
    "groups swapped": lambda x: (
        x.view(x.shape[0], 2, 4, x.shape[2], x.shape[3])
        .transpose(1, 2)
        .flatten(1, 2)[:, :2]
    ),
    "channels into the width": lambda x: x.permute(0, 2, 3, 1).reshape(
        x.shape[0], 2, -1, 4
    ),
}


@both_doors
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MIXING)
def test_view_that_mixes_channels_is_not_passed(name, batch, door):
    net = Net(
        lambda s, x: s.last(MIXING[name](s.first(x).relu() * 0 + s.first(x))),
        first=nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)),
        last=nn.BatchNorm2d(2),
    )
    shapes = [(batch, 8, 4, 4), (2, 8, 6, 6), (1, 8, 4, 4), (3, 8, 2, 4)]
    result = check(net, shapes, door=door, blind=False)
    assert norms(result.model) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_channels_merged_into_the_batch_are_refused(batch):
    # With one sample, (B·C, 1, H, W) has the sizes of (C, 1, H, W) by chance.
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.norm(x)
        return s.conv(y.reshape(y.shape[0] * y.shape[1], 1, y.shape[2], y.shape[3]))

    net = Net(body, norm=nn.BatchNorm2d(8), conv=nn.Conv2d(1, 1, 1))
    shapes = [(batch, 8, 5, 6), (2, 8, 4, 3), (1, 8, 3, 3)]
    result = check(net, shapes, blind=False)
    assert norms(result.model) == 1
    assert "view_mixes_channels" in reasons(result)


def test_scale_after_channels_were_merged_into_the_batch():
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.conv(x)
        y = y.reshape(y.shape[0] * y.shape[1], 1, y.shape[2], y.shape[3])
        return y * s.scale

    net = Net(body, conv=conv(8, 8), scale=nn.Parameter(torch.randn(8, 1, 1, 1)))
    randomise(net)
    x = draw((1, 8, 5, 6))
    result = rc.fuse(net, (x,))
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), net(x))
    with pytest.raises(RuntimeError):  # as in the original, which knows one sample only
        net(draw((2, 8, 5, 6)))


def test_view_as_another_dtype_is_no_reshape():
    net = Net(
        lambda s, x: s.norm(x).view(torch.int64).view(torch.float64) * 2,
        norm=nn.BatchNorm2d(8),
    )
    check(net, SIZES, blind=False)
    net = Net(
        lambda s, x: s.norm(x).view(torch.int64).float() * 2, norm=nn.BatchNorm2d(8)
    )
    assert norms(check(net, SIZES, blind=False).model) == 1


# ---- by coincidence, for the example's sizes alone ----------------------------------


def test_an_axis_kept_for_the_example_only_is_not_kept():
    """(N, 4, 4) as (N, -1, 4) keeps the channels; (N, 4, L) does not."""
    net = Net(
        lambda s, x: (s.norm(x).reshape(x.shape[0], -1, 4) * 2.0).sigmoid(),
        norm=nn.BatchNorm1d(4),
    )
    check(net, [(2, 4, 4), (2, 4, 1), (2, 4, 8), (3, 4, 5)], blind=False)


def test_a_fixed_view_of_positions_is_not_one_of_channels():
    net = Net(
        lambda s, x: s.norm(x).view(x.shape[0], -1, 4, 4).mean((2, 3)).mul(2).relu(),
        norm=nn.BatchNorm2d(4),
    )
    check(net, images(4, (4, 4), (8, 8), (4, 8)), blind=False)


def test_a_squeeze_that_may_take_an_axis_or_not():
    """Where the axis has size one the norm behind it acts on another axis."""
    net = Net(
        lambda s, x: (s.norm(y := x.squeeze(2)) + y).relu(), norm=nn.BatchNorm1d(4)
    )
    check(net, [(2, 4, 5), (1, 4, 1), (3, 4, 1)], blind=False)


def test_a_squeeze_behind_a_pool_passes_scales():
    net = Net(
        lambda s, x: s.head(
            F.adaptive_avg_pool2d(s.norm(x), 1).squeeze(-1).squeeze(-1)
        ).relu(),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8, 3),
    )
    assert "BatchNorm2d" not in kinds(check(net, SIZES, blind=False).model)


# ---- memory layout ------------------------------------------------------------------


def test_a_view_behind_a_norm_that_goes():
    """The norm lays its output out anew; what comes out of a transpose has no view.

    torch.export does not know that, and refuses the model.
    """
    net = Net(
        lambda s, x: s.norm(s.proj(x).transpose(1, 2)).view(x.shape[0], -1).relu(),
        norm=nn.BatchNorm1d(8),
        proj=nn.Linear(8, 8),
    )
    fused = check(net, [(2, 5, 8), (1, 3, 8)], blind=False).model
    assert "BatchNorm1d" not in kinds(fused)


def test_numbers_over_numbers_in_five_axes_merge():
    net = Net(lambda s, x: (x / s.c / s.c).relu())
    net.c = nn.Parameter(torch.full((1, 1, 1, 1, 1), 3.0))
    result = check(net, [(2, 3, 4, 3, 4)], blind=False)
    assert len(result.report.regions) == 1


# ---- sizes that follow the input ---------------------------------------------------


@both_doors
def test_a_vector_on_positions_broadcasts_where_there_is_one_position(door):
    """(N, L, C) times (1, L, 1) also takes L = 1, which a conv over L would refuse."""

    def body(s: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).relu()
        return s.mix(tokens * s.scale + s.shift)

    net = Net(
        body,
        mix=nn.Conv1d(36, 5, 1),
        scale=nn.Parameter(torch.randn(1, 36, 1)),
        shift=nn.Parameter(torch.randn(36, 1)),
    )
    sizes = images(8, (6, 6), (4, 9), (1, 1))
    result = check(net, sizes, door=door)
    assert "mul" in kinds(result.model)
    assert reasons(result) == {"broadcast"}


@both_doors
def test_a_vector_on_channels_that_weights_fix_is_folded_at_any_size(door):
    net = Net(
        lambda s, x: s.fc((x.flatten(2).transpose(1, 2).relu() - s.mean) / s.std),
        fc=nn.Linear(8, 5),
        mean=nn.Parameter(torch.randn(8)),
        std=nn.Parameter(torch.rand(1, 8) + 0.5),
    )
    assert kinds(check(net, SIZES, door=door, blind=False).model) == {"relu", "Linear"}


# ---- somebody else's functions -----------------------------------------------------


def shift_in_place(x: Tensor, by: float) -> None:
    """Writes to its argument and returns nothing, out of the tracer's sight."""
    x[:, 1:].add_(by)


torch.fx.wrap("shift_in_place")


def test_call_that_is_there_for_what_it_writes_stays():
    def body(s, x):
        y = s.conv(x)
        shift_in_place(y, 3.0)
        return s.norm(y)

    net = randomise(Net(body, conv=conv(8, 8), norm=nn.BatchNorm2d(8)))
    x = draw((2, 8, 5, 6))
    result = rc.fuse(net, (x,))
    assert result.report.capture == "symbolic_trace"
    assert result.report.equivalence.ok, result.report.equivalence
    assert torch.equal(net(x), result.model(x))


def test_a_conv_behind_swapped_axes_is_fused_without_an_example():
    """Its probes are shaped for the source, whose axes stand in other places."""
    net = Net(
        lambda s, x: s.norm(s.conv(x.transpose(1, 3))).relu(),
        conv=nn.Conv2d(3, 5, (1, 3), bias=False),
        norm=nn.BatchNorm2d(5),
    )
    randomise(net)
    result = rc.fuse(net)
    assert not reasons(result) and norms(result.model) == 0
    for shape in ((2, 6, 7, 3), (1, 3, 4, 3)):
        assert_same(net, result.model, [(draw(shape),)])


@pytest.mark.parametrize("sizes", [(0, 3, -1), (0, -1, 9)], ids=["named", "open"])
def test_a_view_that_names_its_channels_is_done_to_no_others(sizes):
    """A linear map of two channels to three, and a view of three, before a conv."""

    def run(s, x):
        y = s.first(x)
        return s.second(y.reshape(y.size(0), *sizes[1:]))

    net = Net(
        run,
        first=nn.Conv2d(2, 3, 1, bias=False),
        second=nn.Conv1d(3, 8, 1, bias=False),
    )
    randomise(net)
    image = (draw((2, 2, 3, 3)),)
    result = rc.fuse(net, image, verify=False)
    assert_same(net, result.model, [image])
    assert "not_equal" not in reasons(rc.fuse(net, image))
