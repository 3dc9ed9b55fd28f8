"""Why two maps stay two ops: a closed list, each with one sentence and a docs section.

A reason is a value that travels with a refusal from the algebra to the report. Every
member has a section of the same name in `docs/refusals.md` and a test.
"""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """One reason that keeps an affine op, as (code, sentence)."""

    PADDED_BORDER = (
        "padded_border",
        "the next conv pads with zeros, and what stands before it is not zero there",
    )
    SIZE_MISMATCH = (
        "size_mismatch",
        "the two windows give outputs of different size for some input sizes",
    )
    STRIDE_MISMATCH = ("stride_mismatch", "the two windows move by different strides")
    PADDING_MODE = ("padding_mode", "the two windows pad in different ways")
    AXIS_MISMATCH = ("axis_mismatch", "the two maps act on different axes")
    CHANNEL_MISMATCH = (
        "channel_mismatch",
        "the number of channels differs, so one operand broadcasts",
    )
    BROADCAST = (
        "broadcast",
        "an operand broadcasts in a way that is not one number per channel",
    )
    VIEW_MIXES_CHANNELS = (
        "view_mixes_channels",
        "the layout op between them does not keep the channel axis whole",
    )
    SPATIAL_SUM = (
        "spatial_sum",
        "a window cannot be moved across a sum of several values",
    )
    LAYOUT = ("layout", "a window cannot be moved across the layout op between them")
    TRANSPOSED = (
        "transposed",
        "the taps of a transposed conv do not compose with another window",
    )
    TRAIN_MODE = ("train_mode", "the norm uses the statistics of the batch")
    NOT_CONSTANT = ("not_constant", "a weight or statistic is computed from the input")
    NOT_FINITE = (
        "not_finite",
        "a scale is infinite or no number, so it cannot be multiplied into weights",
    )
    MUTATED = ("mutated", "the value, or an alias of it, is written in place")
    HOOKED = ("hooked", "the module has hooks or a replaced forward")
    NOT_CAPTURED = (
        "not_captured",
        "it stands in a part of the model that no door could turn into a graph",
    )
    UNKNOWN_SHAPE = (
        "unknown_shape",
        "without example inputs the rank or the channels cannot be proved",
    )
    DTYPE = ("dtype", "the operands differ in dtype, or are not floating point")
    CEIL_OR_COUNT = (
        "ceil_or_count",
        "the pooling counts what lies outside, and divides by less at the border",
    )
    OTHER_READER = (
        "other_reader",
        "another op needs the value in between anyway, so merging only adds work",
    )
    DEARER = ("dearer", "merging is exact but costs more than it saves")
    NO_NEIGHBOUR = ("no_neighbour", "no affine op stands next to it")
    NOT_EQUAL = (
        "not_equal",
        "the fused region did not reproduce the original, so it was undone",
    )

    def __init__(self, code: str, sentence: str) -> None:
        self.code = code
        self.sentence = sentence
