"""Every form of MODEL as something that runs: the same tensors out of each."""

from __future__ import annotations

import re

import pytest
import torch
from fastvit_cli import runners
from fastvit_cli.builders import ModelOptions
from fastvit_cli.errors import BadInput

FILES = ("n.pt2", "n.onnx", "n.safetensors")


@pytest.fixture
def written(fastvit, net):
    """The fused form of a small model in every format."""
    outputs = [word for path in FILES for word in ("-o", path)]
    assert fastvit("fuse", net, *outputs).code == 0
    return net


def test_every_form_gives_the_same_tensors(written):
    x = torch.randn(3, 3, 16, 16)
    expected = runners.load(written, ModelOptions())(x)
    for path in FILES:
        runner = runners.load(path, ModelOptions())
        found = runner(x)
        assert found.shape == expected.shape
        assert not found.requires_grad
        assert (found - expected).norm() < 1e-5 * expected.norm()
        assert torch.equal(runner.tensors(x)[0], found)


def test_the_card_of_a_file_is_kept_as_it_was_written(written):
    assert runners.load(written, ModelOptions()).recorded is None
    for path in FILES:
        runner = runners.load(path, ModelOptions())
        assert runner.recorded is not None
        assert runner.recorded.form == "fused"
        assert runner.recorded.source == written
        assert runner.card.input_size == (3, 16, 16)
        assert runner.dynamic_batch


def test_sizes_that_a_file_was_written_for_are_known(written):
    for path in FILES:
        runner = runners.load(path, ModelOptions())
        free = path == "n.safetensors"
        assert runner.takes((torch.zeros(2, 3, 16, 16),))
        assert runner.takes((torch.zeros(2, 3, 16, 17),)) == free


def test_float64_can_be_run_where_torch_runs_it(written):
    for path in (written, *FILES):
        runner = runners.load(path, ModelOptions())
        wide = runner.in_dtype(torch.float64)
        assert (wide is None) == (runner.form == "onnx"), path
        if wide is not None:
            assert wide(*wide.inputs).dtype == torch.float64
            assert runner(*runner.inputs).dtype == torch.float32


def foreign(folder, shape, kind="FLOAT", name="foreign.onnx"):
    """A graph of another program: the mean over positions, or a string's identity."""
    from onnx import TensorProto, helper, save

    element = getattr(TensorProto, kind)
    node = helper.make_node("Relu" if kind == "FLOAT" else "Identity", ["x"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", element, shape)], [value("y", element, shape)]
    )
    opset = helper.make_opsetid("", 18)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / name)
    return name


def test_a_foreign_graph_says_its_size_or_has_it_assumed(folder):
    fixed = runners.load(foreign(folder, [2, 3, 8, 8]), ModelOptions())
    assert fixed.inputs[0].shape == (2, 3, 8, 8)
    assert not fixed.dynamic_batch
    assert fixed.recorded is None
    free = foreign(folder, ["n", 3, "h", "w"], name="free.onnx")
    guessed = runners.load(free, ModelOptions())
    assert guessed.inputs[0].shape == (1, 3, 224, 224)
    assert guessed.dynamic_batch
    assert "3x224x224 is assumed" in guessed.notes[0]
    told = runners.load(free, ModelOptions(input_size=(3, 9, 9)))
    assert told.inputs[0].shape == (1, 3, 9, 9)
    assert told.notes == ()


def test_a_graph_refuses_what_it_cannot_do(folder):
    (folder / "junk.onnx").write_bytes(b"junk")
    fixed = foreign(folder, [2, 3, 8, 8])
    cases = [
        ("gone.onnx", {}, "no file gone.onnx"),
        ("junk.onnx", {}, "does not take junk.onnx"),
        (fixed, {"dtype": "float16"}, "cannot be cast"),
        (fixed, {"weights": "w.pth"}, "--weights"),
        (fixed, {"input_size": (3, 9, 9)}, "cannot take an input of 3x9x9"),
        (foreign(folder, [2], "STRING", "text.onnx"), {}, "tensor(string)"),
    ]
    for text, options, problem in cases:
        with pytest.raises(BadInput, match=re.escape(problem)):
            runners.load(text, ModelOptions(**options))


def test_fuse_says_why_a_graph_cannot_be_fused(fastvit, folder):
    result = fastvit("fuse", foreign(folder, [2, 3, 8, 8]))
    assert result.code == 2
    assert "not rewritten" in result.error
    assert "Give the PyTorch model" in result.error
