"""repcompiler: rewrite the affine parts of a PyTorch model into the cheapest equal ops.

result = repcompiler.fuse(model, example_inputs)
result.model, result.report
"""

from repcompiler.capture import capture
from repcompiler.compile import FuseResult, fuse
from repcompiler.errors import (
    CaptureError,
    NotEval,
    RepCompilerError,
    UnsupportedInput,
    VerificationError,
)
from repcompiler.lift import Affine, Alias, Carry, Op, Opaque, Rule
from repcompiler.operators import RULES
from repcompiler.reasons import Reason
from repcompiler.report import FuseReport, VerifyReport
from repcompiler.tuning import Tuning
from repcompiler.verify import verify

__all__ = [
    "RULES",
    "Affine",
    "Alias",
    "CaptureError",
    "Carry",
    "FuseReport",
    "FuseResult",
    "NotEval",
    "Op",
    "Opaque",
    "Reason",
    "RepCompilerError",
    "Rule",
    "Tuning",
    "UnsupportedInput",
    "VerificationError",
    "VerifyReport",
    "capture",
    "fuse",
    "verify",
]
