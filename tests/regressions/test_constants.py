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
    """A table of frequencies is float32 in a model of any dtype."""

    def run(s, x):
        step = torch.arange(4, dtype=torch.float32)
        rate = 10.0 ** (2 * torch.div(step, 2, rounding_mode="floor") / 4)
        waves = (torch.ones_like(x).cumsum(2).float() / rate[:, None, None]).sin()
        return s.proj(waves.to(x.dtype)) + s.conv(x)

    net = Net(run, conv=conv(), proj=conv(kernel=1))
    found = check(net, [(2, 4, 6, 5), (1, 4, 3, 3)], door=door, blind=False)
    if door == "symbolic_trace":  # torch.export runs arange in every call
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


# ---- what jumps ----------------------------------------------------------------------


@both_doors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_numbers_choose_are_those_of_the_model(door, dtype):
    """0.6 in float32 is a little less, and times ten in float64 it is row 5."""

    def run(s, x):
        return s.lin(x) + s.table[(s.place * 10).long().clamp(0, 9)]

    net = Net(run, lin=nn.Linear(8, 8), table=nn.Parameter(torch.randn(10, 8)))
    net.register_buffer("place", torch.arange(10).float() / 10)
    net = randomise(net).to(dtype)
    x = draw((2, 10, 8)).to(dtype)
    result = rc.fuse(net, (x,), capture=door)
    assert result.report.equivalence.ok
    assert float((net(x) - result.model(x)).abs().max()) < 0.1


@both_doors
def test_a_threshold_on_a_parameter_falls_as_it_does_in_the_model(door):
    def run(s, x):
        kept = (s.gate > 0.1).to(x.dtype) * torch.round(s.gate / 0.2)
        return s.conv(x) * kept.view(1, -1, 1, 1)

    net = randomise(Net(run, conv=conv(), gate=nn.Parameter(torch.ones(4)))).float()
    gate = torch.tensor([0.1, 0.3, 0.5, 0.7])
    net.gate.data = torch.nextafter(gate, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    image = draw((1, 4, 5, 5)).float()
    result = rc.fuse(net, (image,), capture=door)
    torch.testing.assert_close(result.model(image), net(image))


# ---- what is not constant ------------------------------------------------------------


@pytest.mark.parametrize(
    "draws",
    [
        lambda s: torch.nn.functional.gumbel_softmax(s.table, dim=0),
        lambda s: torch.poisson(s.table.exp()),
        lambda s: torch.multinomial(s.table.exp(), 4, replacement=True).to(s.table),
    ],
    ids=["gumbel_softmax", "poisson", "multinomial"],
)
def test_what_is_drawn_stays_random_without_an_example(draws):
    net = Net(
        lambda s, x: s.norm(s.conv(x)) * draws(s).view(1, 4, 1, 1),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        table=nn.Parameter(torch.ones(4)),
    )
    fused = rc.fuse(randomise(net).float()).model
    image = draw((1, 4, 6, 5)).float()
    assert len({float(fused(image).sum()) for _ in range(16)}) > 1


def test_fusing_draws_no_random_number():
    net = Net(lambda s, x: s.conv(x) + torch.poisson(s.one), conv=conv())
    net.register_buffer("one", torch.ones(1))
    state = torch.get_rng_state()
    rc.fuse(randomise(net).float())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_embedding_that_renormalises_its_rows_is_run():
    net = Net(
        lambda s, x: s.conv(x) + s.rows(s.ids).view(1, 4, 1, 1),
        conv=conv(),
        rows=nn.Embedding(5, 4, max_norm=0.5),
    )
    net.register_buffer("ids", torch.tensor([2]))
    fused = rc.fuse(randomise(net), (draw((1, 4, 5, 5)),)).model
    assert any(isinstance(module, nn.Embedding) for module in fused.modules())


# ---- made in forward -----------------------------------------------------------------


def filled(s, x):
    made = torch.zeros(2, 4)
    made.copy_(s.norm(s.conv(x)).mean((2, 3)))
    return made


def added(s, x):
    made = torch.zeros(4)
    made[1:3].add_(x.sum())
    return s.norm(s.conv(x)) * made.view(1, 4, 1, 1)


@pytest.mark.parametrize("run", [filled, added])
def test_a_tensor_that_forward_makes_and_writes_is_made_anew(run):
    net = randomise(Net(run, conv=conv(), norm=nn.BatchNorm2d(4))).float()
    images = [draw((2, 4, 6, 5), seed).float() for seed in (1, 2)]
    fused = rc.fuse(net, (images[0],)).model
    first = fused(images[0])
    kept = first.clone()
    torch.testing.assert_close(fused(images[1]), net(images[1]))
    assert torch.equal(first, kept)
    with pytest.raises(rc.CaptureError, match="makes itself"):
        rc.fuse(net, capture="symbolic_trace")


@both_doors
def test_a_returned_copy_is_one(door):
    net = Net(lambda s, x: (x.clone(), s.conv(x), s.table.clone()), conv=conv())
    net.register_buffer("table", torch.ones(4))
    image = draw((1, 4, 5, 5))
    kept = image.clone()
    fused = rc.fuse(randomise(net), (image,), capture=door).model
    with torch.no_grad():
        for result in fused(image):
            result.add_(1)
        assert torch.equal(image, kept)
        torch.testing.assert_close(fused(image), net(image))


@both_doors
def test_returned_constants_are_the_callers_own(door):
    net = Net(
        lambda s, x: (
            s.conv(x),
            s.table * 2,
            torch.arange(6.0).view(2, 3),
            {"pair": torch.tensor([1.0, 2.0])},
        ),
        conv=conv(),
        table=nn.Parameter(torch.ones(4)),
    )
    image = draw((1, 4, 5, 5))
    fused = rc.fuse(randomise(net), (image,), capture=door).model
    with torch.no_grad():
        expected = net(image)
        found = fused(image)
        for result in (found[1], found[2], found[3]["pair"]):
            result.add_(100)
        torch.testing.assert_close(fused(image), expected)


# ---- dtypes --------------------------------------------------------------------------


def test_a_complex_constant_of_real_numbers_survives_a_cast():
    """`Module.to(dtype)` would drop the imaginary part of a buffer."""

    def run(s, x):
        return (x * torch.polar(torch.ones_like(s.turn), s.turn)).abs() + s.conv(x)

    net = randomise(Net(run, conv=conv())).float()
    net.register_buffer("turn", torch.rand(5) * 3)
    image = draw((1, 4, 6, 5)).float()
    fused = rc.fuse(net, (image,)).model.to(torch.float64)
    expected = net.to(torch.float64)(image.double())
    torch.testing.assert_close(fused(image.double()), expected, rtol=1e-5, atol=1e-5)


def test_a_made_table_times_parameters_of_another_dtype_is_a_constant():
    """The model itself does not run in float64 then; its own numbers have to do."""
    net = Net(
        lambda s, x: s.norm(s.conv(x)) * (torch.eye(4) @ s.table).view(1, 4, 1, 1),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        table=nn.Parameter(torch.ones(4)),
    )
    net = randomise(net).float()
    result = rc.fuse(net, (draw((1, 4, 6, 5)).float(),))
    assert result.report.equivalence.ok
    assert result.report.ops.after == 1


def test_outputs_whose_shape_follows_the_dtype_are_compared_as_they_are():
    net = Net(lambda s, x: (s.conv(x), s.table.view(torch.int32)), conv=conv())
    net.register_buffer("table", torch.rand(4, 4))
    net = randomise(net).float()
    assert rc.fuse(net, (draw((1, 4, 6, 5)).float(),)).report.equivalence.ok


# ---- jumps that no list names --------------------------------------------------------


class OnGrid(nn.Module):
    """A weight on a grid of steps, as quantisation-aware training leaves it."""

    def forward(self, weight):
        return (weight * 0.7 / 3 * 127).round() / 127


def test_a_parametrization_of_ones_own_is_computed_as_it_is():
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64))
    nn.utils.parametrize.register_parametrization(net[0], "weight", OnGrid())
    net = randomise(net).float().eval()
    ties = (torch.randint(-200, 200, (64, 64)) + 0.5) / 127 * 3 / 0.7
    net[0].parametrizations.weight.original.data = ties
    rows = torch.eye(64)
    torch.testing.assert_close(rc.fuse(net, rows).model(rows), net(rows))


JUMPS = {
    "float8": lambda s: (s.table * 1.7).to(torch.float8_e4m3fn).to(s.table.dtype),
    "special": lambda s: torch.special.round(s.table * 7.3),
    "sign of a basis": lambda s: torch.linalg.svd(s.table.view(2, 2))[0].reshape(4),
    "bits": lambda s: s.table.view(torch.int16).view(s.table.dtype),
}


@pytest.mark.parametrize("name", JUMPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_that_are_not_known_to_be_continuous_go_on_from_the_models_own(name, dtype):
    if name == "sign of a basis" and dtype is torch.bfloat16:
        pytest.skip("torch has no svd of bfloat16")
    net = Net(
        lambda s, x: s.norm(s.conv(x)) * JUMPS[name](s).view(1, 4, 1, 1),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        table=nn.Parameter(torch.randn(4)),
    )
    net = randomise(net).to(dtype)
    image = draw((1, 4, 6, 5)).to(dtype)
    result = rc.fuse(net, (image,))
    found = (result.model(image) - net(image)).detach().abs().max()
    assert result.report.equivalence.ok
    assert float(found) <= 0.02 * float(net(image).detach().abs().max())


@pytest.mark.parametrize("blind", [False, True])
def test_sparse_and_quantised_constants_stay(blind):
    net = Net(
        lambda s, x: (
            s.norm(s.conv(x)),
            torch.quantize_per_tensor(s.table * 2, 0.1, 0, torch.qint8),
            (s.table * 2).to_sparse(),
        ),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        table=nn.Parameter(torch.randn(4)),
    )
    net, image = randomise(net).float(), draw((1, 4, 6, 5)).float()
    result = rc.fuse(net, None if blind else (image,))
    torch.testing.assert_close(result.model(image)[0], net(image)[0])


def test_folding_keeps_float64_where_everything_is_continuous():
    """Eight-bit mantissas times each other, summed and normalised: one rounding."""

    def run(s, x):
        spread = torch.var_mean(s.table.flatten(1), dim=1, keepdim=True)[0]
        weight = s.table * s.gain * torch.rsqrt(spread + 1e-5).view(4, 1, 1, 1)
        return nn.functional.conv2d(x, weight)

    table, gain = torch.randn(4, 4, 3, 3), torch.randn(4, 1, 1, 1)
    net = Net(run, table=nn.Parameter(table), gain=nn.Parameter(gain))
    net = randomise(net).bfloat16()
    image = draw((1, 4, 6, 5)).bfloat16()
    equal = rc.fuse(net, (image,)).report.equivalence
    assert equal.ok and equal.exactness is not None and equal.exactness < 1e-12
