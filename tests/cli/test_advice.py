"""Advice that speed alone cannot buy, and that can be followed."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from fastvit_cli import advice, profile_view, timing
from fastvit_cli.cells import Cell
from rich.console import Console


def made(form: str, milliseconds: float, ratio: float | None, **more) -> Cell:
    row = {"backend": "eager", "dtype": "float32", "batch": 1, **more}
    return Cell(
        "net",
        form,
        **row,
        timing=timing.Timing(milliseconds, 0.0, milliseconds, 9),
        error_ratio=ratio,
        distance=1e-7,
    )


def test_a_fast_wrong_form_is_never_advised():
    rows = [made("train", 10.0, 1.0), made("fused", 1.0, 9.0), made("fused", 2.0, None)]
    (advised,) = advice.advise(rows, {"fused": []})
    assert advised.cell is rows[0]
    assert "nothing that is equal is faster" in advised.sentence
    assert (advised.command, advised.usage) == ("", "model.eval()")


def test_the_fastest_equal_form_is_advised_with_its_command():
    rows = [
        made("train", 10.0, 1.0),
        made("fused", 5.0, 2.0, backend="onnxruntime"),
        made("fused", 2.0, 1.0, backend="openvino", dtype="bfloat16"),
    ]
    own, low = advice.advise(rows, {"fused": ["--model-arg=width=8"]})
    assert own.cell is rows[1]
    assert own.speed_up == 2.0
    assert own.command == "fastvit fuse net -o net-fused.onnx --model-arg=width=8"
    assert low.cell is rows[2]
    assert "bf16" in low.usage
    assert "as exact as bfloat16 allows" in low.sentence


def test_what_is_advised_is_a_file_that_says_the_kernels():
    rows = [
        made("train", 10.0, 1.0),
        made("tuned", 2.0, 1.0, backend="openvino", kernels=("dense",)),
    ]
    (advised,) = advice.advise(rows, {"tuned": ["--tune"]})
    words = "fastvit fuse net -o net-tuned.xml --tune --backend openvino"
    assert advised.command == words
    assert "'net-tuned.xml'" in advised.usage


@pytest.mark.parametrize(
    ("backend", "dtype", "usage"),
    [
        ("eager", "bfloat16", "model.eval().to(torch.bfloat16)"),
        (
            "onnxruntime",
            "float32",
            "torch.onnx.export(model, inputs, 'net.onnx', dynamo=True); "
            "onnxruntime.InferenceSession('net.onnx')",
        ),
    ],
)
def test_a_model_that_is_best_as_it_is_names_no_file_that_nobody_writes(
    backend, dtype, usage
):
    rows = [made("train", 9.0, 1.0), made("train", 1.0, 1.0, backend=backend)]
    rows = [replace(row, dtype=dtype) for row in rows]
    (advised,) = advice.advise(rows, {"fused": []})
    assert (advised.command, advised.usage) == ("", usage)


def test_what_is_tuned_again_may_turn_out_otherwise_and_that_is_said():
    rows = [made("train", 9.0, 1.0), made("tuned", 1.0, 1.0)]
    (advised,) = advice.advise(rows, {"fused": [], "tuned": ["--tune"]})
    assert "tunes again" in advised.note and advised.to_dict()["note"] == advised.note
    assert advice.advise(rows[:1], {})[0].note == ""


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("fastvit_t8@weights/a.pth.tar", "fastvit_t8-a"),
        ("timm:resnet18.a1_in1k", "timm_resnet18.a1_in1k"),
        ("own/net.py:build", "net-build"),
        ("own/net.py:Small", "net-Small"),
        ("some/where/t8.pt2", "t8-pt2"),
        ("t8.safetensors", "t8-safetensors"),
        ("package.module:make", "package.module_make"),
    ],
)
def test_files_of_two_models_have_two_names(model, stem):
    assert advice.stem(model) == stem


def test_of_two_forms_as_fast_the_simpler_backend_is_advised():
    rows = [made("fused", 5.0, 1.0, backend="compile"), made("fused", 5.05, 1.0)]
    assert advice.advise(rows, {"fused": []})[0].cell is rows[1]


def test_of_two_graphs_as_fast_the_one_that_a_command_makes_is_advised():
    more = {"backend": "onnxruntime"}
    rows = [made("train", 5.0, 1.0, **more), made("fused", 5.05, 1.0, **more)]
    assert advice.advise(rows, {"fused": []})[0].cell is rows[1]


def test_a_reason_names_the_models_that_it_is_true_of_if_not_all():
    cells = [
        Cell("small", "train", "eager", "float32", 1),
        Cell("large", "train", "openvino", "float32", 1, skipped="too large."),
        Cell("small", "train", "compile", "float32", 1, skipped="no compiler"),
        Cell("large", "train", "compile", "float32", 1, skipped="no compiler"),
    ]
    out = Console(file=io.StringIO(), width=120)
    profile_view.skipped(out, cells)
    assert out.file.getvalue().splitlines() == [
        "openvino was left out for large: too large.",
        "compile was left out: no compiler.",
    ]
