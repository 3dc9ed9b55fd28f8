"""OpenVINO's own files: what they hold, who reads them, which kernels they ask for.

The tuner's choice of kernels is made by a stand-in for the clock; all else runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastvit_cli import irgraphs, irmacs, runners, tuner
from fastvit_cli.backends import BACKENDS
from fastvit_cli.builders import ModelOptions
from fastvit_cli.errors import BadInput
from fastvit_cli.onnx_plans import in_kernels
from torch import nn
from tune_helpers import tune

openvino = pytest.importorskip("openvino")

BOTH = "depthwise and dense convs in direct kernels"  # what tuned.py has
IN_OPENVINO = ("--backend", "openvino", "--threads", 1)


class Kinds(nn.Module):
    """A conv of each kind, and one that has no direct kernel."""

    input_size = (4, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twofold = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)
        self.row = nn.Conv1d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depth(torch.relu(self.point(torch.relu(self.dense(x)))))
        x = self.grouped(torch.relu(self.twofold(torch.relu(x))))
        return self.head(torch.relu(self.row(x.flatten(2))).mean(2))


def graph_of(model: nn.Module, x: torch.Tensor):
    """The module as OpenVINO converts it."""
    return openvino.convert_model(model.eval(), example_input=x, input=[list(x.shape)])


def asked(graph) -> dict[str, str]:
    """The kind of each conv, and the kernels that it asks for."""
    found = {}
    for op in graph.get_ops():
        if op.get_type_name() in irgraphs.CONVS:
            key = "x".join(map(str, irgraphs.weight_of(op)))
            found[key] = " ".join(map(str, op.get_rt_info()))
    return found


@pytest.fixture
def kinds(folder) -> str:
    """A MODEL with a conv of each kind."""
    text = Path(__file__).read_text(encoding="utf-8")
    body = text[text.index("class Kinds") : text.index("def graph_of")]
    (folder / "kinds.py").write_text(f"import torch\nfrom torch import nn\n{body}")
    return "kinds.py:Kinds"


# ---- kernels -----------------------------------------------------------------------


@pytest.fixture
def on_x86(monkeypatch):
    """A processor that has the kernels, whatever runs the tests."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_only_convs_that_have_a_direct_kernel_ask_for_it(on_x86):
    x = torch.randn(1, 4, 12, 12)
    graph = graph_of(Kinds(), x)
    assert irgraphs.kinds_in(graph) == irgraphs.KINDS
    found = asked(irgraphs.prefer_direct(graph, ("depthwise", "dense")))
    with_priority = {key for key, told in found.items() if "priority" in told}
    assert with_priority == {"8x1x1x3x3", "1x8x4x3x3"}
    assert set(found) - with_priority == {
        "1x8x8x1x1",  # pointwise, which was not named
        "8x2x1x3x3",  # depthwise with two outputs a channel
        "2x8x8x3x3",  # in groups
        "1x16x16x1",  # of rows, not of images
    }


def test_a_processor_of_another_kind_has_no_choice(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert irgraphs.kinds_in(graph_of(Kinds(), torch.randn(1, 4, 12, 12))) == ()


@pytest.mark.parametrize(
    "mix", [("depthwise",), ("pointwise", "dense"), irgraphs.KINDS]
)
def test_every_mix_of_kernels_computes_the_same(mix):
    model, x = Kinds().eval(), torch.randn(2, 4, 12, 12)
    expected = model(x).detach()
    (found,) = irgraphs.runner(irgraphs.prefer_direct(graph_of(model, x), mix))(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_result_is_not_written_over_by_the_next_run():
    model, x = Kinds().eval(), torch.randn(1, 4, 12, 12)
    run = irgraphs.runner(graph_of(model, x))
    (first,) = run(x)
    kept = first.clone()
    run(x * 2)
    assert torch.equal(first, kept)


# ---- the tuner ---------------------------------------------------------------------


def test_the_fastest_kernels_are_kept_written_and_said(fastvit, clock, folder, on_x86):
    times = {"default": 1.0, f"1 conv concatenated, {BOTH}": 0.4}
    clock(
        lambda key: {"as one conv": 10.0}.get(key.partition(",")[0], 1.0),
        lambda name: times.get(str(name), 0.8 if "concatenated" in str(name) else 0.9),
    )
    found, result = tune(fastvit, *IN_OPENVINO, "-o", "n.xml", "-o", "n.onnx")
    assert (found["kept"], found["ratio"]) == ("tuned", 0.4)
    assert found["plan"]["kernels"] == ["depthwise", "dense"]
    assert found["left_out"] == []
    assert BOTH in " ".join(result.err.split())
    written = json.loads(result.out)["outputs"][0]
    assert (written["format"], written["kernels"]) == (
        "openvino",
        ["depthwise", "dense"],
    )
    assert written["weights_bytes"] == (folder / "n.bin").stat().st_size
    told = asked(irgraphs.read("n.xml")).values()
    assert told and all("priority" in it for it in told)
    recorded = runners.load("n.xml", ModelOptions()).recorded
    assert recorded is not None
    assert recorded.tuning["kernels"] == ["depthwise", "dense"]
    for file in ("n.xml", "n.onnx"):
        assert fastvit("check", "tuned.py:build", file).code == 0


def test_a_file_of_weights_hands_its_kernels_on(fastvit, clock, folder, on_x86):
    clock(lambda key: 1.0, lambda name: 0.5 if "direct" in str(name) else 1.0)
    words = ("-o", "n.xml", "-o", "n.safetensors")
    found, _ = tune(fastvit, *IN_OPENVINO, *words)
    assert found["plan"]["kernels"]
    assert fastvit("fuse", "n.safetensors", "-o", "again.xml").code == 0
    assert asked(irgraphs.read("again.xml")) == asked(irgraphs.read("n.xml"))


def test_an_onnx_graph_cannot_say_which_kernels(fastvit, clock, on_x86):
    clock(lambda key: 1.0, lambda name: 0.5 if "direct" in str(name) else 1.0)
    found, _ = tune(fastvit, *IN_OPENVINO, "-o", "n.onnx")
    assert found["kept"] == "default"
    assert found["left_out"] == [{"plan": "direct kernels", "why": tuner.SILENT}]


def test_kernels_that_compute_something_else_are_left_out(
    fastvit, clock, monkeypatch, on_x86
):
    real = BACKENDS["openvino"]

    def prepare(subject, inputs):
        run = real.prepare(subject, inputs)
        return (lambda: [x + 1e-2 for x in run()]) if subject.kernels else run

    monkeypatch.setitem(BACKENDS, "openvino", replace(real, prepare=prepare))
    clock(lambda key: 1.0, lambda name: 0.5 if "direct" in str(name) else 1.0)
    found, _ = tune(fastvit, *IN_OPENVINO)
    assert found["kept"] == "default"
    assert {row["why"] for row in found["left_out"]} == {
        "JobFailed: openvino computes something else"
    }


def test_plans_that_were_timed_are_told_where_none_is_faster(fastvit, clock, on_x86):
    clock(lambda key: 1.0, lambda name: 1.0 if name == "default" else 1.2)
    found, _ = tune(fastvit, *IN_OPENVINO)
    assert (found["kept"], found["why"]) == ("default", "no other plan was faster")
    assert any("direct kernels" in row["plan"] for row in found["plans"])


def test_each_plan_is_exported_once(fastvit, clock, monkeypatch, on_x86):
    from fastvit_cli import exporters

    made: list[str] = []
    real = exporters.export_onnx

    def export(artefact):
        made.append(str(artefact.model))
        return real(artefact)

    monkeypatch.setattr(exporters, "export_onnx", export)
    clock(lambda key: 1.0, lambda name: 1.0)
    found, _ = tune(fastvit, *IN_OPENVINO)
    assert len(found["plans"]) > 4
    assert len(made) == len(set(made))


def test_other_runtimes_have_no_such_kernels(fastvit, clock, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("fastvit_cli.onnx_plans.in_kernels", None)
    clock(lambda key: 1.0, lambda name: 1.0)
    found, _ = tune(fastvit, "--backend", "onnxruntime")
    assert found["left_out"] == []


def test_every_mix_of_the_kinds_there_are_is_a_plan(monkeypatch, on_x86):
    from fastvit_cli.plans import Plan, signature

    import repcompiler as rc

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    plan = Plan(("x",), rc.Tuning(), torch.fx.symbolic_trace(model), frozenset())
    graph = graph_of(model, torch.randn(1, 3, 9, 9))
    monkeypatch.setattr(irgraphs, "core", lambda: Reads(graph))
    exports = type("E", (), {"files": {signature(plan): "x.onnx"}})()
    found = in_kernels(type("T", (), {"exports": exports})(), plan)
    assert [it.kernels for it in found] == [
        ("pointwise",),
        ("dense",),
        ("pointwise", "dense"),
    ]
    assert found[-1].name == "x, pointwise and dense convs in direct kernels"


class Reads:
    """An entrance that has one graph."""

    def __init__(self, graph) -> None:
        self.graph = graph

    def read_model(self, path):
        return self.graph


# ---- files -------------------------------------------------------------------------


@pytest.fixture
def written(fastvit, kinds) -> str:
    """`n.xml` of the fused form."""
    result = fastvit("fuse", kinds, "-o", "n.xml", "--json", "-")
    assert result.code == 0, result.err
    return kinds


def test_a_file_is_checked_and_profiled(fastvit, written):
    result = fastvit("check", written, "n.xml", "--json", "-")
    assert result.code == 0, result.err
    assert json.loads(result.out)["origin"] is None
    words = ("--backend", "openvino", "--backend", "onnxruntime", "--backend", "eager")
    result = fastvit("profile", "n.xml", *words, "--json", "-")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    said = {row["backend"]: row["skipped"] for row in found["measurements"]}
    assert said == {
        "openvino": None,
        "onnxruntime": "an OpenVINO graph runs in OpenVINO only",
        "eager": "a graph of a runtime does not run in torch",
    }


def test_what_a_file_costs_is_counted(written):
    counted = irmacs.counts("n.xml", (torch.randn(1, 4, 12, 12),))
    macs = {
        "Convolution": 144 * (8 * 4 * 9 + 8 * 8) + 64 * 16 * 16,
        "GroupConvolution": 144 * 8 * 9 + 100 * 16 * 9 + 64 * 16 * 8 * 9,
        "MatMul": 16 * 3,
    }
    assert counted["macs_by_operator"] == macs
    assert counted["macs"] == sum(macs.values())
    assert counted["uncounted"]["Relu"] == 5
    own = sum(p.numel() for p in Kinds().parameters())
    assert own <= counted["params"] <= own + 8


def test_a_file_with_another_value_is_found(fastvit, written, folder):
    raw = bytearray((folder / "n.bin").read_bytes())
    numbers = torch.frombuffer(raw, dtype=torch.float32)
    numbers[: len(numbers) // 2] *= 1.01
    (folder / "n.bin").write_bytes(bytes(raw))
    result = fastvit("check", written, "n.xml")
    assert result.code == 1
    assert "not shown to be the same function" in result.error


def test_a_file_refuses_what_it_cannot_do(fastvit, written, folder):
    whole = (folder / "n.xml").read_text(encoding="utf-8")
    weights = (folder / "n.bin").read_bytes()
    (folder / "alone.xml").write_text(whole, encoding="utf-8")
    (folder / "junk.xml").write_text("<html></html>", encoding="utf-8")
    (folder / "junk.bin").write_bytes(b"")
    (folder / "short.xml").write_text(whole, encoding="utf-8")
    (folder / "short.bin").write_bytes(weights[:100])
    cases = [
        ("gone.xml", {}, "no file gone.xml"),
        ("alone.xml", {}, "its weights in alone.bin, which is not beside it"),
        ("junk.xml", {}, "does not take junk.xml"),
        ("short.xml", {}, "does not take short.xml"),
        ("n.xml", {"dtype": "float16"}, "an OpenVINO graph in float32, and cannot be"),
        ("n.xml", {"weights": "w.pth"}, "--weights"),
        ("n.xml", {"input_size": (4, 9, 9)}, "cannot take an input of 4x9x9"),
    ]
    for text, options, problem in cases:
        with pytest.raises(BadInput, match=re.escape(problem)):
            runners.load(text, ModelOptions(**options))
    for words in (
        ("fuse", "n.xml"),
        ("train", "digits", "--model", "n.xml"),
        ("check", written, "n.xml", "--certificate", "c.json"),
    ):
        assert fastvit(*words).code == 2


def test_a_certificate_is_not_about_it(fastvit, kinds):
    words = ("-o", "n.xml", "--certificate", "c.json")
    assert fastvit("fuse", kinds, *words).code == 0
    result = fastvit("check", kinds, "n.xml", "--certificate", "c.json")
    assert result.code == 2
    assert "constants have lost the names" in result.error


def test_its_weights_overwrite_nobodys_file(fastvit, kinds, folder):
    (folder / "n.bin").write_bytes(b"mine")
    result = fastvit("fuse", kinds, "-o", "n.xml")
    assert result.code == 2
    assert "n.bin" in result.error and "such a file already" in result.error
    assert (folder / "n.bin").read_bytes() == b"mine"
    assert not (folder / "n.xml").exists()
    result = fastvit("fuse", kinds, "-o", "a.xml", "--report", "a.json", "--json", "-")
    assert result.code == 0, result.err
    assert fastvit("fuse", kinds, "-o", "a.xml").code == 0  # its own, written again


def test_an_xml_of_another_program_owns_no_weights(fastvit, kinds, folder):
    (folder / "n.xml").write_text("<testsuites/>", encoding="utf-8")
    (folder / "n.bin").write_bytes(b"mine")
    assert fastvit("fuse", kinds, "-o", "n.xml").code == 2
    assert (folder / "n.bin").read_bytes() == b"mine"
    (folder / "elsewhere.bin").write_bytes(b"mine")
    (folder / "m.bin").symlink_to(folder / "elsewhere.bin")
    result = fastvit("fuse", kinds, "-o", "m.xml")
    assert result.code == 2 and "m.bin is a link" in result.error
    assert (folder / "elsewhere.bin").read_bytes() == b"mine"


def test_a_report_is_not_written_over_the_graph(fastvit, written, folder):
    before = (folder / "n.xml").read_bytes()
    result = fastvit("check", written, "n.xml", "--junit", "n.xml")
    assert result.code == 2 and "over a model that is compared" in result.error
    assert (folder / "n.xml").read_bytes() == before


def test_nothing_is_left_of_a_file_that_could_not_be_written(
    fastvit, kinds, folder, monkeypatch
):
    from fastvit_cli.exporters import WRITERS

    def fail(artefact, path):
        WRITERS_XML(artefact, path)
        raise RuntimeError("disk on fire")

    WRITERS_XML = WRITERS[".xml"]
    monkeypatch.setitem(WRITERS, ".xml", fail)
    result = fastvit("fuse", kinds, "-o", "n.xml", "-o", "n.onnx")
    assert result.code == 1
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "kinds.py"
    ]


def test_other_dtypes_and_a_missing_runtime_are_said_early(fastvit, kinds, monkeypatch):
    result = fastvit("fuse", kinds, "--dtype", "float64", "-o", "n.xml")
    assert result.code == 2
    assert "OpenVINO computes in float32" in result.error
    real = BACKENDS["openvino"]
    lacking = replace(real, lacks=lambda: irgraphs.MISSING)
    monkeypatch.setitem(BACKENDS, "openvino", lacking)
    result = fastvit("fuse", kinds, "-o", "n.xml")
    assert result.code == 2
    assert "not installed" in result.error and "pip install openvino" in result.error
