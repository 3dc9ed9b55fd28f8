"""Blocks from the literature reach their deploy count, and stay the same function."""

from __future__ import annotations

import pytest
from blocks import BLOCKS, C, RepMixer, dbb
from equality import check, reasons

DOORS = ("symbolic_trace", "export")
SHAPES = [(2, C, 8, 10), (1, C, 7, 9), (3, C, 5, 4)]
# The design's bound for kernels that are kept in float64.
EXACTNESS = 1e-9


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_reaches_its_deploy_count(name: str, door: str) -> None:
    case = BLOCKS[name]
    result = check(case.build(), SHAPES, door=door, blind=False)
    exactness = result.report.equivalence.exactness
    assert exactness is not None
    assert exactness <= EXACTNESS
    assert result.report.ops.after == case.ops, result.report.ops


@pytest.mark.parametrize("door", DOORS)
def test_norm_before_a_zero_padded_conv_stays(door: str) -> None:
    # Y = DWConv(BN(X)) + X: outside, the conv reads zeros and not the norm's shift.
    result = check(RepMixer(), SHAPES, door=door, blind=False)
    assert reasons(result) & {"padded_border"}
    assert result.report.ops.after <= result.report.ops.before


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("door", DOORS)
def test_border_of_the_norms_own_value_is_one_conv(door: str, stride: int) -> None:
    result = check(dbb(stride, pads="after"), SHAPES, door=door, blind=False)
    assert result.report.ops.after == 1
