"""`--tune --backend`: plans for runtimes that take an ONNX graph, timed in them.

Ops and plans really run here; only the clock is replaced.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fastvit_cli.backends import BACKENDS
from fastvit_cli.card import Card
from fastvit_cli.errors import JobFailed
from fastvit_cli.measured import OpTimes
from fastvit_cli.onnx_plans import Exports
from tune_helpers import fast_if_stacked, tune

# Of a depthwise conv with two outputs a channel, whose order of channels is free.
FORMS_OF_SPLIT = ("stacked", "stacked_last", "concatenated", "repeated")


def by_form(key: str) -> float:
    times = {"stacked": 1.0, "as one conv": 10.0}
    return times.get(key.partition(",")[0], 20.0)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_plan_is_tuned_in_the_runtime_that_is_named(fastvit, folder, clock, backend):
    pytest.importorskip(backend)
    asked: list[str] = []

    def op(key):
        asked.append(key)
        return by_form(key)

    clock(op, fast_if_stacked)
    words = ("--backend", backend, "--batch", 2, "-o", "n.onnx")
    found, result = tune(fastvit, *words)
    assert (found["kept"], found["backend"]) == ("tuned", backend)
    assert found["plan"]["name"] == "1 conv stacked"
    assert {row["plan"] for row in found["plans"]} == {"default", "1 conv stacked"}
    conv = "Conv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=4)"
    forms = ("as one conv", *FORMS_OF_SPLIT)
    assert list(dict.fromkeys(asked)) == [f"{f}, {conv} on (4, 16, 16)" for f in forms]
    assert f"1 thread, {backend}: 1 conv stacked" in " ".join(result.err.split())
    card = load_card("n.onnx")
    assert card.tuning["backend"] == backend
    assert card.tuning["forms"] == {"down": "stacked"}
    result = fastvit("check", "tuned.py:build", "n.onnx", "--json", "-")
    assert result.code == 0, result.err
    origin = json.loads(result.out)["origin"]
    assert (origin["form"], origin["related"]) == ("fused", True)
    assert origin["differences"] == []


def load_card(path: str) -> Card:
    onnx = pytest.importorskip("onnx")
    rows = onnx.load(path).metadata_props
    return Card.from_metadata({row.key: row.value for row in rows})


def test_a_form_or_a_plan_that_the_runtime_refuses_is_left_out_and_said(
    fastvit, clock, monkeypatch
):
    pytest.importorskip("onnxruntime")
    real = BACKENDS["onnxruntime"]

    def prepare(subject, inputs):
        text = subject.onnx.read_bytes()
        if text.count(b"Transpose"):
            raise RuntimeError("no kernel for this Transpose")
        if subject.model is not None and text.count(b"Expand"):
            raise RuntimeError("out of memory")
        return real.prepare(subject, inputs)

    monkeypatch.setitem(BACKENDS, "onnxruntime", replace(real, prepare=prepare))
    clock(lambda key: 1.0, fast_if_stacked)
    found, result = tune(fastvit, "--backend", "onnxruntime")
    assert (found["kept"], found["plan"]["name"]) == ("tuned", "1 conv stacked")
    assert {row["plan"]: row["why"] for row in found["left_out"]} == {
        "stacked_last": "RuntimeError: no kernel for this Transpose",
        "1 conv repeated": "RuntimeError: out of memory",
    }
    text = " ".join(result.err.split())
    assert "Not timed: stacked last: RuntimeError: no kernel for this" in text


def test_a_plan_that_a_runtime_computes_wrongly_is_left_out(
    fastvit, clock, monkeypatch
):
    pytest.importorskip("onnxruntime")
    real = BACKENDS["onnxruntime"]

    def prepare(subject, inputs):
        run = real.prepare(subject, inputs)
        concat = subject.model is not None and b"Concat" in subject.onnx.read_bytes()
        return (lambda: [x + 1e-3 for x in run()]) if concat else run

    monkeypatch.setitem(BACKENDS, "onnxruntime", replace(real, prepare=prepare))
    clock(by_form, fast_if_stacked)
    found, _ = tune(fastvit, "--backend", "onnxruntime")
    assert found["kept"] == "default"
    assert found["left_out"] == [
        {
            "plan": "1 conv stacked",
            "why": "JobFailed: onnxruntime computes something else",
        }
    ]


def test_a_model_that_no_conv_of_can_be_written_otherwise_is_not_exported(
    fastvit, clock, monkeypatch
):
    clock()
    monkeypatch.setattr(Exports, "subject", None)
    words = ("--tune", "--backend", "onnxruntime", "--json", "-")
    result = fastvit("fuse", "tuned.py:bare", *words)
    assert result.code == 0, result.err
    found = json.loads(result.out)["tune"]
    assert found["why"] == "no conv has another form that is near it in time"


def test_a_model_that_cannot_be_an_onnx_graph_keeps_the_default(
    fastvit, clock, monkeypatch
):
    def refuse(artefact):
        raise JobFailed("it cannot be written as ONNX")

    clock()
    monkeypatch.setattr("fastvit_cli.exporters.export_onnx", refuse)
    monkeypatch.setattr(OpTimes, "microseconds", lambda self, key, make: make())
    found, _ = tune(fastvit, "--backend", "onnxruntime")
    assert (found["kept"], found["why"]) == ("default", "no other plan could be timed")
    assert "cannot be written as ONNX" in found["left_out"][0]["why"]
