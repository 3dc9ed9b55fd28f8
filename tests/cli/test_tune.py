"""`--tune`: what was measured decides, files remember it, and noise decides nothing.

Ops and plans really run here; only the clock is replaced, so that each test knows which
op and which plan is fast.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fastvit_cli import measured, plans, timing
from fastvit_cli.backends import BACKENDS
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import Card
from fastvit_cli.sources import load
from torch import nn
from tune_helpers import fast_if_stacked, tune


def stacked_is_fast(key: str) -> float:
    return 1.0 if " stacked on" in key else 10.0


# ---- what is kept ------------------------------------------------------------------


def test_a_faster_plan_is_kept_and_said(fastvit, folder, clock):
    clock(stacked_is_fast, fast_if_stacked)
    found, result = tune(fastvit, "--report", "r.html", "--report", "r.json")
    assert found["kept"] == "tuned"
    assert found["ratio"] == 0.5
    assert found["plan"]["name"] == "1 conv stacked"
    (form,) = found["plan"]["forms"]
    assert (form["name"], form["form"]) == ("down", "stacked")
    assert form["microseconds"]["as one conv"] == 10.0
    assert {row["plan"] for row in found["plans"]} >= {"default", "channels last"}
    document = json.loads((folder / "r.json").read_text())
    assert document["tune"] == found
    assert document["equivalence"]["ok"] is True
    line = "Tuned for batch 1, float32, 1 thread, eager: 1 conv stacked:"
    for text in (result.err, (folder / "r.html").read_text()):
        assert line in " ".join(text.split())
    assert "1 conv stacked" in result.err
    assert max(map(len, result.err.splitlines())) <= 80


@pytest.mark.parametrize("gain", [1.0, 0.985, 1.3])
def test_a_plan_that_gains_no_more_than_noise_is_not(fastvit, clock, gain):
    clock(stacked_is_fast, lambda n: 1.0 if n in ("default", "again") else gain)
    found, result = tune(fastvit, "-o", "n.safetensors")
    assert found["kept"] == "default"
    assert found["why"] == "no plan gains more than the noise of 2.0%"
    assert "the default plan stays" in " ".join(result.err.split())
    assert not load("n.safetensors", ModelOptions()).card.tuning


def test_a_default_that_differs_from_itself_hides_a_gain(fastvit, clock):
    clock(stacked_is_fast, lambda name: {"default": 1.0, "again": 1.4}.get(name, 0.7))
    found, _ = tune(fastvit)
    assert found["kept"] == "default"
    assert found["noise"] == pytest.approx(0.4)


def test_regions_go_by_measured_costs(fastvit, clock):
    def op(key):
        return 100.0 if "5,1,1,-2,2 5,1,1,-2,2" in key else 1.0

    def plan(name):
        return 0.8 if "regions" in name else 1.0

    clock(op, plan)
    found, _ = tune(fastvit)
    assert found["kept"] == "tuned"
    assert "regions by measured costs" in found["plan"]["name"]
    assert found["plan"]["not_merged"]


def test_no_other_plan_is_no_choice(fastvit, clock, monkeypatch):
    clock()
    monkeypatch.setattr(plans, "LAYOUTS", {False: "contiguous"})
    result = fastvit("fuse", "tuned.py:bare", "--tune", "--json", "-")
    assert result.code == 0, result.err
    found = json.loads(result.out)["tune"]
    assert found["kept"] == "default"
    assert found["plans"] == []
    assert "no other plan is cheaper by the times of its ops" in found["why"]
    assert "the default plan stays" in " ".join(result.err.split())


def test_a_model_without_a_graph_keeps_the_default(fastvit, asks, clock):
    clock()
    result = fastvit("fuse", asks, "--tune", "--json", "-")
    assert result.code == 0, result.err
    found = json.loads(result.out)["tune"]
    assert found["kept"] == "default"
    assert found["why"] == "the model has no graph as a whole"


def test_writes_in_place_are_tried_on_the_fastest_plan(fastvit, folder, clock):
    clock(plan=lambda name: 0.9 if "in place" in name else 1.0)
    outputs = [f"n{suffix}" for suffix in (".safetensors", ".pt2", ".onnx")]
    found, result = tune(fastvit, *(word for name in outputs for word in ("-o", name)))
    assert (found["kept"], found["plan"]["name"]) == ("tuned", "in place")
    assert found["plan"]["in_place"] is True
    assert found["confirmed"] == [{"plan": "in place", "ratio": 0.9}]
    graph = load("n.safetensors", ModelOptions()).model.graph
    assert any(node.target is torch.relu_ for node in graph.nodes)
    for name in outputs:
        result = fastvit("check", "tuned.py:build", name, "--json", "-")
        assert result.code == 0, result.err
        origin = json.loads(result.out)["origin"]
        assert origin["form"] == "fused"
        assert origin["steps"] > 4


# ---- the time that it takes --------------------------------------------------------


def test_no_measured_time_is_compared_with_a_nominal_one(fastvit, cache, monkeypatch):
    monkeypatch.setattr(measured, "BUDGET", 0.0)
    found, result = tune(fastvit)
    assert found["ops_measured"] == 0
    assert found["ops_not_timed"] > 0
    left_out = {row["plan"]: row["why"] for row in found["left_out"]}
    assert left_out == {
        f"regions by measured costs, {layout}": "the 0 s for timing ops were up"
        for layout in ("contiguous", "channels last")
    }
    assert {row["plan"] for row in found["plans"]} == {"default", "channels last"}
    assert "the next run goes on from there" in " ".join(result.err.split())


# ---- files -------------------------------------------------------------------------


def test_files_of_a_tuned_plan_are_read_back_and_equal(fastvit, folder, clock):
    def op(key):
        return 100.0 if "5,1,1,-2,2 5,1,1,-2,2" in key else stacked_is_fast(key)

    def plan(name):
        return 0.5 if "stacked" in name and "regions" in name else 1.0

    clock(op, plan)
    outputs = [f"n{suffix}" for suffix in (".safetensors", ".pt2", ".onnx")]
    found, _ = tune(fastvit, *(word for name in outputs for word in ("-o", name)))
    assert found["plan"]["forms"]
    assert found["plan"]["not_merged"]
    for name in outputs:
        result = fastvit("check", "tuned.py:build", name, "--json", "-")
        assert result.code == 0, result.err
    again = load("n.safetensors", ModelOptions())
    assert isinstance(again.model.get_submodule("down"), nn.ModuleList)
    x = torch.randn(2, 3, 16, 16)
    expected = load("tuned.py:build", ModelOptions()).model(x)
    torch.testing.assert_close(again.model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_certificate_of_a_tuned_plan_holds(fastvit, folder, clock):
    clock(stacked_is_fast, fast_if_stacked)
    found, _ = tune(fastvit, "-o", "n.safetensors", "--certificate", "c.json")
    assert found["kept"] == "tuned"
    words = ("tuned.py:build", "n.safetensors", "--certificate", "c.json")
    result = fastvit("check", *words)
    assert result.code == 0, result.out + result.err


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"costs": 3}',
        '{"costs": {"add": "1"}}',
        '{"forms": {"a": 1}}',
        '{"kernels": "dense"}',
        "{",
    ],
)
def test_a_damaged_tuning_in_a_file_is_bad_input(text):
    weights = {"origin": "random", "seed": 0}
    card = Card("fastvit_t8", {"input_size": [3, 16, 16]}, weights=weights)
    with pytest.raises(ValueError, match=r"damaged|property name"):
        Card.from_metadata({**card.to_metadata(), "tuning": text})


# ---- the cache --------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_no_error(fastvit, folder, cache):
    cache.parent.parent.mkdir(parents=True, exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    found, _ = tune(fastvit)
    assert found["ops_measured"] > 0


def test_the_real_clock_fills_the_cache(fastvit, cache):
    found, _ = tune(fastvit)
    assert found["ops_measured"] > 0
    assert found["kept"] in ("default", "tuned")
    (rows,) = json.loads(cache.read_text()).values()
    assert len(rows) == found["ops_measured"]
    assert all(0 < row[0] < 1e6 and row[1] == 1 for row in rows.values())


# ---- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--batch", "2"), "Add --tune."),
        (("--threads", "2"), "Add --tune."),
        (("--backend", "openvino"), "Add --tune."),
        (("--tune", "--backend", "tensorrt"), "One of eager, onnxruntime, openvino."),
        (
            ("--tune", "--backend", "onnxruntime", "--dtype", "bfloat16"),
            "cannot be tuned for onnxruntime: onnxruntime does not run bfloat16.",
        ),
        (("--tune", "--batch", "0"), "--batch 0 is not positive."),
        (("--tune", "--threads", "-1"), "--threads -1 is not positive."),
    ],
)
def test_options_that_make_no_sense(fastvit, net, words, says):
    result = fastvit("fuse", net, *words)
    assert result.code == 2
    assert says in result.error


def test_a_fused_file_is_not_tuned(fastvit, net):
    assert fastvit("fuse", net, "-o", "n.safetensors").code == 0
    result = fastvit("fuse", "n.safetensors", "--tune")
    assert result.code == 2
    assert "holds a fused form" in result.error
    assert f"fastvit fuse {net} --tune" in result.error


def test_a_runtime_that_is_not_here_says_how_to_get_it(fastvit, net, monkeypatch):
    lacking = replace(BACKENDS["openvino"], lacks=lambda: "pip install openvino")
    monkeypatch.setitem(BACKENDS, "openvino", lacking)
    result = fastvit("fuse", net, "--tune", "--backend", "openvino")
    assert result.code == 2
    assert "not installed: pip install openvino" in result.error


def test_a_batch_that_the_model_does_not_take(fastvit, folder, net):
    model = load(net, ModelOptions()).model
    program = torch.export.export(model, (torch.randn(1, 3, 16, 16),))
    torch.export.save(program, "fixed.pt2")
    result = fastvit("fuse", "fixed.pt2", "--tune", "--batch", "2")
    assert result.code == 2
    assert "fixes its batch size" in result.error


# ---- profile -----------------------------------------------------------------------


def test_profile_shows_the_tuned_form_beside_the_others(fastvit, folder, clock):
    clock(stacked_is_fast, fast_if_stacked)
    backends = ("--backend", "eager", "--backend", "onnxruntime")
    result = fastvit(
        "profile",
        "tuned.py:build",
        "--tune",
        *backends,
        "--seconds",
        0,
        "--layers",
        3,
        "--html",
        "tuned.html",
        "--png",
        "tuned",
        "--json",
        "-",
    )
    assert result.code == 0, result.err
    document = json.loads(result.out)
    tuned = document["models"][0]["tuned_in"]
    assert document["models"][0]["tune"] == tuned["eager"]
    assert list(tuned) == ["eager", "onnxruntime"]
    for backend, found in tuned.items():
        assert (found["kept"], found["backend"]) == ("tuned", backend)
    rows = {(r["form"], r["backend"]): r for r in document["measurements"]}
    for backend in tuned:
        assert rows["tuned", backend]["equal"]
        assert rows["tuned", backend]["milliseconds"] > 0
    assert set(document["layers"][0]["forms"]) == {"train", "fused", "tuned"}
    assert document["layers"][0]["regions"]
    page = (folder / "tuned.html").read_text()
    for form in ("train", "fused", "tuned"):  # both convs at least
        assert page.count(f'<circle class="{form}"') >= 2
        assert f'<div class="bar {form}"' in page
    assert "green tuned" in page
    assert (folder / "tuned" / "roofline.png").stat().st_size > 0
    assert "1 conv stacked" in " ".join(result.err.split())


def test_profile_says_when_the_default_plan_stays(fastvit, clock):
    clock(stacked_is_fast)
    words = ("--backend", "eager", "--seconds", 0, "--json", "-")
    result = fastvit("profile", "tuned.py:build", "--tune", *words)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert {row["form"] for row in document["measurements"]} == {"train", "fused"}
    assert any("the default plan stays" in note for note in document["notes"])


def test_profile_of_a_fused_file_has_nothing_to_tune(fastvit, net):
    assert fastvit("fuse", net, "-o", "n.safetensors").code == 0
    words = ("--backend", "eager", "--seconds", 0, "--json", "-")
    result = fastvit("profile", "n.safetensors", "--tune", *words)
    assert result.code == 0, result.err
    notes = json.loads(result.out)["notes"]
    assert "n.safetensors: only a model before fusion can be tuned" in notes


def test_the_command_that_makes_the_tuned_form_says_what_it_was_tuned_for():
    from fastvit_cli import advice
    from fastvit_cli.cells import Cell

    def cell(form: str, milliseconds: float) -> Cell:
        time = timing.Timing(milliseconds, 0.0, milliseconds, 5)
        return Cell("net", form, "eager", "float32", 1, time, error_ratio=1.0)

    rows = [cell("train", 9.0), cell("fused", 5.0), cell("tuned", 3.0)]
    words = {"fused": [], "tuned": ["--tune", "--threads", "2"]}
    (advised,) = advice.advise(rows, words)
    assert advised.cell.form == "tuned"
    command = "fastvit fuse net -o net-tuned.pt2 --tune --threads 2 --backend eager"
    assert advised.command == command
