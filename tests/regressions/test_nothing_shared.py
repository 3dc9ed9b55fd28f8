"""Checks and rewrites use copies: no number of the model, or of a constant, changes."""

from __future__ import annotations

import copy

import torch
from equality import assert_same, draw, randomise
from torch import Tensor, nn

import repcompiler as rc


class Scaled(nn.Module):
    """A float64 conv that fusing takes as it is, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.raw = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.gain = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(nn.functional.pad(x, (1, 1, 1, 1))))
        return nn.functional.conv2d(y, self.raw * self.gain) * self.gain.view(
            1, -1, 1, 1
        )


def test_checking_a_float64_model_leaves_its_weights_alone() -> None:
    model = randomise(Scaled())
    before = copy.deepcopy(model.state_dict())
    result = rc.fuse(model, draw((2, 4, 7, 8)))
    assert result.report.equivalence.ok
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert_same(model, result.model, [(draw((2, 4, 7, 8)),), (draw((1, 4, 3, 2)),)])


class Cached(nn.Module):
    """Keeps a tensor in a dict of its own on the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))
        self.cache: dict[str, Tensor] = {}
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.reshape(1, 3, 1, 1)
        return self.conv(x) + self.cache["bias"]


def test_what_a_module_caches_while_it_is_traced_is_taken_back() -> None:
    model = randomise(Cached())
    result = rc.fuse(model, draw((2, 3, 4, 4)))
    assert not any(isinstance(v, torch.fx.Proxy) for v in model.cache.values())
    assert_same(model, result.model, [(draw((2, 3, 4, 4)),)])


class Padded(nn.Module):
    """A pad on an axis order of its own, with a number of rows that changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.pad(x, (0, 1)).flatten(1)
        y = nn.functional.pad(y, (0, 3))
        return y.reshape(y.shape[0], -1) * 2.0


def test_pads_alone_never_fix_the_number_of_channels() -> None:
    model = Padded().eval()
    result = rc.fuse(model, draw((1, 5, 4)))
    assert_same(
        model, result.model, [(draw((n, c, 4)),) for n in (1, 3) for c in (2, 5)]
    )


class Pooled(nn.Module):
    """A norm behind a pooling module, so that the pool is a step inside of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(torch.relu(x))).flatten(1))


def test_a_norm_joins_the_head_behind_a_pooling_module() -> None:
    model = randomise(Pooled())
    result = rc.fuse(model, draw((2, 6, 5, 4)))
    assert result.report.ops.after_by_type["batch_norm"] == 0
    assert_same(model, result.model, [(draw((2, 6, 5, 4)),), (draw((1, 6, 3, 3)),)])
