"""What a FastViT is made of, as data: no tensors, no modules.

Source: Vasu et al., "FastViT: A Fast Hybrid Vision Transformer using Structural
Reparameterization", ICCV 2023, with the numbers of the released training code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastvit.errors import ConfigError

TokenMixer = Literal["repmixer", "attention"]

STAGES = 4
STRIDES = (4, 8, 16, 32)  # input pixels per output pixel after each stage
HEAD_DIM = 32  # channels of one attention head
HEAD_EXPANSION = 2  # the last conv doubles the channels before pooling

_RESOLUTION = 256  # pixels; every variant was trained and is evaluated at this size


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: per channel, of pixel values in [0, 1]; subtracted.
        std: per channel, of pixel values in [0, 1]; divided by, after the mean.
        crop_pct: side of the centre crop over side of the resized image.
        interpolation: how the image is resized.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class FastViTConfig:
    """One FastViT, whole; the defaults are those that most variants share.

    Attributes:
        layers: blocks in each stage.
        dims: channels of each stage.
        mlp_ratio: hidden over outer channels in every feed-forward block.
        token_mixers: how each stage mixes space.
        cpe: which stages begin with a conditional position encoding.
        layer_scale_init: first value of every layer scale.
        drop_path_rate: chance that the last block's branch is skipped in training;
            it rises linearly from 0 at the first block.
        drop_rate: dropout before the classifier.
        crop_pct: centre crop at evaluation, a share of the resized image's side.
        num_classes: outputs of the classifier; 0 leaves pooled features.
        in_chans: channels of the input image.

    Raises:
        ConfigError: the fields do not describe a model.
    """

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratio: float = 4.0
    token_mixers: tuple[TokenMixer, ...] = ("repmixer",) * STAGES
    cpe: tuple[bool, ...] = (False,) * STAGES
    layer_scale_init: float = 1e-5
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    crop_pct: float = 0.9
    num_classes: int = 1000
    in_chans: int = 3

    def __post_init__(self) -> None:
        for field in ("layers", "dims", "token_mixers", "cpe"):
            length = len(getattr(self, field))
            if length != STAGES:
                raise ConfigError(f"{field} has {length} entries, one a stage is 4.")
        self._check_numbers()
        for mixer, dim in zip(self.token_mixers, self.dims, strict=True):
            if mixer not in ("repmixer", "attention"):
                raise ConfigError(f"Token mixer {mixer!r} is unknown.")
            if mixer == "attention" and dim % HEAD_DIM:
                raise ConfigError(f"Attention needs {HEAD_DIM} | {dim} channels.")

    def _check_numbers(self) -> None:
        bounds = {
            "layers": (min(self.layers) >= 1, "at least 1 in each stage"),
            "dims": (min(self.dims) >= 1, "at least 1 in each stage"),
            "mlp_ratio": (self.mlp_ratio > 0, "above 0"),
            "num_classes": (self.num_classes >= 0, "0 or more"),
            "in_chans": (self.in_chans >= 1, "1 or more"),
            "drop_path_rate": (0 <= self.drop_path_rate < 1, "in [0, 1)"),
            "drop_rate": (0 <= self.drop_rate < 1, "in [0, 1)"),
            "crop_pct": (0 < self.crop_pct <= 1, "in (0, 1]"),
        }
        for field, (holds, wanted) in bounds.items():
            if not holds:
                got = getattr(self, field)
                raise ConfigError(f"{field} is {got}, it must be {wanted}.")

    @property
    def preprocessing(self) -> Preprocessing:
        """ImageNet statistics; other than three channels get their average."""
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        if self.in_chans != len(mean):
            mean = (sum(mean) / len(mean),) * self.in_chans
            std = (sum(std) / len(std),) * self.in_chans
        size = (self.in_chans, _RESOLUTION, _RESOLUTION)
        return Preprocessing(size, mean, std, self.crop_pct)
