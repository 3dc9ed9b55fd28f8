"""`fastvit profile`: its cells, their timing and what it shows of them."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time

import pytest
import torch
from fastvit_cli import backends, cells, subjects, timing
from fastvit_cli.cells import Cell
from fastvit_cli.errors import JobFailed
from helpers import randomise
from torch import nn

import repcompiler as rc

FEW = ("--backend", "eager", "--backend", "eager-channels-last", "--seconds", "0")


def test_json_has_every_cell_its_error_and_the_device(fastvit, net):
    result = fastvit("profile", net, *FEW, "--batch", 1, "--batch", 3, "--json", "-")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    rows = document["measurements"]
    assert {(r["form"], r["backend"], r["batch"]) for r in rows} == {
        (form, backend, batch)
        for form in ("train", "fused")
        for backend in ("eager", "eager-channels-last")
        for batch in (1, 3)
    }
    for row in rows:
        assert row["milliseconds"] >= row["best_milliseconds"] > 0
        assert row["equal"]
        assert row["error_ratio"] <= cells.MAX_ERROR_RATIO
    assert document["device"]["threads"] == torch.get_num_threads()
    assert [r["batch"] for r in document["recommendations"]] == [1, 3]
    forms = document["models"][0]["forms"]
    assert forms["fused"]["ops"] < forms["train"]["ops"]


def test_what_was_measured_is_shown_before_what_comes_next(fastvit, net, monkeypatch):
    measure = cells.measure

    def interrupted(grids, batch, seconds, stage):
        if batch == 3:
            raise KeyboardInterrupt
        return measure(grids, batch, seconds, stage)

    monkeypatch.setattr(cells, "measure", interrupted)
    result = fastvit("profile", net, *FEW, "--batch", 1, "--batch", 3)
    assert result.code == 130
    assert "batch 1" in result.out and "batch 3" not in result.out
    assert "Traceback" not in result.err


def test_the_screen_names_the_advised_command(fastvit, net):
    result = fastvit("profile", net, *FEW)
    assert result.code == 0
    flat = " ".join(result.out.split())
    assert "on this device use the" in flat
    assert f"fastvit fuse {net} -o" in flat or "train form" in flat


def test_several_models_stand_side_by_side(fastvit, net):
    other = net.replace("build", "Small")
    result = fastvit("profile", net, other, *FEW, "--json", "-")
    document = json.loads(result.out)
    assert [row["model"] for row in document["models"]] == [net, other]
    assert {row["model"] for row in document["recommendations"]} == {net, other}


def test_one_model_that_cannot_be_loaded_stops_no_other(fastvit, net, folder):
    bad = net.replace("build", "fails")
    result = fastvit("profile", bad, net, *FEW, "--json", "p.json")
    document = json.loads((folder / "p.json").read_text())
    assert [row["model"] for row in document["models"]] == [net]
    assert list(document["failed"]) == [bad]
    assert "no such backbone" in document["failed"][bad]
    assert result.code == 2
    assert result.error.startswith(f"Error: {bad}")
    assert fastvit("profile", bad, *FEW).code == 2


def test_a_model_that_cannot_be_fused_is_measured_as_it_is(fastvit, net):
    asks = net.replace("build", "chance")
    result = fastvit("profile", asks, *FEW, "--json", "-")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert {row["form"] for row in document["measurements"]} == {"train"}
    assert any("it has no fused form" in note for note in document["notes"])
    assert document["recommendations"][0]["usage"].startswith("model.eval()")


def test_a_fused_form_that_is_not_equal_fails_after_the_rest_is_shown(
    fastvit, net, folder, monkeypatch
):
    def unequal(runner):
        raise JobFailed("what fusing gives is not shown to be equal: different.")

    monkeypatch.setattr(subjects, "fuse", unequal)
    result = fastvit("profile", net, *FEW, "--json", "p.json")
    assert result.code == 1
    assert f"{net}: what fusing gives is not shown to be equal" in result.error
    rows = json.loads((folder / "p.json").read_text())["measurements"]
    assert {row["form"] for row in rows} == {"train"}


def test_sound_and_several_inputs_are_profiled_too(fastvit, net):
    sound, pair = net.replace("build", "sound"), net.replace("build", "pair")
    result = fastvit("profile", sound, pair, *FEW, "--batch", 2, "--json", "-")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [row["input_size"] for row in document["models"]] == [[2, 40], [3, 9, 9]]
    assert all(row["equal"] for row in document["measurements"])
    assert {row["form"] for row in document["measurements"]} == {"train", "fused"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--threads", "9999"), "--threads 9999 is more than this machine's"),
        (("--backend", "tensorrt"), "--backend tensorrt is not known"),
        (("--batch", "0"), "--batch 0 is not positive"),
        (("--batch", "2", "--batch", "2"), "--batch is given twice"),
        (("--threads", "0"), "--threads 0 is not positive"),
        (("--dtype", "int8"), "--dtype int8 is not known"),
        (("--seconds", "nan"), "--seconds nan is no such number"),
        (("--seconds", "-1"), "--seconds -1.0 is no such number"),
        (("--layers", "-1"), "--layers -1 is no such number"),
    ],
)
def test_bad_options_are_one_line(fastvit, net, args, said):
    result = fastvit("profile", net, *args)
    assert result.code == 2
    assert said in result.error


def test_a_batch_that_memory_cannot_hold_is_said(fastvit, net):
    words = ("--backend", "eager", "--seconds", "0", "--batch", 10**12)
    result = fastvit("profile", net, *words)
    assert result.code == 1
    text = " ".join(result.err.split())
    assert "a batch of 1000000000000 does not fit into memory" in text
    result = fastvit("fuse", net, "--tune", "--batch", 10**12)
    assert result.code == 2
    assert "does not fit into memory. Use a smaller --batch." in result.error


def test_on_a_narrow_screen_every_figure_has_its_label(fastvit, net, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    words = ("--backend", "eager", "--seconds", "0", "--layers", 1)
    result = fastvit("profile", net, *words)
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "net.py:build, fused: Params" in text
    assert "fused, eager, float32: ms" in text
    assert "GFLOP/s" in text
    assert "…" not in text
    assert max(map(len, result.out.splitlines()[:-3])) <= 40


def test_several_models_have_a_table_each(fastvit, net):
    other = net.replace("build", "Small")
    words = ("--backend", "eager", "--seconds", "0")
    result = fastvit("profile", net, other, *words)
    assert result.code == 0
    assert f"{net}, batch 1" in result.out
    assert f"{other}, batch 1" in result.out
    whole = ("make:", "run:", "on this device")  # lines to copy, or to search for
    rows = [r for r in result.out.splitlines() if not any(word in r for word in whole)]
    assert max(map(len, rows)) <= 80
    ranked = result.out.split("The fastest equal form of each, batch 1")[1]
    rows = [
        r.split() for r in ranked.splitlines() if r.startswith((f" {net}", f" {other}"))
    ]
    speeds = [float(row[-2]) for row in rows]
    assert len(rows) == 2 and speeds == sorted(speeds)


def test_a_backend_that_is_not_here_says_how_to_get_it(fastvit, net, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    result = fastvit(
        "profile", net, "--backend", "openvino", "--backend", "eager", "--seconds", "0"
    )
    assert result.code == 0
    assert "pip install openvino" in " ".join(result.out.split())
    alone = fastvit("profile", net, "--backend", "openvino")
    assert alone.code == 1
    assert "pip install openvino" in alone.err


# ---- accuracy ----------------------------------------------------------------------


def test_errors_are_those_of_the_compilers_own_check():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 4)
    wrong = nn.Linear(6, 4)
    wrong.load_state_dict(model.state_dict())
    with torch.no_grad():
        wrong.bias += 1e-5
    x = torch.randn(3, 6, generator=generator)
    with torch.no_grad():
        truth = model.double()(x.double())
        found, own = wrong(x), model.float()(x)
    ratio, distance = cells.errors(found, own, truth, "float32")
    verdict = rc.verify(model, wrong, (x,))
    assert ratio == pytest.approx(verdict.error_ratio)
    assert distance == pytest.approx(
        float((found.double() - truth).norm() / truth.norm())
    )


@pytest.mark.parametrize("backend", ["eager", "eager-channels-last", "onnxruntime"])
def test_every_backend_computes_the_model(backend, tmp_path):
    if backends.BACKENDS[backend].lacks():
        pytest.skip(backends.BACKENDS[backend].lacks())
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    from fastvit_cli.card import Card

    card = Card("net", {"input_size": [3, 9, 11]}, weights={"origin": "random"})
    x = torch.randn(1, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    subject = backends.Subject(net, (x,), card, "float32", "cpu", 1, tmp_path)
    inputs = backends.of_batch(subject, 2)
    (found,) = cells.flat(backends.BACKENDS[backend].prepare(subject, inputs)())
    with torch.no_grad():
        expected = net.double()(inputs[0].double())
    assert float((found - expected).norm() / expected.norm()) < 1e-6


# ---- timing and counting ------------------------------------------------------------


def test_interleaved_rounds_visit_every_call_and_find_the_slow_one():
    rounds = timing.interleave(
        {"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.004)}, 0.0
    )
    assert {len(visits) for visits in rounds.values()} == {timing.MIN_ROUNDS}
    fast, slow = (timing.summarise(rounds[key]) for key in ("fast", "slow"))
    assert fast.median >= 1.0
    assert slow.median >= 4.0
    assert timing.ratio(rounds["fast"], rounds["fast"]) == 1.0
    assert timing.ratio(rounds["fast"], rounds["slow"]) < 1.0


def test_page_faults_are_those_of_what_is_allocated_anew_in_each_call():
    import resource

    size = 64 * resource.getpagesize() * 16
    found = timing.page_faults(lambda: mmap.mmap(-1, size).write(bytes(size)))
    assert found is not None
    assert found.count >= size / resource.getpagesize() / 16  # huge pages are fewer
    assert found.share > 0
    idle = timing.page_faults(lambda: sum(range(1000)))
    assert idle is not None
    assert idle.count < 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_the_kernels_share_is_said_with_what_helps_against_it():
    pair = [Cell("m", "fused", "eager", "float32", n) for n in (1, 8)]
    assert cells.fault_notes([]) == cells.fault_notes(pair) == []
    pair[0].faults, pair[1].faults = timing.Faults(3, 0.01), timing.Faults(0.0, 0.3)
    assert cells.fault_notes(pair) == []  # a share of nothing is no finding
    pair[1].faults = timing.Faults(8e4, 0.3)
    (note,) = cells.fault_notes(pair)
    assert "batch 8: 80,000 page faults" in note
    assert "30% of the processor's time" in note
    words = dict(word.split("=") for word in note.split() if word.startswith("MALLOC"))
    script = "from fastvit_cli import timing as t; print(t.page_faults(lambda: "
    script += "bytearray(1 << 26)).count)"
    run = [sys.executable, "-c", script]
    freed, kept = (
        float(subprocess.check_output(run, env={**os.environ, **more}, text=True))
        for more in ({}, words)
    )
    assert kept < freed / 10
    script = script.replace("print", "assert t.keep_memory(); print")
    found = subprocess.check_output([*run[:2], script], text=True)
    assert float(found) < freed / 10


def test_memory_grows_by_what_a_call_allocates():
    _, grown = timing.peak_growth(lambda: torch.ones(16 * 2**20).sum())
    if grown is None:
        pytest.skip("the kernel of this system keeps no resettable peak")
    assert 60 * 2**20 < grown < 90 * 2**20


def test_ops_sum_to_the_whole_and_move_what_they_read_and_write(
    fastvit, net, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    args = ("profile", net, "--backend", "eager", "--seconds", 0, "--layers", 3)
    document = json.loads(fastvit(*args, "--json", "-").out)
    ops = document["layers"][0]["forms"]["fused"]["layers"]
    whole = document["models"][0]["forms"]["fused"]["macs"]
    assert sum(op["macs"] for op in ops) == whole
    # Input 3x16x16, output 4x16x16, kernel 4x3x3x3 and its bias, four bytes each.
    assert ops[0]["bytes"] == 4 * (3 * 256 + 4 * 256 + 4 * 27 + 4)
    assert (tmp_path / "cache" / "fastvit-repcompiler" / "rooflines.json").is_file()
