"""Every form of a conv is that conv, whatever its geometry, in the graph and alone."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from equality import Net, assert_same, draw, randomise
from torch import nn

import repcompiler as rc
from repcompiler import forms

CONVS = {
    "depthwise to twice": nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "to three times, no bias": nn.Conv2d(4, 12, 5, groups=4, bias=False),
    "strided": nn.Conv2d(6, 12, 7, stride=2, padding=3, groups=6),
    "dilated": nn.Conv2d(3, 6, (3, 1), dilation=(2, 1), padding=(2, 0), groups=3),
    "circular": nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", groups=4),
    "1-D": nn.Conv1d(6, 12, 3, padding=1, groups=6),
    "3-D": nn.Conv3d(2, 4, 2, stride=2, groups=2),
    "pointwise strided": nn.Conv2d(4, 10, 1, stride=2),
    "pointwise strided by one axis": nn.Conv2d(4, 8, 1, stride=(1, 3), groups=2),
    "pointwise strided 1-D": nn.Conv1d(4, 6, 1, stride=2, bias=False),
}
CASES = [
    (name, form)
    for name, conv in CONVS.items()
    for form, rule in forms.FORMS.items()
    if rule.fits(conv)
]
SIZES = {1: (11,), 2: (11, 9), 3: (6, 5, 4)}


def inputs(conv, batch: int = 2) -> torch.Tensor:
    return draw((batch, conv.in_channels, *SIZES[len(conv.kernel_size)]))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_form_is_the_conv(name: str, form: str) -> None:
    conv: nn.Module = randomise(CONVS[name])
    expected = conv(inputs(conv))
    order = forms.FORMS[form].order
    if order is not None:  # nobody is there to take it back
        expected = expected[:, order(conv)]
    module = forms.alone(conv, form)
    assert module.get_submodule("conv") is not conv
    torch.testing.assert_close(module(inputs(conv)), expected, rtol=1e-12, atol=1e-12)


def test_each_form_is_tried_and_some_convs_have_none() -> None:
    assert {form for _, form in CASES} == set(forms.FORMS)
    plain = (
        nn.Conv2d(4, 4, 3, groups=4),  # one output a channel
        nn.Conv2d(4, 8, 3, groups=2),  # two channels a group
        nn.Conv2d(4, 8, 1),  # reads every position
        nn.Conv2d(4, 8, 1, stride=2, padding=1),  # reads the border
        nn.Conv2d(1, 4, 3),  # one channel, which is no depthwise conv
    )
    assert not any(f.fits(conv) for f in forms.FORMS.values() for conv in plain)


def make_net() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )
    return randomise(Net(lambda n, x: n.net(x), net=body))


@pytest.mark.parametrize(
    "form", ["stacked", "stacked_last", "repeated", "concatenated"]
)
def test_the_compiler_writes_the_forms_that_it_is_told(form: str) -> None:
    net, x = make_net(), (draw((2, 4, 8, 8)),)
    tuning = rc.Tuning(forms={"net.0": form, "net.3": "sliced", "gone": "stacked"})
    result = rc.fuse(net, x, tuning=tuning)
    assert result.report.equivalence.ok
    assert result.report.equivalence.exactness < 1e-12
    assert isinstance(result.model.get_submodule("net.0"), nn.ModuleList)
    first = next(r for r in result.report.regions if r.name == "net.0")
    assert any(name.startswith("net.0.") for name in first.added)
    assert_same(net, result.model, [x, (draw((1, 4, 11, 5)),)])
    assert_same(net, pickle.loads(pickle.dumps(result.model)), [x])


@pytest.mark.parametrize(
    "form", ["stacked", "stacked_last", "repeated", "concatenated"]
)
@pytest.mark.parametrize("dynamo", [True, False])
def test_either_exporter_writes_a_graph_that_runs(
    form: str, dynamo: bool, tmp_path: Path
) -> None:
    net, x = make_net().float(), (draw((2, 4, 8, 8)).float(),)
    tuning = rc.Tuning(forms={"net.0": form, "net.3": "sliced"})
    fused, path = rc.fuse(net, x, tuning=tuning).model, str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the older one is old
        torch.onnx.export(fused, x, path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(*x), rtol=1e-5, atol=1e-5)


def test_a_form_that_does_not_fit_is_left_out() -> None:
    net, x = make_net(), (draw((2, 4, 8, 8)),)
    tuning = rc.Tuning(forms={"net.0": "sliced", "net.3": "no such form"})
    result = rc.fuse(net, x, tuning=tuning)
    assert isinstance(result.model.get_submodule("net.0"), nn.Conv2d)
    assert isinstance(result.model.get_submodule("net.3"), nn.Conv2d)


def test_channels_last_is_how_weights_lie_and_nothing_else() -> None:
    net, x = make_net(), (draw((2, 4, 8, 8)),)
    model = rc.fuse(net, x, tuning=rc.Tuning(channels_last=True)).model
    last = torch.channels_last
    assert model.get_submodule("net.3").weight.is_contiguous(memory_format=last)
    assert_same(net, model, [x])


def test_a_model_without_a_graph_takes_no_tuning() -> None:
    body = make_net()

    def forward(n, x):
        return n.net(x) if float(x.sum()) < 1e9 else x

    net = randomise(Net(forward, net=body))
    x = (draw((2, 4, 8, 8)),)
    result = rc.fuse(net, x, tuning=rc.Tuning(forms={"net.0": "stacked"}))
    assert result.report.equivalence.ok
    assert_same(net, result.model, [x])
