"""What an op is priced at is what it would move, and not what stood there before."""

from __future__ import annotations

import pytest
from equality import Net, check, conv, norms, ops
from torch import nn


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
