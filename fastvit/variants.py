"""The seven published variants and how to make one.

model = create_model("fastvit_sa12", num_classes=10)
backbone = create_model("fastvit_sa12", features_only=True)
model = fastvit_t8()
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from fastvit.config import FastViTConfig, Preprocessing, TokenMixer
from fastvit.errors import ConfigError
from fastvit.model import FastViT, FastViTBackbone

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ATTENTION_LAST: tuple[TokenMixer, ...] = ("repmixer",) * 3 + ("attention",)
_CPE_LAST = (False, False, False, True)

_T12 = FastViTConfig(layers=(2, 2, 6, 2), dims=(64, 128, 256, 512), mlp_ratio=3)
_SA12 = replace(
    _T12,
    mlp_ratio=4,
    token_mixers=_ATTENTION_LAST,
    cpe=_CPE_LAST,
    drop_path_rate=0.1,
)
_SA36 = replace(
    _SA12,
    layers=(6, 6, 18, 6),
    layer_scale_init=1e-6,
    drop_path_rate=0.2,
    crop_pct=0.95,
)

VARIANTS: dict[str, FastViTConfig] = {
    "fastvit_t8": replace(_T12, layers=(2, 2, 4, 2), dims=(48, 96, 192, 384)),
    "fastvit_t12": _T12,
    "fastvit_s12": replace(_T12, mlp_ratio=4),
    "fastvit_sa12": _SA12,
    "fastvit_sa24": replace(_SA12, layers=(4, 4, 12, 4)),
    "fastvit_sa36": _SA36,
    "fastvit_ma36": replace(_SA36, dims=(76, 152, 304, 608), drop_path_rate=0.35),
}


class Options(TypedDict, total=False):
    """What a caller may change about a variant; None keeps the variant's own value."""

    num_classes: int
    in_chans: int
    features_only: bool
    drop_path_rate: float | None
    drop_rate: float
    layer_scale_init: float | None
    norms: bool


def config_of(name: str) -> FastViTConfig:
    """The configuration of a variant, by name.

    Raises:
        ConfigError: no variant has that name; the hint lists those that exist.
    """
    if name not in VARIANTS:
        known = " ".join(VARIANTS)
        raise ConfigError(f"{name!r} is not a variant.", hint=f"Choose from: {known}.")
    return VARIANTS[name]


def preprocessing(name: str) -> Preprocessing:
    """How a variant's input images are made.

    Raises:
        ConfigError: no variant has that name.
    """
    return config_of(name).preprocessing


@overload
def create_model(
    name: str,
    *,
    num_classes: int = ...,
    in_chans: int = ...,
    features_only: Literal[False] = ...,
    drop_path_rate: float | None = ...,
    drop_rate: float = ...,
    layer_scale_init: float | None = ...,
    norms: bool = ...,
) -> FastViT: ...
@overload
def create_model(
    name: str, **options: Unpack[Options]
) -> FastViT | FastViTBackbone: ...
def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    drop_path_rate: float | None = None,
    drop_rate: float = 0.0,
    layer_scale_init: float | None = None,
    norms: bool = False,
) -> FastViT | FastViTBackbone:
    """A variant with random weights, in train mode.

    Args:
        name: a key of `VARIANTS`.
        num_classes: outputs of the classifier; 0 for pooled features.
        in_chans: channels of the input image.
        features_only: a `FastViTBackbone` of four feature maps, no classifier.
        drop_path_rate: of the last block; None for the variant's published rate.
        drop_rate: dropout before the classifier.
        layer_scale_init: None for the variant's published value.
        norms: whether the backbone's outputs end in batch norms.

    Raises:
        ConfigError: the name is unknown, or an option makes no model.
    """
    config = replace(
        config_of(name), num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
    )
    if drop_path_rate is not None:
        config = replace(config, drop_path_rate=drop_path_rate)
    if layer_scale_init is not None:
        config = replace(config, layer_scale_init=layer_scale_init)
    if features_only:
        return FastViTBackbone(config, norms=norms)
    if norms:
        raise ConfigError("norms=True needs features_only=True.")
    return FastViT(config)


def fastvit_t8(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-T8, 4.03 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_t8", **options)


def fastvit_t12(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-T12, 7.55 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_t12", **options)


def fastvit_s12(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-S12, 9.47 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_s12", **options)


def fastvit_sa12(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-SA12, 11.58 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_sa12", **options)


def fastvit_sa24(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-SA24, 21.55 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_sa24", **options)


def fastvit_sa36(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-SA36, 31.53 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_sa36", **options)


def fastvit_ma36(**options: Unpack[Options]) -> FastViT | FastViTBackbone:
    """FastViT-MA36, 44.07 M parameters; `options` as for `create_model`."""
    return create_model("fastvit_ma36", **options)
