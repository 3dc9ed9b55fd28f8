"""Any timm model: fuse it, and read what that saved."""

import timm
import torch

import repcompiler as rc

model = timm.create_model("repvgg_a0", pretrained=False).eval()
report = rc.fuse(model, torch.randn(1, 3, 224, 224)).report
print(f"ops {report.ops.before} -> {report.ops.after}")
print(f"MACs {report.macs.before:,} -> {report.macs.after:,}")
print(f"{report.equivalence.verdict}, exactness {report.equivalence.exactness:.1e}")
assert report.ops.after_by_type["batch_norm"] == 0
assert report.equivalence.ok
