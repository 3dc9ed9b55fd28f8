"""Losses against hand computations, and what a teacher is shown."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from train_helpers import PREPROCESSING, small

from fastvit.config import Preprocessing
from fastvit.errors import RecipeError
from fastvit.objective import (
    Objective,
    Teacher,
    build_mixup,
    build_teacher,
    label_loss,
    teacher_loss,
)
from fastvit.recipes import Distill

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
TARGETS = torch.tensor([0, 2])
TAUGHT = torch.tensor([[0.0, 5.0, 1.0], [1.0, 4.0, 0.0]])  # its words: classes 1 and 1


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def by_hand(rows: list[list[float]], labels: list[int]) -> float:
    """Mean cross entropy, from the formula alone."""
    terms = [-log_softmax(row)[label] for row, label in zip(rows, labels)]
    return sum(terms) / len(terms)


def objective(distill: Distill, smoothing: float = 0.0) -> Objective:
    augment = small(mixup=0.0, cutmix=0.0, smoothing=smoothing).augment
    teacher = Teacher(lambda images: TAUGHT, torch.tensor(1.0), torch.tensor(0.0))
    return Objective(None, label_loss(augment, False), distill, teacher)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_hard_distillation_is_the_mix_of_two_cross_entropies(alpha):
    loss = objective(Distill(teacher="t", alpha=alpha)).loss(
        LOGITS, TARGETS, torch.zeros(2, 3, 4, 4)
    )
    labels = by_hand(LOGITS.tolist(), [0, 2])
    words = by_hand(LOGITS.tolist(), [1, 1])
    assert loss.item() == pytest.approx((1 - alpha) * labels + alpha * words)


def test_hard_distillation_smooths_the_labels_and_not_the_teacher():
    loss = objective(Distill(teacher="t", alpha=0.5), smoothing=0.3).loss(
        LOGITS, TARGETS, torch.zeros(2, 3, 4, 4)
    )
    rows = [log_softmax(row) for row in LOGITS.tolist()]
    smooth = [
        -0.7 * row[label] - 0.3 * sum(row) / 3 for row, label in zip(rows, [0, 2])
    ]
    words = by_hand(LOGITS.tolist(), [1, 1])
    assert loss.item() == pytest.approx(sum(smooth) / 4 + words / 2)


def test_soft_distillation_is_the_divergence_at_its_temperature():
    tau = 3.0
    found = teacher_loss(LOGITS, TAUGHT, Distill("t", kind="soft", temperature=tau))
    total = 0.0
    for pupil, teacher in zip(LOGITS.tolist(), TAUGHT.tolist()):
        q = log_softmax([value / tau for value in pupil])
        p = log_softmax([value / tau for value in teacher])
        total += sum(math.exp(a) * (a - b) for a, b in zip(p, q))
    assert found.item() == pytest.approx(total / 2 * tau**2)


def test_a_teacher_of_timm_sees_its_own_normalisation(tmp_path):
    name = "test_resnet"  # a tiny one, which normalises with 0.5 and 0.5
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "t.pth")
    distill = Distill(teacher=name, teacher_weights=str(tmp_path / "t.pth"))
    pupil = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 1.0)
    teacher = build_teacher(distill, 3, pupil, CPU)
    assert teacher is not None
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(mean, std):
        axis = (1, 3, 1, 1)
        return (pixels - torch.tensor(mean).view(axis)) / torch.tensor(std).view(axis)

    theirs = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        expected = model.eval()(normalised(theirs["mean"], theirs["std"]))
    found = teacher(normalised(pupil.mean, pupil.std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_teachers_that_cannot_be_had_are_named():
    with pytest.raises(RecipeError, match="timm has no model 'nobody'"):
        build_teacher(Distill("nobody"), 3, PREPROCESSING, CPU)


def test_mixing_is_drawn_for_its_place_alone():
    augment = small(mixup=0.8, cutmix=1.0).augment
    mixing = Objective(build_mixup(augment, 3), nn.CrossEntropyLoss(), Distill())
    images = torch.rand(4, 3, 8, 8)
    targets = torch.tensor([0, 1, 2, 0])

    def at(*place: int):
        return mixing.mixed(images.clone(), targets, *place)

    first, labels = at(1, 2, 3)
    again, same = at(1, 2, 3)
    other, _ = at(1, 2, 4)
    assert torch.equal(first, again) and torch.equal(labels, same)
    assert not torch.equal(first, other)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_no_mixing_leaves_plain_labels():
    augment = small(mixup=0.0, cutmix=0.0).augment
    assert build_mixup(augment, 3) is None
    loss = label_loss(small(smoothing=0.0).augment, False)
    expected = by_hand(LOGITS.tolist(), [0, 2])
    assert loss(LOGITS, TARGETS).item() == pytest.approx(expected)


def test_a_teacher_that_takes_another_size_is_said_before_training(tmp_path):
    path = tmp_path / "teacher.pth"
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), path)
    distill = Distill("test_vit", str(path))
    side = model.patch_embed.img_size[0]
    fits = Preprocessing((3, side, side), (0.5,) * 3, (0.25,) * 3, 1.0)
    assert build_teacher(distill, 3, fits, CPU) is not None
    with pytest.raises(RecipeError, match="test_vit cannot take images of 3x8x8"):
        build_teacher(distill, 3, PREPROCESSING, CPU)
