"""MODEL, on every command: from the text and the options to a model ready to run."""

from __future__ import annotations

import inspect
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli import catalogue, graphfiles, programs
from fastvit_cli.builders import (
    BUILDERS,
    Built,
    ModelOptions,
    refuse_factory_options,
    unknown,
)
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

_REBUILD_HINT = "write it again with these versions, or keep a .pt2."
CHECKPOINTS = (".pth", ".pt", ".pth.tar", ".bin")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, with example inputs of batch 1.

    `recorded` is the card inside a file of this project, as it was written.
    """

    name: str
    model: nn.Module | ExportedProgram
    inputs: tuple[Tensor, ...]
    card: Card
    dtype: str
    device: str
    notes: tuple[str, ...] = ()
    dynamic_batch: bool = True
    recorded: Card | None = None


def load(text: str, options: ModelOptions) -> Loaded:
    """The model that MODEL names, with its weights, in eval mode.

    Raises:
        BadInput: the text, an option or a file is at fault.
    """
    import torch

    text, options = split_weights(text, options)
    form = classify(text)
    check_device(options.device)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    built = _build(form, text, options)
    if options.weights is not None:
        built = _with_weights(built, options.weights)
    built = _placed(text, built, options)
    inputs = _inputs(built, options)
    loaded = Loaded(
        name=text,
        model=built.model,
        inputs=inputs,
        card=sized(built.card, inputs),
        dtype=_computed_in(built.model, inputs),
        device=options.device,
        notes=built.notes,
        dynamic_batch=built.dynamic_batch,
        recorded=built.recorded,
    )
    try_once(loaded)
    return loaded


def split_weights(text: str, options: ModelOptions) -> tuple[str, ModelOptions]:
    """`MODEL@FILE` as MODEL and the options with FILE as its weights.

    Raises:
        BadInput: `--weights` names another file.
    """
    model, sign, weights = text.rpartition("@")
    if not sign or not model or not weights or os.path.exists(text):
        return text, options
    if options.weights is not None:
        raise BadInput(
            f"{text} has its weights behind the @, and --weights is given as well.",
            hint="Leave one of them out.",
        )
    return model, replace(options, weights=weights)


def classify(text: str) -> str:
    """Which form a text is: a row of the builders' table, `artefact`, `onnx` or `ir`.

    Raises:
        BadInput: it is none of them.
    """
    suffix = Path(text).suffix
    if text.startswith("timm:"):
        return "timm"
    if text.startswith("torchvision:"):
        return "torchvision"
    if suffix == ".pt2":
        return "program"
    if suffix == ".safetensors":
        return "artefact"
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".xml":
        return "ir"
    if ":" in text:
        return "factory"
    if text in catalogue.fastvit_names():
        return "fastvit"
    if text.endswith(".py"):
        raise BadInput(
            f"{text} is a file without a callable.",
            hint=f"Name the factory in it: {text}:build.",
        )
    if text.endswith(CHECKPOINTS):
        raise BadInput(
            f"{text} is a checkpoint, which does not say what model it belongs to.",
            hint=f"Name the model and add --weights {text}.",
        )
    raise unknown(text)


def _only_runs(form: str, text: str) -> BadInput:
    if not Path(text).is_file():
        return BadInput(f"there is no file {text}.", hint="Check the path.")
    return BadInput(
        f"{text} is {graphfiles.KINDS[form]}, which can be run but not rewritten: the "
        "compiler works on PyTorch graphs.",
        hint="Give the PyTorch model it was exported from, or a .pt2 of it.",
    )


def _build(form: str, text: str, options: ModelOptions) -> Built:
    if form in graphfiles.KINDS:
        raise _only_runs(form, text)
    if form != "artefact":
        return BUILDERS[form](text, options)
    return _from_artefact(text, options)


def _from_artefact(text: str, options: ModelOptions) -> Built:
    """A file that this project wrote: its source built again, its weights loaded."""
    import torch

    from fastvit import weights

    refuse_factory_options(text, options)
    state, metadata = reading(lambda: weights.read_state_dict(text))
    card = _card(text, metadata)
    source = replace(options, args=card.args)
    built = BUILDERS[classify(card.source)](card.source, source)
    model = built.model
    if card.form == "fused":
        model = _fused(built, card)
    floating = [value.dtype for value in state.values() if value.is_floating_point()]
    model = model.to(floating[0] if floating else torch.float32)
    try:
        reading(lambda: weights.load_state_dict_strictly(model, state, source=text))
    except BadInput as error:
        error.hint = f"It was written with {metadata.get('versions')}; {_REBUILD_HINT}"
        raise
    return replace(built, model=model, card=card, recorded=card, notes=())


def read_card(text: str) -> Card:
    """The card of a .safetensors that this project wrote.

    Raises:
        BadInput: there is no such file, or it is another program's.
    """
    from fastvit import weights

    return _card(text, reading(lambda: weights.read_state_dict(text))[1])


def _card(text: str, metadata: dict[str, str]) -> Card:
    try:
        return Card.from_metadata(metadata)
    except ValueError as error:
        raise BadInput(
            f"{text} is not a file that this project wrote: {error}.",
            hint=f"Name the model that it belongs to and add --weights {text}.",
        ) from error


def _fused(built: Built, card: Card) -> Any:
    """The structure that the compiler gives to the card's source."""
    import torch

    import repcompiler as rc

    model = built.model
    if hasattr(model, "eval") and built.inputs is None:
        model = model.eval()
    inputs = built.inputs or (torch.zeros(1, *card.input_size),)
    told: dict[str, Any] = {"capture": card.capture}
    if card.tuning:
        from fastvit_cli import tuner

        told["tuning"] = tuner.from_card(card.tuning)
    return rc.fuse(model, example_inputs=inputs, verify=False, **told).model


def _with_weights(built: Built, path: str) -> Built:
    from fastvit import weights

    result = reading(lambda: weights.load_weights(built.model, path))
    card = replace(built.card, weights={"origin": "file", "file": path})
    try:
        theirs = Card.from_metadata(result.metadata)
    except ValueError:
        return replace(built, card=card)
    # A file of this project says more: where its weights come from, under any name; its
    # classes; and how its images were made.
    known = theirs.weights["origin"] in ("random", "trained")
    told = replace(
        card,
        weights=theirs.weights if known else card.weights,
        class_names=theirs.class_names or card.class_names,
        preprocessing=theirs.preprocessing,
    )
    return replace(built, card=told)


def reading(read: Any) -> Any:
    """What `read` returns, with errors about files as bad input.

    Raises:
        BadInput: the file is missing, damaged, unsafe or another model's.
    """
    from fastvit.errors import WeightsError

    try:
        return read()
    except WeightsError as error:
        raise BadInput(error.args[0], hint=error.hint) from error
    except OSError as error:
        raise BadInput(
            f"{error.filename} cannot be read: {error.strerror}.",
            hint="Check the path and its permissions.",
        ) from error


def check_device(device: str) -> None:
    """See that tensors can be made there.

    Raises:
        BadInput: the device, or a build of torch that has it, is missing.
    """
    import torch

    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"--device {device} cannot be used here: {summary(error, 120)}.",
            hint="Use --device cpu, or a machine and a build of torch that have it.",
        ) from error
    if kind == "meta":
        raise BadInput("--device meta holds no numbers.", hint="Use --device cpu.")


def _placed(text: str, built: Built, options: ModelOptions) -> Built:
    """The model on its device, in its dtype, in eval mode."""
    import torch
    from torch import nn

    model = built.model
    if isinstance(model, nn.Module):
        dtype = getattr(torch, options.dtype) if options.dtype else None
        moved = model.to(device=options.device, dtype=dtype)
        return replace(built, model=moved.eval())
    own = programs.floating_dtype(model)
    if options.dtype not in (None, own):
        raise BadInput(
            f"{text} is an exported program in {own}, and cannot be cast.",
            hint="Export it in the other dtype, or leave --dtype out.",
        )
    if torch.device(options.device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        model = move_to_device_pass(model, options.device)
    return replace(built, model=model)


def _inputs(built: Built, options: ModelOptions) -> tuple[Tensor, ...]:
    import torch

    if built.inputs is not None and options.input_size is None:
        return tuple(value.to(options.device) for value in built.inputs)
    size = options.input_size or built.card.input_size
    generator = torch.Generator().manual_seed(options.seed)
    fixed = built.inputs is not None and not built.dynamic_batch
    batch = len(built.inputs[0]) if fixed and built.inputs else 1
    image = torch.randn(batch, *size, generator=generator)
    return (image.to(device=options.device, dtype=_dtype_of(built.model)),)


def _computed_in(model: Any, inputs: tuple[Tensor, ...]) -> str:
    """The dtype of the arithmetic: whole numbers, as those of words, say nothing."""
    floating = [x.dtype for x in inputs if x.is_floating_point()]
    dtype = floating[0] if floating else _dtype_of(model)
    return str(dtype).removeprefix("torch.")


def _dtype_of(model: Any) -> Any:
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def sized(card: Card, inputs: tuple[Tensor, ...]) -> Card:
    """The card with the size that the inputs have."""
    size = list(inputs[0].shape[1:])
    return replace(card, preprocessing={**card.preprocessing, "input_size": size})


def try_once(loaded: Loaded) -> None:
    """Run the model once, so that a wrong size is known before the long work.

    Raises:
        BadInput: the model does not take the input.
    """
    import torch

    model: Any = loaded.model
    run = model if isinstance(model, torch.nn.Module) else model.module()
    try:
        with torch.no_grad():
            run(*loaded.inputs)
    except (Exception, SystemExit) as error:
        size = "x".join(str(side) for side in loaded.card.input_size)
        raise BadInput(
            f"{loaded.name} cannot take an input of {size} in {loaded.dtype}: "
            f"{summary(error)}.",
            hint=_how_to_feed(run),
        ) from error


def _how_to_feed(model: Any) -> str:
    """What to do where a model does not take the input that was made for it."""
    required = [
        parameter
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) > 1:
        return "Name a factory that returns (model, inputs), all of them as tensors."
    return "Give the size that it takes with --input-size, as in 3x256x256 or 1x16000."
