"""Fuse just the backbone of a detector; the head stays as it was, and trainable."""

import torch
from torch import Tensor, nn

import repcompiler as rc
from fastvit import create_model


class Detector(nn.Module):
    """Four feature maps from the backbone, one score map from each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_model("fastvit_t8", features_only=True)
        self.heads = nn.ModuleList(nn.Conv2d(c, 5, 1) for c in self.backbone.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(m) for head, m in zip(self.heads, self.backbone(x))]


detector, x = Detector().eval(), torch.randn(1, 3, 96, 96)
with torch.no_grad():
    before = detector(x)
    fused = rc.fuse(detector.backbone, x)
    detector.backbone = fused.model
    after = detector(x)
print(f"backbone ops {fused.report.ops.before} -> {fused.report.ops.after}")
assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(before, after))
