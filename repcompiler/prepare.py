"""A captured graph made ready: what the table and certificates start from."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from repcompiler.capture import Captured
from repcompiler.facts import Facts, gather
from repcompiler.lift import Rules
from repcompiler.mutation import keep_dtypes
from repcompiler.opening import Opened, open_norms
from repcompiler.sizes import settle_sizes


def prepare(captured: Captured, rules: Rules) -> tuple[Mapping[Node, Opened], Facts]:
    """Open norms, keep dtypes and settle questions about sizes, in place.

    Each step keeps the function of the graph. Its nodes then have the names that a
    certificate knows them by.

    Returns:
        The norms that were opened, and what is known of the graph as it is now.
    """
    opened = open_norms(captured.module, captured.mutated)
    known = (captured.inputs, captured.exact, captured.frozen, captured.baked)
    facts = gather(captured.module, *known)
    if keep_dtypes(captured.module, facts):
        facts = gather(captured.module, *known)
    settle_sizes(captured.module, facts, rules)
    return opened, facts
