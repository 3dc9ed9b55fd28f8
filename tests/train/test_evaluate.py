"""Figures of an evaluation, from predictions small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastvit.batches import Batch
from fastvit.evaluate import agreement, evaluate

CPU = torch.device("cpu")
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1, 6])
CLASSES = 7


def batches(sizes=(3, 4)):
    """Images whose only pixel is their place."""
    start = 0
    for size in sizes:
        rows = torch.arange(start, start + size)
        yield Batch(rows.view(-1, 1, 1, 1).float(), TARGETS[rows], rows)
        start += size


def table(rows):
    logits = torch.tensor(rows, dtype=torch.float)
    return lambda images: logits[images.flatten().long()]


def peaked(*classes: int, height: float = 3.0):
    """Logits with one peak an image; the others fall from the last class on."""
    rows = [[-k * 0.1 for k in range(CLASSES)] for _ in classes]
    for row, label in zip(rows, classes):
        row[label] = height
    return table(rows)


def test_figures_are_counted_right():
    said = evaluate({"m": peaked(0, 1, 2, 3, 1, 1, 0)}, batches(), CPU)
    assert said is not None
    found = said.forms["m"]
    assert found.images == 7
    assert found.top1 == pytest.approx(100 * 5 / 7)
    # Image 4 (class 0, said 1): the next likely are 0 2 3 4, so it is among the five.
    # Image 6 (class 6, said 0): 1 2 3 4 come next, and 6 last.
    assert found.top5 == pytest.approx(100 * 6 / 7)
    confusion = found.confusion()
    assert confusion.diagonal().sum() == 5
    assert confusion[0, 1] == 1
    assert confusion[6, 0] == 1
    assert confusion.sum() == 7


def test_loss_is_the_mean_cross_entropy_over_images_not_batches():
    run = table([[math.log(p), math.log(1 - p)] for p in (0.1, 0.5, 0.8)])
    rows = torch.arange(3)
    parts = [(0, 1), (1, 3)]
    images = [
        Batch(rows[a:b].view(-1, 1, 1, 1).float(), torch.zeros(b - a).long(), rows[a:b])
        for a, b in parts
    ]
    found = evaluate({"m": run}, images, CPU)
    assert found is not None
    expected = -sum(math.log(p) for p in (0.1, 0.5, 0.8)) / 3
    assert found.forms["m"].loss == pytest.approx(expected, rel=1e-6)


def test_calibration_error_by_hand():
    # Confidence 0.9 four times, right once; 0.6 three times, right three times.
    shares = [0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.6]
    rows = [[math.log(p), math.log(1 - p)] for p in shares]
    targets = torch.tensor([0, 1, 1, 1, 0, 0, 0])
    places = torch.arange(7)
    batch = Batch(places.view(-1, 1, 1, 1).float(), targets, places)
    found = evaluate({"m": table(rows)}, [batch], CPU)
    assert found is not None
    expected = 4 / 7 * (0.9 - 0.25) + 3 / 7 * (1 - 0.6)
    assert found.forms["m"].calibration_error() == pytest.approx(expected, rel=1e-5)


def test_agreement_counts_images_of_one_class():
    forms = {"a": peaked(0, 1, 2, 3, 4, 5, 6), "b": peaked(0, 1, 2, 3, 4, 0, 0)}
    found = evaluate(forms, batches(), CPU)
    assert found is not None
    assert agreement(found.forms["a"], found.forms["b"]) == pytest.approx(5 / 7)
    assert agreement(found.forms["a"], found.forms["a"]) == 1


def test_progress_can_end_an_evaluation():
    seen = []

    def progress(done: int) -> bool:
        seen.append(done)
        return False

    assert evaluate({"m": peaked(*range(7))}, batches(), CPU, progress=progress) is None
    assert seen == [3]


def test_fewer_than_five_classes_have_a_top5_of_all():
    found = evaluate({"m": table([[1.0, 0.0]] * 7)}, batches((2,)), CPU)
    assert found is not None
    assert found.forms["m"].top5 == 100


def test_warming_up_changes_no_figure_and_runs_the_first_batch_once_more():
    seen: list[list[int]] = []
    answers = peaked(0, 1, 2, 3, 1, 1, 0)

    def run(images):
        seen.append(images.flatten().int().tolist())
        return answers(images)

    cold = evaluate({"m": answers}, batches(), CPU)
    warm = evaluate({"m": run}, batches(), CPU, warm_up=True)
    assert cold is not None and warm is not None
    assert seen == [[0, 1, 2], [0, 1, 2], [3, 4, 5, 6]]
    assert warm.forms["m"].loss == cold.forms["m"].loss
    assert torch.equal(warm.forms["m"].indices, cold.forms["m"].indices)
