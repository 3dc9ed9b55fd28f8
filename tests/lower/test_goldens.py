"""The graph before and after each stage, as committed text.

After a change that is meant to show here, rewrite the texts and read the difference:

    python tests/lower/test_goldens.py --write
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvit.blocks import AttentionBlock, MobileOneBlock, RepCPE, RepMixer
from repcompiler.compile import run_stages
from repcompiler.describe import describe

GOLDENS = Path(__file__).parent / "goldens"
STAGES = ("capture", "lift", "compose", "select", "lower")

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "repmixer": lambda: RepMixer(8, 0.1),
    "cpe": lambda: RepCPE(8),
    "mobileone": lambda: MobileOneBlock(8, 8, 3, depthwise=True),
    "attention": lambda: AttentionBlock(32, 2.0, 0.1, 0.0),
}


class Inside(nn.Module):
    """The block where it usually is: inside of a model, so that names have a place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def text_of(name: str) -> str:
    block = BLOCKS[name]()
    channels = 32 if name == "attention" else 8
    inputs = torch.randn(1, channels, 6, 6)
    state = run_stages(Inside(block).eval(), inputs, debug=True)
    assert state.equivalence is not None
    assert state.equivalence.ok
    return "\n".join(f"## {stage}\n{describe(state, stage)}" for stage in STAGES)


@pytest.mark.parametrize("name", BLOCKS)
def test_stages_print_what_was_committed(name: str) -> None:
    assert text_of(name) == (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__" and "--write" in sys.argv:
    GOLDENS.mkdir(exist_ok=True)
    for key in BLOCKS:
        (GOLDENS / f"{key}.txt").write_text(text_of(key), encoding="utf-8")
