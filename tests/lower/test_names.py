"""New modules get a free name near the place they came from, whatever is taken."""

from __future__ import annotations

import pytest

from repcompiler.rewrite import _free_name, _Taken


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        (set(), "a.b"),
        ({"a.c"}, "a.b"),
        ({"a.b.weight"}, "a.b.fused"),
        ({"a.b"}, "a.b_fused"),
        ({"a.b", "a.b_fused"}, "a_b_fused"),
        ({"a"}, "a_b_fused"),
        ({"a", "a_b_fused"}, "a_b_fused_1"),
    ],
)
def test_free_name(taken: set[str], expected: str) -> None:
    assert _free_name("a.b", _Taken(taken)) == expected
