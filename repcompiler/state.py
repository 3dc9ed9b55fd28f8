"""What the stages of one `fuse` have made so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from repcompiler.capture import Captured, Model
from repcompiler.compose import Composed
from repcompiler.facts import Facts
from repcompiler.lift import Lifted, Rules
from repcompiler.opening import Opened
from repcompiler.regions import Rewrite
from repcompiler.report import FuseReport, VerifyReport
from repcompiler.rewrite import Rewritten
from repcompiler.select import Selected
from repcompiler.tuning import Tuning


@dataclass
class State:
    """What the stages have made so far."""

    model: Model
    inputs: tuple[Any, ...] | None
    rules: Rules
    check: bool = True
    samples: int = 1
    tuning: Tuning = field(default_factory=Tuning)
    captured: Captured | None = None
    opened: Mapping[Node, Opened] = field(default_factory=dict[Node, Opened])
    facts: Facts | None = None
    lifted: Mapping[Node, Lifted] | None = None
    composed: Composed | None = None
    selected: Selected | None = None
    regions: tuple[Rewrite, ...] = ()
    undone: tuple[Rewrite, ...] = ()
    exactness: dict[Node, float | None] = field(
        default_factory=dict[Node, "float | None"]
    )
    rewritten: Rewritten | None = None
    equivalence: VerifyReport | None = None
    report: FuseReport | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def parts_of_norms(self) -> set[Node]:
        """Nodes that stand for an opened norm, and count as none of their own."""
        return {node for norm in self.opened.values() for node in norm.nodes}

    @property
    def graph_module(self) -> GraphModule:
        """The captured graph."""
        assert self.captured is not None
        return self.captured.module
