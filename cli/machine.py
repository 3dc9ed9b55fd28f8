"""The device that figures are measured on, in words and for a cache's key."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from fastvit_cli.card import package_version

RUNTIMES = ("torch", "timm", "onnxruntime", "openvino")


def describe(device: str, threads: int) -> dict[str, Any]:
    """What every measurement must say about where it was made."""
    return {
        "device": device,
        "name": name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "bfloat16": has_bfloat16(device),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {n: package_version(n) for n in RUNTIMES},
    }


def line(facts: dict[str, Any]) -> str:
    """The same as one line for people."""
    found = {k: v for k, v in facts["versions"].items() if v != "unknown"}
    runtimes = ", ".join(f"{key} {value}" for key, value in found.items())
    bfloat16 = "bfloat16 in hardware" if facts["bfloat16"] else "no bfloat16 hardware"
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    where = f"{facts['name']}, {threads} of {facts['cores']} cores, {bfloat16}"
    return f"{where}; {runtimes}"


def name(device: str) -> str:
    """The maker's name of the device."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device != "cpu":
        return device
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (
            row.split(":", 1)[1].strip()
            for row in info.splitlines()
            if "model name" in row
        ),
        platform.machine(),
    )


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine() in ("arm64", "aarch64")
    flags = next((r for r in info.splitlines() if r.startswith(("flags", "Feat"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def cache_folder() -> Path:
    """Where measurements of this machine are kept: XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastvit-repcompiler"
