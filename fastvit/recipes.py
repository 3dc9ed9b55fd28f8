"""Recipes: everything that decides a training run beside the data and the model.

The defaults are the ImageNet recipe of the FastViT paper (Vasu et al., ICCV 2023,
appendix) with the numbers of its released code; `builtin` has the named recipes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastvit.errors import RecipeError

MOST_WORKERS = 256  # a slip of the finger must not fork until the machine stands still
_CROP = "in [0.1, 1]"
_MOST = 1e9  # what float32 still holds when two such numbers are multiplied


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast: warm-up, cosine, cool-down; stepped at every update.

    Attributes:
        epochs: until the cosine ends; the warm-up is part of them.
        cooldown_epochs: more epochs at `min_lr`.
        lr: the peak; `warmup_lr` is where the warm-up starts.
    """

    epochs: int = 300
    cooldown_epochs: int = 10
    warmup_epochs: int = 5
    lr: float = 1e-3
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5


@dataclass(frozen=True)
class Optimizer:
    """timm's name of the optimiser; `clip_grad` 0 means no clipping.

    Attributes:
        clip_mode: `norm`, `value` or `agc`.
    """

    opt: str = "adamw"
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    clip_mode: str = "norm"


@dataclass(frozen=True)
class Augment:
    """What happens to training images; names and meanings are timm's.

    Attributes:
        image_size: height and width of the model's input, pixels.
        crop_scale: share of the image's area that a random crop keeps.
        auto_augment: timm's policy string; empty for none.
        mixup: alpha of the Beta distribution; 0 switches mixup off; so for `cutmix`.
        mix_switch_prob: chance of cutmix where both are on.
    """

    image_size: int = 256
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    interpolation: str = "bicubic"
    erase_prob: float = 0.25
    erase_mode: str = "pixel"
    mixup: float = 0.2
    cutmix: float = 1.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    smoothing: float = 0.1


@dataclass(frozen=True)
class Regularise:
    """What reaches the model's factory, and the average of its weights.

    Attributes:
        drop_path: stochastic depth of the last block; None for the model's own.
        layer_scale_init: None for the model's own.
        ema: decay of the exponential moving average; 0 switches it off. Where it is
            on, its weights are what is evaluated and kept.
        ema_warmup: start with a short average (small data sets need it).
    """

    drop_path: float | None = None
    layer_scale_init: float | None = None
    ema: float = 0.9995
    ema_warmup: bool = False


@dataclass(frozen=True)
class Loop:
    """How the work is done; batch sizes are images.

    Attributes:
        batch_size: of one update, over all processes.
        micro_batch: of one forward pass in one process. Gradients are accumulated over
            batch_size / (micro_batch x processes) passes.
        amp: `auto` (float16 on CUDA, off elsewhere), `off`, `float16`, `bfloat16`.
        bn: statistics across processes: `average` them at the end of each epoch, `sync`
            (every batch is normalised with all processes' statistics) or `none`.
        channels_last: None for on with CUDA and off elsewhere.
        compile: torch.compile, on CUDA.
        deterministic: CUDA kernels that give the same bits every time, some slower.
        workers: processes that read images, for each training process.
        checkpoint_minutes: at most so much work is lost.
        checkpoint_updates: also after so many updates; 0 for by time alone.
        keep_best: how many of the best epochs' weights are kept.
    """

    batch_size: int = 1024
    micro_batch: int = 128
    amp: str = "auto"
    bn: str = "average"
    channels_last: bool | None = None
    compile: bool = False
    deterministic: bool = False
    workers: int = 8
    seed: int = 42
    checkpoint_minutes: float = 10.0
    checkpoint_updates: int = 0
    keep_best: int = 1


@dataclass(frozen=True)
class Evaluation:
    """Which images, and how those of validation are cropped.

    Attributes:
        crop_pct: None for the model's own share.
        train_split: of a timm data set; a folder has `train` and `val`.
    """

    crop_pct: float | None = None
    train_split: str = "train"
    val_split: str = "validation"


@dataclass(frozen=True)
class Distill:
    """Learning from a teacher; `teacher` empty for none.

    Attributes:
        teacher: any model of timm, by its name there.
        teacher_weights: a checkpoint of it; empty for timm's pretrained weights.
        kind: `hard` (its most likely class is a second label) or `soft`.
        alpha: the teacher's share of the loss.
        temperature: of the softmax, for `soft` alone.
    """

    teacher: str = ""
    teacher_weights: str = ""
    kind: str = "hard"
    alpha: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; keys are unique over its sections, so that each has one name.

    Raises:
        RecipeError: a value is out of bounds, or two do not go together.
    """

    name: str = "imagenet"
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: Optimizer = field(default_factory=Optimizer)
    augment: Augment = field(default_factory=Augment)
    regularise: Regularise = field(default_factory=Regularise)
    loop: Loop = field(default_factory=Loop)
    evaluation: Evaluation = field(default_factory=Evaluation)
    distill: Distill = field(default_factory=Distill)

    def __post_init__(self) -> None:
        for key, (holds, wanted) in _bounds(self).items():
            if not holds:
                raise RecipeError(f"{key} is {self.get(key)!r}, it must be {wanted}.")

    @property
    def total_epochs(self) -> int:
        """Epochs with the cool-down."""
        return self.schedule.epochs + self.schedule.cooldown_epochs

    def get(self, key: str) -> Any:
        """The value of a key.

        Raises:
            RecipeError: there is no such key.
        """
        return getattr(getattr(self, section_of(key)), key)

    def with_values(self, **values: Any) -> Recipe:
        """A copy with other values, by key.

        Raises:
            RecipeError: a key is not known, or a value is out of bounds.
        """
        sections = {section_of(key) for key in values}
        changed = {
            name: replace(
                getattr(self, name),
                **{k: v for k, v in values.items() if SECTION_OF[k] == name},
            )
            for name in sections
        }
        return replace(self, **changed)


SECTIONS: dict[str, type] = {
    "schedule": Schedule,
    "optimizer": Optimizer,
    "augment": Augment,
    "regularise": Regularise,
    "loop": Loop,
    "evaluation": Evaluation,
    "distill": Distill,
}
SECTION_OF = {f.name: name for name, kind in SECTIONS.items() for f in fields(kind)}


def section_of(key: str) -> str:
    """The section that a key belongs to.

    Raises:
        RecipeError: there is no such key; the hint names those that look like it.
    """
    if key not in SECTION_OF:
        near = difflib.get_close_matches(key, SECTION_OF, n=3)
        listed = near or list(SECTION_OF)
        hint = f"Did you mean {', '.join(near)}?" if near else ""
        raise RecipeError(
            f"a recipe has no key {key!r}.", hint=hint or f"Keys: {', '.join(listed)}."
        )
    return SECTION_OF[key]


def _bounds(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """For each key that has them: whether its bounds hold, and what they are."""
    get = recipe.get
    at_least = {
        "epochs": 1,
        "cooldown_epochs": 0,
        "image_size": 1,
        "batch_size": 1,
        "micro_batch": 1,
        "checkpoint_updates": 0,
        "keep_best": 1,
    }
    not_negative = (
        *("lr", "weight_decay", "clip_grad"),
        *("color_jitter", "mixup", "cutmix", "checkpoint_minutes"),
    )
    shares = (
        *("hflip", "erase_prob", "mix_prob", "mix_switch_prob"),
        "alpha",
    )
    choices = {
        "amp": ("auto", "off", "float16", "bfloat16"),
        "bn": ("average", "sync", "none"),
        "kind": ("hard", "soft"),
        "clip_mode": ("norm", "value", "agc"),
        "erase_mode": ("const", "rand", "pixel"),
        "interpolation": ("bicubic", "bilinear", "nearest", "random"),
    }
    crop, ratio = get("crop_scale"), get("crop_ratio")
    rates = {"min_lr": get("min_lr"), "warmup_lr": get("warmup_lr")}
    names = ("opt", "train_split", "val_split")
    return {
        **{key: (bool(get(key).strip()), "a name") for key in names},
        **{key: (get(key) >= n, f"{n} or more") for key, n in at_least.items()},
        **{k: (0 <= get(k) <= _MOST, f"in [0, {_MOST:g}]") for k in not_negative},
        **{key: (0 <= get(key) <= 1, "in [0, 1]") for key in shares},
        **{k: (get(k) in v, f"one of {', '.join(v)}") for k, v in choices.items()},
        "warmup_epochs": (
            0 <= get("warmup_epochs") < get("epochs"),
            f"0 or more and below epochs, which is {get('epochs')}",
        ),
        **{
            key: (
                0 <= rate <= get("lr"),
                f"0 or more and at most lr, which is {get('lr')}",
            )
            for key, rate in rates.items()
        },
        "workers": (
            0 <= get("workers") <= MOST_WORKERS,
            f"a whole number in [0, {MOST_WORKERS}]",
        ),
        "seed": (0 <= get("seed") < 2**63, "0 or more and below 2^63"),
        "smoothing": (0 <= get("smoothing") < 1, "in [0, 1)"),
        "ema": (0 <= get("ema") < 1, "in [0, 1)"),
        "temperature": (0 < get("temperature") <= _MOST, f"in (0, {_MOST:g}]"),
        "layer_scale_init": (
            abs(get("layer_scale_init") or 0) <= _MOST,
            f"at most {_MOST:g}, either sign",
        ),
        "drop_path": (0 <= (get("drop_path") or 0) < 1, "in [0, 1)"),
        # Images are enlarged to image_size / crop_pct.
        "crop_pct": (get("crop_pct") is None or 0.1 <= get("crop_pct") <= 1, _CROP),
        "crop_scale": (
            len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1,
            "two rising shares in (0, 1]",
        ),
        "crop_ratio": (
            len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < float("inf"),
            "two rising ratios above 0",
        ),
    }
