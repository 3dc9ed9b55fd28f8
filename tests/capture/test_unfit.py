"""Models and inputs that do not fit each other, and models whose code leaves traces."""

from __future__ import annotations

import threading

import pytest
import torch
from equality import Net, assert_same, check, conv, draw, images, norms, randomise
from torch import nn

import repcompiler as rc

IMAGE = (2, 4, 6, 5)


def block(run=lambda s, x: s.norm(s.conv(x)), **parts) -> Net:
    """A conv and a norm."""
    return Net(run, conv=conv(), norm=nn.BatchNorm2d(4), **parts)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "inputs",
    [(), (draw(IMAGE),) * 2, (draw((2, 3, 6, 5)),), ("an image",), (None,)],
    ids=["none", "too many", "other channels", "text", "None"],
)
def test_inputs_that_the_model_does_not_take(inputs, verify):
    with pytest.raises(rc.UnsupportedInput, match="does not run on the example"):
        rc.fuse(randomise(block()), inputs, verify=verify)


def test_a_model_that_cannot_be_copied():
    net = randomise(block(lock=threading.Lock()))
    with pytest.raises(rc.UnsupportedInput, match="cannot be copied"):
        rc.fuse(net, (draw(IMAGE),))


def test_a_kept_value_with_a_gradient_is_named():
    net = randomise(block())
    net.kept = [net.conv(draw(IMAGE))]
    with pytest.raises(rc.UnsupportedInput, match="kept was computed with gradients"):
        rc.fuse(net, (draw(IMAGE),))


def test_weights_that_random_numbers_may_not_replace():
    """Noise is not positive definite: the check of the capture keeps the weights."""

    def run(s, x):
        return s.norm(s.conv(x)) + torch.linalg.cholesky(s.table).sum()

    table = nn.Parameter(3 * torch.eye(4))
    assert norms(check(block(run, table=table), images(4)).model) == 0


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_model_that_takes_one_batch_size_only(door):
    net = block(lambda s, x: s.norm(s.conv(x)).view(2, 4, -1).mean(-1))
    result = check(net, [IMAGE], door=door, blind=door == "symbolic_trace")
    assert norms(result.model) == 0
    assert result.report.ops.before == result.report.ops.after + 1


class Counting(nn.Module):
    """Puts another buffer in place of its own, counts calls and keeps what it saw."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.log = []

    def forward(self, x):
        """The norm of the conv."""
        self.calls += 1
        self.seen = self.seen + 1
        self.last = self.norm(self.conv(x))
        self.log.append(self.last)
        return self.last


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("door", ["auto", "export"])
def test_fusing_leaves_no_trace_on_a_model_that_counts(door, verify):
    net, inputs = randomise(Counting()), (draw(IMAGE),)
    seen = net.seen
    result = rc.fuse(net, inputs, capture=door, verify=verify)
    assert (net.calls, net.log, hasattr(net, "last")) == (0, [], False)
    assert net.seen is seen
    assert float(seen) == 0.0
    assert_same(net, result.model, [inputs])


def test_verify_leaves_no_trace_either():
    net = randomise(Counting())
    assert rc.verify(net, net, [draw(IMAGE)]).ok
    assert (net.calls, float(net.seen)) == (0, 0.0)


@pytest.mark.parametrize("thing", [3, None, "model", nn.Conv2d, lambda x: x])
def test_verify_refuses_what_is_no_model(thing):
    with pytest.raises(rc.UnsupportedInput, match="Cannot verify a"):
        rc.verify(block(), thing, [draw(IMAGE)])


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return block().eval()


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.jit.trace(randomise(block()), draw(IMAGE)), "no Python code"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)).eval(), "has no size yet"),
        (lambda: block().eval().to("meta"), "on the meta device"),
        (made_in_inference_mode, "in torch.inference_mode"),
    ],
    ids=["script", "lazy", "meta", "inference"],
)
def test_a_model_without_code_or_numbers(make, said, blind):
    with pytest.raises(rc.UnsupportedInput, match=said):
        rc.fuse(make(), None if blind else (draw(IMAGE),))


@pytest.mark.parametrize("inputs", [5, "an image"])
def test_example_inputs_that_are_no_sequence(inputs):
    with pytest.raises(rc.UnsupportedInput, match="example_inputs is of type"):
        rc.fuse(randomise(block()), inputs)
