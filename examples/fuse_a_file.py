"""A model from somebody's file, as `path.py:factory`, through the command."""

import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = """
from torch import nn

def build(width=16):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
"""

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "their_model.py")
    path.write_text(SOURCE, encoding="utf-8")
    command = [sys.executable, "-m", "fastvit_cli", "fuse", f"{path}:build"]
    command += ["--model-arg", "width=8", "--input-size", "3x64x64"]
    command += ["-o", str(path.with_suffix(".onnx"))]
    subprocess.run(command, check=True)
    assert path.with_suffix(".onnx").exists()
