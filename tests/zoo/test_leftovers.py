"""Nothing is left that a neighbour might have taken in, unless the report says why.

First the checker itself, on graphs that do hold leftovers, in both spellings; then on
fused models, through both doors.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from equality import Net, conv, draw, randomise
from leftovers import leftovers
from torch import nn

import repcompiler as rc

DOORS = ("symbolic_trace", "export")
# Small members of families that differ: plain, depthwise, branches, dense, norm first.
MODELS = {
    "mobilenetv2_035": 64,
    "resnet10t": 64,
    "repghostnet_050": 64,
    "fastvit_t8": 64,
    "levit_128s": 224,
    "test_byobnet": 64,
}


def nets() -> dict[str, tuple[nn.Module, list[str]]]:
    """Unfused nets, and what must be found in each."""
    norm = nn.BatchNorm2d(4)
    scale = nn.Parameter(torch.rand(4, 1, 1))
    wide = nn.Parameter(torch.rand(8))  # along the width, which is no channel axis
    shared = Net(lambda s, x: s.n(y := s.c(x)).relu() + y.tanh(), c=conv(), n=norm)
    return {
        "norm after conv": (nn.Sequential(conv(), norm), ["norm"]),
        "norm before 1x1": (nn.Sequential(nn.ReLU(), norm, conv(4, 4, 1)), ["norm"]),
        "norm before padded": (nn.Sequential(nn.ReLU(), norm, conv()), []),
        "norm of a shared conv": (shared, []),
        "scale": (Net(lambda s, x: s.c(x) * s.g, c=conv(), g=scale), ["multiply"]),
        "number": (Net(lambda s, x: s.c(x) / 3, c=conv()), ["multiply"]),
        "width": (Net(lambda s, x: s.c(x) * s.g, c=conv(), g=wide), []),
        "1x1 then 3x3": (nn.Sequential(conv(4, 4, 1), conv()), ["conv"]),
        "depthwise then 1x1": (
            nn.Sequential(nn.Conv2d(8, 8, 7, groups=8), conv(8, 8, 1)),
            [],
        ),
        "bottleneck": (nn.Sequential(conv(8, 2, 1), conv(2, 8, 1)), []),
        "two linear": (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), ["linear"]),
        "dropout between": (
            nn.Sequential(conv(), nn.Dropout(), norm, nn.Identity(), nn.ReLU()),
            ["norm"],
        ),
    }


@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("door", DOORS)
def test_checker_finds_what_is_left(name: str, door: str) -> None:
    net, expected = nets()[name]
    channels = 8 if name in ("depthwise then 1x1", "bottleneck") else 4
    x = draw((2, channels, 8, 8))
    graph = rc.capture(randomise(net), (x,), door=door)
    found = leftovers(graph)
    assert [line.split(": ")[1].split()[0] for line in found] == expected, found


def test_a_reason_explains_its_own_op_alone() -> None:
    graph = rc.capture(randomise(nn.Sequential(conv(), nn.BatchNorm2d(4))))
    norm = {"name": "1", "op": "batch_norm", "reason": "dearer"}
    assert leftovers(graph, [norm]) == []
    assert len(leftovers(graph, [{**norm, "op": "conv2d"}])) == 1
    assert len(leftovers(graph, [{**norm, "name": "0"}])) == 1


def test_parts_of_a_model_that_is_no_graph() -> None:
    part = rc.capture(randomise(nn.Sequential(conv(), nn.BatchNorm2d(4))))
    whole = nn.ModuleDict({"part": part})
    assert leftovers(whole) == [
        "part.1: norm after a conv or linear that nothing else reads"
    ]
    entry = {"name": "part.1", "op": "batch_norm", "reason": "hooked"}
    assert leftovers(whole, [entry]) == []


@pytest.mark.parametrize("name", MODELS)
def test_fused_models_hold_no_leftovers(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).eval()
    x = torch.randn(1, 3, MODELS[name], MODELS[name], dtype=torch.float64)
    assert leftovers(rc.capture(copy.deepcopy(model), (x,))), "nothing to fuse at all"
    result = rc.fuse(model, (x,), samples=1)
    assert leftovers(result.model, result.report.kept) == []


def test_a_fused_conv_that_stayed_apart_has_a_reason() -> None:
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    net = nn.Sequential(conv(4, 4, 1), norms[0], conv(), norms[1])
    result = rc.fuse(randomise(net), (draw((2, 4, 8, 8)),))
    assert leftovers(result.model) == ["2: conv after an unpadded one"]
    assert leftovers(result.model, result.report.kept) == []
