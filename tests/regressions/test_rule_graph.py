"""The fused model is an ordinary module, and the one it came from is not touched."""

from __future__ import annotations

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from equality import Branches, assert_same, conv, draw, images, ops, randomise
from torch import nn

import repcompiler as rc


class Small(nn.Module):
    """A stem, a multi-branch block in which one thing stays, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 5
        self.stem = nn.Sequential(conv(3, 8, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Branches(conv(8, 8, groups=8), conv(8, 8, kernel=1))
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.late = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        """Logits."""
        x = self.stem(x)
        x = x + self.scale * self.block(x)
        x = self.late(self.act(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    """A model in float64 with random statistics."""
    torch.manual_seed(0)
    return randomise(Small())


@pytest.fixture
def fused(net) -> nn.Module:
    """What comes out of it."""
    return rc.fuse(net, (draw((1, 3, 12, 14)),)).model


BATCHES = [(draw(shape),) for shape in images(3, (12, 14), (7, 9), (3, 2), (1, 1))]


def test_lint_names_and_outputs(net, fused):
    fused.graph.lint()
    names = [node.name for node in fused.graph.nodes]
    assert len(names) == len(set(names))
    assert len({name for name, _ in fused.named_modules()}) == len(
        list(fused.named_modules())
    )
    assert_same(net, fused, BATCHES)
    assert fused.num_classes == 5


def test_deepcopy_pickle_and_save(net, fused):
    assert_same(net, copy.deepcopy(fused), BATCHES)
    assert_same(net, pickle.loads(pickle.dumps(fused)), BATCHES)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    assert_same(net, torch.load(buffer, weights_only=False), BATCHES)


def test_state_dict_round_trip(net, fused):
    other = copy.deepcopy(fused)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(fused.state_dict(), strict=True)
    assert_same(net, other, BATCHES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(net, fused, dtype):
    moved = copy.deepcopy(fused).to(dtype)
    assert {p.dtype for p in moved.parameters()} == {dtype}
    x = BATCHES[0][0]
    with torch.no_grad():
        expected, found = net(x), moved(x.to(dtype))
    assert found.dtype == dtype
    # Five layers, each with one rounding of weights and one of values.
    limit = 20 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found.double() - expected).abs().max() < limit
    assert copy.deepcopy(fused).half().head.weight.dtype == torch.float16


def test_export_with_dynamic_sizes(net, fused):
    size = {
        0: torch.export.Dim.AUTO,
        2: torch.export.Dim.AUTO,
        3: torch.export.Dim.AUTO,
    }
    program = torch.export.export(
        fused, (draw((2, 3, 12, 14)),), dynamic_shapes=(size,)
    )
    assert_same(net, program.module(), [(draw((3, 3, 9, 7)),), (draw((4, 3, 6, 5)),)])


def test_onnx_export_runs_in_another_runtime(net, fused, tmp_path):
    single = copy.deepcopy(fused).float()
    path = str(tmp_path / "net.onnx")
    x = draw((1, 3, 12, 14)).float()
    program = torch.onnx.export(single, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = net(x.double())
    error = (torch.from_numpy(found).double() - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()  # float32, five layers


@pytest.mark.slow
def test_torch_compile(net, fused):
    torch._dynamo.reset()
    assert_same(net, torch.compile(fused), BATCHES[:1])


def test_backward_pass_reaches_every_parameter(net, fused):
    x = draw((3, 3, 9, 8)).requires_grad_()
    fused(x).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in fused.parameters()
    )
    theirs = x.grad.clone()
    x.grad = None
    net(x).square().sum().backward()
    torch.testing.assert_close(theirs, x.grad, rtol=1e-9, atol=1e-9)


def test_fusing_twice_changes_nothing(net, fused):
    again = rc.fuse(fused, BATCHES[0])
    assert ops(again.model) == ops(fused)
    assert again.report.regions == ()
    assert_same(net, again.model, BATCHES)
    for one, two in zip(fused.parameters(), again.model.parameters()):
        assert torch.equal(one, two)


def test_model_is_untouched(net):
    seen = []
    net.stem[0].register_forward_hook(lambda *_: seen.append(1))
    modules = {name: id(module) for name, module in net.named_modules()}
    tensors = {
        name: (id(tensor), tensor._version, tensor.clone())
        for name, tensor in (*net.named_parameters(), *net.named_buffers())
    }
    attributes = {name: set(vars(m)) for name, m in net.named_modules()}
    fused = rc.fuse(net, BATCHES[0]).model
    assert {name: id(module) for name, module in net.named_modules()} == modules
    assert {name: set(vars(m)) for name, m in net.named_modules()} == attributes
    assert len(net.stem[0]._forward_hooks) == 1
    assert not any(module.training for module in net.modules())
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        identity, version, value = tensors[name]
        assert (id(tensor), tensor._version) == (identity, version), name
        assert torch.equal(tensor, value), name
    theirs = {tensor.data_ptr() for tensor in fused.state_dict().values()}
    assert theirs.isdisjoint(t.data_ptr() for t in net.state_dict().values())


def test_frozen_parameters_stay_frozen(net):
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    fused = rc.fuse(net, BATCHES[0]).model
    assert not any(parameter.requires_grad for parameter in fused.parameters())
