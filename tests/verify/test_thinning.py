"""One grid of a dilated conv's outputs shows whatever all of them would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import symbolic_trace

import repcompiler
from repcompiler.affine import Axis, Meaning, Term, Window
from repcompiler.region_error import region_error
from repcompiler.thinning import thinned


def window(pad: int, dilation: int, taps: int, rank: int) -> Meaning:
    """The geometry of a conv alone: nothing here reads its numbers."""
    axis = Axis(first=-pad, step=dilation, taps=taps, pad_high=pad)
    source: Any = None
    kernel: Any = None
    map = Window(-(rank + 1), 4, 3, 1, (axis,) * rank, "zeros", kernel)
    return Meaning((Term(source, map),), None, -(rank + 1))


@given(
    rank=st.integers(1, 2),
    dilation=st.integers(2, 5),
    grids=st.integers(0, 3),
    taps=st.integers(2, 4),
    wrong=st.sampled_from(["", "tap", "bias", "pad", "dilation"]),
    seed=st.integers(0, 99),
)
def test_what_differs_at_all_differs_on_the_grid(
    rank: int, dilation: int, grids: int, taps: int, wrong: str, seed: int
) -> None:
    torch.manual_seed(seed)
    pad = dilation * grids
    kind: Any = (nn.Conv1d, nn.Conv2d)[rank - 1]
    one, other = (kind(4, 3, taps, padding=pad, dilation=dilation) for _ in "ab")
    one, other = one.double().eval(), other.double().eval()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        if wrong == "tap":
            place = tuple(int(torch.randint(n, ())) for n in other.weight.shape)
            other.weight[place] += 1e-3
        elif wrong == "bias":
            other.bias[1] += 1e-3
    if wrong == "pad" and pad:
        other.padding_mode = "circular"
        other._reversed_padding_repeated_twice = [pad] * 2 * rank
    if wrong == "dilation":
        other.dilation = (1,) * rank
        other.padding = (0,) * rank
        span = dilation * (taps - 1) + 1
        other.padding = tuple(max(0, pad - (span - taps) // 2) for _ in range(rank))
    graphs = symbolic_trace(nn.Sequential(one)), symbolic_trace(nn.Sequential(other))
    pair = thinned(window(pad, dilation, taps, rank), *graphs)
    assert pair is not None
    size = dilation * (taps - 1) + 2 * pad + 2
    shapes = [((4, 4, *(size + i for i in range(rank))),)]
    axis = -(rank + 1)
    short = region_error(*pair, shapes, axis)
    full = region_error(*graphs, shapes, axis)
    assert short is not None and full is not None
    assert (short > 1e-9) == (full > 1e-9), (short, full)
    assert (full > 1e-9) == bool(wrong and (wrong != "pad" or pad))


def test_only_one_grid_is_computed() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(4, 3, 3, padding=6, dilation=6)))
    graph = symbolic_trace(model)
    pair = thinned(window(6, 6, 3, 2), graph, graph)
    assert pair is not None
    image = torch.randn(1, 4, 14, 15)
    for copy in pair:
        torch.testing.assert_close(copy(image), model(image)[..., ::6, ::6])
    assert model[0].stride == (1, 1)


class Functional(nn.Module):
    """A dilated branch and its norm, spelled as functions."""

    def __init__(self, padding: int | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.norm = nn.BatchNorm2d(5)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, None, 1, self.padding, 3))


class ByKeyword(Functional):
    """The same with keywords."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding=self.padding, dilation=3)
        return self.norm(y)


class Skip(Functional):
    """The source is read beside the conv too, so that one grid is not enough."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight[:4], None, 1, self.padding, 3)
        return y + x


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize(
    ("kind", "padding"),
    [(kind, padding) for kind in (Functional, ByKeyword) for padding in (3, 0, "same")]
    + [(Skip, 3), (Skip, "same")],
)
def test_every_spelling_is_fused(
    kind: type[Functional], padding: int | str, door: str
) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 4, 13, 14)
    result = repcompiler.fuse(randomise(kind(padding)), (image,), capture=door)
    (region,) = result.report.regions
    assert result.report.equivalence.verdict == "equal"
    assert result.report.ops.after == 1
    assert region.exactness is not None and region.exactness < 1e-12
