"""`torchrun … -m fastvit_cli train`: one writer; a process that dies ends the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from train_helpers import write_images

NET = """
import os, torch
from torch import nn

class Net(nn.Module):
    input_size = (3, 16, 16)

    def __init__(self, num_classes=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head, self.steps = nn.Linear(4, num_classes), 0

    def forward(self, x):
        self.steps += self.training
        fault, _, rank = os.environ.get("FAULT", "").partition("@")
        late = self.steps == 5 and rank in ("", os.environ["RANK"])  # second epoch
        if late and fault == "dies":
            os._exit(9)  # without a word
        if late and fault == "raises":
            raise RuntimeError("a fault of the model's own")
        x = x * float("nan") if late and fault == "diverges" else x
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
"""


def torchrun(folder, arguments, fault="") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "FAULT": fault,
    }
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environment,
    )


SMALL = ("--recipe", "small", "--set", "image_size=16", "--set", "batch_size=8")


@pytest.fixture
def train(tmp_path):
    """Trains `NET` in two processes; a fault is of all of them, or of one: X@RANK."""
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val", each=4)
    (tmp_path / "net.py").write_text(NET)

    def train(fault="", *options) -> subprocess.CompletedProcess[str]:
        command = ["-m", "fastvit_cli", "train", "data", "--model", "net.py:Net"]
        return torchrun(tmp_path, [*command, *SMALL, "-o", "run", *options], fault)

    return train


def errors(done) -> list[str]:
    """What was said of the end, by whichever process."""
    assert "fastvit_cli/" not in done.stderr  # torchrun shows its own trace alone
    return [line for line in done.stderr.splitlines() if line.startswith("Error: ")]


def test_a_process_that_dies_ends_the_job_with_a_message(train, tmp_path):
    done = train("dies@1")
    assert done.returncode != 0
    (said,) = errors(done)
    assert "one of the 2 processes died or cannot be reached" in said
    assert "continue with --resume" in said
    # The first process alone speaks and writes; its first epoch is kept.
    assert done.stdout.count("24 training and 12 validation images") == 1
    assert done.stderr.count("epoch 1: train loss") == 1
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1]
    assert (tmp_path / "run/last.pt").exists()


LATE = {
    "diverges": "Error: the loss is nan at update 2 of epoch 2.",
    "diverges@1": "Error: process 1 of 2: the loss is nan at update 2 of epoch 2.",
    "raises": "Error: RuntimeError: a fault of the model's own.",
    "raises@1": "Error: RuntimeError: a fault of the model's own.",
}


SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in list(LATE)[1:]]


@pytest.mark.parametrize("fault", ["diverges", *SLOW])
def test_what_fails_in_all_processes_or_in_one_is_said_once(train, fault):
    done = train(fault)
    assert done.returncode != 0
    (said,) = errors(done)
    assert said.startswith(LATE[fault])


@pytest.mark.slow
def test_a_recipe_that_is_wrong_in_every_process_is_said_once(train):
    done = train("", "--set", "lrr=1")
    (said,) = errors(done)
    assert said.startswith("Error: a recipe has no key 'lrr'")


OWN_FOLDERS = """
import os, sys
from fastvit_cli.main import main
os.chdir(os.environ["RANK"])
main(sys.argv[1:])
"""


@pytest.fixture
def train_apart(tmp_path):
    """The same, each process in a folder of its own."""
    for name in ("0", "1"):
        write_images(tmp_path / name / "data" / "train")
        write_images(tmp_path / name / "data" / "val", each=4)
        (tmp_path / name / "net.py").write_text(NET)
    (tmp_path / "own.py").write_text(OWN_FOLDERS)
    command = ["own.py", "train", "data", "--model", "net.py:Net", *SMALL]
    return lambda *options: torchrun(tmp_path, [*command, *options])


def test_bad_data_of_one_process_is_said_once_by_the_first(train_apart, tmp_path):
    (tmp_path / "1/data/val/extra").mkdir()
    done = train_apart()
    assert done.returncode != 0
    (said,) = errors(done)
    assert "process 1 of 2: data: train has 3 classes and val 4" in said


def test_an_image_that_one_process_cannot_read_ends_a_strict_run(train_apart, tmp_path):
    for path in (tmp_path / "1/data/train").rglob("*.png"):
        path.write_bytes(b"no image")
    done = train_apart("--strict")
    assert done.returncode != 0
    (said,) = errors(done)
    assert said.startswith("Error: process 1 of 2: data/train/")
    assert "cannot be read: it is empty, or no image" in said
