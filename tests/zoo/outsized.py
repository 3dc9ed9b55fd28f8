"""Models that there is no memory for: made on the meta device, and captured there."""

from __future__ import annotations

from typing import Any

import torch
from packages import PACKAGES

from repcompiler import UnsupportedInput
from repcompiler.capture import run_capture


def captured_only(package: str, name: str) -> dict[str, Any]:
    """Which door opens a model whose weights there is no memory for.

    It and its input are made on the meta device, which has shapes and no numbers, so
    nothing can be fused or compared.
    """
    with torch.device("meta"):
        model, inputs = PACKAGES[package].build(name)
    try:
        found = run_capture(model.eval(), inputs, door="auto", check=False)
    except UnsupportedInput as error:  # it takes something else than an image
        return {"status": "no input here", "note": str(error.args[0])[:200]}
    return {"status": "too large", "captured": found.door}


def parameters_on_meta(package: str, name: str) -> int:
    """How many there will be, before memory is taken for them; 0 if that fails."""
    try:
        with torch.device("meta"):
            model, _ = PACKAGES[package].build(name)
    except Exception:
        return 0  # a model that computes while it is made
    return sum(p.numel() for p in model.parameters())
