"""The loss: labels, mixed or smoothed, and a teacher's word.

With a teacher, L = (1 - α) L_labels + α L_teacher, on the model's own head: there is
none extra. hard: L_teacher is the cross entropy with the teacher's most likely class
(Touvron et al., "DeiT", 2021, eq. 3). soft: τ² KL(teacher / τ ‖ model / τ) (eq. 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from fastvit.batches import seed_from
from fastvit.config import Preprocessing
from fastvit.errors import RecipeError
from fastvit.recipes import Augment, Distill

Loss = Callable[[Tensor, Tensor], Tensor]


def build_mixup(augment: Augment, classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None where both are off."""
    if augment.mixup == 0 and augment.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=classes,
    )


def label_loss(augment: Augment, mixed: bool) -> Loss:
    """The loss on labels: soft ones after mixing, else smoothed or plain."""
    if mixed:
        return SoftTargetCrossEntropy()
    if augment.smoothing > 0:
        return LabelSmoothingCrossEntropy(augment.smoothing)
    return nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode, and what turns the pupil's input into its own."""

    model: nn.Module
    scale: Tensor  # (1, C, 1, 1)
    shift: Tensor  # (1, C, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) as the pupil sees them."""
        return self.model(images * self.scale + self.shift)


def build_teacher(
    distill: Distill, classes: int, pupil: Preprocessing, device: torch.device
) -> Teacher | None:
    """The recipe's teacher, a model of timm; None where it names none.

    Raises:
        RecipeError: there is no such model, or its weights cannot be had.
    """
    if not distill.teacher:
        return None
    import timm
    from timm.data import resolve_model_data_config

    from fastvit.weights import load_weights

    name = distill.teacher.removeprefix("timm:")
    if not timm.is_model(name.partition(".")[0]):
        raise RecipeError(
            f"timm has no model {name!r} to be the teacher.",
            hint="`fastvit models PATTERN` lists them.",
        )
    own = bool(distill.teacher_weights)
    try:
        model = timm.create_model(name, pretrained=not own, num_classes=classes)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"the teacher {name} has no weights: {reason.rstrip('.')}.",
            hint="timm downloads them; or give --set teacher_weights=FILE.",
        ) from error
    if own:
        load_weights(model, distill.teacher_weights)
    config = resolve_model_data_config(model)
    scale, shift = _renormalised(pupil, config["mean"], config["std"])
    model = model.to(device).eval().requires_grad_(False)
    teacher = Teacher(model, scale.to(device), shift.to(device))
    _try(teacher, name, pupil, device)
    return teacher


def _try(
    teacher: Teacher, name: str, pupil: Preprocessing, device: torch.device
) -> None:
    """See that the teacher takes what the pupil sees, before any training.

    Raises:
        RecipeError: it does not; many transformers take one size alone.
    """
    try:
        teacher(torch.zeros(2, *pupil.input_size, device=device))
    except Exception as error:  # each model refuses in its own way
        size = "x".join(str(side) for side in pupil.input_size)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"the teacher {name} cannot take images of {size}: {reason.rstrip('.')}.",
            hint="Choose another size with --set image_size=N, or another teacher.",
        ) from error


def _renormalised(
    pupil: Preprocessing, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Scale and shift from the pupil's normalisation to another's.

    x = (p - μ) / σ and z = (p - m) / s give z = x σ / s + (μ - m) / s.
    """
    axis = (1, -1, 1, 1)
    ours = [torch.tensor(v, dtype=torch.float64) for v in (pupil.mean, pupil.std)]
    theirs = [torch.tensor(v, dtype=torch.float64) for v in (mean, std)]
    scale = (ours[1] / theirs[1]).float().view(axis)
    shift = ((ours[0] - theirs[0]) / theirs[1]).float().view(axis)
    return scale, shift


def teacher_loss(logits: Tensor, teacher: Tensor, distill: Distill) -> Tensor:
    """What the teacher's logits (B, K) say of the model's (B, K)."""
    if distill.kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    tau = distill.temperature
    pupil = F.log_softmax(logits / tau, 1)
    target = F.log_softmax(teacher / tau, 1)
    return F.kl_div(pupil, target, log_target=True, reduction="batchmean") * tau**2


@dataclass(frozen=True)
class Objective:
    """Everything between a batch and its loss but the model itself."""

    mixup: Mixup | None
    labels: Loss
    distill: Distill
    teacher: Teacher | None = None

    def mixed(
        self, images: Tensor, targets: Tensor, *place: int
    ) -> tuple[Tensor, Tensor]:
        """The batch after mixup or cutmix, drawn for its place."""
        if self.mixup is None:
            return images, targets
        np.random.seed(seed_from(*place) % 2**32)  # timm draws from this generator
        return self.mixup(images, targets)

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss of a batch, a scalar, in float32."""
        logits = logits.float()
        loss = self.labels(logits, targets)
        if self.teacher is None:
            return loss
        said = teacher_loss(logits, self.teacher(images).float(), self.distill)
        alpha = self.distill.alpha
        return (1 - alpha) * loss + alpha * said
