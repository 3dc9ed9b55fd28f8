"""What fusing saved in each region, in time: for the page that `fuse --report` writes.

Every op of the graph from before and of the fused one is timed in its place, eagerly,
by `layers`; a model that was fused in parts has no graph as a whole, and no times.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from fastvit_cli import layers

if TYPE_CHECKING:
    from fastvit_cli.sources import Loaded

    from repcompiler.state import State


def fill_in(document: dict[str, Any], loaded: Loaded, state: State) -> None:
    """Give each region `milliseconds`, before and after, where they are known."""
    if not document["regions"]:
        return
    assert state.captured is not None and state.rewritten is not None
    inputs = state.captured.inputs or loaded.inputs
    graphs = (state.captured.module, state.rewritten.module)
    found = [layers.measure(graph, inputs, loaded.device) for graph in graphs]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in layers.saved(*found, state):
        rows[row["name"], row["kind"]].append(row)
    named: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for region in document["regions"]:
        named[region["name"], region["kind"]].append(region)
    for key, regions in named.items():
        for region, row in zip(regions, rows[key], strict=True):
            region["milliseconds"] = {k: row[k] for k in ("before", "after")}
