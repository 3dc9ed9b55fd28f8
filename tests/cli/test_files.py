"""What is written computes what the model computes, is whole, and says its origin.

The compiler is a stand-in that fuses nothing; writing and checking are the real thing.
"""

from __future__ import annotations

import errno
import json
import stat

import onnx
import onnxruntime
import pytest
import torch
from fastvit_cli import exporters
from fastvit_cli.exporters import Artefact
from fastvit_cli.programs import EXTRA_FILE
from fastvit_cli.sources import ModelOptions, load
from reports import DIFFERENT, make_report, names
from safetensors import safe_open
from torch import nn

KEYS = {
    "format",
    "source",
    "model_args",
    "form",
    "capture",
    "weights",
    "weights_detail",
    "preprocessing",
    "class_names",
    "versions",
}
SUFFIXES = (".pt2", ".onnx", ".safetensors")


@pytest.fixture
def written(fastvit, net, folder, stand_in):
    """Writes the small net in every format; the folder and the JSON."""
    stand_in()
    outputs = [part for suffix in SUFFIXES for part in ("-o", f"n{suffix}")]
    args = ("--model-arg", "width=6", "--dynamic-size", "--json", "-")
    result = fastvit("fuse", net, *args, *outputs)
    assert result.code == 0, result.err
    return folder, json.loads(result.out), result


def metadata(path) -> dict[str, str]:
    """The card in a file of any format."""
    if path.suffix == ".onnx":
        return {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata()
    extra = {EXTRA_FILE: ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra[EXTRA_FILE])


def test_every_output_is_there_whole_and_listed(written):
    folder, document, result = written
    files = {f"n{suffix}" for suffix in SUFFIXES}
    assert names(folder) == {"net.py", *files}
    assert [row["path"] for row in document["outputs"]] == [f"n{s}" for s in SUFFIXES]
    for row in document["outputs"]:
        assert row["bytes"] == (folder / row["path"]).stat().st_size
        assert len(row["sha256"]) == 64
        assert f"Wrote {row['path']}" in result.err


def test_every_output_carries_the_card(written):
    folder, _, _ = written
    for suffix in SUFFIXES:
        card = metadata(folder / f"n{suffix}")
        assert card.keys() == KEYS, suffix
        assert card["source"] == "net.py:build"
        assert json.loads(card["model_args"]) == {"width": 6}
        assert card["form"] == "fused"
        assert "random" in json.loads(card["weights_detail"])["note"]
        assert json.loads(card["preprocessing"])["input_size"] == [3, 16, 16]
        versions = json.loads(card["versions"])
        assert {"torch", "fastvit-repcompiler"} <= versions.keys()
        assert ("opset" in versions) == (suffix == ".onnx")


def test_onnx_runs_at_any_batch_and_size(written):
    folder, _, _ = written
    model = load("net.py:build", ModelOptions(args={"width": 6})).model
    session = onnxruntime.InferenceSession(
        folder / "n.onnx", providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].name == "output"
    for shape in [(1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 33, 20)]:
        x = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_pt2_runs_at_any_batch_and_size(written):
    folder, _, _ = written
    model = load("net.py:build", ModelOptions(args={"width": 6})).model
    program = torch.export.load(folder / "n.pt2").module()
    for shape in [(1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 33, 20)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x))


def test_without_dynamic_size_only_the_batch_is_dynamic(fastvit, net, folder, stand_in):
    stand_in()
    assert fastvit("fuse", net, "-o", "n.onnx").code == 0
    session = onnxruntime.InferenceSession(
        folder / "n.onnx", providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_what_was_written_is_a_model(written, fastvit, suffix, monkeypatch):
    path = f"n{suffix}"
    original = load("net.py:build", ModelOptions(args={"width": 6}))
    loaded = load(path, ModelOptions())
    assert loaded.card.weights["origin"] == "factory"
    x = torch.randn(2, 3, 16, 16)
    model = loaded.model
    run = model if isinstance(model, nn.Module) else model.module()
    torch.testing.assert_close(run(x), original.model(x))


def test_a_fused_file_whose_source_changed_is_refused(written, fastvit):
    folder, _, _ = written
    text = (folder / "net.py").read_text()
    (folder / "net.py").write_text(text.replace("width=4", "width=4, depth=1", 1))
    changed = text.replace("self.head = nn.Linear", "self.tail = nn.Linear")
    changed = changed.replace("self.head(", "self.tail(")
    (folder / "net.py").write_text(changed)
    result = fastvit("fuse", "n.safetensors")
    assert result.code == 2
    assert "tail.weight" in result.error
    assert "keep a .pt2" in result.error
    (folder / "net.py").unlink()
    gone = fastvit("fuse", "n.safetensors")
    assert gone.code == 2
    assert "no file net.py" in gone.error


def test_a_file_describes_its_own_model(written, fastvit):
    for option in ("--model-arg=width=3", "--weights=x.pth", "--pretrained"):
        result = fastvit("fuse", "n.safetensors", option)
        assert result.code == 2
        assert "n.safetensors, which has its own" in result.error


def test_files_are_readable_as_others_are(written):
    folder, _, _ = written
    modes = {stat.S_IMODE((folder / f"n{s}").stat().st_mode) for s in SUFFIXES}
    assert modes == {stat.S_IMODE((folder / "net.py").stat().st_mode)}


def test_random_weights_are_said_on_screen_and_in_the_file(fastvit, folder, stand_in):
    stand_in()
    result = fastvit("fuse", "timm:test_resnet", "-o", "r.safetensors")
    assert "random weights (seed 0)" in result.out
    assert "The weights are random, and the file says so." in result.out
    card = metadata(folder / "r.safetensors")
    assert card["weights"] == "random"
    # They stay random when the file is given as a checkpoint, or as a model.
    args = ("timm:test_resnet", "--weights", "r.safetensors", "-o", "s.safetensors")
    assert fastvit("fuse", *args).code == 0
    assert metadata(folder / "s.safetensors")["weights"] == "random"


def test_preprocessing_and_class_names_travel(fastvit, folder, stand_in):
    stand_in()
    assert fastvit("fuse", "timm:test_resnet", "-o", "r.onnx").code == 0
    card = metadata(folder / "r.onnx")
    prepared = json.loads(card["preprocessing"])
    assert prepared["input_size"] == [3, 160, 160]
    assert prepared["interpolation"] == "bilinear"
    assert {"mean", "std", "crop_pct"} <= prepared.keys()
    assert len(json.loads(card["class_names"])) == 1000
    args = ("torchvision:squeezenet1_1", "-o", "t.safetensors")
    assert fastvit("fuse", *args).code == 0
    card = metadata(folder / "t.safetensors")
    assert json.loads(card["class_names"])[0] == "tench"
    assert json.loads(card["preprocessing"])["interpolation"] == "bilinear"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_onnx_in_a_dtype_that_cannot_be_checked_is_refused(
    fastvit, net, folder, stand_in, dtype
):
    calls = stand_in()
    before = names(folder)
    result = fastvit("fuse", net, "--dtype", dtype, "-o", "n.pt2", "-o", "n.onnx")
    assert result.code == 2
    assert f"cannot run convolutions in {dtype}" in result.error
    assert "--dtype float32" in result.error
    assert calls == []
    assert names(folder) == before


def test_other_formats_take_bfloat16_and_load_as_such(fastvit, net, folder, stand_in):
    stand_in()
    outputs = ("-o", "n.pt2", "-o", "n.safetensors")
    assert fastvit("fuse", net, "--dtype", "bfloat16", *outputs).code == 0
    for path in ("n.pt2", "n.safetensors"):
        assert load(path, ModelOptions()).dtype == "bfloat16"


def test_nothing_is_written_when_verification_fails(fastvit, net, folder, stand_in):
    stand_in(make_report(DIFFERENT))
    (folder / "n.pt2").write_text("precious")
    before = names(folder)
    outputs = ("-o", "n.pt2", "-o", "n.onnx", "--report", "n.json")
    result = fastvit("fuse", net, *outputs, "--json", "-")
    assert result.code == 1
    assert names(folder) == before
    assert (folder / "n.pt2").read_text() == "precious"
    document = json.loads(result.out)
    assert document["equivalence"]["ok"] is False
    assert document["outputs"] == []
    assert "NOT EQUAL" in result.err
    assert result.err.strip().splitlines()[-1] == (
        "Error: the fused model is not shown to be equal: different. "
        "No file was written."
    )


def fails_half_way(error):
    """A writer that leaves half a file and then fails."""

    def write(artefact, path):
        path.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
        (RuntimeError("PytorchStreamWriter failed"), 1, "PytorchStreamWriter"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_writer_that_fails_leaves_no_file(
    fastvit, net, folder, stand_in, monkeypatch, error, code, said
):
    stand_in()
    monkeypatch.setitem(exporters.WRITERS, ".onnx", fails_half_way(error))
    (folder / "n.onnx").write_text("precious")
    before = names(folder)
    outputs = ("-o", "n.safetensors", "-o", "n.onnx", "--report", "n.json")
    result = fastvit("fuse", net, *outputs)
    assert result.code == code
    assert said in result.err
    assert len(result.err.strip().splitlines()) == (code == 1)
    assert names(folder) == before
    assert (folder / "n.onnx").read_text() == "precious"


def test_a_graph_that_computes_something_else_is_not_kept(
    fastvit, net, folder, stand_in, monkeypatch
):
    stand_in()
    honest = exporters.onnx_runner

    def lying(artefact, path):
        runner = honest(artefact, path)
        runner.register_forward_hook(lambda module, args, output: output * 1.0001)
        return runner

    monkeypatch.setattr(exporters, "onnx_runner", lying)
    before = names(folder)
    result = fastvit("fuse", net, "-o", "n.onnx")
    assert result.code == 1
    assert "n.onnx: the ONNX graph in onnxruntime does not compute" in result.error
    assert names(folder) == before


def test_a_size_that_cannot_be_dynamic_says_what_to_do(fastvit, net, folder, stand_in):
    (folder / "fixed.py").write_text(
        "from torch import nn\n"
        "class Flat(nn.Sequential):\n"
        "    input_size = (3, 4, 4)\n"
        "def build():\n"
        "    return Flat(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 5))\n"
    )
    stand_in()
    assert fastvit("fuse", "fixed.py:build", "-o", "f.pt2").code == 0
    result = fastvit("fuse", "fixed.py:build", "-o", "g.pt2", "--dynamic-size")
    assert result.code == 2
    assert "Try it without --dynamic-size" in result.error
    assert names(folder) == {"net.py", "fixed.py", "f.pt2"}


def test_several_outputs_are_rewritten_in_place(fastvit, net, folder, stand_in):
    stand_in()
    (folder / "n.safetensors").write_text("old")
    assert fastvit("fuse", net, "-o", "n.safetensors").code == 0
    assert metadata(folder / "n.safetensors")["form"] == "fused"
    assert names(folder) == {"net.py", "n.safetensors"}


def test_outputs_keep_the_structure_of_dictionaries(folder):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return {"map": y, "pooled": (y.mean((2, 3)),)}

    card = load("timm:test_resnet", ModelOptions()).card
    artefact = Artefact(Two().eval(), (torch.randn(1, 3, 8, 8),), card)
    for suffix in SUFFIXES:
        exporters.WRITERS[suffix](artefact, folder / f"two{suffix}")
    session = onnxruntime.InferenceSession(
        folder / "two.onnx", providers=["CPUExecutionProvider"]
    )
    assert [o.name for o in session.get_outputs()] == ["output_0", "output_1"]
