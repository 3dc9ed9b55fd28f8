"""FastViT's token mixers, feed-forward and the two blocks made of them.

Every block has MetaFormer's shape (Yu et al., CVPR 2022): mix space, then mix channels,
each as a branch beside the residual stream. Source: FastViT, ICCV 2023, section 3.2, in
the form of the released code where that differs from the equations. Attribute names are
timm's, so that its state dicts load as they are.

Shapes: all modules here map (B, C, H, W) to (B, C, H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from fastvit.branches import MobileOneBlock, conv_bn
from fastvit.config import HEAD_DIM


def drop_path(rate: float) -> nn.Module:
    """Skips a sample's branch with chance `rate` in training; the identity at 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


class LayerScale(nn.Module):
    """y = gamma * x with one learnt factor a channel (Touvron et al., ICCV 2021).

    Args:
        dim: channels.
        init: first value of every factor; small, so that deep stacks start near the
            identity.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepMixer(nn.Module):
    """y = x + gamma * (mixer(x) - norm(x)), affine once the statistics are constant.

    `mixer` is a 3x3 depthwise MobileOne block without activation, `norm` a batch norm.
    The paper's equation 2, y = DWConv(BN(x) + x), states the idea; the subtraction of
    the norm and the layer scale come from the released code.

    Args:
        dim: channels.
        layer_scale_init: first value of gamma.
    """

    def __init__(self, dim: int, layer_scale_init: float) -> None:
        super().__init__()
        # A block that is nothing but its identity branch is a batch norm under the
        # name that released checkpoints give it, `norm.identity`.
        self.norm = MobileOneBlock(
            dim, dim, 3, conv_branches=0, scale_branch=False, activation=False
        )
        self.mixer = MobileOneBlock(dim, dim, 3, depthwise=True, activation=False)
        self.layer_scale = LayerScale(dim, layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class Attention(nn.Module):
    """Multi-head self-attention over all positions of a feature map.

    softmax(Q K^T / sqrt(d)) V per head of d = 32 channels (Vaswani et al., 2017), with
    a bias on the output projection only.

    Args:
        dim: channels, a multiple of 32.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        N = H * W
        tokens_BNC = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens_BNC).reshape(B, N, 3, self.num_heads, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, 32)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed_BNC = self.proj(mixed.transpose(1, 2).reshape(B, N, C))
        return mixed_BNC.transpose(1, 2).reshape(B, C, H, W)


class ConvFFN(nn.Module):
    """Depthwise 7x7 and batch norm, then two 1x1 convolutions with a GELU between.

    FastViT, section 3.2.3: the large kernel lends early stages the reach that
    attention would be too dear for.

    Args:
        dim: outer channels.
        hidden: inner channels.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = conv_bn(dim, dim, 7, groups=dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.apply(_init_conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class RepCPE(nn.Module):
    """Conditional position encoding: y = x + depthwise 7x7 convolution of x.

    Zero padding tells each position how far the border is (Chu et al., "Conditional
    Positional Encodings for Vision Transformers", 2021).

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_enc = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pos_enc(x) + x


class RepMixerBlock(nn.Module):
    """RepMixer, then a feed-forward branch.

    Args:
        dim: channels.
        mlp_ratio: hidden over outer channels of the feed-forward.
        layer_scale_init: first value of both layer scales.
        drop_path_rate: chance that training skips the feed-forward branch; the mixer
            is never skipped, for its residual is part of one affine map.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        layer_scale_init: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, layer_scale_init)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio))
        self.layer_scale = LayerScale(dim, layer_scale_init)
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.drop_path(self.layer_scale(self.mlp(x)))


class AttentionBlock(nn.Module):
    """Batch norm and attention, then a feed-forward, both as residual branches.

    Args:
        dim: channels, a multiple of 32.
        mlp_ratio: hidden over outer channels of the feed-forward.
        layer_scale_init: first value of both layer scales.
        drop_path_rate: chance that training skips a branch, drawn for each.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        layer_scale_init: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.token_mixer = Attention(dim)
        self.layer_scale_1 = LayerScale(dim, layer_scale_init)
        self.drop_path1 = drop_path(drop_path_rate)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio))
        self.layer_scale_2 = LayerScale(dim, layer_scale_init)
        self.drop_path2 = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.layer_scale_1(self.token_mixer(self.norm(x)))
        x = x + self.drop_path1(mixed)
        return x + self.drop_path2(self.layer_scale_2(self.mlp(x)))
