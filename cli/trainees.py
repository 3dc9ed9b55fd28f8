"""MODEL as something to train: its factory called for the data's classes.

What `sources` loads is ready to run; what is here keeps train mode, passes the recipe's
drop path and layer scale on, and gives a checkpoint of other classes a new head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import graphfiles, sources
from fastvit_cli.builders import BUILDERS, Built, ModelOptions
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    from torch import nn

    from fastvit.config import Preprocessing
    from fastvit.recipes import Recipe

CROP, INTERPOLATION = 1.0, "bicubic"


@dataclass(frozen=True)
class Trainee:
    """A model in train mode with its card, and what people should be told."""

    model: nn.Module
    card: Card
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def build(
    text: str, options: ModelOptions, recipe: Recipe, classes: tuple[str, ...]
) -> Trainee:
    """The model that MODEL names, for these classes, with the recipe's settings.

    Raises:
        BadInput: it cannot be trained, or does not give a logit for each class.
    """
    text, options = sources.split_weights(text, options)
    source, options, card = _source(text, options)
    form = sources.classify(source)
    options = replace(options, args=_arguments(form, source, options, recipe, classes))
    built = _seeded(form, source, options, recipe)
    # What a builder notes is the size that it had to assume: here the recipe says it.
    notes = _load(built, options, classes, card)
    known = card.preprocessing if card else built.card.preprocessing
    made = preprocessing(known, recipe)
    _check_output(source, built.model, made, len(classes))
    mine = replace(
        built.card,
        preprocessing=_as_dict(made),
        args=options.args,
        class_names=classes,
    )
    return Trainee(built.model, mine, made, tuple(notes))


def preprocessing(known: dict[str, Any], recipe: Recipe) -> Preprocessing:
    """The model's own preprocessing at the recipe's size and crop."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from fastvit.config import Preprocessing

    channels = known["input_size"][0]
    side = recipe.augment.image_size
    rgb = channels == len(IMAGENET_DEFAULT_MEAN)
    mean = IMAGENET_DEFAULT_MEAN if rgb else (0.5,) * channels
    std = IMAGENET_DEFAULT_STD if rgb else (0.5,) * channels
    return Preprocessing(
        input_size=(channels, side, side),
        mean=tuple(known.get("mean") or mean),
        std=tuple(known.get("std") or std),
        crop_pct=recipe.evaluation.crop_pct or known.get("crop_pct") or CROP,
        interpolation=known.get("interpolation") or INTERPOLATION,
    )


def _source(text: str, options: ModelOptions) -> tuple[str, ModelOptions, Card | None]:
    """What builds the model: for a file of this project, its source and weights.

    Raises:
        BadInput: a form that has no factory, or that is fused.
    """
    form = sources.classify(text)
    if form == "program" or form in graphfiles.KINDS:
        what = graphfiles.KINDS.get(form, "an exported program")
        raise BadInput(
            f"{text} is {what}, which cannot be trained.",
            hint="Name the model that it was made from.",
        )
    if form != "artefact":
        return text, options, None
    card = sources.read_card(text)
    if card.form == "fused":
        raise BadInput(
            f"{text} is a fused model, which has lost what training needs.",
            hint=f"Train {card.source}, from weights before fusion.",
        )
    if options.weights:
        raise BadInput(
            f"--weights does not go with {text}, which has its own.",
            hint=f"Name the model: {card.source}.",
        )
    args = {**card.args, **options.args}
    args.pop("num_classes", None)
    return card.source, replace(options, args=args, weights=text), card


def _arguments(
    form: str,
    source: str,
    options: ModelOptions,
    recipe: Recipe,
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """What the factory is called with: the user's word first, then the recipe's.

    Raises:
        BadInput: `num_classes` is given and is not the data's.
    """
    asked = options.args.get("num_classes", len(classes))
    if asked != len(classes):
        raise BadInput(
            f"--model-arg num_classes={asked}: the data has {len(classes)} classes.",
            hint="Leave it out: the data decides.",
        )
    wanted = {
        "num_classes": len(classes),
        "drop_path_rate": recipe.regularise.drop_path,
        "layer_scale_init": recipe.regularise.layer_scale_init,
    }
    taken = _accepted(form, source)
    mine = {k: v for k, v in wanted.items() if v is not None and taken(k)}
    return {**mine, **options.args}


def _accepted(form: str, source: str) -> Callable[[str], bool]:
    """Which of the recipe's arguments a form's factory takes."""
    if form == "fastvit":
        return lambda key: True
    if form == "timm":
        return lambda key: key in ("num_classes", "drop_path_rate")
    if form == "torchvision":
        return lambda key: key == "num_classes"
    from fastvit_cli import factories

    try:
        names = inspect.signature(factories.find(source)).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return lambda key: False
    open_ended = any(p.kind is p.VAR_KEYWORD for p in names.values())
    return lambda key: key in names or (open_ended and key == "num_classes")


def _seeded(form: str, source: str, options: ModelOptions, recipe: Recipe) -> Built:
    """The model with weights drawn from the recipe's seed.

    timm's models differ in whether they take a drop path: where one does not, it goes.
    """
    import random

    import torch

    def call(given: ModelOptions) -> Built:
        torch.manual_seed(recipe.loop.seed)
        random.seed(recipe.loop.seed)
        return BUILDERS[form](source, replace(given, seed=recipe.loop.seed))

    try:
        return call(options)
    except BadInput:
        if form != "timm" or "drop_path_rate" not in options.args:
            raise
        options.args.pop("drop_path_rate")
        return call(options)


def _load(
    built: Built, options: ModelOptions, names: tuple[str, ...], card: Card | None
) -> list[str]:
    """Load --weights, if given, and say what became of the head.

    `card`: of the file, where this project wrote it.
    """
    if options.weights is None:
        return []
    from fastvit.weights import load_weights_but_head

    path, classes = options.weights, len(names)
    theirs = sources.reading(lambda: load_weights_but_head(built.model, path, classes))
    if theirs == classes:
        own = tuple((card and card.class_names) or names)
        if own == names:
            return [f"Started from {path}."]
        place = next(i for i, pair in enumerate(zip(own, names)) if len({*pair}) > 1)
        return [
            f"Started from {path}, its head with it, whose classes have other names: "
            f"number {place} is {own[place]!r} there and {names[place]!r} here."
        ]
    return [
        f"Started from {path}; its head has {theirs} classes, the data {classes}: "
        "a new head, with random weights."
    ]


def _check_output(source: str, model: Any, made: Preprocessing, classes: int) -> None:
    """Run two images, so that what cannot be trained is known at once.

    Raises:
        BadInput: the model does not take them or gives something else than logits.
    """
    import torch

    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *made.input_size))
    except Exception as error:
        size = "x".join(str(side) for side in made.input_size)
        raise BadInput(
            f"{source} cannot take images of {size}: {summary(error)}.",
            hint="Choose another size with --set image_size=N.",
        ) from error
    finally:
        model.train()
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, classes):
        what = f"shape {shape}" if shape else f"a {type(logits).__name__}"
        raise BadInput(
            f"{source} gives {what} for two images, {(2, classes)} was expected.",
            hint="A factory takes num_classes, or has the data's number of classes.",
        )


def _as_dict(made: Preprocessing) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(made).items()}
