"""Models of words, of a batch, of float64: what `profile` and `fuse` take them for."""

from __future__ import annotations

import json

import pytest

WORDS = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, places):
        x = self.mix(self.table(places)).transpose(1, 2)
        return self.norm(x)

def words():
    return Words(), torch.tensor([[1, 9, 3]])

def four():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    body[1].running_mean.uniform_(-1, 1)
    return body, torch.randn(4, 3, 8, 8)
"""
QUICK = ("--backend", "eager", "--seconds", "0", "--layers", "0", "--json", "-")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(WORDS)


@pytest.mark.usefixtures("file")
def test_a_model_of_words_is_measured_and_fused(fastvit):
    result = fastvit("profile", "net.py:words", *QUICK, "--batch", 1, "--batch", 3)
    assert result.code == 0, result.err
    rows = json.loads(result.out)["measurements"]
    assert [row["dtype"] for row in rows] == ["float32"] * 4
    assert all(row["equal"] and row["milliseconds"] for row in rows)
    written = fastvit("fuse", "net.py:words", "-o", "out.onnx", "--quiet")
    assert written.code == 0, written.err


@pytest.mark.usefixtures("file")
def test_macs_are_those_of_one_sample(fastvit):
    result = fastvit("profile", "net.py:four", *QUICK)
    assert result.code == 0, result.err
    (model,) = json.loads(result.out)["models"]
    by_hand = 3 * 4 * 9 * 36  # of the conv; and the norm's 4 maps of 36
    assert model["forms"]["fused"]["macs"] == by_hand
    assert model["forms"]["train"]["macs_dispatched"] == by_hand


@pytest.mark.usefixtures("file")
def test_the_fused_form_in_float64_has_its_digits(fastvit):
    result = fastvit("profile", "net.py:four", *QUICK, "--dtype", "float64")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["measurements"]
    assert all(row["equal"] for row in rows)
    assert max(row["distance"] for row in rows) < 1e-14


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "words",
    [
        ("fuse", "--certificate", "x.json", "--report", "x.json"),
        ("fuse", "-o", "x.pt2", "--json", "x.pt2"),
        ("fuse", "--certificate", "x.json", "--json", "x.json"),
        ("fuse", "--report", "x.html", "--json", "./x.html"),
        ("profile", "--html", "x.html", "--json", "x.html"),
        ("profile", "--png", "pictures", "--json", "pictures/backends.png"),
    ],
)
def test_two_results_in_one_file_are_refused(fastvit, words, tmp_path):
    (tmp_path / "pictures").mkdir()
    command, *rest = words
    result = fastvit(command, "net.py:four", *rest)
    assert result.code == 2
    assert "both write" in result.err and "file of its own" in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.py", "pictures"]


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("option", ["--output", "--report"])
def test_one_file_given_twice_is_refused(fastvit, option, tmp_path):
    name = "x.pt2" if option == "--output" else "x.html"
    result = fastvit("fuse", "net.py:four", option, name, option, f"./{name}")
    assert result.code == 2 and f"{option} {name} is given twice" in result.err
    assert not (tmp_path / name).exists()


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_seeds_out_of_range(fastvit, seed):
    result = fastvit("fuse", "net.py:four", f"--seed={seed}")
    assert result.code == 2 and "out of range" in result.err
    graph = fastvit("profile", "net.onnx", f"--seed={seed}")  # before any file is read
    assert graph.code == 2 and "out of range" in graph.err


@pytest.mark.usefixtures("file")
def test_a_model_without_a_figure_is_no_success(fastvit):
    few = ("--backend", "onnxruntime", "--dtype", "bfloat16", "--seconds", "0")
    result = fastvit("profile", "net.py:four", *few)
    assert result.code == 1 and "could be measured" in result.err


@pytest.mark.usefixtures("file")
def test_an_onnx_graph_is_not_cast(fastvit):
    assert fastvit("fuse", "net.py:four", "-o", "net.onnx", "--quiet").code == 0
    few = ("--backend", "openvino", "--dtype", "bfloat16", "--seconds", "0")
    result = fastvit("profile", "net.onnx", *few)
    assert result.code == 1 and "cannot be cast to bfloat16" in result.err
