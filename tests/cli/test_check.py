"""`fastvit check`: equal through every pair of forms, and each planted fault found."""

from __future__ import annotations

import json
import runpy
from xml.etree import ElementTree

import pytest
import torch
from fastvit_cli import main

FILES = ("n.pt2", "n.onnx", "n.safetensors")

# Candidates: the fused form of the net with one fault each, and what must be named.
FAULTS = """
import copy
import torch
import repcompiler as rc
from net import Small
from torch import nn

def build():
    torch.manual_seed(0)
    net = Small(5, 8)
    with torch.no_grad():
        for value in (net.norm.running_mean, net.norm.running_var, net.norm.weight):
            value.uniform_(0.5, 2.0)
        net.norm.bias.uniform_(-1, 1)
    return net.eval()

def fused():
    return rc.fuse(build(), torch.zeros(1, 3, 16, 16), verify=False).model

def planted(change):
    model = fused()
    with torch.no_grad():
        change(model, model.conv)
    model.input_size = (3, 16, 16)
    return model

def one_weight():
    return planted(lambda m, conv: conv.weight.view(-1)[50].mul_(1 + 1e-3))

def dropped_bias():
    return planted(lambda m, conv: conv.bias.zero_())

def swapped_channels():
    def change(m, conv):
        conv.weight[[0, 3]] = conv.weight[[3, 0]]
    return planted(change)

def wrong_eps():
    return planted(lambda m, conv: conv.weight.mul_(1 + 5e-6))

def shifted_padding():
    return planted(lambda m, conv: conv.weight.copy_(conv.weight.roll(1, -1)))

def border_only():
    def change(m, conv):
        conv.padding_mode = "replicate"
        conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return planted(change)

def swapped_rows():
    def change(m, conv):
        m.head.weight[[1, 2]] = m.head.weight[[2, 1]]
    return planted(change)

class Half(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part.bfloat16()

    def forward(self, x):
        return self.part(x.bfloat16()).float()

def other_dtype():
    def change(m, conv):
        m.conv = Half(conv)
    return planted(change)

def detour():
    class Detour(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return self.part(x * 2 * 0.5)
    def change(m, conv):
        m.conv = Detour(conv)
    return planted(change)

class Other(nn.Module):
    input_size = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x):
        net, norm = self.net, self.net.norm
        patches = torch.nn.functional.unfold(x, 3, padding=1)
        y = torch.einsum("ok,nkp->nop", net.conv.weight.flatten(1), patches)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        y = (y * scale[:, None] + shift[:, None]).clamp_min(0).sum(-1) / y.shape[-1]
        return torch.einsum("kc,nc->nk", net.head.weight, y) + net.head.bias
"""
NAMES = {
    "one_weight": "conv",
    "dropped_bias": "conv",
    "swapped_channels": "conv",
    "wrong_eps": "conv",
    "shifted_padding": "conv",
    "border_only": "conv",
    "swapped_rows": "head",
    "other_dtype": "conv",
}


@pytest.fixture
def faults(net, folder):
    """A file of candidates."""
    (folder / "faults.py").write_text(FAULTS)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, net_source):
    """A small model's fused form in every format, and its folder."""
    place = tmp_path_factory.mktemp("check")
    (place / "net.py").write_text(net_source)
    outputs = [word for path in FILES for word in ("-o", str(place / path))]
    source = f"{place / 'net.py'}:build"
    assert main.run(["fuse", source, *outputs, "--quiet", "--dynamic-size"]) == 0
    return place, source


@pytest.mark.parametrize("candidate", [*FILES, "module"])
@pytest.mark.parametrize("reference", [*FILES, "module"])
def test_a_model_is_equal_to_its_fused_form_in_every_format(
    fastvit, written, reference, candidate
):
    place, source = written
    pair = [source if f == "module" else str(place / f) for f in (reference, candidate)]
    result = fastvit("check", *pair, "--samples", "1", "--json", "-")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["verdict"] == "equal"
    assert document["error_ratio"] < 8
    odd = [case for case in document["cases"] if case["case"].startswith("odd")]
    assert [case["verdict"] for case in odd] == ["equal", "equal"]
    if reference != "n.onnx":
        assert document["origin"]["related"]
        assert document["origin"]["differences"] == []


@pytest.mark.parametrize("fault", list(NAMES))
def test_a_planted_fault_is_found_and_its_region_named(fastvit, faults, fault):
    result = fastvit("check", "faults.py:build", f"faults.py:{fault}", "--json", "-")
    assert result.code == 1
    document = json.loads(result.out)
    assert document["verdict"] == "different"
    assert document["first_difference"]["region"] == NAMES[fault]
    assert NAMES[fault] in result.err.strip().splitlines()[-1]


def test_steps_that_compute_the_same_are_no_difference(fastvit, faults):
    result = fastvit("check", "faults.py:build", "faults.py:detour", "--json", "-")
    assert result.code == 0, result.err
    origin = json.loads(result.out)["origin"]
    assert origin["related"]
    assert origin["shared"] < 1


def test_an_unrelated_graph_is_told_what_outputs_can_show(fastvit, faults):
    args = ("faults.py:build", "faults.py:Other", "--samples", "2")
    result = fastvit("check", *args)
    assert result.code == 0, result.err
    said = " ".join(result.out.split())
    assert "only outputs were compared" in said
    assert "What outputs can show" in said


def test_other_weights_differ_and_the_files_say_so(fastvit, net, folder):
    assert fastvit("fuse", net, "-o", "n.pt2", "--seed", "3").code == 0
    files = ("--junit", "c.xml", "--sarif", "c.sarif", "--repro", "repro")
    result = fastvit("check", net, "n.pt2", *files)
    assert result.code == 1
    assert "NOT EQUAL" in result.out
    suite = ElementTree.parse(folder / "c.xml").getroot()[0]
    assert int(suite.get("failures")) == len(suite.findall("*/failure")) > 3
    (run,) = json.loads((folder / "c.sarif").read_text())["runs"]
    assert run["results"][0]["ruleId"] == "different"
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "n.pt2"
    replayed = fastvit("check", net, "n.pt2", "--replay", "repro/inputs.safetensors")
    assert replayed.code == 1
    assert fastvit("check", net, net, "--replay", "repro/inputs.safetensors").code == 0


def test_the_reproduction_runs_and_shows_the_constant(fastvit, faults, capsys):
    args = ("faults.py:build", "faults.py:one_weight", "--repro", "repro")
    assert fastvit("check", *args).code == 1
    capsys.readouterr()
    runpy.run_path("repro/repro.py")
    out = capsys.readouterr().out
    assert "case 0, output 0" in out
    assert "conv.weight differs most at [1, 2, 1, 2]" in out


def test_equal_and_quiet_says_nothing(fastvit, net):
    result = fastvit("check", net, net, "--quiet", "--samples", "1")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_images_are_compared_as_the_model_takes_them(fastvit, net, folder):
    from PIL import Image

    (folder / "images").mkdir()
    Image.new("RGB", (20, 30), "red").save(folder / "images" / "red.png")
    result = fastvit("check", net, net, "--data", "images", "--json", "-")
    assert result.code == 0, result.err
    assert "image red.png" in [c["case"] for c in json.loads(result.out)["cases"]]


BAD = [
    (["net.py:build", "gone.onnx"], "no file gone.onnx"),
    (["gone.pt2", "net.py:build"], "no file gone.pt2"),
    (["net.py:build", "net.py:build", "--max-error-ratio", "0"], "not above 0"),
    (["net.py:build", "net.py:build", "--replay", "gone"], "holds no inputs"),
    (["net.py:build", "net.py:build", "--data", "gone"], "not a directory"),
    (["net.py:build", "net.py:build", "--repro", "net.py"], "is a file"),
    (["net.py:build", "net.py:build", "--junit", "gone/x.xml"], "no directory"),
    (["net.py:build"], "Missing argument 'CANDIDATE'"),
]


@pytest.mark.parametrize(("args", "problem"), BAD, ids=lambda v: str(v)[-30:])
def test_a_question_that_cannot_be_asked_is_exit_code_2(fastvit, net, args, problem):
    result = fastvit("check", *args)
    assert result.code == 2
    assert problem in result.error


def test_a_refusal_reaches_the_files_of_ci(fastvit, net, folder):
    files = ("--junit", "c.xml", "--sarif", "c.sarif")
    assert fastvit("check", net, "gone.onnx", *files).code == 2
    suite = ElementTree.parse(folder / "c.xml").getroot()[0]
    assert suite.get("errors") == "1"
    (row,) = json.loads((folder / "c.sarif").read_text())["runs"][0]["results"]
    assert row["ruleId"] == "refused"
    assert "gone.onnx" in row["message"]["text"]


def test_nan_and_infinity_have_to_be_where_the_reference_has_them(fastvit, folder):
    (folder / "odd.py").write_text(
        "import torch\n"
        "class A(torch.nn.Module):\n"
        "    input_size = (1, 4, 4)\n"
        "    def forward(self, x):\n"
        "        return torch.log(x.mean((2, 3)) * 0)\n"
        "class B(A):\n"
        "    def forward(self, x):\n"
        "        return -super().forward(x)\n"
    )
    assert fastvit("check", "odd.py:A", "odd.py:A").code == 1  # nothing to compare
    result = fastvit("check", "odd.py:A", "odd.py:B", "--json", "-")
    assert result.code == 1
    note = json.loads(result.out)["cases"][0]["note"]
    assert "NaN and infinity are not where" in note


def test_the_dtype_of_the_output_counts(fastvit, net, folder):
    (folder / "wide.py").write_text(
        "from net import Small\nclass Wide(Small):\n"
        "    def forward(self, x):\n        return super().forward(x).double()\n"
    )
    torch.manual_seed(0)
    result = fastvit("check", net, "wide.py:Wide")
    assert result.code == 1
    assert "is float64 instead of float32" in result.err
