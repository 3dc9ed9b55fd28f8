"""WebDataset shards: the index reads what timm's reader reads; faults are said."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import Stopped, assert_same_state, state, stop_at
from timm.data import create_dataset
from train_helpers import PREPROCESSING, Recorder, small

from fastvit.batches import EvaluationImages
from fastvit.data import evaluation_transform, open_for_evaluation, open_splits
from fastvit.errors import DataError
from fastvit.loaders import evaluation_loader
from fastvit.shardlists import expanded

CPU = torch.device("cpu")


def picture(label: int, number: int) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 90, (12, 12, 3))
    pixels[..., label % 3] += 130
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int, classes: int = 3, first: int = 0):
    """Files of `count` samples, the way that WebDataset names them."""
    for number in range(first, first + count):
        label = number % classes
        yield f"{number:04d}.cls", str(label).encode()
        yield f"{number:04d}.png", picture(label, number)


def write_shard(path: Path, files, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of 8 training samples, one of 9 to validate on."""
    folder = tmp_path / "shards"
    for number in range(3):
        write_shard(
            folder / f"toy-train-{number:03d}.tar", samples(8, first=8 * number)
        )
    write_shard(folder / "toy-val-000.tar", samples(9, first=100))
    return folder


def read_all(source):
    pairs = [source.read(index) for index in range(len(source))]
    return [(np.asarray(image).tobytes(), target) for image, target in pairs]


def test_the_index_finds_what_timms_reader_streams(shards):
    split = "toy-train-{000..002}.tar"
    theirs = create_dataset("wds/", root=str(shards), split=f"{split}|24")
    source = open_for_evaluation("wds/", root=str(shards), split=split)
    expected = [(np.asarray(image).tobytes(), target) for image, target in theirs]
    assert len(expected) == 24
    assert read_all(source) == expected
    assert source.class_names == ("0", "1", "2")
    assert source.name(8).endswith("toy-train-001.tar:0008")


@pytest.mark.parametrize("split", ["validation", "val", "toy-val-*.tar"])
def test_a_split_is_found_by_its_name_or_pattern(shards, split):
    assert len(open_for_evaluation("wds/", root=str(shards), split=split)) == 9
    assert len(open_for_evaluation(f"wds/{shards}", split=split)) == 9


def test_a_split_is_found_in_timms_information_with_its_label(tmp_path):
    def files():
        for number in range(6):
            label = number % 2
            yield f"a/{number}.jpg", picture(label, number)
            meta = {"id": {"label": label if number else -1}}
            yield f"a/{number}.json", json.dumps(meta).encode()

    write_shard(tmp_path / "part.tar", files())
    split = {
        "name": "validation",
        "num_samples": 6,
        "filenames": ["part.tar"],
        "shard_lengths": [6],
        "alt_label": "id/label",
    }
    info = {"splits": {"validation": split}, "class_names": ["cat", "dog"]}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    source = open_for_evaluation("wds/", root=str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert [source.read(k)[1] for k in range(1, 6)] == [1, 0, 1, 0, 1]
    with pytest.raises(DataError, match="has no class"):
        source.read(0)  # -1: unlabelled, as timm has it
    theirs = create_dataset("wds/", root=str(tmp_path), split="validation")
    assert [target for _, target in theirs] == [1, 0, 1, 0, 1]


def test_patterns_are_expanded_as_webdataset_does():
    from webdataset.shardlists import expand_urls

    for pattern in (
        "a.tar",
        "t-{00..11}.tar",
        "{a,b}-{8..10}.tar",
        "x-{1..2}{p,q}.tar",
    ):
        assert expanded(pattern) == list(expand_urls(pattern))


def lacking_classes(folder):
    write_shard(folder / "x-val.tar", ((n, c) for n, c in samples(3) if "png" in n))


def text_classes(folder):
    write_shard(folder / "x-val.tar", [("7.png", picture(0, 0)), ("7.cls", b"cat")])


def truncated(folder):
    write_shard(folder / "x-val.tar", samples(40))
    whole = (folder / "x-val.tar").read_bytes()
    (folder / "x-val.tar").write_bytes(whole[: len(whole) // 2 + 700])


WRONG = {
    "no folder": (lambda d: d.rmdir(), "is no folder"),
    "no shards": (lambda d: None, "holds no shards (.tar)"),
    "other splits": (lambda d: write_shard(d / "x-test.tar", samples(2)), "x-test.tar"),
    "empty": (lambda d: write_shard(d / "x-val.tar", []), "holds no samples"),
    "strangers": (
        lambda d: write_shard(d / "x-val.tar", [("README", b"x")]),
        "no samp",
    ),
    "no labels": (lacking_classes, "none of the 3 samples has a .cls"),
    "labels in words": (text_classes, "7.cls is 'cat', a class as a whole number"),
    "cut short": (truncated, "is no whole tar archive"),
    "no archive": (
        lambda d: (d / "x-val.tar").write_text("<html>" * 200),
        "no whole tar",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shards_are_said_before_anything_is_run(tmp_path, name):
    spoil, said = WRONG[name]
    folder = tmp_path / "d"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(DataError) as caught:
        open_for_evaluation("wds/", root=str(folder))
    assert said in str(caught.value)
    assert caught.value.hint


def test_shards_that_a_pattern_names_must_all_be_there(shards):
    with pytest.raises(DataError, match=r"2 of 5 shards are not there.*train-003\.tar"):
        open_for_evaluation("wds/", root=str(shards), split="toy-train-{000..004}.tar")


def test_a_sample_without_image_or_with_a_damaged_one_is_left_out(tmp_path):
    files = [*samples(4), ("9.cls", b"1"), ("8.cls", b"0"), ("8.png", b"not an image")]
    write_shard(tmp_path / "val.tar", files)
    source = open_for_evaluation("wds/", root=str(tmp_path))
    images = EvaluationImages(source, evaluation_transform(PREPROCESSING))
    batches = list(evaluation_loader(images, 4, 0, CPU))
    assert sum(len(batch.targets) for batch in batches) == 4
    problems = [problem for batch in batches for problem in batch.problems]
    assert [problem.name.partition("tar:")[2] for problem in problems] == ["9", "8"]
    assert "has no image" in problems[0].reason


def test_classes_that_are_numbers_are_those_of_the_larger_split(tmp_path):
    write_shard(tmp_path / "train.tar", samples(12, classes=4))
    write_shard(tmp_path / "val.tar", samples(6, classes=2))
    splits = open_splits(f"wds/{tmp_path}")
    assert splits.class_names == ("0", "1", "2", "3")
    assert splits.notes == ()
    write_shard(tmp_path / "train.tar", [("1.cls", b"5"), ("1.png", picture(0, 0))])
    notes = open_splits(f"wds/{tmp_path}").notes
    assert notes == ("5 classes have no training images (0, 1, 2, 3, 4…).",)
    few = open_for_evaluation(f"wds/{tmp_path}", classes=("a", "b", "c"), count=3)
    assert few.class_names == ("a", "b", "c")  # numbers are the model's indices


def test_a_run_on_shards_continues_bit_for_bit(run, shards, tmp_path):
    splits = open_splits(f"wds/{shards}")
    recipe = small(checkpoint_updates=1)
    run(recipe, "whole", splits=splits)
    with pytest.raises(Stopped):
        run(recipe, "killed", stop_at(4), splits=splits)
    run(recipe, "killed", resume=True, splits=splits)
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "killed"))


# ---- what cannot be indexed: timm's reader, from front to back -----------------------


@pytest.fixture
def streamed(tmp_path) -> Path:
    """The same, compressed: such an archive has no place to jump to."""
    folder = tmp_path / "streams"
    parts = {"train": (2, 12), "validation": (1, 9)}
    splits = {}
    for name, (count, each) in parts.items():
        files = [f"{name}-{number}.tar.gz" for number in range(count)]
        for number, file in enumerate(files):
            write_shard(folder / file, samples(each, first=each * number), "w:gz")
        splits[name] = {
            "name": name,
            "num_samples": count * each,
            "filenames": files,
            "shard_lengths": [each] * count,
        }
    info = {"splits": splits, "class_names": ["red", "green", "blue"]}
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_evaluated_whole_by_any_number_of_processes(streamed, workers):
    source = open_for_evaluation("wds/", root=str(streamed), split="train")
    assert (len(source), source.class_names) == (24, ("red", "green", "blue"))
    images = EvaluationImages(source, evaluation_transform(PREPROCESSING))
    for world in (1, 3):
        loaders = [
            evaluation_loader(images, 4, workers, CPU, (rank, world))
            for rank in range(world)
        ]
        batches = list(itertools.chain.from_iterable(loaders))
        places = torch.cat([batch.indices for batch in batches]).tolist()
        assert sorted(places) == list(range(24))
        targets = torch.cat([batch.targets for batch in batches])
        assert targets.bincount().tolist() == [8, 8, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_stream_continues_where_it_stopped(run, streamed, tmp_path, workers):
    splits = open_splits("wds/", root=str(streamed))
    assert "reads its epoch again" in splits.notes[0]
    recipe = small(checkpoint_updates=1, workers=workers, micro_batch=4, epochs=3)
    whole, _ = run(recipe, "whole", splits=splits)
    assert len(whole.losses) == 9
    with pytest.raises(Stopped):
        run(recipe, "killed", stop_at(5), splits=splits)
    run(recipe, "killed", Recorder(), resume=True, splits=splits)
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "killed"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_stream_without_a_shard_for_each_reader_is_refused(run, streamed):
    splits = open_splits("wds/", root=str(streamed))
    with pytest.raises(DataError, match="has 2 shards for 3 reading processes"):
        run(small(workers=3), splits=splits)


def test_a_stream_that_ends_before_its_epoch_is_said(run, streamed, monkeypatch):
    splits = open_splits("wds/", root=str(streamed))
    real = splits.train.dataset

    def short(*args, **options):
        dataset = real(*args, **options)
        monkeypatch.setattr(
            type(dataset), "__iter__", lambda self: itertools.islice(self.reader, 13)
        )
        return dataset

    monkeypatch.setattr(splits.train, "dataset", short)
    with pytest.raises(DataError, match="ended after 1 of 3 batches"):
        run(small(), splits=splits)


@pytest.mark.parametrize(
    ("data", "packages"),
    [
        ("tfds/mnist", "tensorflow tensorflow-datasets"),
        ("hfids/mnist", "datasets"),
        ("hfds/mnist", "datasets"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, data, packages):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as caught:
        open_for_evaluation(data)
    assert caught.value.hint == f"pip install {packages}"
