"""Nets of monai and kornia at sizes that a survey can run, and their input shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def monai_table() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    from monai.networks import nets as n

    volume = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    steps = {"channels": (8, 16, 32), "strides": (2, 2)}
    cube, image = (1, 1, 32, 32, 32), (1, 1, 64, 64)
    return {
        "UNet": (
            lambda: n.UNet(**volume, **steps, num_res_units=2, norm="batch"),
            cube,
        ),
        "UNet-2d": (
            lambda: n.UNet(2, 1, 2, (8, 16, 32), (2, 2), norm="batch"),
            image,
        ),
        "AttentionUnet": (lambda: n.AttentionUnet(**volume, **steps), cube),
        "BasicUNet": (
            lambda: n.BasicUNet(**volume, features=(8, 8, 16, 16, 32, 8), norm="batch"),
            cube,
        ),
        "BasicUNetPlusPlus": (
            lambda: n.BasicUNetPlusPlus(
                **volume, features=(8, 8, 16, 16, 32, 8), norm="batch"
            ),
            cube,
        ),
        "SegResNet": (lambda: n.SegResNet(**volume, norm="batch"), cube),
        "SegResNetDS": (lambda: n.SegResNetDS(**volume, norm="batch"), cube),
        "VNet": (lambda: n.VNet(), cube),
        "HighResNet": (lambda: n.HighResNet(**volume), cube),
        "DynUNet": (
            lambda: n.DynUNet(
                **volume,
                kernel_size=[3, 3, 3],
                strides=[1, 2, 2],
                upsample_kernel_size=[2, 2],
                norm_name="batch",
            ),
            cube,
        ),
        "DenseNet121": (lambda: n.DenseNet121(**volume), (1, 1, 48, 48, 48)),
        "SEResNet50": (
            lambda: n.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2),
            (1, 1, 48, 48, 48),
        ),
        "EfficientNetBN": (
            lambda: n.EfficientNetBN(
                "efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1
            ),
            (1, 1, 48, 48, 48),
        ),
        "ResNet18": (
            lambda: n.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2),
            (1, 1, 48, 48, 48),
        ),
        "ResNet50": (
            lambda: n.resnet50(spatial_dims=3, n_input_channels=1, num_classes=2),
            (1, 1, 48, 48, 48),
        ),
        "FlexibleUNet": (
            lambda: n.FlexibleUNet(1, 2, "efficientnet-b0", pretrained=False),
            (1, 1, 128, 128),
        ),
        "RegUNet": (lambda: n.RegUNet(3, 1, 8, 2, out_channels=3), cube),
        "LocalNet": (lambda: n.LocalNet(3, 1, 8, (0, 1, 2)), cube),
        "GlobalNet": (lambda: n.GlobalNet((32, 32, 32), 3, 1, 8, 2), cube),
        "AHNet": (lambda: n.AHNet(spatial_dims=3), (1, 1, 128, 128, 64)),
        "MedNeXtS": (lambda: n.MedNeXtS(**volume), cube),
        "Quicknat": (lambda: n.Quicknat(num_classes=3), image),
        "HoVerNet": (lambda: n.HoVerNet(), (1, 3, 256, 256)),
        "DAF3D": (lambda: n.DAF3D(1, 2), (1, 1, 64, 64, 64)),
        "AutoEncoder": (
            lambda: n.AutoEncoder(
                3, 1, 2, channels=(8, 16), strides=(2, 2), norm="batch"
            ),
            cube,
        ),
        "VoxelMorphUNet": (
            lambda: n.VoxelMorphUNet(3, 2, 16, (8, 8, 8, 8), (16, 16, 16, 16)),
            (1, 2, 32, 32, 32),
        ),
    }


def kornia_table() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    import kornia.feature as f
    from kornia.models import rrdbnet, tiny_vit
    from kornia.models.dexined import DexiNed

    return {
        "HardNet": (lambda: f.HardNet(False), (2, 1, 32, 32)),
        "HardNet8": (lambda: f.HardNet8(False), (2, 1, 32, 32)),
        "SOSNet": (lambda: f.SOSNet(False), (2, 1, 32, 32)),
        "TFeat": (lambda: f.TFeat(False), (2, 1, 32, 32)),
        "HyNet": (lambda: f.HyNet(False), (2, 1, 32, 32)),
        "OriNet": (lambda: f.OriNet(False), (2, 1, 32, 32)),
        "KeyNet": (lambda: f.KeyNet(False), (1, 1, 64, 64)),
        "DISK": (lambda: f.DISK(), (1, 3, 64, 64)),
        "XFeat": (lambda: f.XFeatModel(), (1, 3, 64, 64)),
        "LoFTR": (lambda: _Loftr(), (1, 1, 64, 64)),
        "DexiNed": (lambda: DexiNed(pretrained=False), (1, 3, 64, 64)),
        "RRDBNet": (
            lambda: rrdbnet.RRDBNet(3, 3, num_feat=16, num_block=2),
            (1, 3, 32, 32),
        ),
        "TinyViT": (lambda: tiny_vit.TinyViT.from_config("5m"), (1, 3, 224, 224)),
    }


class _Loftr(nn.Module):
    """LoFTR's matcher on two images of one shape, which it wants in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        from kornia.feature import LoFTR

        self.matcher = LoFTR(pretrained=None)

    def forward(self, image: Tensor) -> Any:
        return self.matcher({"image0": image, "image1": image.flip(-1)})
