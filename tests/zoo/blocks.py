"""Blocks from the literature that train as many ops and deploy as few.

Each is written down from its published formula, with nothing but plain modules: no
deploy form, no method that merges. `BLOCKS` names them, with the ops that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 6  # channels of every block here


def conv_norm(kernel: int | tuple[int, int], **settings: object) -> nn.Sequential:
    """conv → BN, padded to the same size unless told."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    step = int(str(settings.get("dilation", 1)))
    padding = tuple(step * (side // 2) for side in sides)
    options = {"bias": False, "padding": padding, **settings}
    return nn.Sequential(nn.Conv2d(C, C, sides, **options), nn.BatchNorm2d(C))  # type: ignore[arg-type]


class Sum(nn.Module):
    """Σ branch(x), then perhaps an activation."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """All branches read the same input."""
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.act(total)


def skip(stride: int) -> list[nn.Module]:
    """A BN of the input, where the block keeps the size."""
    return [nn.BatchNorm2d(C)] if stride == 1 else []


def repvgg(stride: int = 1, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """RepVGG (arXiv 2101.03697, section 3.3), and YOLOv6/v7's RepConv with SiLU."""
    sides = (conv_norm(3, stride=stride), conv_norm(1, stride=stride))
    return Sum(*sides, *skip(stride), act=act())


def mobileone(stride: int = 1) -> nn.Module:
    """MobileOne (arXiv 2206.04040, figure 3), with k = 2 branches."""
    deep = [conv_norm(3, groups=C, stride=stride) for _ in range(2)]
    scale = conv_norm(1, groups=C, stride=stride)
    depthwise = Sum(*deep, scale, *skip(stride), act=nn.ReLU())
    point = Sum(*(conv_norm(1) for _ in range(2)), nn.BatchNorm2d(C), act=nn.ReLU())
    return nn.Sequential(depthwise, point)


def acnet(stride: int = 1) -> nn.Module:
    """ACNet (arXiv 1908.03930, equation 2): square, horizontal and vertical kernels."""
    return Sum(*(conv_norm(k, stride=stride) for k in (3, (1, 3), (3, 1))))


class Padded(nn.Module):
    """BN, then a border of the very value that it makes of zero (DBB, figure 2)."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.norm, self.width = nn.BatchNorm2d(C), width

    def forward(self, x: Tensor) -> Tensor:
        """The border is β - γ μ / σ, one value per channel."""
        n, width = self.norm, [self.width] * 4
        value = n.bias - n.running_mean * n.weight / (n.running_var + n.eps).sqrt()
        value = value.reshape(1, -1, 1, 1)
        return F.pad(n(x) - value, width) + value


def dbb(stride: int = 1, *, pads: str = "before") -> nn.Module:
    """Diverse branch block (arXiv 2103.13425, figure 2): 1x1, KxK, 1x1-KxK, 1x1-avg.

    Args:
        pads: `before` pads x with zeros ahead of 1x1 and BN, `after` pads what BN made
            with BN's own value. The two are the same function of x.
    """

    def first() -> list[nn.Module]:
        point = nn.Conv2d(C, C, 1, bias=False)
        if pads == "before":
            return [nn.ZeroPad2d(1), point, nn.BatchNorm2d(C)]
        return [point, Padded()]

    inner = nn.Sequential(*first(), conv_norm(3, stride=stride, padding=0))
    pool = nn.AvgPool2d(3, stride)
    average = nn.Sequential(*first(), pool, nn.BatchNorm2d(C))
    plain = conv_norm(3, stride=stride), conv_norm(1, stride=stride)
    return Sum(*plain, inner, average)


def asymmetric(stride: int = 1) -> nn.Module:
    """A 1xK then a Kx1 conv (Inception v3, arXiv 1512.00567, section 3.2)."""
    wide = nn.Conv2d(C, C, (1, 3), padding=(0, 1), stride=(1, stride), bias=False)
    return nn.Sequential(wide, conv_norm((3, 1), stride=(stride, 1)))


class RepMixer(nn.Module):
    """Y = DWConv(BN(X)) + X (FastViT, arXiv 2303.14189, equation 2)."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)
        self.mixer = nn.Conv2d(C, C, 3, padding=1, groups=C, padding_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        """As the paper writes it."""
        return self.mixer(self.norm(x)) + x


def cpe() -> nn.Module:
    """Conditional position encoding (arXiv 2102.10882): DWConv(x) + x."""
    return Sum(nn.Conv2d(C, C, 7, padding=3, groups=C), nn.Identity())


def large_and_small() -> nn.Module:
    """RepLKNet (arXiv 2203.06717, section 3): a small kernel beside a large one."""
    return Sum(conv_norm(13, groups=C), conv_norm(5, groups=C))


def dilated() -> nn.Module:
    """UniRepLKNet (arXiv 2311.15599, equation 1): dilated ones beside a large one."""
    rows = ((9, 1), (5, 1), (5, 2), (3, 3), (3, 4))
    return Sum(*(conv_norm(k, groups=C, dilation=d) for k, d in rows))


def repghost() -> nn.Module:
    """RepGhost (arXiv 2211.06088, figure 3): BN of the input instead of a concat."""
    return Sum(conv_norm(3, groups=C), nn.BatchNorm2d(C), act=nn.ReLU())


def tokens(x: Tensor) -> Tensor:
    """(N, L, C), laid out so: torch runs a strided linear layer as two ops."""
    return x.flatten(2).transpose(1, 2).contiguous()


class Implicit(nn.Module):
    """YOLOR's implicit add and multiply around a head's 1x1 conv (2105.04206)."""

    def __init__(self) -> None:
        super().__init__()
        self.add = nn.Parameter(torch.randn(1, C, 1, 1))
        self.conv = nn.Conv2d(C, 2 * C, 1)
        self.times = nn.Parameter(torch.randn(1, 2 * C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """times · conv(add + x)."""
        return self.times * self.conv(self.add + x)


class LayerScale(nn.Module):
    """x + γ · MLP(x) (CaiT, arXiv 2103.17239), on images or with channels last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        made = nn.Linear if last else lambda i, o: nn.Conv2d(i, o, 1)
        self.mlp = nn.Sequential(made(C, 2 * C), nn.GELU(), made(2 * C, C))
        self.gamma = nn.Parameter(torch.randn(C) if last else torch.randn(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The residual branch scaled per channel."""
        x = tokens(x) if self.last else x
        return x + self.gamma * self.mlp(x)


class LinearNorm(nn.Module):
    """LeViT's pair (arXiv 2104.01136): Linear, then BN over tokens, or BN first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.norm = first, nn.BatchNorm1d(C)
        self.linear = nn.Linear(C, C, bias=first)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of an image, or a pooled vector for a head."""
        if self.first:
            return self.linear(self.norm(x.mean((2, 3)).relu()))
        made = self.linear(tokens(x))
        return self.norm(made.flatten(0, 1)).reshape_as(made)


@dataclass(frozen=True)
class Case:
    """How a block is built, and the ATen compute ops that its deploy form has."""

    build: Callable[[], nn.Module]
    ops: int


BLOCKS = {
    "RepVGG": Case(repvgg, 2),
    "RepVGG, stride 2": Case(lambda: repvgg(2), 2),
    "MobileOne": Case(mobileone, 4),
    "MobileOne, stride 2": Case(lambda: mobileone(2), 4),
    "ACNet": Case(acnet, 1),
    "ACNet, stride 3": Case(lambda: acnet(3), 1),
    "DBB": Case(dbb, 1),
    "DBB, stride 2": Case(lambda: dbb(2), 1),
    "asymmetric pair": Case(asymmetric, 1),
    "asymmetric pair, stride 2": Case(lambda: asymmetric(2), 1),
    # torch runs a conv that pads by reflection as two ops.
    "RepMixer, reflected": Case(lambda: RepMixer("reflect"), 2),
    "CPE": Case(cpe, 1),
    "large and small kernel": Case(large_and_small, 1),
    "dilated branches": Case(dilated, 1),
    "RepGhost": Case(repghost, 2),
    "YOLO RepConv": Case(lambda: repvgg(act=nn.SiLU), 2),
    "implicit add and multiply": Case(Implicit, 1),
    "layer scale": Case(lambda: LayerScale(last=False), 4),
    "layer scale, channels last": Case(lambda: LayerScale(last=True), 4),
    "Linear, then BN": Case(lambda: LinearNorm(first=False), 1),
    "BN, then Linear": Case(lambda: LinearNorm(first=True), 3),
}
