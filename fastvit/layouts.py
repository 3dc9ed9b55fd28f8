"""Key layouts: how other code names a FastViT's tensors, and which variant they are.

| layout | example |
|---|---|
| timm (ours) | `stages.1.blocks.0.mlp.conv.bn.weight` |
| timm-features | `stages_1.blocks.0.mlp.conv.bn.weight` |
| apple | `network.2.0.convffn.conv.bn.weight` |

Apple's `network` is one flat list of stages, patch embeddings and position encodings.
Facts from the released code (github.com/apple/ml-fastvit) and timm's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvit.config import FastViTConfig
from fastvit.model import FastViT, FastViTBackbone
from fastvit.variants import VARIANTS

# What training wrappers put before every name: DistributedDataParallel, torch.compile.
WRAPPERS = ("module.", "_orig_mod.")

# The classifier's end, which a backbone does not have.
TAIL = ("final_conv.", "head.")

_APPLE_PARTS = {
    "patch_embed": "stem",
    "rbr_conv": "conv_kxk",
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "lkb_origin": "large_conv",
    "convffn": "mlp",
    "conv_exp": "final_conv",
    "reduce": "fc1",
    "expand": "fc2",
    "head": "head.fc",
    "layer_scale": "layer_scale.gamma",
    "layer_scale_1": "layer_scale_1.gamma",
    "layer_scale_2": "layer_scale_2.gamma",
}
_APPLE_ENTRY = re.compile(r"network\.(\d+)\.(proj|pe)?")
_APPLE_PLACES = {"proj": "downsample.proj", "pe": "pos_emb.pos_enc", None: "blocks."}


@dataclass(frozen=True)
class Identified:
    """What a state dict's shapes say about the model that it came from.

    Attributes:
        variant: a key of `VARIANTS`.
        num_classes: outputs of its classifier, or None if it has none.
        in_chans: channels of its input.
    """

    variant: str
    num_classes: int | None
    in_chans: int


def without_wrappers(
    state: Mapping[str, Tensor], own: Collection[str]
) -> dict[str, Tensor]:
    """The same tensors without the wrapper prefixes that every name bears.

    A prefix stays where the model's own names bear it as well.
    """
    names = dict(zip(state, state, strict=True))
    peeled = True
    while peeled:
        peeled = False
        for prefix in WRAPPERS:
            every = all(name.startswith(prefix) for name in names.values())
            if names and every and not any(name.startswith(prefix) for name in own):
                names = {old: new.removeprefix(prefix) for old, new in names.items()}
                peeled = True
    return {new: state[old] for old, new in names.items()}


def in_timm_layout(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The same tensors under timm's names, and the layout that they came in.

    Names that no layout knows are kept, so that they surface as unexpected.
    """
    if any(name.startswith("network.") for name in state):
        return _from_apple(state), "apple"
    if any(name.startswith("stages_") for name in state):
        renamed = {
            re.sub(r"^(stages|stem)_(\d+)\.", r"\1.\2.", name): tensor
            for name, tensor in state.items()
        }
        return renamed, "timm-features"
    return dict(state), "timm"


def identify(state: Mapping[str, Tensor]) -> Identified | None:
    """The variant whose train-form tensors these are, by name and shape, if any.

    Args:
        state: in timm's layout, a whole classifier's or a backbone's.
    """
    stem = state.get("stem.0.conv_kxk.0.conv.weight")
    classifier = state.get("head.fc.weight")
    if stem is None or stem.ndim != 4:
        return None
    has_tail = any(name.startswith(TAIL) for name in state)
    num_classes = classifier.shape[0] if classifier is not None else None
    in_chans = stem.shape[1]
    shapes = _shapes(state)
    for variant, config in VARIANTS.items():
        if config.dims[0] != stem.shape[0]:
            continue
        candidate = replace(config, num_classes=num_classes or 0, in_chans=in_chans)
        if _expected_shapes(candidate, has_tail) == shapes:
            return Identified(variant, num_classes if has_tail else None, in_chans)
    return None


def _from_apple(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    entries = [(name, _APPLE_ENTRY.match(name)) for name in state]
    embeddings = {int(m[1]) for _, m in entries if m and m[2] == "proj"}

    def renamed(name: str, entry: re.Match[str] | None) -> str:
        if entry is None:
            return _renamed_parts(name)
        # A stage begins with its patch embedding, so its number is how many precede.
        stage = sum(index <= int(entry[1]) for index in embeddings)
        rest = _renamed_parts(name[entry.end() :])
        return f"stages.{stage}.{_APPLE_PLACES[entry[2]]}{rest}"

    return {renamed(name, entry): state[name] for name, entry in entries}


def _renamed_parts(name: str) -> str:
    return ".".join(_APPLE_PARTS.get(part, part) for part in name.split("."))


def _expected_shapes(config: FastViTConfig, has_tail: bool) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = FastViT(config) if has_tail else FastViTBackbone(config)
    return _shapes(model.state_dict())


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {
        name: tensor.shape
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
