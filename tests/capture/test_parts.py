"""Submodule by submodule: what is fused, what has to stay, and that both stay right."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from equality import assert_same, conv, distance, draw, norms, randomise
from torch import Tensor, nn

import repcompiler as rc

IMAGE = (draw((2, 4, 8, 8)),)


def block(width: int = 4, *, inplace: bool = False) -> nn.Sequential:
    """Two convs with norms, which fuse to two ops and two non-linear ones."""
    return nn.Sequential(
        conv(width, width),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace),
        conv(width, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class Deciding(nn.Module):
    """Looks at values before it goes on, so that it has no graph as a whole."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def body(self, x: Tensor) -> Any:
        """What the model does with an image; a subclass says."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        """The body, of the image or of its negative."""
        return self.body(-x) if float(x.sum()) > 0 else self.body(x)


def deciding(body: Any, **children: nn.Module) -> nn.Module:
    """A randomised `Deciding` with this body."""
    kind = type("Chosen", (Deciding,), {"body": body})
    return randomise(kind(**children))


def fused(net: nn.Module, inputs: Any = IMAGE) -> rc.FuseResult:
    """Fused in parts, with the invariants checked, and the same on both branches."""
    before = {name: t.clone() for name, t in net.state_dict().items()}
    result = rc.fuse(net, inputs, debug=True)
    assert result.report.capture == "submodules"
    assert result.report.equivalence.ok, result.report.equivalence
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    return result


def doors(result: rc.FuseResult) -> dict[str, str | None]:
    """The door of each part, None where it was left."""
    return {part.name: part.door for part in result.report.parts}


def why(result: rc.FuseResult, name: str) -> str:
    """Why a submodule was left."""
    return next(part.reason for part in result.report.parts if part.name == name)


def same(net: nn.Module, result: rc.FuseResult, *sizes: tuple[int, ...]) -> None:
    """Equal on images of these sizes and on their negatives, which branch otherwise."""
    images = [draw(size) for size in (sizes or ((2, 4, 8, 8), (1, 4, 5, 7)))]
    assert_same(net, result.model, [(x,) for x in images] + [(-x,) for x in images])


# ---- what is fused -----------------------------------------------------------------


class Head(nn.Module):
    """Takes a dictionary and keywords, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, features: dict[str, Tensor], scale: float = 1.0, *, bias=None):
        """Class scores, and what they came from."""
        pooled = features["image"].mean((2, 3))
        return {"scores": self.norm(self.fc(pooled)) * scale, "pooled": pooled}


def detector() -> nn.Module:
    """A backbone and a head between which the model looks at values."""

    def body(self, x):
        y = self.backbone(x)
        if float(y.mean()) > 1e6:
            return {"scores": y.mean((2, 3)), "pooled": y}
        return self.head(features={"image": y}, scale=2.0)

    return deciding(body, backbone=block(), head=Head())


def test_largest_submodules_are_fused_and_the_whole_is_compared():
    net = detector()
    result = fused(net)
    assert doors(result)["backbone"] == "symbolic_trace"
    assert doors(result)["head"] is not None
    assert result.report.ops.after_by_type["batch_norm"] == 0
    assert result.report.ops.after < result.report.ops.before
    assert result.report.equivalence.exactness < 1e-9
    assert {r.name.split(".")[0] for r in result.report.regions} == {"backbone", "head"}
    assert type(result.model) is type(net)
    assert any("data-dependent" in note for note in result.report.notes)
    same(net, result)


def test_result_is_copied_pickled_and_fused_again():
    net = detector()
    result = fused(net)
    x = IMAGE[0]
    expected = result.model(x)["scores"]
    for other in (
        copy.deepcopy(result.model),
        pickle.loads(pickle.dumps(copy.deepcopy(result.model.backbone))),
    ):
        found = other(x)["scores"] if isinstance(other, Deciding) else None
        assert found is None or torch.equal(found, expected)
    assert result.model.half().double()(x)["scores"].dtype is torch.float64
    again = rc.fuse(result.model.float(), (x.float(),))
    assert not again.report.regions
    assert again.report.ops.before == again.report.ops.after


def test_shared_submodule_is_fused_once():
    shared = block()

    def body(self, x):
        return self.one(x) + self.two(x.tanh()) + self.held[0](x[:, :, 1:])[..., :1, :1]

    net = deciding(body, one=shared, two=shared)
    net.held = [net.one]  # not registered a third time, but called
    result = fused(net)
    model = result.model
    assert model.one is model.two is model.held[0]
    assert list(doors(result)) == ["one"]
    same(net, result)


def test_called_with_several_sizes():
    def body(self, x):
        return self.block(x).mean() + self.block(x[..., 1:, 2:]).mean()

    net = deciding(body, block=block())
    result = fused(net)
    assert doors(result) == {"block": "symbolic_trace"}
    same(net, result)


def test_what_no_door_opens_is_searched_below():
    inner = deciding(lambda self, x: self.a(x) * 2, a=block())
    net = deciding(lambda self, x: self.inner(x) + self.b(x), inner=inner, b=block())
    result = fused(net)
    assert doors(result)["inner.a"] == "symbolic_trace"
    assert doors(result)["inner"] is None
    assert "data-dependent" in why(result, "inner")
    same(net, result)


def test_norm_in_what_was_left_is_accounted_for():
    net = deciding(
        lambda self, x: self.norm(self.a(x)), a=block(), norm=nn.BatchNorm2d(4)
    )
    kept = {k.name: k.reason for k in fused(net).report.kept}
    assert kept["norm"] == "not_captured"


def test_by_request_where_the_whole_has_a_graph():
    net = randomise(nn.Sequential(block(), block()))
    result = rc.fuse(net, IMAGE, capture="submodules")
    assert doors(result) == {"0": "symbolic_trace", "1": "symbolic_trace"}
    assert result.report.ops.after_by_type["batch_norm"] == 0
    assert_same(net, result.model, [IMAGE])
    with pytest.raises(rc.UnsupportedInput, match="example_inputs"):
        rc.fuse(net, capture="submodules")


# ---- what has to stay --------------------------------------------------------------


def _reads(self, x):
    return self.block(x) * self.block[0].weight.sum() + self.other(x)


def _iterates(self, x):
    y = self.block(x)
    for layer in self.block:
        y = layer(y)
    return y + self.other(x)


def _writes(self, x):
    return self.block(x * 2) + self.other(x)


class InPlace(nn.Module):
    """Writes to its argument, which its caller goes on to use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        """A block of the argument's positive part."""
        return self.inner(x.relu_())


def _uses_what_was_written(self, x):
    y = x * 2
    return self.block(y) + y + self.other(x)


class Flagged(nn.Module):
    """Computes one thing or another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        """A block once or twice."""
        return self.inner(self.inner(x)) if twice else self.inner(x)


def _calls_both_ways(self, x):
    return self.block(x) + self.block(x, twice=True) + self.other(x)


class Returned(nn.Module):
    """Its result is a new tensor, which its caller writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the argument, and a block of it."""
        return x * 1.0, self.inner(x)


def _writes_to_a_result(self, x):
    copied, y = self.block(x)
    copied.add_(1.0)
    return copied + x + y + self.other(x)


STAYS = {
    "reads its": (_reads, block),
    "other code reads": (_iterates, block),
    "writes to its arguments": (_uses_what_was_written, InPlace),
    "differ in more than sizes": (_calls_both_ways, Flagged),
}


@pytest.mark.parametrize("reason", STAYS)
def test_submodule_stays_where_its_call_is_not_all(reason):
    body, make = STAYS[reason]
    net = deciding(body, block=make(), other=block())
    result = fused(net)
    assert doors(result)["block"] is None
    assert reason in why(result, "block")
    assert doors(result)["other"] == "symbolic_trace"
    same(net, result)


def test_result_that_is_written_to_is_no_alias_of_an_argument():
    net = deciding(_writes_to_a_result, block=Returned(), other=block())
    result = fused(net)
    same(net, result)


def test_hook_is_kept_and_runs():
    seen: list[tuple[int, ...]] = []
    net = deciding(
        lambda self, x: self.block(x) + self.other(x), block=block(), other=block()
    )
    net.block.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    result = fused(net)
    assert "hooks" in why(result, "block")
    seen.clear()
    result.model(IMAGE[0])
    assert seen == [(2, 4, 8, 8)]


class Counting(nn.Module):
    """Updates a buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """A block, scaled by the number of calls."""
        self.calls += 1
        return self.inner(x) * self.calls


def test_buffer_that_forward_updates_goes_on_being_updated():
    net = deciding(
        lambda self, x: self.block(x) + self.other(x), block=Counting(), other=block()
    )
    result = fused(net)
    x = IMAGE[0]
    with torch.no_grad():
        for _ in range(3):
            assert distance(result.model(x), net(x)) < 1e-9


# ---- another use than the example's ------------------------------------------------


def test_call_of_another_form_is_an_error():
    def body(self, x):
        return self.block(x, x.shape[0] > 2)

    net = deciding(body, block=Flagged())
    result = fused(net)
    with pytest.raises(rc.UnsupportedInput, match="another way"):
        result.model(draw((3, 4, 8, 8)))
    with pytest.raises(AttributeError, match="fused Flagged"):
        _ = result.model.block.inner


def test_nothing_opens():
    class Unruly(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(x) if float(x.sum()) > 0 else x

    with pytest.raises(rc.CaptureError) as caught:
        rc.fuse(randomise(Unruly()), IMAGE)
    assert "No submodule" in caught.value.hint


# ---- keyword inputs ----------------------------------------------------------------


class Keywords(nn.Module):
    """Two inputs, of which the second has a default before a third."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, offset: Any = None):
        """A dictionary of a tensor and a list of tensors."""
        y = self.norm(self.conv(x))
        y = y if mask is None else y * mask
        return {"y": y, "rest": [y if offset is None else y + offset]}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_inputs_by_keyword_and_values_with_structure(door):
    net = randomise(Keywords())
    x, offset = draw((2, 4, 8, 8)), draw((2, 4, 1, 1), 3)
    result = rc.fuse(net, {"offset": offset, "x": x}, capture=door)
    assert norms(result.model) == 0
    expected = net(x, offset=offset)
    found = result.model(x, None, offset)
    assert distance(found["y"], expected["y"]) < 1e-9
    assert distance(found["rest"][0], expected["rest"][0]) < 1e-9
    with pytest.raises(rc.UnsupportedInput, match="offsets"):
        rc.fuse(net, {"x": x, "offsets": offset})
    with pytest.raises(rc.UnsupportedInput, match="needs x"):
        rc.fuse(net, {"offset": offset})
