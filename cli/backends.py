"""What can run a model here: one row for each backend, and how to get it.

A backend takes a `Subject`, one form of one model in one dtype, and inputs, and returns
a callable that runs it once and waits for the result.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import irgraphs
from fastvit_cli.card import Card

if TYPE_CHECKING:
    from torch import Tensor, nn

Inputs = tuple["Tensor", ...]
Runner = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """One form of one model in one dtype; `scratch` is where it may put files."""

    model: nn.Module
    inputs: Inputs
    card: Card
    dtype: str
    device: str
    threads: int
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    dynamic_batch: bool = True
    file: str = ""  # an ONNX or OpenVINO graph, where that is all there is
    kernels: tuple[str, ...] = ()  # kinds of convs for OpenVINO's direct kernels
    made_in: Callable[[Any], nn.Module] | None = None  # anew, in a wider dtype

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file in float32, written once for all who read it.

        Raises:
            JobFailed: it cannot be exported.
        """
        from fastvit_cli import exporters

        if self.file:
            return Path(self.file)
        scratch = Path(tempfile.mkdtemp(dir=self.scratch))
        wide = [value.float() for value in self.inputs]
        artefact = exporters.Artefact(
            model=self.model if self.dtype == "float32" else _cast(self.model),
            inputs=tuple(wide),
            card=self.card,
            dynamic_batch=self.dynamic_batch,
        )
        path = scratch / "model.onnx"
        exporters.export_onnx(artefact).save(path)
        return path


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        prepare: from a subject and inputs to what runs it once.
        dtypes: dtypes that it can run in.
        devices: kinds of device that it runs on.
        artefact: suffix of the file that it takes.
        holds_model: whether the module's own weights stay in memory beside it.
        lacks: what is missing here, as how to get it; empty when it can run.
        usage: how to run the artefact, for people.
    """

    prepare: Callable[[Subject, Inputs], Runner]
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    artefact: str
    holds_model: bool
    lacks: Callable[[], str]
    usage: str


def _cast(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()


def plain(model: nn.Module, inputs: Inputs, device: str) -> Runner:
    """What calls a module once and waits for the result."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else None

    def run() -> Any:
        with torch.inference_mode():
            result = model(*inputs)
        if wait is not None:
            wait()
        return result

    return run


def eager(subject: Subject, inputs: Inputs) -> Runner:
    """torch as it is."""
    return plain(subject.model, inputs, subject.device)


def channels_last(subject: Subject, inputs: Inputs) -> Runner:
    """torch, with images and their kernels stored channel by channel last."""
    return plain(in_channels_last(subject.model), _last(inputs), subject.device)


def in_channels_last(model: nn.Module) -> nn.Module:
    """A copy whose 4-D weights are stored channels last; every value is the same."""
    import torch

    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _last(inputs: Inputs) -> Inputs:
    import torch

    form = torch.channels_last
    return tuple(x.to(memory_format=form) if x.dim() == 4 else x for x in inputs)


def compiled(subject: Subject, inputs: Inputs) -> Runner:
    """torch.compile with frozen weights: Inductor may fold and pack them."""
    import torch

    # One function serves many models here; each needs its own entry in the cache.
    torch._dynamo.config.recompile_limit = 4096
    model = torch.compile(subject.model, dynamic=False, options={"freezing": True})
    run = plain(model, inputs, subject.device)
    run()
    return run


def onnxruntime(subject: Subject, inputs: Inputs) -> Runner:
    """onnxruntime's CPU provider on the file that `fastvit fuse -o x.onnx` writes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(str(subject.onnx), options, providers=providers)
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs)}
    return lambda: session.run(None, feed)


def openvino(subject: Subject, inputs: Inputs) -> Runner:
    """OpenVINO on the same file, with the sizes of the inputs made static.

    Where the subject asks for kernels, the file is one of OpenVINO's own.
    """
    graph = irgraphs.core().read_model(subject.onnx)
    if subject.kernels:
        graph = irgraphs.prefer_direct(graph, subject.kernels)
    graph.reshape({i: list(value.shape) for i, value in enumerate(inputs)})
    request = irgraphs.request(graph, subject.dtype, subject.threads)
    feed = [value.float().numpy() for value in inputs]

    def run() -> Any:
        request.infer(feed, share_inputs=True)
        return [tensor.data for tensor in request.output_tensors]

    return run


def _nothing() -> str:
    return ""


def _needs_compiler() -> str:
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return ""
    return "install a C++ compiler (apt-get install g++), which Inductor calls"


def _needs(module: str, how: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(module) else how


ANY = ("float32", "bfloat16", "float16", "float64")

BACKENDS: dict[str, Backend] = {
    "eager": Backend(
        eager,
        ANY,
        ("cpu", "cuda", "mps", "xpu"),
        ".pt2",
        True,
        _nothing,
        "torch.export.load(FILE).module()",
    ),
    "eager-channels-last": Backend(
        channels_last,
        ANY,
        ("cpu", "cuda", "mps", "xpu"),
        ".pt2",
        True,
        _nothing,
        "torch.export.load(FILE).module().to(memory_format=torch.channels_last)",
    ),
    "compile": Backend(
        compiled,
        ("float32", "bfloat16", "float16"),
        ("cpu", "cuda", "xpu"),
        ".pt2",
        True,
        _needs_compiler,
        "torch.compile(torch.export.load(FILE).module(), options={'freezing': True}) "
        "under torch.no_grad()",
    ),
    "onnxruntime": Backend(
        onnxruntime,
        ("float32",),
        ("cpu",),
        ".onnx",
        False,
        _needs("onnxruntime", "pip install onnxruntime"),
        "onnxruntime.InferenceSession(FILE)",
    ),
    "openvino": Backend(
        openvino,
        ("float32", "bfloat16"),
        ("cpu",),
        ".onnx",
        False,
        _needs("openvino", irgraphs.MISSING),
        "openvino.compile_model(FILE, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})",
    ),
}


def load_runtime(name: str) -> None:
    """Load what a backend needs once, which belongs to the memory of no model."""
    if name == "compile":
        importlib.import_module("torch._inductor.compile_fx")
    elif name == "onnxruntime":
        importlib.import_module("onnxruntime")
    elif name == "openvino":
        irgraphs.core()


# Where plans can be tuned; what else runs torch takes the plan of eager.
TUNED_IN = ("eager", "onnxruntime", "openvino")


def obstacle(name: str, dtype: str, device: str) -> str:
    """Why a backend cannot run anything in a dtype on a device; empty if it can."""
    backend = BACKENDS[name]
    missing = backend.lacks()
    if missing:
        return f"not installed: {missing}"
    if dtype not in backend.dtypes:
        return f"{name} does not run {dtype}"
    if device.split(":")[0] not in backend.devices:
        return f"{name} does not run on {device} here"
    return ""


def of_batch(subject: Subject, batch: int) -> Inputs:
    """The subject's inputs repeated, each sample scaled differently."""
    from fastvit_cli.exporters import rebatch

    return rebatch(subject.inputs, batch)


def in_dtype(subject: Subject, dtype: str) -> Subject:
    """The same form in another dtype.

    Kernels that were worked out have the digits of their own dtype: a wider one is
    given a form made of the model in that.
    """
    import torch

    if dtype == subject.dtype:
        return subject
    kind, own = getattr(torch, dtype), getattr(torch, subject.dtype)
    inputs = tuple(x.to(kind) if x.is_floating_point() else x for x in subject.inputs)
    wider = torch.finfo(kind).eps < torch.finfo(own).eps
    if wider and subject.made_in is not None:
        model = subject.made_in(kind)
    else:
        model = copy.deepcopy(subject.model).to(kind)
    return replace(subject, model=model, inputs=inputs, dtype=dtype)
