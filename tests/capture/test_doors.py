"""Two doors, one function: counts, structure, dynamic sizes, and what cannot pass."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from equality import (
    Branches,
    Net,
    assert_same,
    check,
    conv,
    convs,
    draw,
    images,
    norms,
    ops,
    randomise,
)
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import repcompiler as rc

IMAGE = (draw((1, 4, 8, 8)),)


def kinds(model: nn.Module) -> dict[str, int]:
    """How many convs, norms, linear layers and sums there are, in any spelling."""
    found = {"conv": 0, "batch_norm": 0, "linear": 0, "add": 0, "mul": 0}
    for name, count in ops(model).items():
        short = name.lower().split(".")[0].replace("batchnorm2d", "batch_norm")
        for kind in found:
            found[kind] += count * short.rstrip("123d").endswith(kind)
    return found


# ---- the same from both ------------------------------------------------------------


class Attention(nn.Module):
    """A norm in front of an attention's projection, and a scale behind it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x):
        """Attention over all positions."""
        batch, width, height, across = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        y = self.proj(F.scaled_dot_product_attention(q, k, v))
        y = y.transpose(1, 2).reshape(batch, width, height, across)
        return x + self.scale * y


MODELS = {
    "conv, norm": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), 4),
    "branches": (lambda: Branches(conv(), conv(kernel=1)), 4),
    "branches twice": (
        lambda: nn.Sequential(
            Branches(conv(groups=4)), nn.GELU(), Branches(conv(kernel=5))
        ),
        4,
    ),
    "attention": (Attention, 8),
    "pool and head": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        4,
    ),
    "kept norm": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()), 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_doors_end_in_the_same_counts(name):
    make, channels = MODELS[name]
    found = []
    for door in ("symbolic_trace", "export"):
        torch.manual_seed(0)
        result = check(make(), images(channels), door=door, blind=False)
        assert result.report.capture == door
        found.append(kinds(result.model))
    assert found[0] == found[1]


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_sizes_stay_dynamic(door):
    net = Attention()
    sizes = images(8, (7, 9), (2, 3), (12, 4), (1, 1), (5, 5))
    check(net, sizes, door=door, blind=False)


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_names_come_from_where_the_ops_were(door):
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(conv(), nn.BatchNorm2d(4)))
    result = check(net, images(4), door=door)
    assert [region.name for region in result.report.regions] == ["stem.0"]
    assert "stem.0" in dict(result.model.named_modules())


# ---- structure ---------------------------------------------------------------------


class Pair(NamedTuple):
    """An output with names."""

    first: torch.Tensor
    second: torch.Tensor


class Structured(nn.Module):
    """Takes a dictionary, a keyword and a default; gives a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.default_cfg = 7, {"input_size": (4, 8, 8)}
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, batch, extra=None, double: bool = False, *, gain: float = 2.0):
        """A dictionary of a tuple."""
        y = self.norm(self.conv(batch["image"])) * gain
        if extra is not None:
            y = y + extra
        if double:
            y = y * 2
        return {"all": (y, [y.mean()]), "pair": Pair(y, batch["image"])}


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_nested_values_and_bound_defaults(door):
    net = randomise(Structured())
    batches = [({"image": draw(shape)},) for shape in images(4)]
    result = rc.fuse(net, batches[0], capture=door)
    assert (convs(result.model), norms(result.model)) == (1, 0)
    assert_same(net, result.model, batches)
    found = result.model(*batches[0])
    assert type(found["pair"]) is Pair
    assert result.model.num_classes == 7
    assert result.model.default_cfg == {"input_size": (4, 8, 8)}


def test_two_inputs_by_name():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, left, right):
            return self.norm(self.conv(left)) - right, right

    net = randomise(Two())
    left, right = draw((1, 4, 6, 5)), draw((1, 4, 6, 5), seed=2)
    fused = rc.fuse(net, (left, right)).model
    with torch.no_grad():
        expected = net(left, right)
        found = fused(right=right, left=left)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["graph", "program", "decomposed program"])
def test_other_kinds_of_model(kind):
    net = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()))
    sizes = [(2, 4, 8, 8), (3, 4, 7, 9), (5, 4, 3, 2)]
    if kind == "graph":
        model = torch.fx.symbolic_trace(net)
    else:
        auto = torch.export.Dim.AUTO
        model = torch.export.export(
            net, (draw(sizes[0]),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
        )
        if kind == "decomposed program":
            model = model.run_decompositions()
    result = rc.fuse(model, (draw(sizes[0]),))
    assert (convs(result.model), norms(result.model)) == (2, 0)
    assert result.report.equivalence.ok
    assert_same(net, result.model, [(draw(size),) for size in sizes])


def test_program_exported_in_train_mode_is_refused():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4)).train()
    program = torch.export.export(net, (draw((2, 4, 8, 8)).float(),))
    with pytest.raises(rc.NotEval, match="train mode"):
        rc.fuse(program)


def test_what_is_no_model_is_refused():
    with pytest.raises(rc.UnsupportedInput):
        rc.fuse(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(rc.UnsupportedInput):
        rc.fuse(nn.Identity().eval(), capture="window")


# ---- silent errors and refusals ----------------------------------------------------


class Shadow(nn.Module):
    """Writes the weights of a conv that its forward then calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.shadow = conv(bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        """The shadow's own numbers never count."""
        self.shadow.weight.data = self.weight.data * 2
        return self.norm(self.shadow(x))


def test_stale_weights_are_noticed():
    net = randomise(Shadow())
    with torch.no_grad():
        net.shadow.weight.normal_()
    x = draw((1, 4, 6, 6))
    with pytest.raises(rc.CaptureError, match="something else"):
        rc.capture(net, (x,), door="symbolic_trace")
    with pytest.raises(rc.CaptureError) as caught:
        rc.fuse(net, (x,))
    assert caught.value.hint


class Branching(nn.Module):
    """Decides by its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        """One of two."""
        if x.sum() > 0:
            return self.norm(self.conv(x))
        return self.conv(x)


def test_control_flow_on_data_is_refused_with_a_hint():
    net = randomise(Branching())
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(rc.CaptureError) as caught:
        rc.fuse(net)
    assert "example_inputs" in caught.value.hint
    with pytest.raises(rc.CaptureError) as caught:
        rc.fuse(net, IMAGE)
    assert "No submodule" in caught.value.hint
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


# As text, since pytest rewrites the asserts of a test's own file.
ASSERTING = """
def body(s, x):
    torch._assert(x.shape[1] == 4, "four channels")
    y = s.conv(x)
    assert y.shape[0] == x.shape[0], "the batch"
    assert y.dim() == 4
    return s.norm(y)
"""


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_asserts_and_guards_go(door):
    scope = {"torch": torch}
    exec(ASSERTING, scope)
    net = Net(scope["body"], conv=conv(), norm=nn.BatchNorm2d(4))
    found = ops(check(net, images(4), door=door, blind=False).model)
    assert sum(found.values()) == 1


def test_branches_that_eval_does_not_use_go():
    def body(s, x):
        y = s.conv(x)
        s.head(y)
        return s.norm(y)

    net = Net(body, conv=conv(), norm=nn.BatchNorm2d(4), head=conv())
    fused = check(net, images(4)).model
    assert ops(fused) == {"Conv2d": 1}
    assert sum(p.numel() for p in fused.parameters()) == 4 * 4 * 9 + 4


# ---- weights that are computed -----------------------------------------------------


class Standardised(nn.Conv2d):
    """A conv whose weights are standardised per output channel in forward."""

    def forward(self, x):
        """As nn.Conv2d, with other weights."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        """Twice the weight."""
        return weight * 2


WEIGHTS = {
    "standardised": lambda: Standardised(4, 4, 3, padding=1),
    "parametrised": lambda: _parametrised(),
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "old weight norm": lambda: torch.nn.utils.weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
}


def _parametrised() -> nn.Conv2d:
    layer = conv()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_computed_weights(kind, door):
    net = nn.Sequential(WEIGHTS[kind](), nn.BatchNorm2d(4))
    if kind == "old weight norm":
        with pytest.raises(rc.UnsupportedInput, match=r"0\.weight") as caught:
            rc.fuse(net.eval())
        assert "no_grad" in caught.value.hint
        with torch.no_grad():
            net(draw((1, 4, 6, 6)).float())
    result = check(net, images(4), door=door, blind=door == "symbolic_trace")
    if kind == "old weight norm" and door == "symbolic_trace":
        # A hook computes the weight anew at each call: the conv stays, and says so.
        assert "hooked" in {kept.reason for kept in result.report.kept}
    else:
        assert (convs(result.model), norms(result.model)) == (1, 0)
        assert sum(ops(result.model).values()) == 1


# ---- code that the trace does not see ----------------------------------------------


@fx.wrap
def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    """What `fx` keeps as one call; the caller may not even read what it returns."""
    return x.add_(y)


class Overwritten(nn.Module):
    """A conv's output that a wrapped function changes, before a norm reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        """norm(conv(x) + x), with the sum done behind the trace's back."""
        y = self.conv(x)
        add_in_place(y, x)
        return self.norm(y)


@pytest.mark.parametrize("inputs", [IMAGE, None], ids=["example", "no example"])
def test_a_wrapped_function_may_change_its_arguments(inputs):
    model = randomise(Overwritten())
    fused = rc.fuse(model, inputs, capture="symbolic_trace").model
    assert_same(model, fused, [IMAGE])
    assert norms(fused) == 1


class AsksForATensor(nn.Module):
    """A branch on the type of a value, which is no tensor while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        """norm(conv([x, x]))"""
        both = torch.cat([x, x], 1) if isinstance(x, Tensor) else x
        return self.norm(self.conv(both))


def test_a_trace_past_a_branch_that_does_not_even_run_is_not_taken():
    model = randomise(AsksForATensor())
    result = rc.fuse(model, IMAGE)
    assert result.report.capture == "export"
    assert_same(model, result.model, [IMAGE])
