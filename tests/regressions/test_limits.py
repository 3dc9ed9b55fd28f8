"""Where a model's code asks for sizes, its graph is right or stops: never wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same, conv, draw, randomise
from torch import nn

import repcompiler as rc

EXAMPLE = (2, 4, 8, 8)


class Asks(nn.Module):
    """A conv and a norm, and a way through them that sizes decide."""

    def __init__(self, way: Callable) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm, self.head = conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x):
        return self.way(self, x)


def body(net: Asks, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(x))


def large(net, x):
    return body(net, x) * 2 + 1 if x.shape[2] > 6 else body(net, x)


def single(net, x):
    return net.head(x) if x.shape[0] == 1 else body(net, x)


def even(net, x):
    return body(net, x if x.shape[3] % 2 == 0 else F.pad(x, (0, 1)))


def square(net, x):
    return body(net, x) if x.shape[2] == x.shape[3] else net.head(x)


def blocks(net, x):
    found = [net.head(t) * i for i, t in enumerate(x.split(3, 2))]
    return torch.cat([*found, body(net, x)], 2)


def rows(net, x):
    return sum(body(net, x)[:, :, i] for i in range(x.shape[2]))


def unbatched(net, x):
    return body(net, x[None] if x.dim() == 3 else x)


def resized(net, x):
    found = body(net, x)
    return found if found.shape[2] == 8 else F.interpolate(found, (8, 8))


RIGHT = {  # sizes for which the code goes another way, and sizes for which it does not
    large: ([(2, 4, 6, 6), (2, 4, 1, 9)], [(3, 4, 7, 5), (1, 4, 9, 1)]),
    single: ([(1, 4, 8, 8)], [(3, 4, 5, 7), (4, 4, 1, 1)]),
    even: ([(2, 4, 8, 7), (1, 4, 3, 1)], [(3, 4, 5, 6), (1, 4, 1, 2)]),
    square: ([(2, 4, 7, 8)], [(1, 4, 5, 5), (3, 4, 1, 1)]),
    blocks: ([(2, 4, 11, 8), (2, 4, 6, 8)], [(1, 4, 9, 3), (3, 4, 7, 1)]),
    rows: ([(2, 4, 9, 8), (2, 4, 7, 8)], [(1, 4, 8, 3)]),
    unbatched: ([(4, 8, 8)], [(1, 4, 3, 5)]),
    resized: ([(2, 4, 9, 8), (2, 4, 7, 5)], [(1, 4, 8, 3)]),
}


@pytest.mark.parametrize("way", RIGHT, ids=lambda way: way.__name__)
def test_another_turn_is_an_error(way):
    net = randomise(Asks(way))
    fused = rc.fuse(net, (draw(EXAMPLE),)).model
    other, same = RIGHT[way]
    assert_same(net, fused, [(draw(shape),) for shape in (EXAMPLE, *same)])
    for shape in other:
        net(draw(shape))  # the model takes it
        with pytest.raises(AssertionError, match="captured for inputs where"):
            fused(draw(shape))


def test_the_turn_of_the_example_is_taken():
    net = randomise(Asks(single))
    fused = rc.fuse(net, (draw((1, 4, 8, 8)),)).model
    assert_same(net, fused, [(draw((1, 4, 8, 8)),)])
    with pytest.raises(AssertionError, match="captured for inputs where"):
        fused(draw((2, 4, 8, 8)))


def test_what_only_the_exporter_assumes_is_no_limit():
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.avg_pool2d(self.norm(self.conv(x)), 4, 2).mean((2, 3))

    net = randomise(Pools())
    shapes = [(1, 4, 8, 8), (1, 4, 4, 5), (3, 4, 7, 4), (2, 4, 33, 47)]
    fused = rc.fuse(net, (draw(shapes[0]),), capture="export").model
    assert_same(net, fused, [(draw(shape),) for shape in shapes])


def test_limits_outlive_copies_and_another_fusing(tmp_path):
    net = randomise(Asks(large))
    fused = rc.fuse(net, (draw(EXAMPLE),)).model
    file = tmp_path / "fused.pt"
    torch.save(fused, file)
    again = rc.fuse(fused, (draw(EXAMPLE),)).model
    for copy in (again, torch.load(file, weights_only=False)):
        assert_same(net, copy, [(draw((3, 4, 9, 7)),)])
        with pytest.raises(AssertionError, match="captured for inputs where"):
            copy(draw((2, 4, 6, 6)))


def test_a_tensor_given_twice_is_two_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = conv(), nn.BatchNorm2d(4), conv()

        def forward(self, x, y):
            return self.norm(self.conv(x)) + self.head(y)

    net = randomise(Two())
    for batch in (2, 5):
        same = draw((batch, 4, 8, 8))
        for door in ("symbolic_trace", "export"):
            result = rc.fuse(net, (same, same), capture=door)
            assert result.report.equivalence.ok
            apart = (draw(EXAMPLE, seed=1), draw(EXAMPLE, seed=2))
            assert_same(net, result.model, [apart])


def test_an_empty_batch_as_the_example():
    net = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    fused = rc.fuse(net, (draw((0, 4, 8, 8)),)).model
    assert_same(net, fused, [(draw(EXAMPLE),)])


def test_a_program_keeps_to_the_sizes_that_it_was_exported_for():
    net = randomise(Asks(large))
    auto = torch.export.Dim.AUTO
    sizes = ({0: auto, 2: auto},)
    program = torch.export.export(net, (draw(EXAMPLE),), dynamic_shapes=sizes)
    fused = rc.fuse(program, (draw(EXAMPLE),)).model
    assert_same(net, fused, [(draw((1, 4, 7, 8)),), (draw((3, 4, 9, 8)),)])
    for shape in ((2, 4, 6, 8), (2, 4, 8, 9)):
        with pytest.raises(AssertionError, match="captured for inputs where"):
            fused(draw(shape))


def test_sizes_that_nest_too_deep_are_left_fixed() -> None:
    """Each stage pads to its own multiple: open sizes would take minutes to export."""

    def nested(net: Asks, x: torch.Tensor) -> torch.Tensor:
        for multiple in (7, 5, 3, 7, 5, 3):
            height, width = x.shape[2:]
            x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
            x = net.norm(net.conv(x))[:, :, ::2, ::2]
        return x if x.shape[2] > 1 else net.head(x)

    model = randomise(Asks(nested))
    result = rc.fuse(model, (draw((2, 4, 40, 40)),), capture="export")
    assert result.report.equivalence.verdict == "equal"
    assert_same(model, result.model, [(draw((5, 4, 40, 40)),)])
    with pytest.raises(AssertionError, match=r"shape\[2\]"):
        result.model(draw((2, 4, 44, 40)))


def test_a_constant_that_is_resampled_for_good_is_folded() -> None:
    """timm's position embeddings, which do so whenever they are exported."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()
            self.place = nn.Parameter(torch.randn(1, 4, 6, 6))

        def forward(self, x):
            place = self.place
            if torch.compiler.is_exporting() or place.shape[2:] != x.shape[2:]:
                place = F.interpolate(place, x.shape[2:], mode="bicubic")
            return self.conv(x) + place

    model = randomise(Embedded())
    x = draw((2, 4, 6, 6))
    result = rc.fuse(model, (x,), capture="export")
    assert result.report.ops.after == 2
    assert_same(model, result.model, [(x,), (draw((5, 4, 6, 6)),)])
    assert rc.fuse(model, (draw((2, 4, 8, 8)),), capture="export").report.ops.after <= 3
