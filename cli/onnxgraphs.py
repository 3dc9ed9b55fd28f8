"""ONNX graphs: run by onnxruntime, with what they say about their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli.builders import DEFAULT_SIZE, ModelOptions, refuse_factory_options
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    import torch
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


@dataclass(frozen=True)
class OnnxGraph:
    """A graph in a session, its card if this project wrote it, and example inputs.

    Attributes:
        run: from tensors to the list of output tensors, on the device of the first.
        declared: the sizes of each input, None where an axis is free.
    """

    run: Callable[..., list[Tensor]]
    card: Card
    recorded: Card | None
    inputs: tuple[Tensor, ...]
    dynamic_batch: bool
    declared: tuple[tuple[int | None, ...], ...]
    notes: tuple[str, ...] = ()


def load(text: str, options: ModelOptions) -> OnnxGraph:
    """The graph in a file, ready to run.

    Raises:
        BadInput: there is no such file, onnxruntime does not take it, or an option asks
            for what a graph cannot do.
    """
    refuse_factory_options(text, options)
    if not Path(text).is_file():
        raise BadInput(f"there is no file {text}.", hint="Check the path.")
    session = open_session(text, options.device)
    if not session.get_inputs():
        raise BadInput(
            f"{text} takes no input: it is a constant, not a model.",
            hint="Export it with an example input.",
        )
    dtypes = [_dtype(text, value) for value in session.get_inputs()]
    own = str(dtypes[0]).removeprefix("torch.")
    if options.dtype not in (None, own):
        raise BadInput(
            f"{text} is an ONNX graph in {own}, and cannot be cast.",
            hint="Export it in the other dtype, or leave --dtype out.",
        )
    recorded = _recorded(session)
    shapes = [list(value.shape) for value in session.get_inputs()]
    inputs, assumed = _inputs(shapes, dtypes, recorded, options)
    card = recorded or Card(
        source=text,
        preprocessing={"input_size": list(inputs[0].shape[1:])},
        weights={"origin": "program"},
    )
    note = f"{text} does not say its input size: {assumed} is assumed (--input-size)."
    return OnnxGraph(
        run=runner(session),
        card=card,
        recorded=recorded,
        inputs=tuple(value.to(options.device) for value in inputs),
        dynamic_batch=all(not _fixed(shape[:1]) for shape in shapes),
        declared=tuple(
            tuple(side if _fixed([side]) else None for side in shape)
            for shape in shapes
        ),
        notes=(note,) if assumed else (),
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


def _fixed(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _inputs(
    shapes: list[list[Any]],
    dtypes: list[Any],
    recorded: Card | None,
    options: ModelOptions,
) -> tuple[list[Tensor], str]:
    """Example inputs of batch 1 where it is free, and the size if it is a guess."""
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    size, assumed = options.input_size, ""
    if size is None and recorded is not None:
        size = recorded.input_size
    if size is None and not _fixed(shapes[0][1:]):
        size, assumed = DEFAULT_SIZE, "x".join(map(str, DEFAULT_SIZE))
    inputs: list[Tensor] = []
    for index, (shape, dtype) in enumerate(zip(shapes, dtypes)):
        sides = [side if _fixed([side]) else 1 for side in shape]
        if index == 0 and size is not None:
            sides = [sides[0], *size]
        noise = torch.randn(sides, generator=generator)
        inputs.append(noise.to(dtype))
    return inputs, assumed
