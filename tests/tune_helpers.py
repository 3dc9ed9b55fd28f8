"""What the tests of `--tune` share: a stand-in for the clock, and the command."""

from __future__ import annotations

import json


def fast_if_stacked(name: object) -> float:
    """Times of whole plans: those that say so take half."""
    return 0.5 if "stacked" in str(name) else 1.0


def tune(fastvit, *more: str, code: int = 0):
    """(the JSON of the tuning, the whole result) of `fuse --tune`."""
    result = fastvit("fuse", "tuned.py:build", "--tune", "--json", "-", *more)
    assert result.code == code, result.err
    return json.loads(result.out)["tune"], result
