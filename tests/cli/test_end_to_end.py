"""The command with the real compiler, in this process and as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import onnxruntime
import pytest
import torch
from fastvit_cli.sources import ModelOptions, load
from reports import names

T8 = ("fastvit_t8", "--input-size", "3x64x64")


def test_fastvit_t8_is_fused_written_and_read_back(fastvit, folder):
    outputs = ("-o", "t8.onnx", "-o", "t8.safetensors", "-o", "t8.pt2")
    result = fastvit("fuse", *T8, *outputs, "--report", "t8.json", "--json", "-")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["equivalence"]["ok"] is True
    assert document["equivalence"]["exactness"] < 1e-9
    assert document["ops"]["after"] <= 85
    assert document["ops"]["after_by_type"]["batch_norm"] == 0
    assert len(document["outputs"]) == 3
    assert json.loads((folder / "t8.json").read_text()) == document

    x = torch.randn(3, 3, 64, 64)
    expected = load("fastvit_t8", ModelOptions()).model(x).detach()
    session = onnxruntime.InferenceSession(
        folder / "t8.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    scale = expected.abs().max()
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * scale
    for path in ("t8.safetensors", "t8.pt2"):
        again = fastvit("fuse", path, "--json", "-")
        assert again.code == 0, again.err
        document = json.loads(again.out)
        assert document["regions"] == []
        assert document["ops"]["before"] == document["ops"]["after"] <= 85
        assert document["weights"]["origin"] == "random"
        assert "Nothing to fuse" in again.err


def test_both_doors_end_in_the_same_counts(fastvit, net):
    counts = []
    for door in ("symbolic_trace", "export"):
        result = fastvit("fuse", net, "--capture", door, "--json", "-")
        assert result.code == 0, result.err
        document = json.loads(result.out)
        assert document["capture"] == door
        counts.append(document["ops"]["after"])
    assert counts[0] == counts[1] == 4


def test_a_model_that_cannot_be_captured_is_bad_input(fastvit, net, folder):
    before = names(folder)
    result = fastvit("fuse", "net.py:branching", "-o", "n.pt2")
    assert result.code == 2
    assert result.error.startswith("Error: net.py:branching: ")
    assert names(folder) == before


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes_are_equal_too(fastvit, net, folder, dtype):
    result = fastvit("fuse", net, "--dtype", dtype, "-o", "n.pt2")
    assert result.code == 0, result.err
    assert f"{dtype} on cpu" in result.out


def test_no_verify_runs_the_real_compiler_unchecked(fastvit, net, folder):
    result = fastvit("fuse", net, "--no-verify", "-o", "n.safetensors", "--json", "-")
    assert result.code == 0, result.err
    assert json.loads(result.out)["equivalence"]["verdict"] == "not checked"
    assert "NOT CHECKED" in result.err


def test_timm_and_torchvision_models_are_equal(fastvit, folder):
    for model in ("timm:test_byobnet", "torchvision:squeezenet1_1"):
        result = fastvit("fuse", model, "-o", "m.onnx", "--input-size", "3x64x64")
        assert result.code == 0, result.err
        assert "Equal: " in result.out


def test_as_a_process_stdout_is_json_and_stderr_is_plain(folder, net):
    command = [sys.executable, "-m", "fastvit_cli", "fuse", net, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == net
    assert "\x1b" not in done.stderr


def test_as_a_process_bad_input_is_exit_code_2(folder):
    command = [sys.executable, "-m", "fastvit_cli", "fuse", "gone.py:build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_leaves_no_file_and_says_nothing(folder, net):
    slow = "\nimport sys, time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    (folder / "slow.py").write_text((folder / "net.py").read_text() + slow)
    before = names(folder)
    arguments = ["fuse", "slow.py:build", "-o", "n.pt2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvit_cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A suite that runs in the background of a shell ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 130
    assert names(folder) == before


@pytest.mark.parametrize("words", [("--help",), ("profile", "--help"), ("models",)])
def test_a_reader_that_is_gone_from_the_start_is_no_error(words):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvit_cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


def test_a_closed_pipe_is_no_error(folder):
    command = f"{sys.executable} -m fastvit_cli models timm: | head -n 1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("timm:")
    assert done.stderr == ""
