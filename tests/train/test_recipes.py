"""Recipes: the paper's numbers, and words for whatever cannot be one."""

from __future__ import annotations

import math

import pytest
import torch
from train_helpers import small

from fastvit import VARIANTS
from fastvit.builtin import RECIPES, TEACHER, recipe_for
from fastvit.engine import build_scheduler
from fastvit.errors import RecipeError
from fastvit.recipe_files import from_toml, read_recipe, to_toml, with_settings

# variant → drop path, mixup; distilled: drop path, mixup; LayerScale, crop. From the
# paper's appendix and the released code, copied by hand.
PAPER = {
    "fastvit_t8": (0.0, 0.2, 0.0, 0.2, 1e-5, 0.9),
    "fastvit_t12": (0.0, 0.2, 0.0, 0.2, 1e-5, 0.9),
    "fastvit_s12": (0.0, 0.2, 0.0, 0.2, 1e-5, 0.9),
    "fastvit_sa12": (0.1, 0.2, 0.0, 0.8, 1e-5, 0.9),
    "fastvit_sa24": (0.1, 0.2, 0.05, 0.8, 1e-5, 0.9),
    "fastvit_sa36": (0.2, 0.2, 0.1, 0.8, 1e-6, 0.95),
    "fastvit_ma36": (0.35, 0.8, 0.2, 0.8, 1e-6, 0.95),
}
COMMON = {
    "opt": "adamw",
    "weight_decay": 0.05,
    "lr": 1e-3,
    "batch_size": 1024,
    "micro_batch": 128,
    "epochs": 300,
    "cooldown_epochs": 10,
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "image_size": 256,
    "ema": 0.9995,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "erase_prob": 0.25,
    "erase_mode": "pixel",
    "color_jitter": 0.4,
    "cutmix": 1.0,
    "mix_prob": 1.0,
    "mix_switch_prob": 0.5,
    "smoothing": 0.1,
    "interpolation": "bicubic",
    "bn": "average",
    "clip_grad": 0.0,
    "seed": 42,
}


def test_the_table_covers_every_variant():
    assert PAPER.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", PAPER)
def test_imagenet_recipe_has_the_papers_numbers(name):
    recipe = recipe_for("imagenet", name)
    drop_path, mixup, _, _, layer_scale, crop = PAPER[name]
    own = {"drop_path": drop_path, "mixup": mixup, "crop_pct": crop}
    own["layer_scale_init"] = layer_scale
    for key, value in {**COMMON, **own}.items():
        assert recipe.get(key) == value, key
    assert recipe.get("teacher") == ""


@pytest.mark.parametrize("name", PAPER)
def test_distill_recipe_has_the_papers_numbers(name):
    recipe = recipe_for("distill", name)
    _, _, drop_path, mixup, layer_scale, crop = PAPER[name]
    own = {"drop_path": drop_path, "mixup": mixup, "crop_pct": crop}
    own["layer_scale_init"] = layer_scale
    teacher = {"teacher": TEACHER, "kind": "hard", "alpha": 0.5, "temperature": 1.0}
    for key, value in {**COMMON, **own, **teacher}.items():
        assert recipe.get(key) == value, key


def test_the_teacher_is_the_regnet_of_16_gigaflops():
    import timm

    assert timm.is_model(TEACHER.partition(".")[0])
    assert TEACHER in timm.list_pretrained()


def test_finetuning_recipe_has_the_papers_numbers():
    recipe = recipe_for("finetune-384", "fastvit_sa36")
    wanted = {
        "epochs": 30,
        "lr": 5e-5,
        "weight_decay": 1e-8,
        "batch_size": 512,
        "crop_pct": 1.0,
        "image_size": 384,
        "drop_path": 0.2,
    }
    assert {key: recipe.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model", ["fastvit_ma36", "timm:resnet18"])
def test_a_recipe_survives_its_file(name, model, tmp_path):
    recipe = recipe_for(name, model)
    path = tmp_path / "r.toml"
    path.write_text(to_toml(recipe))
    assert read_recipe(path) == recipe


def test_settings_are_read_in_the_type_of_their_key():
    texts = [
        "lr=3e-4",
        "epochs=7",
        "compile=true",
        "crop_scale=0.2,1",
        "drop_path=none",
    ]
    recipe = with_settings(recipe_for("imagenet", "fastvit_sa12"), texts)
    keys = ("lr", "epochs", "compile", "crop_scale", "drop_path")
    assert [recipe.get(key) for key in keys] == [3e-4, 7, True, (0.2, 1.0), None]
    named = with_settings(recipe, ["schedule.lr=0.5", "auto_augment="])
    assert (named.get("lr"), named.get("auto_augment")) == (0.5, "")


WRONG = {
    "lr": "'lr' is not key=value",
    "learning_rate=1": "no key 'learning_rate'",
    "weight_decy=1": "Did you mean weight_decay?",
    "loop.lr=1": "It belongs to 'schedule'",
    "epochs=1.5": "epochs is '1.5', it must be a whole number",
    "lr=fast": "lr is 'fast', it must be a number",
    "lr=-1": "lr is -1.0, it must be in [0, 1e+09]",
    "lr=1e40": "lr is 1e+40, it must be in [0, 1e+09]",
    "workers=1000000": "workers is 1000000, it must be a whole number in [0, 256]",
    "crop_pct=0.0001": "crop_pct is 0.0001, it must be in [0.1, 1]",
    "smoothing=1": "smoothing is 1.0, it must be in [0, 1)",
    "val_split=": "val_split is '', it must be a name",
    "lr=nan": "lr is nan",
    "compile=2": "it must be true or false",
    "amp=fp8": "one of auto, off, float16, bfloat16",
    "crop_scale=1,0.5": "two rising shares",
    "mix_prob=1.1": "in [0, 1]",
    "drop_path=1": "in [0, 1)",
    "min_lr=2": "min_lr is 2.0, it must be 0 or more and at most lr, which is 0.001",
    "warmup_lr=-1": "warmup_lr is -1.0, it must be 0 or more",
    "ema=1": "ema is 1.0, it must be in [0, 1)",
    "seed=9223372036854775808": "0 or more and below 2^63",
    "crop_ratio=1,inf": "two rising ratios",
    "layer_scale_init=nan": "layer_scale_init is nan, it must be at most 1e+09",
    "epochs=3": "warmup_epochs is 5, it must be 0 or more and below epochs",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_settings_are_named_with_what_is_right(text):
    with pytest.raises(RecipeError) as caught:
        with_settings(recipe_for("imagenet", "fastvit_t8"), [text])
    assert WRONG[text] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[schedule\n", "is not TOML"),
        ("[plan]\nlr = 1\n", "no section of a recipe"),
        ("lr = 1\n", "no section of a recipe"),
        ("[loop]\nlr = 1\n", "lr is not in section 'loop'"),
        ('[schedule]\nlr = "x"\n', "lr is 'x'"),
        ("[loop]\nworkers = true\n", "workers is True"),
    ],
)
def test_wrong_files_are_named_with_what_is_right(text, said):
    with pytest.raises(RecipeError) as caught:
        from_toml(text, "my.toml")
    assert said in str(caught.value)


def test_the_learning_rate_warms_up_follows_the_cosine_and_cools_down():
    recipe = small(
        epochs=10, warmup_epochs=2, cooldown_epochs=3, lr=1.0, warmup_lr=0.1, min_lr=0.2
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = build_scheduler(optimizer, recipe, updates=5)
    rates = []
    for update in range(13 * 5):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.9 / 2)
    for update in range(10, 50):
        cosine = 0.2 + 0.8 * (1 + math.cos(math.pi * update / 50)) / 2
        assert rates[update] == pytest.approx(cosine)
    assert rates[50:] == [pytest.approx(0.2)] * 15
