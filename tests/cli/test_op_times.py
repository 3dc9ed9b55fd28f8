"""Times of single ops are kept by setting, and a damaged cache is mended."""

from __future__ import annotations

import json
import math

import pytest
from fastvit_cli import measured
from fastvit_cli.measured import FILE, OpTimes, Setting

WHERE = Setting("cpu", "float32", 1, 1)


@pytest.fixture
def cache(folder, monkeypatch):
    """The file with times, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    return measured.machine.cache_folder() / FILE


def test_times_are_kept_and_taken_from_the_cache_after_three_runs(cache):
    ran: list[int] = []
    for run in range(measured.RUNS + 1):
        times = OpTimes.opened(WHERE)
        times.microseconds("op", lambda r=run: lambda: ran.append(r))
        times.save()
    assert set(ran) == set(range(measured.RUNS))
    assert (times.counts["ops_measured"], times.counts["ops_from_cache"]) == (0, 1)
    rows = json.loads(cache.read_text())
    assert list(rows) == [WHERE.place]
    assert rows[WHERE.place]["op, batch 1"][1] == measured.RUNS


def test_settings_and_batches_do_not_share_times(cache):
    first = OpTimes.opened(WHERE)
    first.microseconds("op", lambda: lambda: None)
    first.save()
    for other in (Setting("cpu", "float32", 2, 1), Setting("cpu", "float64", 1, 1)):
        assert OpTimes.opened(other).rows == {}
    other = OpTimes.opened(Setting("cpu", "float32", 1, 8))
    other.microseconds("op", lambda: lambda: None)
    assert (other.counts["ops_measured"], other.counts["ops_from_cache"]) == (1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"x": 3}',
        "null",
        "\x00\xff",
        json.dumps({WHERE.place: {"op, batch 1": [-1.0, 3]}}),
        json.dumps({WHERE.place: {"op, batch 1": ["fast", 3]}}),
        json.dumps({WHERE.place: {"op, batch 1": [math.inf, 3]}}),
        json.dumps({WHERE.place: {"op, batch 1": 3}}),
    ],
)
def test_a_damaged_cache_is_measured_again_and_mended(cache, text):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(text, encoding="latin-1")
    times = OpTimes.opened(WHERE)
    assert times.microseconds("op", lambda: lambda: None) > 0
    assert times.counts["ops_measured"] == 1
    times.save()
    row = json.loads(cache.read_text())[WHERE.place]["op, batch 1"]
    assert row[0] > 0
    assert row[1] == 1


def test_ops_of_another_runtime_are_kept_apart(cache):
    other = Setting("cpu", "float32", 1, 1, "openvino")
    assert other.place.startswith(f"{WHERE.place}|openvino ")
    first = OpTimes.opened(WHERE)
    first.microseconds("op", lambda: lambda: None)
    first.save()
    assert OpTimes.opened(other).rows == {}


def test_when_the_time_is_up_known_ops_keep_their_time_and_others_have_none(
    cache, monkeypatch
):
    first = OpTimes.opened(WHERE)
    time = first.microseconds("known", lambda: lambda: None)
    first.save()
    second = OpTimes.opened(WHERE)
    second.spent = measured.BUDGET * measured.KNOWN_SHARE
    assert second.microseconds("known", lambda: pytest.fail) == time
    assert second.microseconds("new", lambda: lambda: None) is not None
    second.spent = measured.BUDGET
    assert second.microseconds("newer", lambda: pytest.fail) is None
    counts = second.counts
    assert (counts["ops_measured"], counts["ops_from_cache"]) == (1, 1)
    assert counts["ops_not_timed"] == 1


def test_timing_an_op_is_counted_also_when_it_fails(cache):
    def fails():
        raise RuntimeError("no such kernel")

    times = OpTimes.opened(WHERE)
    with pytest.raises(RuntimeError):
        times.microseconds("op", fails)
    assert times.spent > 0
