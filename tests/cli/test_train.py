"""`fastvit train`: the folder it leaves, how it ends, and what it says of bad input."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_state
from train_helpers import write_images

import repcompiler as rc
from fastvit.checkpoint import read_state

SETTINGS = (
    *("--set", "epochs=2", "--set", "warmup_epochs=0", "--set", "image_size=16"),
    *("--set", "batch_size=8", "--set", "micro_batch=8", "--set", "lr=0.01"),
)
FILES = {
    "recipe.toml",
    "last.pt",
    "best.safetensors",
    "metrics.csv",
    "metrics.jsonl",
    "curves.png",
    "summary.html",
}


@pytest.fixture
def images(folder) -> str:
    """A data set of coloured squares, in the working directory."""
    write_images(folder / "data" / "train")
    write_images(folder / "data" / "val", each=4)
    return "data"


@pytest.fixture
def train(fastvit, net, images):
    def run(*args, data=images, model=net, recipe="small"):
        options = ("--recipe", recipe) if recipe else ()
        return fastvit("train", data, "--model", model, *options, *SETTINGS, *args)

    return run


def test_the_folder_gets_everything_and_the_json_says_the_same(train, folder):
    result = train("-o", "run", "--json", "-")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert {path.name for path in (folder / "run").iterdir()} == FILES
    rows = list(csv.DictReader((folder / "run/metrics.csv").open()))
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [json.loads(line) for line in lines][-1] == document["last"]
    assert document["best"]["top1"] == max(float(row["top1"]) for row in rows)
    assert (document["epochs"], document["complete"]) == (2, True)
    page = (folder / "run/summary.html").read_text()
    assert f"{document['best']['top1']:.2f} %" in page
    assert (folder / "run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_recipe_is_shown_before_the_first_step_and_reads_back(train, folder):
    result = train("-o", "run")
    shown = result.out.index("image_size=16")
    assert shown < result.out.index("Best: top-1")
    assert result.err.startswith("epoch 1: train loss")
    again = train("-o", "again", recipe="run/recipe.toml")
    assert again.code == 0
    recipes = [(folder / run / "recipe.toml").read_text() for run in ("run", "again")]
    assert recipes[0] == recipes[1]


def test_the_weights_know_their_classes_and_preprocessing(train, fastvit, folder):
    train("-o", "run")
    args = ("eval", "data", "--model", "run/best.safetensors", "--json", "-")
    found = json.loads(fastvit(*args).out)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[found["weights"]["epoch"] - 1])
    assert found["input_size"] == [3, 16, 16]
    assert found["weights"]["origin"] == "trained"
    assert found["images"] == 12
    assert found["top1"] == pytest.approx(row["top1"])
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-6)


def test_a_finished_run_resumes_into_nothing_and_another_is_not_overwritten(train):
    train("-o", "run")
    assert "holds a run already" in train("-o", "run").error
    result = train("-o", "run", "--resume", recipe=None)
    assert result.code == 0
    assert "Resumed at epoch 3" in result.err


def test_a_run_resumes_with_its_own_recipe_where_the_file_is_gone(train, folder):
    train("-o", "run")
    (folder / "run/recipe.toml").unlink()
    result = train("-o", "run", "--resume", recipe=None)
    assert result.code == 0, result.err
    assert "Resumed at epoch 3" in result.err
    assert 'name = "small"' in (folder / "run/recipe.toml").read_text()


def test_the_size_of_a_model_that_says_none_is_the_recipes(train, folder):
    (folder / "mute.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    pool = nn.AdaptiveAvgPool2d(1)\n"
        "    return nn.Sequential(pool, nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    result = train("-o", "run", model="mute.py:build")
    assert result.code == 0, result.err
    assert "3x16x16 on cpu" in result.out
    assert "224" not in result.out


def test_a_disk_that_is_full_at_the_end_is_said_and_resume_finishes(
    train, folder, monkeypatch
):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        result = train("-o", "run", "--json", "-")
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        "Error: the training is complete; run/curves.png, run/summary.html: No space "
        "left on device. Make room, then --resume writes them and trains nothing."
    )
    assert json.loads(result.out)["complete"] is True
    assert train("-o", "run", "--resume").code == 0
    assert {path.name for path in (folder / "run").iterdir()} == FILES


def test_weights_of_other_classes_get_a_new_head_said_aloud(train, fastvit, folder):
    write_images(folder / "five" / "train", "vwxyz")
    write_images(folder / "five" / "val", "vwxyz", each=2)
    train("-o", "run")
    result = train("-o", "next", "--weights", "run/best.safetensors", data="five")
    assert result.code == 0, result.err
    assert "its head has 3 classes, the data 5: a new head" in flat(result.out)
    same = train("-o", "same", model="run/best.safetensors")
    assert "Started from run/best.safetensors." in flat(same.out)


def test_classes_of_other_names_are_said_aloud(train, folder):
    write_images(folder / "other" / "train", "abx")
    write_images(folder / "other" / "val", "abx", each=2)
    train("-o", "run")
    model = "run/best.safetensors"
    result = train("-o", "next", model=model, data="other")
    assert result.code == 0, result.err
    assert "number 2 is 'c' there and 'x' here" in flat(result.out)


def test_fuse_at_end_leaves_the_fused_files_and_their_report(train, folder, fastvit):
    result = train("-o", "run", "--fuse-at-end", "--json", "-")
    assert result.code == 0, result.err
    written = json.loads(result.out)["fused"]  # stdout is the JSON alone
    names = ("fused.pt2", "fused.onnx", "fused.json", "fused.html")
    assert written == [f"run/{name}" for name in names]
    assert {path.name for path in (folder / "run").iterdir()} == FILES | set(names)
    page = (folder / "run/fused.html").read_text()
    assert "best.safetensors fused" in page
    report = json.loads((folder / "run/fused.json").read_text())
    assert report["equivalence"]["ok"]
    assert report["ops"]["after_by_type"].get("batch_norm", 0) == 0
    args = ("eval", "data", "--json", "-", "--model")
    plain = json.loads(fastvit(*args, "run/best.safetensors").out)
    for name in ("run/fused.pt2", "run/fused.onnx"):
        fused = json.loads(fastvit(*args, name).out)
        assert fused["top1"] == plain["top1"]
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert fused["weights"]["origin"] == "trained"
    image = "data/val/a/0.png"
    likely = [
        json.loads(fastvit("predict", f"run/{name}", image, "--json", "-").out)
        for name in ("best.safetensors", "fused.onnx")
    ]
    tops = [document["predictions"][0]["top"] for document in likely]
    assert [guess["class"] for guess in tops[0]] == [g["class"] for g in tops[1]]
    refused = fastvit("eval", "data", "--model", "run/fused.onnx", "--fuse")
    assert "is an ONNX graph" in refused.error


def test_weights_that_cannot_be_fused_are_kept_and_the_run_is_reported(
    train, net, folder, monkeypatch
):
    def refused(*args, **options):
        raise rc.CaptureError("no graph", hint="Write one.")

    monkeypatch.setattr(rc, "fuse", refused)
    # The page of the report is drawn from the stages themselves.
    monkeypatch.setattr("repcompiler.compile.run_stages", refused)
    result = train("-o", "run", "--fuse-at-end", "--json", "j.json")
    assert result.code == 1
    assert "the training is complete" in result.err
    assert "no graph. Write one." in flat(result.err)
    document = json.loads((folder / "j.json").read_text())
    assert document["complete"]
    assert {path.name for path in (folder / "run").iterdir()} == FILES


def test_tensorboard_events_are_written_where_asked_for(train, folder):
    assert train("-o", "run", "--tensorboard").code == 0
    assert list((folder / "run/tensorboard").glob("events.*"))


BAD = {
    ("--set", "lrr=1"): "no key 'lrr'. Did you mean lr?",
    ("--set", "epochs=many"): "epochs is 'many', it must be a whole number",
    ("--set", "micro_batch=3"): "no multiple of micro_batch 3",
    ("--set", "batch_size=64", "--set", "micro_batch=64"): "fewer than one batch of 64",
    ("--set", "amp=float16"): "amp=float16 needs CUDA",
    ("--set", "opt=adamx"): "opt=adamx cannot be used",
    ("--set", "opt=adahessian"): "opt=adahessian needs second derivatives",
    ("--set", "auto_augment=rnd"): "auto_augment=rnd is no policy",
    ("--set", "channels_last=true"): "corrupts memory",
    ("--set", "compile=true"): "compile=true needs --device cuda",
    ("--set", "mixup=1", "--set", "micro_batch=1"): "micro_batch 1 is odd",
    ("--set", "teacher=nobody"): "timm has no model 'nobody'",
    ("--model-arg", "num_classes=7"): "the data has 3 classes",
    ("--model-arg", "in_chans=abc"): "in_chans=abc is no whole number",
    ("--weights", "none.pth"): "none.pth",
    ("--device", "cuda:99"): "cannot be used here",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_and_code_2(train, args, folder):
    result = train("-o", "run", *args)
    assert result.code == 2
    assert BAD[args] in flat(result.err).split("Error: ")[1]
    assert not (folder / "run/last.pt").exists()


def test_unknown_recipes_and_files_are_named(train):
    assert "there is no recipe 'huge'" in train(recipe="huge").error
    assert "none.toml cannot be read" in train(recipe="none.toml").error


def test_what_cannot_be_trained_is_refused(train, fastvit, folder):
    assert "has no train/" in train(data=".").error
    assert "does not exist" in train(data="nowhere").error
    fastvit("fuse", "net.py:build", "-o", "n.pt2", "-o", "n.safetensors", "--no-verify")
    assert "cannot be trained" in train(model="n.pt2").error
    assert "is a fused model" in train(model="n.safetensors").error


def test_skipped_images_are_counted_listed_and_fatal_if_strict(train, folder):
    path = folder / "data/train/a/3.png"
    path.write_bytes(path.read_bytes()[:60])
    result = train("-o", "run", "--json", "j.json")
    assert result.code == 0
    assert "Skipped" in result.err
    assert json.loads((folder / "j.json").read_text())["skipped"] == 1
    rows = list(csv.DictReader((folder / "run/skipped.csv").open()))
    assert [row["image"].endswith("train/a/3.png") for row in rows] == [True]
    strict = train("-o", "strict", "--strict")
    assert strict.code == 1
    assert "3.png cannot be read" in strict.err


def test_a_signal_ends_the_run_with_its_own_code(net, images, folder):
    """In a process of its own: the handlers belong to a main thread."""
    command = [sys.executable, "-m", "fastvit_cli", "train", images, "--model", net]
    command += ["--recipe", "small", *SETTINGS, "--set", "epochs=400", "-o", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first epoch is done
    process.terminate()
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 143, rest
    assert "SIGTERM: stopped after update" in rest
    assert (folder / "run/last.pt").exists()


def test_a_reader_that_leaves_does_not_end_the_run(net, images, folder):
    command = [sys.executable, "-m", "fastvit_cli", "train", images, "--model", net]
    command += ["--recipe", "small", *SETTINGS, "-o", "run", "--json", "-"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "run").iterdir()} == FILES
    command = [*command[:3], "eval", images, "--model", "run/best.safetensors"]
    shell = f"{' '.join(command)} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", shell], timeout=120).returncode == 0


def test_kill_9_loses_nothing_but_time(train, net, images, folder):
    """Twice here; `benchmarks/kill_and_resume.py` does it 20 times, at random."""
    options = ("--set", "epochs=8", "--set", "checkpoint_updates=1", "--resume")
    assert train(*options, "-o", "whole").code == 0
    command = [sys.executable, "-m", "fastvit_cli", "train", images, "--model", net]
    command += ["--recipe", "small", *SETTINGS, *options, "-o", "killed", "--quiet"]
    last = folder / "killed/last.pt"
    positions = [kill_after_a_checkpoint(command, last) for _ in range(2)]
    assert (0, 0) < positions[0] < positions[1] < (8, 0)
    assert train(*options, "-o", "killed").code == 0
    states = [read_state(folder / run / "last.pt") for run in ("whole", "killed")]
    assert_same_state(*states)


def kill_after_a_checkpoint(command: list[str], last: Path) -> tuple[int, int]:
    """Start the run, wait for an update more than there was, and kill it."""
    before = reached(last)
    # As many threads as this process has: what they sum, they sum in the same order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment)
    while reached(last) == before:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return reached(last)


def reached(last: Path) -> tuple[int, int]:
    """The epoch and the update that a checkpoint stands before."""
    if not last.exists():
        return (0, 0)
    at = read_state(last)["position"]
    return at["epoch"], at["update"]


def flat(text: str) -> str:
    return " ".join(text.split())
