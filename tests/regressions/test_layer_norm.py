"""A LayerNorm's scale and shift go into the linear layers behind it, or stay whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import Net, check, draw, images, ops, randomise
from torch import Tensor, nn

import repcompiler as rc

both_doors = pytest.mark.parametrize("door", ["symbolic_trace", "export"])
SIZES = images(8, (6, 6), (5, 7), (1, 1))


def norm(channels: int, **settings: bool) -> nn.LayerNorm:
    """A LayerNorm with weights as training leaves them."""
    made = nn.LayerNorm(channels, **settings)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.5)
    return made


def tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, L, C)."""
    return x.flatten(2).transpose(1, 2)


def affine_norms(model: nn.Module) -> int:
    """LayerNorms that still scale or shift."""
    found = 0
    for node in model.graph.nodes:
        if node.op == "call_module":
            leaf = model.get_submodule(node.target)
            found += isinstance(leaf, nn.LayerNorm) and leaf.weight is not None
        elif "layer_norm" in str(node.target):
            found += len(node.all_input_nodes) > 1
    return found


SPELLINGS = {
    "module": lambda s, x: s.norm(x),
    "function": lambda s, x: F.layer_norm(x, (8,), s.norm.weight, s.norm.bias, 1e-3),
    "named": lambda s, x: F.layer_norm(x, [8], weight=s.norm.weight, eps=1e-6),
}


@both_doors
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_reader_takes_the_scale_and_shift_in(spelling, door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = SPELLINGS[spelling](s, tokens(x))
        return s.q(y) * s.k(y) + s.v(y)

    layers = {name: nn.Linear(8, 4, bias=name != "k") for name in "qkv"}
    result = check(Net(body, norm=norm(8), **layers), SIZES, door=door)
    assert affine_norms(result.model) == 0
    assert {region.kind for region in result.report.regions} == {"ln_linear"}
    assert result.report.ops.after == result.report.ops.before
    assert result.report.params.after < result.report.params.before


@both_doors
def test_a_norm_with_any_other_reader_stays_as_it_was(door):
    def body(s: nn.Module, x: Tensor) -> Tensor:
        y = s.norm(tokens(x))
        return s.fc(y) * y

    result = check(Net(body, norm=norm(8), fc=nn.Linear(8, 8)), SIZES, door=door)
    assert affine_norms(result.model) == 1
    assert not result.report.regions
    assert not result.report.kept


def test_a_norm_that_no_reader_takes_in_is_put_back():
    """As where the table knows no linear layer."""
    model, x = randomise(nn.Sequential(norm(8), nn.Linear(8, 4))), draw((2, 8))
    table = {t: rule for t, rule in rc.RULES.items() if t is not nn.Linear}
    kept = rc.fuse(model, (x,), rules=table).model
    assert affine_norms(kept) == 1
    names = [node.target for node in kept.graph.nodes if node.op == "call_module"]
    assert names == ["0", "1"]
    assert torch.equal(kept(x), model(x))


@pytest.mark.parametrize(
    "made",
    [norm(8, elementwise_affine=False), nn.LayerNorm((5, 8)), nn.GroupNorm(5, 5)],
    ids=["no affine", "two axes", "group norm"],
)
def test_other_norms_are_left_alone(made):
    net = nn.Sequential(made, nn.Linear(8, 3))
    result = check(net, [(2, 5, 8), (1, 5, 8)])
    assert not result.report.regions


def test_a_hooked_norm_is_left_alone():
    net = nn.Sequential(norm(8), nn.Linear(8, 3))
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    fused = rc.fuse(randomise(net), (draw((2, 8)),), capture="symbolic_trace").model
    assert torch.allclose(fused(draw((2, 8))), net(draw((2, 8))))
    assert ops(fused)["LayerNorm"] == 1


def test_in_half_precision_the_result_is_no_less_exact():
    net = nn.Sequential(norm(64), nn.Linear(64, 32)).to(torch.bfloat16).eval()
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    assert rc.fuse(net, (x,)).report.equivalence.error_ratio < 2


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_a_norm_of_the_input_itself_is_taken_in_whole(rank, door):
    model = randomise(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU()))
    shape = (2, 5, 4)[: rank - 1]
    result = rc.fuse(model, (draw((*shape, 6)),), capture=door)
    assert result.report.ops.after == 3
    assert result.report.ops.after_by_type.get("mul", 0) == 0
    for sizes in ((3, 7, 2)[: rank - 1], (1, 1, 1)[: rank - 1]):
        x = draw((*sizes, 6))
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)
