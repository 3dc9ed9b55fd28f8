"""`torchrun … -m fastvit_cli train`: one writer; a process that dies ends the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
        if self.steps == 5 and os.environ["RANK"] == "1":
            os._exit(9)  # in the second epoch, without a word
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
"""


def torchrun(folder, arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environment,
    )


def test_a_process_that_dies_ends_the_job_with_a_message(tmp_path):
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val", each=4)
    (tmp_path / "net.py").write_text(NET)
    command = ["-m", "fastvit_cli", "train", "data", "--model", "net.py:Net"]
    command += ["--recipe", "small", "--set", "image_size=16", "--set", "batch_size=8"]
    done = torchrun(tmp_path, [*command, "-o", "run"])
    assert done.returncode != 0
    assert "one of the 2 processes died or cannot be reached" in done.stderr
    assert "continue with --resume" in done.stderr
    # The first process alone speaks and writes; its first epoch is kept.
    assert done.stdout.count("24 training and 12 validation images") == 1
    assert done.stderr.count("epoch 1: train loss") == 1
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1]
    assert (tmp_path / "run/last.pt").exists()


def test_bad_data_of_one_process_is_said_once_by_the_first(tmp_path):
    for name in ("0", "1"):  # each process stands in a folder of its own
        write_images(tmp_path / name / "data" / "train", each=2)
        write_images(tmp_path / name / "data" / "val", each=1)
        (tmp_path / name / "net.py").write_text(NET)
    (tmp_path / "1/data/val/extra").mkdir()
    script = "import os; os.chdir(os.environ['RANK']); "
    script += "import sys; from fastvit_cli.main import main; main(sys.argv[1:])"
    (tmp_path / "own.py").write_text(script)
    done = torchrun(tmp_path, ["own.py", "train", "data", "--model", "net.py:Net"])
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1
    assert "process 1 of 2: data: train has 3 classes and val 4" in said[0]
    assert "fastvit_cli/" not in done.stderr  # torchrun shows its own trace alone
