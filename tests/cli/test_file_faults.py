"""One number changed inside a file: found, and put in its layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from fastvit_cli import main
from fastvit_cli.programs import EXTRA_FILE

FORMATS = ("pt2", "onnx", "safetensors")


def in_pt2(path: Path, change) -> None:
    extra = {EXTRA_FILE: ""}
    program = torch.export.load(path, extra_files=extra)
    with torch.no_grad():
        for tensor in program.state_dict.values():
            change(tensor)
    torch.export.save(program, path, extra_files=extra)


def in_onnx(path: Path, change) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path)
    for held in graph.graph.initializer:
        value = torch.tensor(numpy_helper.to_array(held))
        if value.is_floating_point():
            change(value)
            raw = numpy.ascontiguousarray(value.numpy())
            held.CopyFrom(numpy_helper.from_array(raw, held.name))
    onnx.save(graph, path)


def in_safetensors(path: Path, change) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for tensor in tensors.values():
        change(tensor)
    save_file(tensors, path, metadata)


EDIT = {"pt2": in_pt2, "onnx": in_onnx, "safetensors": in_safetensors}


def one_weight(tensor: torch.Tensor) -> None:
    if tensor.dim() == 4:
        tensor.view(-1)[7] *= 1 + 1e-3


def dropped_bias(tensor: torch.Tensor) -> None:
    if tensor.shape == (CHANNELS,):
        tensor.zero_()


def swapped_channels(tensor: torch.Tensor) -> None:
    if tensor.dim() == 4:
        tensor[[0, 1]] = tensor[[1, 0]]


CHANNELS = 8
FAULTS = (one_weight, dropped_bias, swapped_channels)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A small model whose conv and norm are one region."""
    place = tmp_path_factory.mktemp("files") / "small.py"
    place.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        f"    norm = nn.BatchNorm2d({CHANNELS})\n"
        "    nn.init.uniform_(norm.weight, 0.5, 1.5)\n"
        "    nn.init.normal_(norm.bias)\n"
        "    norm.running_mean.normal_()\n"
        "    norm.running_var.uniform_(0.5, 2.0)\n"
        f"    conv = nn.Conv2d(3, {CHANNELS}, 3, padding=1)\n"
        "    tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        f"    net = nn.Sequential(conv, norm, *tail, nn.Linear({CHANNELS}, 5))\n"
        "    net.input_size = (3, 16, 16)\n"
        "    return net.eval()\n"
    )
    return f"{place}:build"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_fault_in_a_file_is_found_and_put_in_its_layer(
    suffix, source, folder, capsys
):
    path = folder / f"fused.{suffix}"
    told = ["check", source, str(path), "--samples", "1", "--json", "-"]
    for fault in FAULTS:
        write = ["fuse", source, "-o", str(path), "--quiet"]
        assert main.run(write) == 0
        capsys.readouterr()
        assert main.run(told) == 0, "unchanged"
        capsys.readouterr()
        EDIT[suffix](path, fault)
        assert main.run(told) == 1, fault.__name__
        found = json.loads(capsys.readouterr().out)
        assert found["verdict"] == "different"
        assert found["first_difference"]["region"] == "0", fault.__name__
        path.unlink()
