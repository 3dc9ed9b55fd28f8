"""ONNX graphs: run by onnxruntime, with what they say about their inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import graphfiles
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    import torch
    from fastvit_cli.builders import ModelOptions
    from torch import Tensor

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnxruntime's names of element types, and torch's.
DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "bool": "bool",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8")},
}


def load(text: str, options: ModelOptions) -> graphfiles.GraphFile:
    """The graph in a file, ready to run.

    Raises:
        BadInput: there is no such file, onnxruntime does not take it, or an option asks
            for what a graph cannot do.
    """
    graphfiles.check_file(text, options)
    session = open_session(text, options.device)
    values = [
        graphfiles.Value(list(value.shape), _dtype(text, value))
        for value in session.get_inputs()
    ]
    return graphfiles.described(
        text, "onnx", options, values, _recorded(session), runner(session)
    )


def open_session(path: str | Path, device: str = "cpu") -> Any:
    """A session of onnxruntime on a device, with torch's number of threads.

    Raises:
        BadInput: onnxruntime is missing, has no provider for the device, or refuses
            the graph.
    """
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise BadInput(
            f"{path} is an ONNX graph, which onnxruntime runs; it is not installed.",
            hint="pip install onnxruntime",
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    provider = PROVIDERS.get(torch.device(device).type, "")
    if provider not in onnxruntime.get_available_providers():
        raise BadInput(
            f"{path}: onnxruntime has no provider for --device {device} here.",
            hint="Use --device cpu, or install onnxruntime-gpu.",
        )
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise BadInput(
            f"onnxruntime does not take {path}: {summary(error)}.",
            hint="Check that the file is a whole ONNX graph, or give a .pt2.",
        ) from error


def runner(session: Any) -> Callable[..., list[Tensor]]:
    """A session as a function from tensors to the list of output tensors."""
    import torch

    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        if len(inputs) != len(names):
            raise ValueError(f"it takes {len(names)} inputs, not {len(inputs)}")
        feed = {
            name: value.detach().cpu().contiguous().numpy()
            for name, value in zip(names, inputs)
        }
        found = [torch.from_numpy(value) for value in session.run(None, feed)]
        return [value.to(inputs[0].device) for value in found]

    return run


def _dtype(text: str, value: Any) -> torch.dtype:
    import torch

    name = value.type.removeprefix("tensor(").removesuffix(")")
    if name not in DTYPES:
        raise BadInput(
            f"{text}: its input {value.name} is of type {value.type}, not a tensor of "
            "numbers.",
            hint="Graphs that take tensors can be run.",
        )
    return getattr(torch, DTYPES[name])


def _recorded(session: Any) -> Card | None:
    try:
        return Card.from_metadata(session.get_modelmeta().custom_metadata_map)
    except ValueError:  # another program's file
        return None
