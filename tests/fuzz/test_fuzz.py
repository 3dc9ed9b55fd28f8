"""A minute of the fuzzer: no program fails; the long run is `run.py` itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grammar import Script, Statement
from judge import Failure, Mode, Tally, shrink, text, try_program
from run import failures, missing, report
from strategies import PIECES

import repcompiler as rc

SEED = 0
# In parts, so that they can be run side by side.
PARTS, PROGRAMS = 4, 80


@pytest.mark.parametrize("part", range(PARTS))
def test_programs_are_fused_to_the_same_function(part: int) -> None:
    size = PROGRAMS // PARTS
    numbers = range(part * size, (part + 1) * size)
    tally = Tally()
    found = [report(SEED, *failure) for failure in failures(numbers, SEED, tally)]
    assert not found, found[0]
    assert tally.counts["inputs compared"] > size
    turns = {str(list(PIECES)[n % len(PIECES)]) for n in numbers}
    # One that takes no value of the program at hand has its turn in another program.
    assert len(turns & set(missing(tally))) <= size // 10


def test_a_rule_that_lies_is_found_and_made_small(monkeypatch) -> None:
    """The fuzzer must be able to fail: a table in which a - b is a + b."""
    broken = {**rc.RULES}
    for target in rc.RULES:
        if getattr(target, "__name__", target) == "sub":
            broken[target] = rc.Rule(rc.RULES[torch.add].meaning, "input other")
    both = [Statement("v1 = self.m(x)", ("self.m = nn.Conv2d(4, 4, 1)",))]
    both += [Statement("v2 = v1 - x"), Statement("v3 = v2.relu()")]
    script = Script(3, (1, 4, 6, 5), ("x",), tuple(both), "[v3, x]")
    how = Mode("symbolic_trace", verify=False)
    assert try_program(script, how, Tally()) is None
    monkeypatch.setattr(rc, "RULES", broken)
    failure = try_program(script, how, Tally())
    assert isinstance(failure, Failure)
    assert failure.kind == "mismatch"
    small, again = shrink(script, how, failure)
    assert again.kind == "mismatch"
    assert [s.line for s in small.statements if " - " in s.line] == ["v2 = v1 - x"]
    assert "Conv2d" not in text(small)
    names: dict[str, object] = {"__name__": "pasted"}
    exec(text(small), names)
    assert callable(names["build"])
