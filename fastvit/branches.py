"""Convolutions that train as several parallel branches of one affine map.

Let `conv_i` be bias-free convolutions of one geometry (each kernel centred), then

    y = BN_0(x) + sum_i BN_i(conv_i(x))

is affine once the batch norms' statistics are constant, so it equals one convolution.
More branches train better and cost nothing afterwards. Only the branches live here;
what they add up to is the compiler's business.

Sources: Vasu et al., "MobileOne", CVPR 2023 (the block); Ding et al., "RepLKNet",
CVPR 2022 (large beside small kernel); FastViT, ICCV 2023, sections 3.2.2 and 3.2.3.
Attribute names are timm's, so that its state dicts load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import reduce
from operator import add

from timm.layers.squeeze_excite import SqueezeExcite
from torch import Tensor, nn


def conv_bn(
    in_chs: int,
    out_chs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """A centred, bias-free convolution `conv` and its batch norm `bn`.

    Shapes: (B, in_chs, H, W) to (B, out_chs, ceil(H / stride), ceil(W / stride)), for
    odd kernels.
    """
    conv = nn.Conv2d(
        in_chs,
        out_chs,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_chs)))


def sum_of(branches: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The branches' outputs on one input, added from left to right."""
    return reduce(add, (branch(x) for branch in branches))


class MobileOneBlock(nn.Module):
    """Identity, 1x1 and kxk branches, summed; then squeeze-excite and activation.

    The identity branch (a batch norm alone) exists where shape is kept, the 1x1 branch
    beside a larger kernel unless `scale_branch` is off.

    Args:
        in_chs: input channels.
        out_chs: output channels.
        kernel: odd side of the kxk branches' kernels.
        stride: of every branch.
        depthwise: whether every branch treats each channel on its own.
        conv_branches: how many kxk branches; 0 leaves the others alone.
        scale_branch: whether a 1x1 branch stands beside a larger kernel.
        squeeze_excite: whether channels are reweighted by their global means.
        activation: whether a GELU ends the block.

    Shapes: (B, in_chs, H, W) to (B, out_chs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        conv_branches: int = 1,
        scale_branch: bool = True,
        squeeze_excite: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        groups = in_chs if depthwise else 1
        keeps_shape = in_chs == out_chs and stride == 1
        has_scale = kernel > 1 and scale_branch

        def branch(side: int) -> nn.Sequential:
            return conv_bn(in_chs, out_chs, side, stride=stride, groups=groups)

        self.se = (
            SqueezeExcite(out_chs, rd_divisor=1) if squeeze_excite else nn.Identity()
        )
        self.identity = nn.BatchNorm2d(in_chs) if keeps_shape else None
        self.conv_kxk = nn.ModuleList(branch(kernel) for _ in range(conv_branches))
        self.conv_scale = branch(1) if has_scale else None
        self.act = nn.GELU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Order matters for bits: floating-point sums, of outputs here and of the
        # branches' gradients on the way back, are those of timm's model.
        optional = (self.identity, self.conv_scale)
        present = [branch for branch in optional if branch is not None]
        return self.act(self.se(sum_of([*present, *self.conv_kxk], x)))


class LargeKernelConv(nn.Module):
    """A large and a small depthwise convolution of one stride, summed.

    Where `out_chs` is a multiple of `in_chs`, each input channel feeds that many
    output channels.

    Shapes: (B, in_chs, H, W) to (B, out_chs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        large: int = 7,
        small: int = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.large_conv = conv_bn(in_chs, out_chs, large, stride=stride, groups=in_chs)
        self.small_conv = conv_bn(in_chs, out_chs, small, stride=stride, groups=in_chs)

    def forward(self, x: Tensor) -> Tensor:
        return sum_of((self.large_conv, self.small_conv), x)


class PatchEmbed(nn.Module):
    """Halves the resolution between stages: a strided large kernel, then a 1x1 block.

    Shapes: (B, in_chs, H, W) to (B, out_chs, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernelConv(in_chs, out_chs, stride=2),
            MobileOneBlock(out_chs, out_chs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def build_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Three MobileOne blocks that quarter the resolution.

    Shapes: (B, in_chans, H, W) to (B, dim, ceil(H / 4), ceil(W / 4)).
    """
    return nn.Sequential(
        MobileOneBlock(in_chans, dim, 3, stride=2),
        MobileOneBlock(dim, dim, 3, stride=2, depthwise=True),
        MobileOneBlock(dim, dim, 1),
    )
