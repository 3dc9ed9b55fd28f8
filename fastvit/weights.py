"""Loading weights into a model: all of them, or none and an error that says why.

load_weights(model, "fastvit_sa12.pth.tar")         # any nn.Module
state, metadata = read_state_dict("best.safetensors")
load_state_dict_strictly(model, state)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastvit.config import FastViTConfig
from fastvit.errors import FusedCheckpoint, KeyMismatch
from fastvit.layouts import TAIL, identify, in_timm_layout, without_wrappers
from fastvit.model import FastViT, FastViTBackbone
from fastvit.statefiles import read_state_dict
from fastvit.variants import VARIANTS

__all__ = [
    "LoadedWeights",
    "load_state_dict_strictly",
    "load_weights",
    "load_weights_but_head",
    "read_state_dict",
]

# What hand-written reparameterize() methods call the merged kernel.
_FUSED_PARTS = frozenset({"reparam_conv", "rbr_reparam", "lkb_reparam"})
_FUSED_FORMS = frozenset({"fused", "deploy"})
_FUSED_HINT = (
    "Load the unfused checkpoint that it was made from (released files come in both "
    "forms); fusing the loaded model gives the deploy form again."
)
_OTHER_MODEL_HINT = (
    "Check that the file was saved from this very model, made with the same arguments."
)
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded.

    Attributes:
        layout: how the file names its tensors: `timm`, `timm-features` or `apple`;
            `own` for other models.
        ignored: names that were left out on purpose: the classifier's end, where the
            model is a backbone.
        metadata: what the file says besides its tensors.
    """

    layout: str
    ignored: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> LoadedWeights:
    """Load a checkpoint into a model, in place; on any error the model is unchanged.

    A FastViT takes timm's and Apple's unfused layouts; a `FastViTBackbone` also takes
    a classifier's file, without its last convolution and head. Any other module takes
    its own names. Wrapper prefixes and containers are removed.

    Raises:
        WeightsError: see `fastvit.errors`; a `KeyMismatch` lists what does not fit and
            names the variant that would.
    """
    state, metadata = read_state_dict(path)
    words = {"source": os.fspath(path), "form": metadata.get("form", "")}
    if not isinstance(model, FastViT | FastViTBackbone):
        load_state_dict_strictly(model, state, **words)
        return LoadedWeights("own", metadata=metadata)
    state, layout = in_timm_layout(without_wrappers(state, model.state_dict()))
    left_out = TAIL if isinstance(model, FastViTBackbone) else ()
    ignored = tuple(name for name in state if name.startswith(left_out))
    fitted = {k: v for k, v in state.items() if not k.startswith(left_out)}
    try:
        load_state_dict_strictly(model, fitted, **words)
    except FusedCheckpoint:
        raise
    except KeyMismatch as error:
        error.hint = _remedy(model, state)
        raise
    return LoadedWeights(layout, ignored, metadata)


def load_weights_but_head(
    model: nn.Module, path: str | os.PathLike[str], classes: int
) -> int:
    """Load a checkpoint made for another number of classes: all but the classifier.

    1. The tensors that differ in shape differ on their first axis alone.
    2. There the model has `classes`, and the file one other number.
    The model keeps its own values for those; `load_weights` rules hold for the rest.

    Returns:
        The file's number of classes; `classes` where nothing differs and all is loaded.

    Raises:
        WeightsError: as `load_weights`, also where 1 or 2 does not hold.
    """
    state, metadata = read_state_dict(path)
    own = model.state_dict()
    state = without_wrappers(state, own)
    if isinstance(model, FastViT):
        state, _ = in_timm_layout(state)
    differ = [k for k in own if k in state and state[k].shape != own[k].shape]
    theirs = {state[k].shape[0] for k in differ if state[k].dim()}
    alike = all(
        state[k].shape[1:] == own[k].shape[1:] and own[k].shape[:1] == (classes,)
        for k in differ
    )
    if differ and alike and len(theirs) == 1:
        state = {**state, **{k: own[k] for k in differ}}
    words = {"source": os.fspath(path), "form": metadata.get("form", "")}
    load_state_dict_strictly(model, state, **words)
    return theirs.pop() if differ else classes


def load_state_dict_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "The state dict",
    form: str = "",
) -> None:
    """Copy tensors into any module if they are exactly its own, else change nothing.

    1. Every parameter and buffer of the model is in `state`, and nothing else is.
       Batch norms' step counters alone may be absent (older files lack them): they do
       not enter the output, and keep the model's value.
    2. Shapes are equal.
    3. A floating-point tensor is not filled from integers, which would be a quantised
       weight without its scale. Precision may differ: values are cast.

    Args:
        model: any module, on any device.
        state: tensors by name, with or without wrapper prefixes.
        source: what messages call `state`, a path for instance.
        form: what the file's metadata says of it; `fused` or `deploy` explain why
            names differ.

    Raises:
        KeyMismatch: 1, 2 or 3 does not hold.
        FusedCheckpoint: the same, and the form or the names are a deploy form's.
    """
    own = model.state_dict()
    state = without_wrappers(state, own)
    missing = [
        name for name in own if name not in state and not name.endswith(_COUNTER)
    ]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name}: file {_described(state[name], own[name])}, "
        f"model {_described(own[name], state[name])}"
        for name in own
        if name in state and not _fits(state[name], own[name])
    ]
    if missing or unexpected or misshapen:
        lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        name = type(model).__name__
        if form in _FUSED_FORMS or _is_fused(unexpected):
            message = f"{source} is a fused (deploy-form) checkpoint, not {name}'s own"
            raise FusedCheckpoint(message, **lists, hint=_FUSED_HINT)
        message = f"{source} does not fit {name}"
        raise KeyMismatch(message, **lists, hint=_OTHER_MODEL_HINT)
    model.load_state_dict({**own, **state}, strict=True)


def _fits(given: Tensor, own: Tensor) -> bool:
    castable = given.is_floating_point() or not own.is_floating_point()
    return given.shape == own.shape and castable


def _described(tensor: Tensor, other: Tensor) -> str:
    shape = tuple(tensor.shape)
    if tensor.shape != other.shape:
        return str(shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}"


def _is_fused(unexpected: Collection[str]) -> bool:
    return any(_FUSED_PARTS & set(name.split(".")) for name in unexpected)


def _remedy(model: FastViT | FastViTBackbone, state: Mapping[str, Tensor]) -> str:
    """What to change, from what the file's shapes betray."""
    found = identify(state)
    if found is None:
        return "The file is no whole train-form checkpoint of any FastViT variant."
    if not _same_trunk(model.config, VARIANTS[found.variant]):
        return f"The file is a {found.variant}: create that variant, or load another."
    if found.in_chans != model.config.in_chans:
        return f"Create the model with in_chans={found.in_chans}, as the file has it."
    if isinstance(model, FastViTBackbone):
        return "The file has no norms for the outputs: create it with norms=False."
    if found.num_classes is None:
        return "The file is a backbone's: create the model with features_only=True."
    return (
        f"Create the model with num_classes={found.num_classes}, as the file has it, "
        f"and call reset_classifier({model.config.num_classes}) after loading."
    )


def _same_trunk(one: FastViTConfig, other: FastViTConfig) -> bool:
    """Whether two configurations differ in nothing that shapes stem and stages."""

    def trunk(config: FastViTConfig) -> FastViTConfig:
        return FastViTConfig(
            layers=config.layers,
            dims=config.dims,
            mlp_ratio=config.mlp_ratio,
            token_mixers=config.token_mixers,
            cpe=config.cpe,
        )

    return trunk(one) == trunk(other)
