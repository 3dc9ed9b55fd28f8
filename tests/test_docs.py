"""The worked example of docs/adding_an_operator.md runs, and its lie is caught."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import repcompiler as rc

PAGE = Path(__file__).parents[1] / "docs" / "adding_an_operator.md"


def worked() -> dict[str, Any]:
    """The names that the program on the page defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    program = next(block for block in blocks if "class Net" in block)
    names: dict[str, Any] = {"__name__": "worked"}
    exec(compile(program, str(PAGE), "exec"), names)
    return names


def test_worked_example_runs() -> None:
    report = worked()["report"]
    assert report.equivalence.ok
    assert report.ops.after == 2


def test_a_rule_that_lies_is_undone() -> None:
    names = worked()

    def lie(op: rc.Op) -> Any:
        return names["meaning"](rc.Op(op.node, op.facts, {**op.args, "power": 1}))

    rules = {**rc.RULES, names["modulate"]: rc.Rule(lie, "input gain power")}
    model, x = names["Net"]().eval(), torch.randn(2, 3, 16, 16)
    report = rc.fuse(model, x, rules=rules).report
    assert report.equivalence.ok
    assert "not_equal" in {kept.reason for kept in report.kept}
