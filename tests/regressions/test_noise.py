"""Models that draw random numbers: one seed for both, so that they can be compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import Net, draw, randomise
from torch import Tensor, nn

import repcompiler as rc

NOISE = {
    "like": lambda y: y + 0.1 * torch.randn_like(y),
    "dropout": lambda y: F.dropout(y, 0.3, training=True),
    "of a size": lambda y: y + torch.randn(y.shape[0], 1, *y.shape[2:]),
    "of one size": lambda y: y + torch.randn(1, 4, 1, 1),
}


@pytest.mark.parametrize("door", ["auto", "export"])
@pytest.mark.parametrize("noise", NOISE)
def test_noise_between_norms(noise: str, door: str) -> None:
    def forward(n: nn.Module, x: Tensor) -> Tensor:
        return n.second(F.relu(NOISE[noise](n.first(x))))

    parts = [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        for _ in range(2)
    ]
    model = randomise(Net(forward, first=parts[0], second=parts[1])).double()
    x = (draw((2, 4, 6, 6)),)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result = rc.fuse(model, x, capture=door)
    assert torch.equal(before, torch.get_rng_state())  # the caller's own draws go on
    assert result.report.equivalence.verdict == "equal"
    assert result.report.ops.after_by_type["batch_norm"] == 0
    for batch in (1, 3):
        x = draw((batch, 4, 6, 6))
        outputs: list[Tensor] = []
        for each in (model, result.model):
            torch.manual_seed(batch)
            outputs.append(each(x))
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


def test_another_noise_is_another_model() -> None:
    """The check can fail: draws of another spread, from the same seed."""

    def noisy(spread: float) -> nn.Module:
        def forward(n: nn.Module, x: Tensor) -> Tensor:
            return n.conv(x) + spread * torch.randn_like(x)

        torch.manual_seed(0)
        return Net(forward, conv=nn.Conv2d(4, 4, 1)).eval()

    x = (draw((2, 4, 6, 6)).float(),)
    assert rc.verify(noisy(0.1), noisy(0.1), x).verdict == "equal"
    assert rc.verify(noisy(0.1), noisy(0.3), x).verdict == "different"
