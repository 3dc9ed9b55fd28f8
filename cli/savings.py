"""What fusing saved in each region, in time: for the page that `fuse --report` writes.

The model is taken through the compiler's stages once more, because a result holds no
graph from before. Every op of the two graphs is timed in its place, eagerly, by
`layers`; a model that was fused in parts has no graph as a whole, and no times.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from fastvit_cli import layers

if TYPE_CHECKING:
    from fastvit_cli.fusing import Fused
    from fastvit_cli.sources import Loaded


def fill_in(document: dict[str, Any], loaded: Loaded, fused: Fused, door: str) -> None:
    """Give each region `milliseconds`, before and after, where they are known."""
    import repcompiler as rc
    from repcompiler.compile import run_stages

    tuning = fused.tuned.tuning if fused.tuned else None
    told: dict[str, Any] = {"door": door, "stop_after": "lower", "tuning": tuning}
    if not document["regions"] or document["capture"] == "submodules":
        return
    try:
        state = run_stages(loaded.model, loaded.inputs, verify=False, **told)
    except rc.RepCompilerError:  # it was captured once; then this is no reason to stop
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
        if len(rows[key]) != len(regions):  # one of them was undone by its check
            continue
        for region, row in zip(regions, rows[key]):
            region["milliseconds"] = {k: row[k] for k in ("before", "after")}
