"""What an op is priced at is what it would move, and not what stood there before."""

from __future__ import annotations

import pytest
import torch
from equality import Net, check, conv, norms, ops, randomise
from torch import nn

import repcompiler as rc


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_view_is_priced_by_the_value_that_it_is_done_to(door):
    """A conv moved behind the view of a norm reads its own input, four times as wide.

    Priced as wide as the norm, it was worth doing three times, once for each reader of
    the view; when the view was kept instead, so was the norm.
    """

    def run(s, x):
        y = x + s.narrow(s.wide(x).relu())
        flat = s.norm(y).flatten(2).transpose(1, 2)
        a, b, c = (part(flat).relu() for part in (s.q, s.k, s.v))
        return y + s.back(a.transpose(1, 2).unflatten(2, (3, 3))), b * c

    net = Net(
        run,
        wide=conv(64, 256, 1),
        narrow=conv(256, 64, 1),
        back=conv(64, 64, 1),
        norm=nn.BatchNorm2d(64),
        **{name: nn.Linear(64, 64) for name in "qkv"},
    )
    fused = check(net, [(1, 64, 3, 3), (3, 64, 3, 3)], door=door, blind=False).model
    assert norms(fused) == 0
    kinds = {name.split(".")[0].lower(): n for name, n in ops(fused).items()}
    assert kinds["conv2d"] + kinds["linear"] == 6


class Parallel(nn.Module):
    """One linear layer for the attention and the feed-forward net (ViT-22B)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.whole = nn.RMSNorm(8), nn.Linear(8, 48, bias=False)
        self.shift = nn.Parameter(torch.rand(32))
        self.out = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, query, key = self.whole(self.norm(x)).split([32, 8, 8], -1)
        mixed = self.out((hidden + self.shift).relu())
        return x + mixed + query.sigmoid() * key.tanh()


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_pieces_of_a_linear_layer_are_not_made_one_by_one(door):
    model = randomise(Parallel())
    result = rc.fuse(model, (torch.randn(2, 9, 8).double(),), capture=door)
    ops = result.report.ops
    assert ops.after <= ops.before
    assert sum(n for op, n in ops.after_by_type.items() if op in ("mm", "addmm")) == 2


def test_a_pool_kept_for_another_reader_gets_no_twin():
    """conv → norm → pool → head is pool → head, but the pool may be kept anyway.

    Over a quarter of the channels the head saves multiplications; a pool of its own
    for that is one op more than there was (DIA nets: a cell's first state is made of
    the pooled values, which its first layer reads).
    """

    def run(s, x):
        y = s.norm(s.wide(x))
        pooled = s.pool(y).flatten(1)
        return y * s.head(pooled).relu().sum(), torch.zeros_like(pooled).cos()

    net = Net(
        run,
        wide=conv(64, 512, 1),
        norm=nn.BatchNorm2d(512),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(512, 512),
    )
    fused = check(net, [(1, 64, 7, 7)], blind=False).model
    assert norms(fused) == 0
    assert sum(n for kind, n in ops(fused).items() if "pool" in kind.lower()) == 1
