"""The recipes that have a name, for each model.

`imagenet`, `distill` and `finetune-384` are the paper's, with the numbers of its
released code, per variant; `small` is for small images on a laptop.

Source: Vasu et al., "FastViT", ICCV 2023, appendix tables of training settings.
"""

from __future__ import annotations

from dataclasses import replace

from fastvit.errors import RecipeError
from fastvit.recipes import Distill, Recipe
from fastvit.variants import VARIANTS

# Drop path, mixup, and both again where a teacher helps (a stronger regulariser of its
# own); LayerScale and crop are the variant's configuration.
_PER_VARIANT: dict[str, tuple[float, float, float, float]] = {
    "fastvit_t8": (0.0, 0.2, 0.0, 0.2),
    "fastvit_t12": (0.0, 0.2, 0.0, 0.2),
    "fastvit_s12": (0.0, 0.2, 0.0, 0.2),
    "fastvit_sa12": (0.1, 0.2, 0.0, 0.8),
    "fastvit_sa24": (0.1, 0.2, 0.05, 0.8),
    "fastvit_sa36": (0.2, 0.2, 0.1, 0.8),
    "fastvit_ma36": (0.35, 0.8, 0.2, 0.8),
}
TEACHER = "regnety_160.tv2_in1k"  # RegNetY-16GF


def _imagenet(model: str) -> Recipe:
    return _for_variant(Recipe(), model, distilled=False)


def _distill(model: str) -> Recipe:
    recipe = replace(Recipe(name="distill"), distill=Distill(teacher=TEACHER))
    return _for_variant(recipe, model, distilled=True)


def _finetune(model: str) -> Recipe:
    """At 384 pixels, from weights trained at 256: a fresh optimiser and average."""
    recipe = _for_variant(Recipe(name="finetune-384"), model, distilled=False)
    return recipe.with_values(
        epochs=30,
        cooldown_epochs=0,
        lr=5e-5,
        weight_decay=1e-8,
        batch_size=512,
        micro_batch=64,
        image_size=384,
        crop_pct=1.0,
    )


def _small(model: str) -> Recipe:
    """Thousands of small images, two cores, minutes.

    No flips: a mirrored digit or letter is another one. Use `hflip=0.5` for scenes, and
    `image_size=64` or more where details matter.
    """
    return Recipe(name="small").with_values(
        epochs=16,
        cooldown_epochs=0,
        warmup_epochs=2,
        lr=3e-3,
        image_size=32,
        crop_scale=(0.6, 1.0),
        hflip=0.0,
        color_jitter=0.0,
        auto_augment="",
        erase_prob=0.0,
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        layer_scale_init=0.1,
        ema=0.99,
        ema_warmup=True,
        batch_size=64,
        micro_batch=64,
        workers=0,
        crop_pct=1.0,
        checkpoint_minutes=1.0,
    )


def _for_variant(recipe: Recipe, model: str, *, distilled: bool) -> Recipe:
    """The recipe with what depends on the variant; other models keep their own."""
    if model not in VARIANTS:
        return recipe
    config = VARIANTS[model]
    drop_path, mixup = _PER_VARIANT[model][2 * distilled :][:2]
    return recipe.with_values(
        drop_path=drop_path,
        mixup=mixup,
        layer_scale_init=config.layer_scale_init,
        crop_pct=config.crop_pct,
    )


RECIPES = {
    "imagenet": _imagenet,
    "distill": _distill,
    "finetune-384": _finetune,
    "small": _small,
}


def recipe_for(name: str, model: str) -> Recipe:
    """A built-in recipe for a model, by both names.

    Raises:
        RecipeError: there is no such recipe.
    """
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise RecipeError(
            f"there is no recipe {name!r}.",
            hint=f"One of {known}, or a file that ends in .toml.",
        )
    return RECIPES[name](model)
