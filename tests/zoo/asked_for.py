"""Inputs of the models of pytorchcv that take something else than an image.

Sound, optical flow and frames, with the shapes that each net's documentation gives,
small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FRAMES, ROWS, COLUMNS = 3, 64, 80


def inputs_of(model: nn.Module) -> tuple[Any, ...] | None:
    """What a model is run on; None if that is one image."""
    make = _INPUTS.get(type(model).__module__.rpartition(".")[2])
    return None if make is None else make(model)


def _speech(model: nn.Module) -> tuple[Any, ...]:
    """Spectra of two clips (N, F, T), and how long each is."""
    return torch.randn(2, model.in_size, 121), torch.tensor([121, 90])


def _two_images(model: nn.Module) -> tuple[Any, ...]:
    """Neighbouring frames; RAFT pools its correlations at 1/8 three times."""
    return torch.randn(1, 3, 128, 160), torch.randn(1, 3, 128, 160)


def _masked_flows(model: nn.Module) -> tuple[Any, ...]:
    """Flows and the masks of what is missing, (N, T, C, H, W)."""
    return _video(2), (_video(1) > 0).float()


def _propagation(model: nn.Module) -> tuple[Any, ...]:
    """Frames and masks (T, C, H, W), flows there and back (T - 1, 4, H, W)."""
    frames, masks = _video(3)[0], (_video(1)[0] > 0).float()
    return frames, masks, torch.randn(FRAMES - 1, 4, ROWS, COLUMNS)


def _inpainting(model: nn.Module) -> tuple[Any, ...]:
    """Frames, two masks, flows there and back, and how many frames are local."""
    mask, flows = (_video(1) > 0).float(), torch.randn(1, FRAMES - 1, 4, ROWS, COLUMNS)
    return _video(3), mask, mask, flows, FRAMES


def _video(channels: int) -> Tensor:
    return torch.randn(1, FRAMES, channels, ROWS, COLUMNS)


def _audio_to_expression(model: nn.Module) -> tuple[Any, ...]:
    """Eight windows of 16 frames of 29 features, and who speaks."""
    return torch.randn(2, 8, 16, 29), torch.full((2,), 3)


def _audio_to_mesh(model: nn.Module) -> tuple[Any, ...]:
    return torch.randn(2, 1, 16, 29), torch.full((2,), 3)


def _audio_to_viseme(model: nn.Module) -> tuple[Any, ...]:
    return torch.randn(34, 8, 195), torch.full((34, 76), 3)


def _grey(rows: int, columns: int) -> Callable[[nn.Module], tuple[Any, ...]]:
    return lambda model: (torch.randn(1, 1, rows, columns),)


_INPUTS: dict[str, Callable[[nn.Module], tuple[Any, ...]]] = {
    "jasper": _speech,
    "raft": _two_images,
    "propainter": _inpainting,
    "propainter_ip": _propagation,
    "propainter_rfc": _masked_flows,
    "pfpcnet": _grey(320, 240),
    "superpointnet": _grey(96, 128),
    "nvpattexp": _audio_to_expression,
    "voca": _audio_to_mesh,
    "visemenet": _audio_to_viseme,
}
