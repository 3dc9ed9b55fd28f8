"""Vision models of transformers with convs or norms, small where the default is not.

Class, settings of its config, and the side of the image that it is run on.
"""

from __future__ import annotations

from typing import Any

_SMALL_DETR = {
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 20,
    "decoder_layers": 2,
}
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "MobileNetV1ForImageClassification": ({}, 224),
    "MobileNetV2ForImageClassification": ({}, 224),
    "MobileNetV2ForSemanticSegmentation": ({}, 224),
    "LevitForImageClassification": ({}, 224),
    "LevitForImageClassificationWithTeacher": ({}, 224),
    "RegNetForImageClassification": ({}, 224),
    "ResNetForImageClassification": ({}, 224),
    "ResNetBackbone": ({"out_features": ["stage2", "stage4"]}, 224),
    "HGNetV2ForImageClassification": ({}, 224),
    "HGNetV2Backbone": ({"out_features": ["stage2", "stage4"]}, 224),
    "MobileViTForImageClassification": ({}, 256),
    "MobileViTForSemanticSegmentation": ({}, 256),
    "MobileViTV2ForImageClassification": ({}, 256),
    "MobileViTV2ForSemanticSegmentation": ({}, 256),
    "EfficientNetForImageClassification": (
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        224,
    ),
    "SwiftFormerForImageClassification": ({}, 224),
    "CvtForImageClassification": ({}, 224),
    "TextNetForImageClassification": ({}, 224),
    "TextNetBackbone": ({}, 224),
    "PPLCNetForImageClassification": ({}, 224),
    "PPLCNetV3Backbone": ({}, 224),
    "PPLCNetV4Backbone": ({}, 224),
    "RTDetrResNetBackbone": ({}, 224),
    "RTDetrModel": (_SMALL_DETR, 160),
    "RTDetrForObjectDetection": (_SMALL_DETR, 160),
    "RTDetrV2ForObjectDetection": (_SMALL_DETR, 160),
    "DFineModel": (_SMALL_DETR, 160),
    "DFineForObjectDetection": (_SMALL_DETR, 160),
    "Deimv2ForObjectDetection": ({}, 160),
    "SegformerForSemanticSegmentation": ({}, 128),
    "GLPNForDepthEstimation": ({}, 128),
    "PoolFormerForImageClassification": ({}, 224),
    "ConvNextForImageClassification": ({}, 128),
    "ConvNextV2ForImageClassification": ({}, 128),
    "BitForImageClassification": ({"depths": [1, 1, 1, 1]}, 128),
    "PPOCRV5MobileDetForObjectDetection": ({}, 160),
    "SuperPointForKeypointDetection": ({}, 128),
    "VitPoseForPoseEstimation": ({}, 128),
    "FocalNetForImageClassification": ({}, 224),
}
