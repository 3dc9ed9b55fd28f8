"""Reading checkpoints: from a path to named tensors, without running what is inside.

Two formats: safetensors, and torch's own zip or legacy pickle read with
`weights_only=True`. Nothing here knows what model the tensors are for.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvit.errors import CorruptFile, UnsafePickle, WeightsError, WeightsNotFound

PICKLES = (".pth", ".pt", ".pth.tar", ".bin")
SUFFIXES = (".safetensors", *PICKLES)

# Where training scripts put the weights, averaged ones first: those are what was
# evaluated and selected.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")

_DOWNLOAD_AGAIN = "Download or copy it again, and compare its size with the original's."

# What files turn out to be when a download went wrong: pattern at the start of the
# file, what it is, what to do.
_IMPOSTORS = (
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page", _DOWNLOAD_AGAIN),
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the weights themselves",
        "Run `git lfs pull` in the repository that it came from.",
    ),
)


def read_state_dict(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint, on the CPU, and what else it says in words.

    Containers of training scripts are opened (`CONTAINERS`, in that order). Names are
    returned as they stand in the file.

    Args:
        path: a file that ends in one of `SUFFIXES`.

    Returns:
        (tensors by name, metadata): metadata is the safetensors header's, or a
        pickle's scalars as text, with the container's name under `container`.

    Raises:
        WeightsNotFound: no such file.
        CorruptFile: empty, damaged, not a checkpoint, or without weights.
        UnsafePickle: reading it would run code.
        WeightsError: the suffix is none that is known, or access is denied.
    """
    path = Path(path)
    _check_file(path)
    if path.name.lower().endswith(".safetensors"):
        return _read_safetensors(path)
    content = _read_pickle(path)
    state, metadata = _open_containers(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = _described(content)
        raise CorruptFile(
            f"{path} holds no state dict but {found}.",
            hint="Save one with torch.save(model.state_dict(), path).",
        )
    return {name: tensor.detach() for name, tensor in state.items()}, metadata


def _check_file(path: Path) -> None:
    if not path.name.lower().endswith(SUFFIXES):
        known = " ".join(SUFFIXES)
        raise WeightsError(f"{path} ends in none of {known}.", hint="Convert it first.")
    if not path.exists():
        hint = "Check the path; weights are never downloaded from here."
        raise WeightsNotFound(f"There is no file {path}.", hint=hint)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file.", hint="Name the checkpoint in it.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        hint = "Check the file's permissions."
        raise WeightsError(f"{path} cannot be read: {error}.", hint=hint) from error
    if not start:
        raise CorruptFile(f"{path} is empty.", hint=_DOWNLOAD_AGAIN)
    for pattern, what, hint in _IMPOSTORS:
        if re.match(pattern, start, re.IGNORECASE):
            raise CorruptFile(f"{path} is {what}.", hint=hint)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        message = f"{path} is not a whole safetensors file: {error}."
        raise CorruptFile(message, hint=_DOWNLOAD_AGAIN) from error
    if not state:
        raise CorruptFile(f"{path} holds no tensors.", hint=_DOWNLOAD_AGAIN)
    return state, metadata


def _read_pickle(path: Path) -> Any:
    try:
        # Training scripts store their arguments beside the weights; a Namespace is
        # data, setting its attributes runs nothing.
        allowed = torch.serialization.safe_globals([argparse.Namespace])
        with allowed, warnings.catch_warnings():
            # A TorchScript archive is warned about, then refused: once is enough.
            warnings.filterwarnings("ignore", message=".*TorchScript archive")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:
        # The unpickler meets random bytes before it knows that they are no pickle, so
        # that damage shows as any kind of exception (KeyError, EOFError, …).
        if "TorchScript" in str(error):
            hint = "Save the state dict of the model instead of its program."
            raise CorruptFile(f"{path} is a TorchScript program.", hint=hint) from error
        message = f"{path} is damaged ({type(error).__name__})."
        raise CorruptFile(message, hint=_DOWNLOAD_AGAIN) from error


def _refused(path: Path, reason: str) -> WeightsError:
    named = re.search(r"GLOBAL ([\w.]+\w)", reason)
    if named is None:
        return CorruptFile(f"{path} is not a checkpoint.", hint=_DOWNLOAD_AGAIN)
    return UnsafePickle(
        f"{path} was refused: it holds more than tensors, and reading it would call "
        f"{named[1]}.",
        hint="Where the file is trusted, save its state dict alone, as safetensors.",
    )


def _open_containers(content: Any) -> tuple[Mapping[Any, Any], dict[str, str]]:
    metadata: dict[str, str] = {}
    while isinstance(content, Mapping):
        scalars = (str, int, float, bool)
        metadata |= {
            str(key): str(value)
            for key, value in content.items()
            if isinstance(value, scalars)
        }
        boxes = [key for key in CONTAINERS if isinstance(content.get(key), Mapping)]
        if not boxes:
            return content, metadata
        metadata["container"] = boxes[0]
        content = content[boxes[0]]
    return {}, metadata


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"an object of type {type(content).__name__}"
    keys = ", ".join(str(key) for key in list(content)[:5])
    return f"a dictionary with the keys {keys}" if keys else "an empty dictionary"
