"""Odd images: what is read, how deep pixels are, and what is said of the rest."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from train_helpers import PREPROCESSING, write_images

from fastvit.batches import TrainingImages
from fastvit.data import open_folder, training_transform
from fastvit.images import as_mode, posterise, why_unreadable
from fastvit.recipes import Augment

COLOURS = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_eight_bits_is_read_as_pillow_does(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(as_mode(image, "RGB")), expected)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_sixteen_bits_keep_their_high_byte(tmp_path, kind):
    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=kind)
    image = Image.fromarray(deep)
    assert as_mode(image, "L").tobytes() == bytes([0, 0, 1, 128, 255])
    assert as_mode(image, "RGB").getpixel((3, 0)) == (128,) * 3
    if kind is np.uint16:  # and through a file
        image.save(tmp_path / "deep.png")
        with Image.open(tmp_path / "deep.png") as read:
            assert as_mode(read, "L").tobytes() == bytes([0, 0, 1, 128, 255])


def test_floating_point_pixels_are_refused():
    image = Image.fromarray(np.ones((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="unknown range"):
        as_mode(image, "RGB")


def test_what_cannot_be_read_is_said_in_a_few_words(tmp_path):
    write_images(tmp_path / "train", each=1)
    place = tmp_path / "train/a"
    (place / "empty.png").write_bytes(b"")
    (place / "text.png").write_text("hello")
    (place / "gone.jpg").symlink_to("nowhere.jpg")
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:60])
    source = open_folder(tmp_path / "train", ("a", "b", "c"), "RGB")
    reasons = {}
    for index in range(len(source)):
        try:
            source.read(index)
        except Exception as error:
            reasons[source.name(index).rpartition("/")[2]] = why_unreadable(error)
    unknown = "it is empty, or no image of a kind that Pillow knows"
    assert reasons.pop("cut.png")
    assert reasons == {
        "empty.png": unknown,
        "text.png": unknown,
        "gone.jpg": "No such file or directory",
    }


def test_one_pixel_and_one_row_are_trained_on(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(COLOURS[:1, :1]).save(tmp_path / "a/dot.png")
    Image.fromarray(COLOURS[:1]).save(tmp_path / "a/row.png")
    source = open_folder(tmp_path, ("a",), "RGB")
    transform = training_transform(Augment(image_size=8), PREPROCESSING)
    images = TrainingImages(source, transform, seed=0)
    assert [images[0, index][0].shape for index in range(2)] == [(3, 8, 8)] * 2


def test_posterising_to_no_bits_is_black_as_it_was():
    image = Image.fromarray(COLOURS)
    for bits in range(9):
        mask = 0xFF & ~(2 ** (8 - bits) - 1)  # the definition of the operation
        assert np.array_equal(np.asarray(posterise(image, bits)), COLOURS & mask)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_policies_may_posterise_to_no_bits(policy):
    augment = Augment(image_size=8, auto_augment=policy)
    transform = training_transform(augment, PREPROCESSING)
    ops = [op for step in transform.transforms for op in getattr(step, "ops", ())]
    ops += [
        op
        for step in transform.transforms
        for chosen in getattr(step, "policy", ())
        for op in chosen
    ]
    mine = [op for op in ops if op.name.startswith("Posterize")]
    assert mine
    for op in mine:
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
        assert op(Image.fromarray(COLOURS)).size == (7, 9)
