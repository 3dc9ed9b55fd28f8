"""What depends on parameters alone is computed once, and keeps its dtype."""

from __future__ import annotations

import pytest
import torch
from equality import Net, check, conv, draw, ops, randomise
from torch import nn

import repcompiler as rc

both_doors = pytest.mark.parametrize("door", ["symbolic_trace", "export"])


def biased_by_an_mlp(**more) -> Net:
    """A conv plus what a small net of torch's modules makes of a table of its own."""
    return Net(
        lambda s, x: s.conv(x) + 16 * torch.sigmoid(s.mlp(s.table)).view(1, 4, 1, 1),
        conv=conv(),
        table=nn.Parameter(torch.randn(1, 2)),
        mlp=nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
        **more,
    )


@both_doors
def test_a_net_on_a_table_of_the_model_is_a_constant(door):
    """Swin v2 has one in each block: six ops that no input reaches."""
    shapes = [(2, 4, 6, 5), (1, 4, 3, 3)]
    fused = check(biased_by_an_mlp(), shapes, door=door, blind=False).model
    assert set(ops(fused)) <= {"Conv2d", "conv2d"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_keeps_the_dtype_of_the_model(dtype):
    net = randomise(biased_by_an_mlp()).to(dtype)
    image = draw((2, 4, 6, 5)).to(dtype)
    result = rc.fuse(net, (image,))
    assert result.report.equivalence.ok
    assert result.model(image).dtype == dtype
    assert {p.dtype for p in result.model.state_dict().values()} == {dtype}


def test_a_hooked_module_on_a_table_runs_as_before():
    net = randomise(biased_by_an_mlp())
    seen = []
    net.mlp[0].register_forward_hook(lambda *_: seen.append(1))
    image = draw((2, 4, 6, 5))
    fused = rc.fuse(net, (image,)).model
    seen.clear()
    fused(image)
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_folded_complex_constant_keeps_its_precision(dtype):
    """Folded in float64, it was left in complex128, and made the result float64."""

    def run(s, x):
        wide = torch.fft.fft2(s.norm(s.conv(x)).to(s.turn.dtype))
        return (wide * torch.complex(s.turn, -s.turn)).real

    turn = nn.Parameter(torch.randn(4, 1, 1))
    net = randomise(Net(run, conv=conv(), norm=nn.BatchNorm2d(4), turn=turn)).to(dtype)
    if dtype is torch.bfloat16:  # torch has no complex numbers of that
        net.turn.data = net.turn.data.float()
    image = draw((2, 4, 6, 5)).to(dtype)
    result = rc.fuse(net, (image,))
    assert result.report.equivalence.ok
    assert result.model(image).dtype == net(image).dtype == net.turn.dtype


@both_doors
def test_what_is_made_from_numbers_alone_keeps_its_dtype(door):
    """A table of frequencies is float32 in a model of any dtype, and made once."""

    def run(s, x):
        step = torch.arange(4, dtype=torch.float32)
        rate = 10.0 ** (2 * torch.div(step, 2, rounding_mode="floor") / 4)
        waves = (torch.ones_like(x).cumsum(2).float() / rate[:, None, None]).sin()
        return s.proj(waves.to(x.dtype)) + s.conv(x)

    net = Net(run, conv=conv(), proj=conv(kernel=1))
    found = check(net, [(2, 4, 6, 5), (1, 4, 3, 3)], door=door, blind=False)
    short = {name.split(".")[0] for name in ops(found.model)}
    assert short.isdisjoint({"arange", "pow", "mul", "floor_divide"})
    for dtype in (torch.float64, torch.bfloat16):
        typed = net.to(dtype)
        image = draw((2, 4, 6, 5)).to(dtype)
        assert rc.fuse(typed, (image,), capture=door).report.equivalence.ok


def test_a_made_tensor_that_is_returned_is_made_anew():
    """The caller may write to what a model returns."""
    net = Net(
        lambda s, x: (s.conv(x), torch.arange(4), torch.zeros(3)),
        conv=conv(),
    )
    image = (draw((1, 4, 3, 3)),)
    fused = rc.fuse(randomise(net), image, capture="export").model
    for result in fused(*image)[1:]:
        result += 7
    assert fused(*image)[1].tolist() == [0, 1, 2, 3]
    assert fused(*image)[2].tolist() == [0, 0, 0]
