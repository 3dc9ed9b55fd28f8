"""OpenVINO's own format (IR): a graph in .xml, its weights in the .bin beside it.

It says what ONNX cannot: which kernel of oneDNN the runtime is to try first for an op.
By default OpenVINO runs convs with BRGEMM kernels, on channels last; the direct ones,
on blocks of channels, take 0.6 to 1.3 of their time, by kind of conv and processor.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import graphfiles
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, one_line

if TYPE_CHECKING:
    import torch
    from fastvit_cli.builders import ModelOptions
    from torch import Tensor

SUFFIX = ".xml"
WEIGHTS = ".bin"
CARD = ["fastvit_repcompiler", "card"]  # where a file's rt_info holds it
KINDS = ("depthwise", "pointwise", "dense")
# The attribute of an op that OpenVINO tries kernels by, and oneDNN's direct convs in
# it, of any x86 processor: those that it does not have are passed over.
PRIORITY = "PrimitivesPriority"
DIRECT = ",".join(
    f"cpu:jit_{isa}{kind}" for isa in ("avx512", "avx2") for kind in ("_dw", "_1x1", "")
)
CONVS = ("Convolution", "GroupConvolution")
# OpenVINO's names of element types, and torch's.
DTYPES = {
    "f32": "float32",
    "f64": "float64",
    "f16": "float16",
    "boolean": "bool",
    "u8": "uint8",
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
}
MISSING = "pip install openvino"


# ---- the runtime -------------------------------------------------------------------


@cache
def core() -> Any:
    """OpenVINO's entrance, one for the life of the process.

    With its first use of the CPU each `Core` gives the thread another stack for
    signals, and frees that with itself. Of two that live at once the later one puts
    back what the earlier one has freed: the next signal ends the process without a
    word. Weights are read, not mapped: whoever writes to a mapped file changes, or
    ends, what runs from it.
    """
    import openvino as ov

    made = ov.Core()
    made.set_property({"ENABLE_MMAP": False})
    return made


def request(model: Any, dtype: str, threads: int) -> Any:
    """What infers with a graph on the CPU, in float32 or bfloat16."""
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core().compile_model(model, "CPU", settings).create_infer_request()


# ---- kernels -----------------------------------------------------------------------


def kinds_in(graph: Any) -> tuple[str, ...]:
    """Of which kinds of convs a graph has any that direct kernels may run here."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()  # oneDNN has them for x86
    found = {kind_of(op) for op in graph.get_ops()}
    return tuple(kind for kind in KINDS if kind in found)


def kind_of(op: Any) -> str:
    """What a conv of images is; empty for another op, and for one in groups.

    A conv in groups that is not depthwise has no direct kernel: the runtime would take
    ten times as long for it.
    """
    sizes = weight_of(op)
    if len(sizes) != 5:
        return ""
    groups, out, own, *kernel = sizes
    if groups > 1:
        return "depthwise" if out == own == 1 else ""
    return "pointwise" if kernel == [1, 1] else "dense"


def weight_of(op: Any) -> tuple[int, ...]:
    """(groups, channels out and in of one group, sides of the kernel) of a conv.

    Empty for another op, and for a conv whose weight has no size before it is run.
    """
    name = op.get_type_name()
    if name not in CONVS or op.input(1).get_partial_shape().is_dynamic:
        return ()
    sizes = tuple(op.input(1).get_shape())
    return sizes if name == "GroupConvolution" else (1, *sizes)


def mark(graph: Any, kinds: Iterable[str]) -> None:
    """Have convs of some kinds ask for direct kernels, once they come from a file."""
    for op in graph.get_ops():
        if kind_of(op) in kinds:
            op.get_rt_info()[PRIORITY] = DIRECT


def prefer_direct(graph: Any, kinds: Iterable[str]) -> Any:
    """A graph whose convs of some kinds ask for direct kernels.

    OpenVINO takes that from a file only, so that the graph goes through one.
    """
    mark(graph, kinds)
    with tempfile.TemporaryDirectory(
        prefix="fastvit-ir-", ignore_cleanup_errors=True
    ) as folder:
        path = Path(folder) / f"graph{SUFFIX}"
        _write(graph, path)
        return core().read_model(path)


# ---- files -------------------------------------------------------------------------


def write(graph: Any, path: Path, metadata: dict[str, str]) -> None:
    """The .xml, and beside it the .bin, with a card."""
    graph.set_rt_info(json.dumps(metadata), CARD)
    _write(graph, path)


def _write(graph: Any, path: Path) -> None:
    import openvino as ov

    ov.save_model(graph, path, compress_to_fp16=False)


def load(text: str, options: ModelOptions) -> graphfiles.GraphFile:
    """The graph in a file, ready to run.

    Raises:
        BadInput: there is no such file, OpenVINO is missing or does not take it, or an
            option asks for what a graph cannot do.
    """
    import torch

    graphfiles.check_file(text, options)
    graph = read(text)
    if torch.device(options.device).type != "cpu":
        raise BadInput(
            f"{text}: OpenVINO graphs are run on the CPU, not on --device "
            f"{options.device}.",
            hint="Use --device cpu.",
        )
    for value in graph.outputs:
        _dtype(text, value)
    values = [
        graphfiles.Value(_known_rank(text, value), _dtype(text, value))
        for value in graph.inputs
    ]
    try:
        run = runner(graph)
    except RuntimeError as error:
        raise refused(text, error) from error
    return graphfiles.described(text, "ir", options, values, _recorded(graph), run)


def is_graph(path: Path) -> bool:
    """Whether a file looks like one of OpenVINO: other programs write .xml too."""
    try:
        with path.open(encoding="utf-8") as file:
            return "<net" in file.read(500)
    except (OSError, ValueError):
        return False


def read(path: str | Path) -> Any:
    """The graph in a file.

    Raises:
        BadInput: OpenVINO is missing, or does not take the file.
    """
    try:
        entrance = core()
    except ImportError as error:
        raise BadInput(
            f"{path} is an OpenVINO graph, which OpenVINO runs; it is not installed.",
            hint=MISSING,
        ) from error
    weights = Path(path).with_suffix(WEIGHTS)
    if not weights.is_file():
        raise BadInput(
            f"{path} has its weights in {weights.name}, which is not beside it.",
            hint="Move the two together.",
        )
    try:
        return entrance.read_model(str(path))
    except RuntimeError as error:
        raise refused(path, error) from error


def refused(path: str | Path, error: Exception) -> BadInput:
    """OpenVINO's error by the end of its message: the rest says where it was thrown."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = one_line(lines[-1] if lines else "it does not say why", 160)
    return BadInput(
        f"OpenVINO does not take {path}: {reason.rstrip('.!')}.",
        hint="Check that it and its .bin are whole, or give an .onnx.",
    )


def runner(graph: Any) -> Callable[..., list[Tensor]]:
    """A graph as a function from tensors to the list of output tensors.

    It raises `ValueError` for inputs of other sizes or dtypes than the graph declares:
    OpenVINO does not always look, and then reads and writes where it must not.
    """
    import torch

    made = request(graph, "float32", torch.get_num_threads())
    declared = [(_sizes(value), _dtype("it", value)) for value in graph.inputs]

    def run(*inputs: Tensor) -> list[Tensor]:
        if len(inputs) != len(declared):
            raise ValueError(f"it takes {len(declared)} inputs, not {len(inputs)}")
        for value, (sizes, dtype) in zip(inputs, declared):
            _check(value, sizes, dtype)
        made.infer([value.detach().cpu().contiguous().numpy() for value in inputs])
        # A copy each: the next call writes to the same memory.
        found = [torch.from_numpy(it.data.copy()) for it in made.output_tensors]
        return [value.to(inputs[0].device) for value in found]

    return run


def _check(value: Tensor, sizes: list[int | None] | None, dtype: torch.dtype) -> None:
    fit = sizes is None or graphfiles.fits([sizes], [value])
    if not fit or value.dtype != dtype:
        wanted = "any" if sizes is None else "x".join(str(it or "?") for it in sizes)
        shape = "x".join(map(str, value.shape))
        raise ValueError(f"it takes {wanted} in {dtype}, not {shape} in {value.dtype}")


def _sizes(value: Any) -> list[int | None] | None:
    """The sizes of an input, None where an axis is free; None for any rank."""
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic:
        return None
    return [None if side.is_dynamic else side.get_length() for side in shape]


def _known_rank(text: str, value: Any) -> list[int | None]:
    sizes = _sizes(value)
    if not sizes:
        raise BadInput(
            f"{text}: an input has no number of axes, so that none can be made.",
            hint="Convert the model with the sizes of its inputs.",
        )
    return sizes


def _dtype(text: str, value: Any) -> torch.dtype:
    import torch

    name = value.get_element_type().get_type_name()
    if name not in DTYPES:
        raise BadInput(
            f"{text}: an input or output is of type {name}, which cannot be run here.",
            hint=f"Use one of {', '.join(DTYPES)}.",
        )
    return getattr(torch, DTYPES[name])


def _recorded(graph: Any) -> Card | None:
    try:
        return Card.from_metadata(json.loads(graph.get_rt_info(CARD).value))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None  # another program's file
