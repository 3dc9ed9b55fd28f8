"""FastViT in its train-time form: a classifier, and a backbone of four feature maps.

Source: Vasu et al., "FastViT", ICCV 2023. There is one form only; the deploy form is
derived from a trained model's graph, not written here a second time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.layers.classifier import ClassifierHead
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from fastvit.blocks import AttentionBlock, RepCPE, RepMixerBlock
from fastvit.branches import MobileOneBlock, PatchEmbed, build_stem
from fastvit.config import HEAD_EXPANSION, STRIDES, FastViTConfig

_BLOCKS = {"repmixer": RepMixerBlock, "attention": AttentionBlock}


class Stage(nn.Module):
    """Patch embedding (from the second stage on), position encoding, blocks.

    Args:
        config: the whole model's.
        index: which stage, from 0.
        drop_path_rates: one a block.

    Shapes: (B, dims[index - 1], H, W) to (B, dims[index], ceil(H / 2), ceil(W / 2));
        the first stage keeps (B, dims[0], H, W).
    """

    def __init__(
        self, config: FastViTConfig, index: int, drop_path_rates: list[float]
    ) -> None:
        super().__init__()
        dim = config.dims[index]
        block = _BLOCKS[config.token_mixers[index]]
        first = index == 0
        self.downsample = (
            nn.Identity() if first else PatchEmbed(config.dims[index - 1], dim)
        )
        self.pos_emb = RepCPE(dim) if config.cpe[index] else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                block(dim, config.mlp_ratio, config.layer_scale_init, rate)
                for rate in drop_path_rates
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pos_emb(self.downsample(x)))


class FastViT(nn.Module):
    """The image classifier.

    Attributes:
        config: what the model was built from.
        preprocessing: how its input images are made.
        num_features: channels that the classifier reads.

    Shapes: `forward` maps (B, in_chans, H, W) to logits (B, num_classes), or with
        `num_classes=0` to pooled features (B, num_features).
    """

    def __init__(self, config: FastViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = HEAD_EXPANSION * config.dims[-1]
        self.stem = build_stem(config.in_chans, config.dims[0])
        self.stages = _build_stages(config)
        self.final_conv = MobileOneBlock(
            config.dims[-1], self.num_features, 3, depthwise=True, squeeze_excite=True
        )
        self.head = ClassifierHead(
            self.num_features, config.num_classes, drop_rate=config.drop_rate
        )
        self.preprocessing = config.preprocessing
        self.apply(_init_linear)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, num_features, ceil(H / 32), ceil(W / 32))."""
        return self.final_conv(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits, or to (B, num_features) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, randomly initialised classifier in place of the old one.

        Raises:
            ConfigError: `num_classes` is negative.
        """
        self.config = replace(self.config, num_classes=num_classes)
        self.head.reset(num_classes)
        self.head.apply(_init_linear)


class FastViTBackbone(nn.Module):
    """Four feature maps of falling resolution, for detection and segmentation.

    Args:
        config: as for the classifier; what concerns its head is ignored.
        norms: whether a batch norm of its own ends each output, as in the released
            code for dense prediction. Classifier checkpoints hold no such norms.

    Attributes:
        channels: of each output.
        strides: input pixels per output pixel, 4 8 16 32.

    Shapes: (B, in_chans, H, W) to a list of (B, channels[i], ceil(H / strides[i]),
        ceil(W / strides[i])).
    """

    def __init__(self, config: FastViTConfig, *, norms: bool = False) -> None:
        super().__init__()
        self.config = config
        self.channels = config.dims
        self.strides = STRIDES
        self.stem = build_stem(config.in_chans, config.dims[0])
        self.stages = _build_stages(config)
        for index, dim in enumerate(config.dims):
            norm = nn.BatchNorm2d(dim) if norms else nn.Identity()
            self.add_module(f"norm{index}", norm)
        self.preprocessing = config.preprocessing
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            outputs.append(self.get_submodule(f"norm{index}")(x))
        return outputs


def _build_stages(config: FastViTConfig) -> nn.Sequential:
    # On the CPU even where modules are being built on the meta device: rates are read.
    ramp = torch.linspace(0, config.drop_path_rate, sum(config.layers), device="cpu")
    rates = ramp.split(config.layers)
    return nn.Sequential(
        *(Stage(config, i, of_stage.tolist()) for i, of_stage in enumerate(rates))
    )


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
