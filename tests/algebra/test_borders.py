"""Which chains and sums must be merged, and which must not, for which reason.

What is accepted is executed over many sizes too; what is refused would be wrong at a
border, or for some size.
"""

from __future__ import annotations

import pytest
import torch
from helpers import conv, diagonal, noise, vector, window
from oracle import chain_is_exact, sum_is_exact

from repcompiler import algebra
from repcompiler.affine import Diagonal, Refusal, Transposed, Window
from repcompiler.reasons import Reason

# ---- what must be accepted ----------------------------------------------------------

POINT = conv(4, 4, 1, 1)
PAD_ONE = window(torch.ones(4, 1, 1, 1, dtype=torch.float64), groups=4, pads=1)
REFLECT = window(
    torch.ones(4, 1, 1, 1, dtype=torch.float64), groups=4, pads=1, mode="reflect"
)

# name: (second, first, whether a bias stands between them)
CHAINS = {
    "1x1 bias-free, 3x3 pad 1": (conv(4, 4, 3, 3, pads=1), POINT, False),
    "1x1 biased, 3x3 pad 0": (conv(4, 4, 3, 3), POINT, True),
    "1x1 bias-free, 3x3 stride 2 dilation 2": (
        conv(4, 4, 3, 3, pads=2, stride=2, dilation=2),
        POINT,
        False,
    ),
    "1x1 biased, 3x3 reflect": (conv(4, 4, 3, 3, pads=1, mode="reflect"), POINT, True),
    "1x1 biased, 3x3 circular": (
        conv(4, 4, 3, 3, pads=1, mode="circular"),
        POINT,
        True,
    ),
    "3x3 pad 1 biased, 1x1": (POINT, conv(4, 4, 3, 3, pads=1), True),
    "3x3 stride 2 biased, 1x1 stride 2": (
        conv(4, 4, 1, 1, stride=2),
        conv(4, 4, 3, 3, pads=1, stride=2),
        True,
    ),
    "7x7 reflect biased, 1x1": (POINT, conv(4, 4, 7, 7, pads=3, mode="reflect"), True),
    "3x3 pad 2 biased, 3x3 pad 0": (conv(4, 4, 3, 3), conv(4, 4, 3, 3, pads=2), True),
    "1x3 pad (0,1) bias-free, 3x1 pad (1,0)": (
        conv(4, 4, 3, 1, pads=((1, 1), (0, 0))),
        conv(4, 4, 1, 3, pads=((0, 0), (1, 1))),
        False,
    ),
    "causal, causal": (
        conv(4, 4, 3, pads=((2, 0),)),
        conv(4, 4, 3, pads=((2, 0),)),
        False,
    ),
    "causal dilated, causal dilated": (
        conv(4, 4, 3, pads=((4, 0),), dilation=2),
        conv(4, 4, 2, pads=((3, 0),), dilation=3),
        False,
    ),
    "3x3 pads (2, 2), 3x3 pad 1": (
        conv(4, 4, 3, pads=1),
        conv(4, 4, 3, pads=2),
        False,
    ),
    "pad, 3x3 pad 0": (conv(4, 4, 3, 3), PAD_ONE, False),
    "pad, pad": (PAD_ONE, PAD_ONE, False),
    "reflect pad, 3x3 pad 0": (conv(4, 4, 3, 3), REFLECT, False),
    "3x3 pad 0, 3x3 pad 0 biased": (conv(4, 4, 3, 3), conv(4, 4, 3, 3), True),
    "patchify 4x4 stride 4, pad 1 bias-free": (
        conv(4, 4, 3, 3, pads=((1, 0), (1, 0))),
        conv(4, 4, 4, 4, stride=4),
        False,
    ),
    "groups 4, groups 6": (
        conv(12, 12, 1, 1, groups=6),
        conv(12, 12, 3, 3, groups=4),
        True,
    ),
    "depthwise, dense": (conv(4, 8, 1, 1), conv(4, 4, 3, 3, groups=4, pads=1), True),
    "3d pointwise, 3d conv": (
        conv(2, 2, 3, 1, 2, pads=((1, 1), (0, 0), (1, 0))),
        conv(2, 2, 1, 1, 1),
        False,
    ),
}

# name: (a, b)
SUMS = {
    "3x3 pad 1 and 1x1": (conv(4, 4, 3, 3, pads=1), POINT),
    "RepVGG at stride 2": (
        conv(4, 8, 3, 3, pads=1, stride=2),
        conv(4, 8, 1, 1, stride=2),
    ),
    "dilated and dense": (
        conv(4, 4, 3, 3, pads=2, dilation=2),
        conv(4, 4, 3, 3, pads=1),
    ),
    "5x5 depthwise and 3x3 dense": (
        conv(4, 4, 5, 5, groups=4, pads=2),
        conv(4, 4, 3, 3, pads=1),
    ),
    "1x3 and 3x1": (
        conv(4, 4, 1, 3, pads=((0, 0), (1, 1))),
        conv(4, 4, 3, 1, pads=((1, 1), (0, 0))),
    ),
    "identity and odd same conv": (Diagonal(), conv(4, 4, 7, 7, pads=3, groups=4)),
    "identity and even same conv": (Diagonal(), conv(4, 4, 4, pads=((1, 2),))),
    "scale and 1x1": (diagonal(4, -3), POINT),
    "groups 4 and groups 6": (
        conv(12, 12, 3, 3, groups=4, pads=1),
        conv(12, 12, 3, 3, groups=6, pads=1),
    ),
    "reflect 3x3 and 1x1": (conv(4, 4, 3, 3, pads=1, mode="reflect"), POINT),
    "reflect 3x3 and reflect 5x5": (
        conv(4, 4, 3, 3, pads=1, mode="reflect"),
        conv(4, 4, 5, 5, pads=2, mode="reflect"),
    ),
    "circular 3x3 and identity": (
        conv(4, 4, 3, 3, pads=1, mode="circular"),
        Diagonal(),
    ),
    "shifted by one": (
        conv(4, 4, 1, pads=((1, -1),)),
        conv(4, 4, 1, pads=((-1, 1),)),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_is_accepted_and_exact(name):
    second, first, biased = CHAINS[name]
    bias = vector(noise(first.out_channels, seed=6)) if biased else None
    assert chain_is_exact(second, first, bias, len(first.axes)), "refused"


@pytest.mark.parametrize("name", SUMS)
def test_sum_is_accepted_and_exact(name):
    a, b = SUMS[name]
    wide = b if isinstance(a, Diagonal) else a
    assert sum_is_exact(a, b, len(wide.axes)), "refused"


# ---- what must be refused, and why --------------------------------------------------

# name: (second, first, biased, reason)
BROKEN_CHAINS = {
    "1x1 biased, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        POINT,
        True,
        Reason.PADDED_BORDER,
    ),
    "3x3 pad 1, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1),
        False,
        Reason.PADDED_BORDER,
    ),
    "1x3 pad (0,1) biased, 3x1 pad (1,0)": (
        conv(4, 4, 3, 1, pads=((1, 1), (0, 0))),
        conv(4, 4, 1, 3, pads=((0, 0), (1, 1))),
        True,
        Reason.PADDED_BORDER,
    ),
    "crop, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 1, 1, pads=-1),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 reflect, 3x3 pad 1": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1, mode="reflect"),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 pad 1, 3x3 replicate": (
        conv(4, 4, 3, 3, pads=1, mode="replicate"),
        conv(4, 4, 3, 3, pads=1),
        False,
        Reason.PADDED_BORDER,
    ),
    "causal, anti-causal": (
        conv(4, 4, 3, pads=((0, 2),)),
        conv(4, 4, 3, pads=((2, 0),)),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 pads (1, 2), 3x3 padded at the start": (
        conv(4, 4, 3, pads=((1, 0),)),
        conv(4, 4, 3, pads=((1, 2),)),
        False,
        Reason.PADDED_BORDER,
    ),
    "3x3 pads (2, 1), 3x3 padded at the end": (
        conv(4, 4, 3, pads=((0, 1),)),
        conv(4, 4, 3, pads=((2, 1),)),
        False,
        Reason.PADDED_BORDER,
    ),
    "conv, linear on another axis": (
        Window(-1, 4, 4, 1, (), "zeros", lambda: noise(4, 4)),
        POINT,
        False,
        Reason.AXIS_MISMATCH,
    ),
    "scale on the last axis after a conv": (
        diagonal(4, -1),
        POINT,
        False,
        Reason.AXIS_MISMATCH,
    ),
    "transposed, 3x3": (
        conv(4, 4, 3, 3),
        Transposed(-3, 4, 4, 1, ((2, 0, 0, 1, 2),) * 2, lambda: noise(4, 4, 2, 2)),
        False,
        Reason.TRANSPOSED,
    ),
    "bias, transposed": (
        Transposed(-3, 4, 4, 1, ((2, 0, 0, 1, 2),) * 2, lambda: noise(4, 4, 2, 2)),
        POINT,
        True,
        Reason.TRANSPOSED,
    ),
    "channels that do not fit": (
        conv(4, 4, 1, 1),
        conv(4, 6, 1, 1),
        False,
        Reason.CHANNEL_MISMATCH,
    ),
}

# name: (a, b, reason)
BROKEN_SUMS = {
    "3x3 pad 1 and 3x3 pad 0": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3),
        Reason.SIZE_MISMATCH,
    ),
    "3x3 pad 0 and identity": (conv(4, 4, 3, 3), Diagonal(), Reason.SIZE_MISMATCH),
    "depthwise stride 2, equal on odd sizes only": (
        conv(4, 4, 3, 3, pads=1, stride=2, groups=4),
        conv(4, 4, 2, 2, stride=2, groups=4),
        Reason.SIZE_MISMATCH,
    ),
    "stride 1 and stride 2": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1, stride=2),
        Reason.STRIDE_MISMATCH,
    ),
    "identity and stride 2": (
        Diagonal(),
        conv(4, 4, 3, 3, pads=1, stride=2),
        Reason.STRIDE_MISMATCH,
    ),
    "zero and reflect padding": (
        conv(4, 4, 3, 3, pads=1),
        conv(4, 4, 3, 3, pads=1, mode="reflect"),
        Reason.PADDING_MODE,
    ),
    "identity and a conv to other channels": (
        Diagonal(),
        conv(4, 8, 3, 3, pads=1),
        Reason.CHANNEL_MISMATCH,
    ),
    "one output channel and four": (
        conv(4, 4, 1, 1),
        conv(4, 1, 1, 1),
        Reason.CHANNEL_MISMATCH,
    ),
    "scale on the last axis and a conv": (
        diagonal(4, -1),
        POINT,
        Reason.AXIS_MISMATCH,
    ),
    "scales on two axes": (diagonal(4, -1), diagonal(4, -3), Reason.AXIS_MISMATCH),
    "transposed and conv": (
        Transposed(-3, 4, 4, 1, ((1, 0, 0, 1, 1),) * 2, lambda: noise(4, 4, 1, 1)),
        POINT,
        Reason.TRANSPOSED,
    ),
}


@pytest.mark.parametrize("name", BROKEN_CHAINS)
def test_chain_is_refused_for_its_reason(name):
    second, first, biased, reason = BROKEN_CHAINS[name]
    refused = algebra.compose(second, first, biased=biased)
    assert isinstance(refused, Refusal)
    assert refused.reason is reason


@pytest.mark.parametrize("name", BROKEN_SUMS)
def test_sum_is_refused_for_its_reason(name):
    a, b, reason = BROKEN_SUMS[name]
    for left, right in ((a, b), (b, a)):
        refused = algebra.add(left, right)
        assert isinstance(refused, Refusal)
        assert refused.reason is reason
