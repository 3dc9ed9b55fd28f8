"""Small graphs as drawings: where boxes and lines go, for the templates to draw.

Rows are the longest way from a source, so that branches stand side by side and every
line leads down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOX = (112, 26)  # pixels
GAP = (14, 22)


@dataclass(frozen=True)
class Drawing:
    """Boxes (x, y, text, title, role) and lines (x1, y1, x2, y2), and their frame."""

    width: int
    height: int
    boxes: tuple[dict[str, Any], ...]
    lines: tuple[tuple[float, float, float, float], ...]


def layers(nodes: Sequence[Any]) -> Drawing:
    """A region as it was."""
    depth: list[int] = []
    for node in nodes:
        depth.append(1 + max((depth[i] for i in node.inputs), default=-1))
    edges = [(i, place) for place, node in enumerate(nodes) for i in node.inputs]
    texts = [(_label(node), node.name, node.role) for node in nodes]
    return _place(texts, depth, edges)


def column(nodes: Sequence[Any], added: Sequence[str]) -> Drawing:
    """What replaced it: its sources, and the new ops one below the other."""
    sources = [node for node in nodes if node.role == "source"]
    texts = [(_label(node), node.name, "source") for node in sources]
    texts += [(_short(name), name, "added") for name in added]
    depth = [0] * len(sources) + [1 + place for place in range(len(added))]
    first = len(sources)
    edges = [(place, first) for place in range(first)] if added else []
    edges += [(place, place + 1) for place in range(first, len(texts) - 1)]
    return _place(texts, depth, edges)


def _place(
    texts: Sequence[tuple[str, str, str]],
    depth: Sequence[int],
    edges: Sequence[tuple[int, int]],
) -> Drawing:
    rows: dict[int, list[int]] = {}
    for place, row in enumerate(depth):
        rows.setdefault(row, []).append(place)
    widest = max((len(row) for row in rows.values()), default=1)
    width = widest * (BOX[0] + GAP[0]) + GAP[0]
    height = len(rows) * (BOX[1] + GAP[1]) + 8
    spots: dict[int, tuple[float, float]] = {}
    for row, members in rows.items():
        left = (width - len(members) * (BOX[0] + GAP[0]) + GAP[0]) / 2
        for column, place in enumerate(members):
            spots[place] = (
                left + column * (BOX[0] + GAP[0]),
                4 + row * (BOX[1] + GAP[1]),
            )
    boxes = tuple(
        {"x": spots[i][0], "y": spots[i][1], "text": text, "title": title, "role": role}
        for i, (text, title, role) in enumerate(texts)
    )
    half = BOX[0] / 2
    lines = tuple(
        (spots[a][0] + half, spots[a][1] + BOX[1], spots[b][0] + half, spots[b][1])
        for a, b in edges
    )
    return Drawing(width, height, boxes, lines)


def _label(node: Any) -> str:
    return _short(node.name if node.role == "source" else node.op)


def _short(text: str, limit: int = 15) -> str:
    """The end of a dotted path that fits a box."""
    return text if len(text) <= limit else "…" + text[-limit + 1 :]
