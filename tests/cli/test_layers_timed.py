"""Every op in its place: counts by hand, the roofline's bounds, and what is kept."""

from __future__ import annotations

import datetime
import json

import pytest
import torch
from fastvit_cli import charts, layers, machine, roofline
from fastvit_cli.roofline import Roofline
from torch import nn

ROOF = Roofline(100.0, (50.0, 10.0), (1000, 10**9))


class Net(nn.Module):
    """A conv, a sum with its input, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head((self.conv(x) + x).flatten(2).mean(2))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and a device that is measured in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speeds = iter((3.0, 5.0, 4.0, 9.0, 8.0))

    def measure(device, dtype):
        speed = next(speeds)
        rates = tuple(speed for _ in roofline.COPIES)
        return Roofline(10 * speed, rates, roofline.COPIES)

    monkeypatch.setattr(roofline, "measure", measure)
    return tmp_path / "fastvit-repcompiler" / "rooflines.json"


def test_macs_and_bytes_are_those_counted_by_hand():
    graph = torch.fx.symbolic_trace(Net().eval())
    found = {x.op.split("[")[0]: x for x in layers.measure(
        graph, (torch.randn(2, 4, 6, 6),), "cpu", repeats=2)}  # fmt: skip
    assert list(found) == ["Conv2d", "add", "mean", "Linear"]  # flatten moves nothing
    image = 2 * 4 * 36
    conv, add, head = found["Conv2d"], found["add"], found["Linear"]
    assert conv.macs == image * 2 * 9
    assert conv.moved == 4 * (2 * image + 4 * 2 * 9 + 4)
    assert add.macs == 0
    assert add.moved == 4 * 3 * image
    assert head.macs == 2 * 4 * 5
    assert conv.name == "conv"
    assert conv.milliseconds > 0
    assert conv.gflops == pytest.approx(2e-6 * conv.macs / conv.milliseconds)


def test_the_roof_is_that_of_the_working_set():
    assert ROOF.bandwidth(1000) == 50.0
    assert ROOF.bandwidth(1001) == ROOF.bandwidth(10**12) == 10.0
    assert ROOF.milliseconds(10**9, 1000) == pytest.approx(20.0)
    assert ROOF.milliseconds(0, 10**7) == pytest.approx(1.0)
    assert ROOF.bound(10**9, 1000) == "compute"
    assert ROOF.bound(10, 10**7) == "memory"
    half = layers.Layer("n", "n", "op", 2.0, 0, 10**7)
    assert half.share(ROOF) == pytest.approx(0.5)


def test_a_roofline_is_the_best_that_was_ever_measured_and_says_when(
    cache, monkeypatch
):
    days = iter(("2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"))

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(next(days))

    monkeypatch.setattr(roofline.datetime, "date", Day)
    found = [roofline.measured("cpu", "float32", 1) for _ in range(3)]
    assert [roof.gbs[0] for roof in found] == [3.0, 5.0, 5.0]
    assert [roof.gflops for roof in found] == [30.0, 50.0, 50.0]
    assert [roof.runs for roof in found] == [1, 2, 3]
    assert [roof.bettered for roof in found] == ["2026-01-01"] + ["2026-01-02"] * 2
    (row,) = json.loads(cache.read_text()).values()
    assert (row["runs"], row["bettered"]) == (3, "2026-01-02")
    assert roofline.measured("cpu", "float32", 2).gbs[0] == 9.0  # threads count
    assert roofline.measured("cpu", "float32", 2).gbs[0] == 9.0


WHOLE = {"runs": 1, "gflops": 200.0, "gbs": [20.0] * 6, "bettered": "2026-01-01"}


@pytest.mark.parametrize(
    "row",
    [
        *(3, {}, {"runs": 9}, {**WHOLE, "gbs": 7}, {**WHOLE, "gbs": [20.0]}),
        *({**WHOLE, "gflops": "1"}, {**WHOLE, "gflops": float("inf")}),
        *({**WHOLE, "bettered": "today"}, {**WHOLE, "bettered": None}),
    ],
)
def test_a_damaged_row_is_measured_again(cache, row):
    roofline.measured("cpu", "float32", 1)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: row}))
    assert roofline.measured("cpu", "float32", 1).gflops == 50.0
    cache.write_text(json.dumps({key: WHOLE}))
    assert roofline.measured("cpu", "float32", 1).gflops == 200.0


@pytest.mark.parametrize("wrong", [{"gflops": 1e9}, {"gbs": [1e9, *[20.0] * 5]}])
def test_a_figure_that_no_device_reaches_is_forgotten(cache, wrong):
    roofline.measured("cpu", "float32", 1)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {**WHOLE, **wrong}}))
    found = roofline.measured("cpu", "float32", 1)
    assert (found.gflops, found.gbs[0], found.runs) == (50.0, 5.0, 1)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}'])
def test_a_damaged_cache_is_measured_again(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert roofline.measured("cpu", "float32", 1).gflops == 30.0


def test_a_measured_roofline_is_positive():
    found = roofline.measure("cpu", "float32", products=(32,), copies=(2**12, 2**14))
    assert found.gflops > 0
    assert min(found.gbs) > 0
    assert machine.cache_folder().name == "fastvit-repcompiler"


def test_a_profile_times_every_op_and_region(fastvit, net, cache, folder):
    result = fastvit("profile", net, "--backend", "eager", "--seconds", "0",
                     "--threads", torch.get_num_threads(), "--json", "-",
                     "--layers", 3, "--html", "n.html",
                     "--png", "pictures")  # fmt: skip
    assert result.code == 0, result.err
    document = json.loads(result.out)
    (row,) = document["layers"]
    before, after = row["forms"]["train"], row["forms"]["fused"]
    ops = [[x["op"].split("[")[0] for x in form["layers"]] for form in (before, after)]
    assert ops == [
        ["Conv2d", "BatchNorm2d", "relu", "mean", "Linear"],
        ["Conv2d", "relu", "mean", "Linear"],
    ]
    (region,) = row["regions"]
    own = [x["milliseconds"] for x in before["layers"][:2]]
    assert region["kind"] == "conv_bn"
    assert region["before"] == pytest.approx(sum(own))
    assert region["after"] == after["layers"][0]["milliseconds"]
    assert document["roofline"]["gbs"][0] == 3.0
    assert "Slowest ops of net.py:build, fused" in result.err
    assert "Regions fused" in result.err
    assert "the best of 1 run here, last bettered" in " ".join(result.err.split())
    page = (folder / "n.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 2 + 2  # each conv and each linear layer
    assert page.count("<polyline") == 2
    assert "The roofline is the best of 1 run here" in page
    pictures = sorted((folder / "pictures").iterdir())
    assert [path.name for path in pictures] == [
        "backends.png",
        "layers.png",
        "roofline.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_ops_are_timed_in_the_dtype_that_is_asked_for(fastvit, net, cache, folder):
    words = ("--backend", "eager", "--seconds", "0", "--dtype", "bfloat16")
    result = fastvit("profile", net, *words, "--layers", 1, "--json", "-")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)["layers"]
    assert row["dtype"] == "bfloat16"
    conv = row["forms"]["fused"]["layers"][0]
    numbers = 3 * 16 * 16 + 4 * 16 * 16 + 4 * 3 * 3 * 3 + 4
    assert conv["bytes"] == 2 * numbers
    assert "|bfloat16|" in cache.read_text()
    assert "batch 1, eager, bfloat16" in " ".join(result.err.split())


def test_the_roofline_is_measured_once_for_several_models(fastvit, net, cache, folder):
    words = ("--backend", "eager", "--seconds", "0", "--layers", 1, "--json", "-")
    result = fastvit("profile", net, net.replace("build", "Small"), *words)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert len(document["layers"]) == 2
    assert document["roofline"]["runs"] == 1


def test_a_model_without_one_graph_is_profiled_as_a_whole(fastvit, asks, cache):
    result = fastvit("profile", asks, "--backend", "eager",
                     "--seconds", "0", "--layers", 2, "--json", "-")  # fmt: skip
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["layers"] == []
    assert [row["equal"] for row in document["measurements"]] == [True, True]
    assert "asks.py:Asks: no one graph, so that no op is timed" in document["notes"]


def test_a_chart_has_every_point_inside_its_frame():
    facts = {"milliseconds": 3.0, "layers": []}
    for macs, rate in ((10**3, 0.001), (10**6, 5.0), (10**9, 1e5)):
        op = {"name": "n", "op": "o", "milliseconds": 1.0, "macs": macs}
        facts["layers"].append({**op, "bytes": 10**4, "gflops": rate, "gbs": 1.0})
    chart = charts.rooflines(ROOF.to_dict(), {"fused": facts})
    assert len(chart.points) == 3
    for point in chart.points:
        assert charts.EDGE <= point["x"] <= chart.width
        assert 0 <= point["y"] <= chart.height - charts.EDGE
    assert chart.points[0]["y"] > chart.points[1]["y"] > chart.points[2]["y"]
    assert len(chart.roofs) == 2


def test_pictures_need_a_folder(fastvit, net, folder):
    (folder / "taken").write_text("")
    result = fastvit("profile", net, "--png", "taken")
    assert result.code == 2
    assert "is a file" in result.error
