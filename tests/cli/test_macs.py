"""Multiply-accumulates, counted as by hand."""

from __future__ import annotations

import pytest
import torch
from fastvit_cli import macs, onnxmacs
from torch import nn

from repcompiler.counting import count


class Attention(nn.Module):
    """One head count's worth of everything that multiplies in an attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, length, width))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_as_by_hand(fused):
    net, x = Attention(fused).eval(), torch.randn(1, 5, 12)
    by_hand = 5 * 12 * 36 + 3 * (5 * 5 * 4 + 5 * 5 * 4) + 5 * 12 * 12
    counted = macs.count(net, (x,))
    assert counted.total == by_hand
    assert counted.total == count(net, (x,))[1]
    if not fused:
        assert counted.uncounted["softmax"] == 1


class Einsum(nn.Module):
    """The products of a text, of which numpy would say 2.097e+06."""

    def __init__(self, text: str, other: tuple[int, ...]) -> None:
        super().__init__()
        self.text, self.other = text, nn.Parameter(torch.randn(other))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.text, x, self.other)


@pytest.mark.parametrize(
    ("text", "size", "other", "by_hand"),
    [
        ("bij,jk->bik", (2, 129, 77), (77, 131), 2 * 129 * 77 * 131),
        ("b c h w, o c -> b o h w", (1, 13, 9, 11), (17, 13), 13 * 9 * 11 * 17),
        ("bhi,bhj->bij", (2, 3, 129), (1, 3, 131), 2 * 3 * 129 * 131),
    ],
)
def test_einsum_is_counted_to_the_unit(text, size, other, by_hand):
    net, x = Einsum(text, other).eval(), torch.randn(size)
    assert macs.count(net, (x,)).by_operator == {"einsum": by_hand}


def test_fastvit_with_attention_is_counted_alike_by_both_counters():
    import fastvit

    net, x = fastvit.create_model("fastvit_sa12").eval(), torch.randn(1, 3, 64, 64)
    counted = macs.count(net, (x,))
    assert counted.total == count(net, (x,))[1]
    # Two blocks, 16 heads of 32 over 2x2 positions: Q Kᵀ and then the sum of V.
    assert counted.by_operator[macs.ATTENTION] == 2 * 16 * (4 * 4 * 32 + 4 * 4 * 32)
    assert counted.uncounted["gelu"] > 0


class Of(nn.Module):
    """One module, called as it takes its inputs, of which the first result counts."""

    def __init__(self, module: nn.Module, times: int = 1, **given: object) -> None:
        super().__init__()
        self.module, self.times, self.given = module, times, given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.module(*[x] * self.times, **self.given)
        return result[0] if isinstance(result, tuple) else result


# Five tokens of twelve channels; heads of one layer: projections, then attention.
HEADS = 5 * 12 * 36 + 5 * 12 * 12 + 2 * 5 * 5 * 12
LSTM = 5 * (2 * 4 * 8 * (12 + 8) + 2 * 4 * 8 * (16 + 8))
WHOLE = [
    (nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True), 1, LSTM),
    (nn.LSTM(12, 8, proj_size=4), 1, 5 * (32 * 12 + 32 * 4 + 4 * 8)),
    (nn.GRU(12, 8, batch_first=True), 1, 5 * 24 * (12 + 8)),
    (nn.RNN(12, 8, batch_first=True), 1, 5 * 8 * (12 + 8)),
    (nn.MultiheadAttention(12, 3, batch_first=True), 3, HEADS),
    (
        nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
        1,
        HEADS + 2 * 5 * 12 * 20,
    ),
    (nn.Bilinear(12, 12, 7), 2, 5 * 12 * 12 * 7),
]


@pytest.mark.parametrize(
    ("module", "times", "by_hand"), WHOLE, ids=lambda v: type(v).__name__
)
def test_layers_that_run_as_one_kernel_are_counted_by_both_counters(
    module, times, by_hand
):
    net, x = Of(module, times).eval(), torch.randn(1, 5, 12)
    assert count(net, (x,))[1] == by_hand
    assert macs.count(net, (x,)).total == by_hand


def test_padded_words_of_an_encoder_are_not_counted():
    """Torch packs what a mask leaves, and attends over that."""
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    mask = torch.tensor([[False, False, False, True, True]])
    net = Of(nn.TransformerEncoder(layer, 2), src_key_padding_mask=mask).eval()
    tokens = 3 * 12 * (36 + 12 + 2 * 20) + 2 * 3 * 3 * 12
    assert count(net, (torch.randn(1, 5, 12),))[1] == 2 * tokens


class Packed(nn.Module):
    """Ragged rows, multiplied with one another, and an op of no results at all."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layout, self.linear = layout, nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.unbind_copy(x[:, :0], 1)
        rows = [x[0, :2], x[0, :3]]
        packed = torch.nested.nested_tensor(rows, layout=self.layout)
        if self.layout is torch.jagged:
            return self.linear(packed).to_padded_tensor(0.0)
        return torch.bmm(packed, packed.transpose(1, 2)).to_padded_tensor(0.0)


def test_ragged_rows_are_counted_row_by_row():
    x = torch.randn(1, 5, 3)
    assert count(Packed(torch.strided), (x,))[1] == 2 * 2 * 3 + 3 * 3 * 3
    assert count(Packed(torch.jagged), (x,))[0]["linear"] == 1  # and no sizes known


class Vectors(nn.Module):
    """Products in which one side is a vector."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        products = x[0] @ x[0, 0], x[0, 0] @ x[0, 1], x @ x[0].mT
        added = torch.addbmm(x[0] @ x[0].mT, x, x.mT)
        return sum(p.sum() for p in (*products, added))


def test_products_of_vectors_are_counted_by_both_counters():
    x = torch.randn(1, 5, 12)
    by_hand = 5 * 12 + 12 + 3 * 5 * 5 * 12
    assert count(Vectors(), (x,))[1] == by_hand
    assert macs.count(Vectors(), (x,)).total == by_hand


class Everything(nn.Module):
    """A grouped, strided conv, a transposed one, a linear layer and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.linear = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(torch.relu(self.conv(x))) * self.scale
        y = y @ y.transpose(-2, -1)
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_onnx_graph_is_counted_as_by_hand(tmp_path, dynamic):
    net, x = Everything().eval(), torch.randn(1, 4, 10, 12)
    file = str(tmp_path / "net.onnx")
    axes = {"x": {0: "batch", 2: "height", 3: "width"}} if dynamic else {}
    torch.onnx.export(
        net, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes
    )
    counted = onnxmacs.counts(file, (x,))
    conv, up = 6 * 5 * 6 * 2 * 9, 6 * 5 * 6 * 2 * 4
    assert counted["macs_by_operator"] == {
        "Conv": conv,
        "ConvTranspose": up,
        "MatMul": 4 * 10 * 10 * 12,
        "Gemm": 4 * 5,
    }
    assert counted["macs"] == count(net, (x,))[1]
    assert counted["params"] == sum(p.numel() for p in net.parameters())
    assert counted["uncounted"]["Relu"] == 1
    larger = onnxmacs.counts(file, (torch.randn(1, 4, 20, 12),))
    assert larger["macs_by_operator"]["Conv"] == 2 * conv


def test_what_has_no_size_is_listed(tmp_path):
    from onnx import TensorProto, helper, save

    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "cast"], ["y"]),
        helper.make_node("Einsum", ["x", "x"], ["z"], equation="ij,kj->ik"),
    ]
    values = (("x", (2, 3)), ("y", None), ("z", None))
    x, *results = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        for name, sizes in values
    )
    file = str(tmp_path / "net.onnx")
    save(helper.make_model(helper.make_graph(nodes, "net", [x], results)), file)
    counted = onnxmacs.counts(file, (torch.randn(2, 3),))
    assert counted["macs_by_operator"] == {"Einsum": 2 * 3 * 2}
    assert counted["uncounted"] == {"NonZero": 1, "Cast": 1, "MatMul": 1}
