"""One builder for each form of MODEL: from the text to a module and its card.

`BUILDERS` is the table; `sources` chooses the row and does what all forms share:
weights, device, dtype, inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from fastvit_cli import catalogue, factories, programs
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

DEFAULT_SIZE = (3, 224, 224)
IMAGENET = 1000


@dataclass(frozen=True)
class ModelOptions:
    """What the options that all commands share say about one model.

    `dtype` None means the model's own; `capture` is the door for files in fused form.
    """

    args: dict[str, Any] = field(default_factory=dict[str, Any])
    weights: str | None = None
    pretrained: bool = False
    input_size: tuple[int, ...] | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None


@dataclass(frozen=True)
class Built:
    """A model, its card, and what only some forms know.

    Attributes:
        notes: what people should be told, such as an assumed input size.
        inputs: example inputs, where the model fixes them.
        dynamic_batch: whether the first axis of the inputs may have any size.
        recorded: the card inside a file of this project, as it was written.
    """

    model: nn.Module | ExportedProgram
    card: Card
    notes: tuple[str, ...] = ()
    inputs: tuple[Tensor, ...] | None = None
    dynamic_batch: bool = True
    recorded: Card | None = None


def build_fastvit(text: str, options: ModelOptions) -> Built:
    """A variant of this project."""
    import fastvit
    from fastvit.variants import preprocessing

    if options.pretrained:
        raise BadInput(
            "this project ships no weights, so --pretrained has nothing to load.",
            hint=f"Give a checkpoint with --weights FILE, or try timm:{text}.",
        )
    create = fastvit.create_model
    model = factories.call(text, lambda **args: create(text, **args), options.args)
    classes = options.args.get("num_classes", IMAGENET)
    if options.args.get("features_only"):
        classes = 0
    return _built(text, model, options, asdict(preprocessing(text)), _labels(classes))


def build_timm(text: str, options: ModelOptions) -> Built:
    """A model of timm."""
    import timm
    from timm.data import resolve_model_data_config

    name = text.removeprefix("timm:")
    if name.partition(".")[0] not in timm.list_models():
        raise unknown(text, ["timm"])
    model = factories.call(
        text,
        lambda **args: timm.create_model(name, pretrained=options.pretrained, **args),
        options.args,
        *_download_hint(options),
    )
    config = resolve_model_data_config(model)
    classes = getattr(model, "num_classes", 0)
    return _built(text, model, options, config, _labels(classes))


def build_torchvision(text: str, options: ModelOptions) -> Built:
    """A model of torchvision."""
    try:
        from torchvision import models
    except ImportError as error:
        raise BadInput(
            "torchvision is not installed.", hint="pip install torchvision"
        ) from error
    name = text.removeprefix("torchvision:")
    if name not in models.list_models():
        raise unknown(text, ["torchvision"])
    builder = models.get_model_builder(name)
    fixed = {"weights": "DEFAULT" if options.pretrained else None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        fixed["weights_backbone"] = None  # its default would be downloaded
    model = factories.call(
        text,
        lambda **args: builder(**fixed, **args),
        options.args,
        *_download_hint(options),
    )
    weights = next(iter(models.get_model_weights(name)), None)
    names = tuple(weights.meta.get("categories", ())) if weights else ()
    if "num_classes" in options.args and options.args["num_classes"] != len(names):
        names = ()
    return _built(text, model, options, _torchvision_config(weights), names)


def build_factory(text: str, options: ModelOptions) -> Built:
    """What a user's factory returns."""
    from torch import nn

    if options.pretrained:
        raise BadInput(
            "--pretrained works with timm: and torchvision: models.",
            hint="Tell the factory with --model-arg, or give --weights FILE.",
        )
    factory = factories.find(text)
    is_module = isinstance(factory, nn.Module)
    made = factory if is_module else factories.call(text, factory, options.args)
    model, inputs = _with_inputs(text, made)
    if inputs is None:
        config, note = _factory_config(text, model)
    else:
        config, note = {"input_size": tuple(inputs[0].shape[1:])}, ""
    built = _built(text, model, options, config, ())
    weights = {"origin": "factory", "seed": options.seed}
    return replace(
        built,
        card=replace(built.card, weights=weights),
        notes=(note,) if note and not options.input_size else (),
        inputs=inputs,
        dynamic_batch=inputs is None or _share_a_batch(inputs),
    )


def _with_inputs(text: str, made: Any) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """What a factory gave: the model, or the model and its example inputs."""
    from torch import Tensor, nn

    model, inputs = made, None
    if isinstance(made, tuple) and len(made) == 2:
        model, inputs = made
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if not inputs or not all(isinstance(value, Tensor) for value in inputs):
            raise BadInput(
                f"{text} returned example inputs that are no tensors.",
                hint="Return (model, tensor) or (model, (tensor, tensor, …)).",
            )
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"{text} returned type {type(model).__name__}, not a torch.nn.Module.",
            hint="Return the model itself, or (model, example inputs).",
        )
    return model, inputs


def _share_a_batch(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the first axis of every input may be the batch."""
    return len({value.shape[:1] for value in inputs}) == 1 and inputs[0].dim() > 0


def build_program(text: str, options: ModelOptions) -> Built:
    """A program that torch.export wrote."""
    refuse_factory_options(text, options)
    program, recorded = programs.load(Path(text))
    card = recorded
    inputs = programs.example_inputs(text, program)
    if card is None:
        card = Card(
            source=text,
            preprocessing={"input_size": list(inputs[0].shape[1:])},
            weights={"origin": "program"},
        )
    return Built(
        model=program,
        card=replace(card, source=text, args={}, form="train"),
        inputs=inputs,
        dynamic_batch=programs.has_dynamic_batch(program),
        recorded=recorded,
    )


def _download_hint(options: ModelOptions) -> tuple[str, ...]:
    if not options.pretrained:
        return ()
    return ("--pretrained needs published weights and the network; or --weights FILE.",)


def refuse_factory_options(text: str, options: ModelOptions) -> None:
    """A file is what it is.

    Raises:
        BadInput: an option asks for another model than the file holds.
    """
    given = {
        "--model-arg": bool(options.args),
        "--pretrained": options.pretrained,
        "--weights": options.weights is not None,
    }
    wrong = [option for option, is_given in given.items() if is_given]
    if wrong:
        raise BadInput(
            f"{wrong[0]} does not go with {text}, which has its own.",
            hint="Leave it out, or name the model that the file was made from.",
        )


def unknown(text: str, families: list[str] | None = None) -> BadInput:
    """The error for a name that nobody has, with those that look like it."""
    names = catalogue.near(text, families or catalogue.FAMILIES)
    if names:
        hint = f"Did you mean {', '.join(names)}?"
    else:
        hint = "Run `fastvit models` for what can be named."
    return BadInput(f"there is no model {text!r}.", hint=hint)


def _built(
    text: str,
    model: nn.Module,
    options: ModelOptions,
    config: dict[str, Any],
    class_names: tuple[str, ...],
) -> Built:
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    known = {key: config[key] for key in keys if config.get(key) is not None}
    random = {"origin": "random", "seed": options.seed}
    card = Card(
        source=text,
        preprocessing=_for_channels(known, options.args.get("in_chans")),
        args=options.args,
        weights={"origin": "pretrained"} if options.pretrained else random,
        class_names=class_names,
    )
    return Built(model, card)


def _for_channels(config: dict[str, Any], channels: Any) -> dict[str, Any]:
    """The preprocessing with `channels` instead of its own, statistics averaged."""
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    if not isinstance(channels, int) or channels == config["input_size"][0]:
        return config
    config["input_size"] = [channels, *config["input_size"][1:]]
    for key in {"mean", "std"} & config.keys():
        config[key] = [sum(config[key]) / len(config[key])] * channels
    return config


def _labels(classes: Any) -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    if classes != IMAGENET:
        return ()
    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(index) for index in range(IMAGENET))


def _torchvision_config(weights: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"input_size": DEFAULT_SIZE}
    if weights is None:
        return config
    preset = weights.transforms()
    crop, resize = (
        getattr(preset, "crop_size", None),
        preset.__dict__.get("resize_size"),
    )
    side = (crop or resize or [DEFAULT_SIZE[1]])[0]
    config["input_size"] = (3, side, side)
    config.update({key: getattr(preset, key, None) for key in ("mean", "std")})
    if crop and resize:
        config["crop_pct"] = crop[0] / resize[0]
    interpolation = getattr(preset, "interpolation", None)
    if interpolation is not None:
        config["interpolation"] = interpolation.value
    return config


def _factory_config(text: str, model: nn.Module) -> tuple[dict[str, Any], str]:
    """The preprocessing that the model itself declares, or a default said aloud."""
    declared = getattr(model, "pretrained_cfg", None)
    if isinstance(declared, dict) and is_size(declared.get("input_size")):
        return dict(declared), ""
    for name in ("default_input_size", "input_size"):
        size = getattr(model, name, None)
        if is_size(size):
            return {"input_size": tuple(size)}, ""
    shown = "x".join(str(side) for side in DEFAULT_SIZE)
    note = f"{text} does not say its input size: {shown} is assumed (--input-size)."
    return {"input_size": DEFAULT_SIZE}, note


def is_size(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether a value is positive integers: of an image three, of sound two."""
    return (
        isinstance(value, (tuple, list))
        and len(value) > 0
        and all(type(side) is int and side > 0 for side in value)
    )


BUILDERS: dict[str, Callable[[str, ModelOptions], Built]] = {
    "fastvit": build_fastvit,
    "timm": build_timm,
    "torchvision": build_torchvision,
    "factory": build_factory,
    "program": build_program,
}
