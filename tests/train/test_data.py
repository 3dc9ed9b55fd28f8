"""Data sets: what is wrong with them is said before any work, image by image later."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import PREPROCESSING, small, write_images

from fastvit.batches import (
    BatchPlan,
    EpochOrder,
    EvaluationImages,
    TrainingImages,
    seed_generators,
)
from fastvit.data import (
    evaluation_transform,
    open_for_evaluation,
    open_splits,
    training_transform,
)
from fastvit.errors import DataError
from fastvit.loaders import evaluation_loader
from fastvit.packaged import lay_out, read_packaged, split


def test_classes_are_numbered_in_the_order_of_their_names(tmp_path):
    for part in ("train", "validation"):
        write_images(tmp_path / part, ("10", "9", "1"), each=2)
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ("1", "9", "10")
    for source in (splits.train, splits.val):
        for index in range(len(source)):
            _, target = source.read(index)
            assert f"/{splits.class_names[target]}/" in source.name(index)


def test_splits_of_a_folder_may_have_names_of_their_own(images):
    (images / "val").rename(images / "held")
    splits = open_splits(str(images), names=("train", "held"))
    assert "/held/" in splits.val.name(0)
    with pytest.raises(DataError, match="has no other/"):
        open_splits(str(images), names=("train", "other"))


def test_an_empty_name_of_a_split_is_said(images):
    with pytest.raises(DataError, match="--split is empty"):
        open_for_evaluation(str(images), split="")


def remove(images, *names):
    for name in names:
        shutil.rmtree(images / name)


WRONG = {
    "no val": (lambda d: remove(d, "val"), "has no val/ or validation/ or valid/."),
    "no train": (lambda d: remove(d, "train"), "It has val."),
    "a class less": (lambda d: remove(d, "val/b"), "val lacks b"),
    "a class more": (lambda d: (d / "val/z").mkdir(), "val has z besides"),
    "empty": (
        lambda d: [f.unlink() for f in (d / "train/c").iterdir()],
        "1 class without images (c)",
    ),
    "nested": (
        lambda d: (
            ((d / "train/c").rename(d / "x") and (d / "train/c").mkdir())
            or (d / "x").rename(d / "train/c/deep")
        ),
        "Class folders hold images, not folders",
    ),
    "loop": (
        lambda d: (d / "train/a/up").symlink_to(d / "train"),
        "train/a/up is a folder inside a class folder",
    ),
    "one class": (
        lambda d: remove(d, "train/a", "train/b", "val/a", "val/b"),
        "has one class, c: there is nothing to tell apart",
    ),
    "no classes": (
        lambda d: remove(d, "train/a", "train/b", "train/c"),
        "holds no class folders",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_folders_are_said_before_training(images, name):
    spoil, said = WRONG[name]
    spoil(images)
    with pytest.raises(DataError) as caught:
        open_splits(str(images))
    assert said in str(caught.value)


def test_images_beside_the_class_folders_are_said_to_be_unused(images):
    shutil.copy(images / "train/a/0.png", images / "train/loose.png")
    splits = open_splits(str(images))
    assert len(splits.train) == 24
    assert "1 images in" in splits.notes[0]


def test_evaluation_uses_the_models_indices_where_classes_are_missing(images):
    shutil.rmtree(images / "val" / "a")
    source = open_for_evaluation(str(images), classes=("a", "b", "c", "d"))
    assert {source.read(index)[1] for index in range(len(source))} == {1, 2}


def test_a_split_of_a_folder_is_its_sub_folder(images):
    (images / "val").rename(images / "test")
    assert len(open_for_evaluation(str(images), split="test")) == 12
    assert len(open_for_evaluation(str(images), split="train")) == 24
    with pytest.raises(DataError, match=r"has no validation/\. It has test, train"):
        open_for_evaluation(str(images), split="validation")
    with pytest.raises(DataError, match="DATA is empty"):
        open_splits("")


def test_a_timm_scheme_reads_or_says_why_not(images):
    source = open_for_evaluation(
        "torch/image_folder", root=str(images), split="val", channels=1
    )
    assert source.class_names == ("a", "b", "c")
    assert source.read(0)[0].mode == "L"
    with pytest.raises(DataError, match="somewhere is no folder"):
        open_splits("wds/somewhere")
    with pytest.raises(DataError, match="cannot be opened"):
        open_splits("torch/cifar10", root=str(images))


# ---- batches -----------------------------------------------------------------------


def training_images(splits, **options) -> TrainingImages:
    transform = training_transform(small().augment, PREPROCESSING)
    return TrainingImages(splits.train, transform, seed=3, **options)


def test_an_image_depends_on_its_epoch_and_index_alone(splits):
    images = training_images(splits)
    first = images[(0, 5)][0]
    seed_generators(99)
    images[(0, 6)]
    assert torch.equal(images[(0, 5)][0], first)
    assert not torch.equal(images[(1, 5)][0], first)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_update_takes_the_same_images_however_it_is_shared(world, passes):
    def taken(micro, passes, world):
        orders = [
            EpochOrder(BatchPlan(50, micro, passes, rank, world), seed=1)
            for rank in range(world)
        ]
        rows = [list(order) for order in orders]
        updates = []
        for update in range(orders[0].plan.updates):
            parts = [row[update * passes : (update + 1) * passes] for row in rows]
            updates.append({i for part in parts for batch in part for i in batch})
        return updates

    shared = taken(16 // (passes * world), passes, world)
    assert shared == taken(16, 1, 1)
    assert [len(update) for update in shared] == [16, 16, 16]


def test_an_epoch_continues_where_it_stopped_and_differs_from_the_next():
    order = EpochOrder(BatchPlan(20, 4), seed=1)
    whole = list(order)
    order.first_update = 3
    assert list(order) == whole[3:]
    assert len(order) == 2
    order.first_update, order.epoch = 0, 1
    assert [[i for _, i in b] for b in order] != [[i for _, i in b] for b in whole]


def damage(images) -> list[str]:
    """One image cut short, one empty, one that is text."""
    paths = [
        images / "train/a/1.png",
        images / "train/b/2.png",
        images / "train/c/7.png",
    ]
    paths[0].write_bytes(paths[0].read_bytes()[:70])
    paths[1].write_bytes(b"")
    paths[2].write_text("<html>not found</html>")
    return [str(path) for path in paths]


def test_unreadable_training_images_are_replaced_and_named(images):
    broken = damage(images)
    splits = open_splits(str(images))
    train = training_images(splits)
    found = [train[(0, index)] for index in range(len(train))]
    assert all(sample[0].shape == (3, 8, 8) for sample in found)
    problems = [problem for sample in found for problem in sample[3]]
    assert sorted(p.name for p in problems) == sorted(broken)
    assert all(problem.reason for problem in problems)
    strict = training_images(splits, strict=True)
    place = next(i for i in range(24) if splits.train.name(i) == broken[0])
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        strict[(0, place)]


def test_unreadable_evaluation_images_are_left_out_and_named(images):
    broken = damage(images)
    source = open_splits(str(images)).train
    found = EvaluationImages(source, evaluation_transform(PREPROCESSING))
    for workers in (0, 2):
        batches = list(evaluation_loader(found, 8, workers, torch.device("cpu")))
        assert sum(len(batch.targets) for batch in batches) == 21
        assert sorted(p.name for b in batches for p in b.problems) == sorted(broken)


def test_a_data_set_of_which_nothing_can_be_read_ends_the_run(images):
    for path in images.rglob("*.png"):
        path.write_bytes(b"")
    train = training_images(open_splits(str(images)))
    with pytest.raises(DataError, match="24 images in a row cannot be read"):
        train[(0, 0)]


def test_evaluation_shards_hold_every_image_once(splits):
    images = EvaluationImages(splits.val, evaluation_transform(PREPROCESSING))
    seen = [
        index
        for rank in range(5)
        for batch in evaluation_loader(images, 2, 0, torch.device("cpu"), (rank, 5))
        for index in batch.indices.tolist()
    ]
    assert sorted(seen) == list(range(12))


# ---- packaged ----------------------------------------------------------------------


def test_digits_on_disk_are_the_packages_own(tmp_path):
    from sklearn.datasets import load_digits

    pixels = read_packaged("digits")
    lay_out(pixels, tmp_path / "d")
    found = load_digits()
    path = next((tmp_path / "d/val/4").iterdir())
    index = int(path.stem)
    assert found.target[index] == 4
    written = np.asarray(Image.open(path)).astype(float)
    np.testing.assert_allclose(written, found.images[index] * 255 / 16, atol=0.5)


def test_the_packaged_split_holds_out_a_fifth_of_each_class_and_shares_nothing():
    pixels = read_packaged("mnist")
    train, val = split(pixels)
    assert pixels.images.shape == (5000, 28, 28)
    assert not set(train) & set(val)
    assert len(train) + len(val) == 5000
    assert np.bincount(pixels.targets[val]).tolist() == [100] * 10
