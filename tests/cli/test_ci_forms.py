"""The pytest plugin and the workflow, in a scratch project of a third party."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "examples" / "ci"

FAILING = """
import pytest
import torch
from torch import nn

@pytest.mark.equivalence(model="net.py:build", candidate="other.pt2")
def test_other_weights(): ...

def test_modules(repcompiler_equal):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    outcome = repcompiler_equal(net, inputs=(torch.randn(1, 3, 8, 8),))
    assert outcome.origin.form == "fused"

@pytest.mark.equivalence(candidate="other.pt2")
def test_no_model(): ...

def test_no_tensors(repcompiler_equal):
    repcompiler_equal(nn.Conv2d(3, 4, 3).eval(), inputs=3)

def test_train_mode(repcompiler_equal):
    repcompiler_equal(nn.Conv2d(3, 4, 3), inputs=(torch.randn(1, 3, 8, 8),))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, net_source) -> Path:
    """A project with a net, its export, and the plugin as pip would install it."""
    place = tmp_path_factory.mktemp("project")
    (place / "net.py").write_text(net_source)
    shutil.copy(CI / "test_equivalence.py", place)
    (place / "test_failing.py").write_text(FAILING)
    installed = place / "site" / "scratch-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: scratch\n")
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'entry-points\.pytest11\]\n(\w+) = "(\S+)"', text)
    assert found is not None
    entry = f"[pytest11]\n{found[1]} = {found[2]}\n"
    (installed / "entry_points.txt").write_text(entry)
    for output, seed in (("net.onnx", "0"), ("other.pt2", "7")):
        fuse = ["fuse", "net.py:build", "-o", output, "--seed", seed, "--quiet"]
        assert run(place, [sys.executable, "-m", "fastvit_cli", *fuse]).returncode == 0
    return place


def run(place: Path, command: list[str], **more: str) -> subprocess.CompletedProcess:
    """A command in the project, which sees the plugin's metadata."""
    paths = [str(place / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )


def test_three_lines_are_enough_and_failures_say_what_differs(project):
    options = ["-q", "--strict-markers", "-p", "no:cacheprovider", "-rA"]
    done = run(project, [sys.executable, "-m", "pytest", *options])
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("test_what_is_shipped", "test_modules"):
        assert re.search(rf"PASSED \S+::{name}", done.stdout), done.stdout
    assert "equivalence mark: missing a required argument: 'model'" in done.stdout
    assert "inputs of Conv2d are no tuple of tensors" in done.stdout
    assert "INTERNALERROR" not in done.stdout
    for name in ("test_other_weights", "test_train_mode", "test_no_model"):
        assert re.search(rf"FAILED \S+::{name}", done.stdout), done.stdout
    assert "other.pt2 is not shown to be the same function" in done.stdout
    assert "is in train mode" in done.stdout


def steps() -> list[dict]:
    """The steps of the workflow."""
    workflow = yaml.safe_load((CI / "equivalence.yml").read_text())
    return workflow["jobs"]["check"]["steps"]


def test_the_workflow_runs_and_leaves_what_its_later_steps_take(project):
    (command,) = [s["run"] for s in steps() if "fastvit check" in s.get("run", "")]
    command = command.replace("fastvit", f"{sys.executable} -m fastvit_cli", 1)
    shell = ["bash", "-e", "-c", command]
    workflow = yaml.safe_load((CI / "equivalence.yml").read_text())
    done = run(project, shell, **workflow["env"])
    assert done.returncode == 0, done.stderr
    assert "Equal" in done.stdout
    different = run(project, shell, MODEL="net.py:build", CANDIDATE="other.pt2")
    assert different.returncode == 1
    kept = steps()[-1]["with"]["path"].split()
    for name in (steps()[-2]["with"]["sarif_file"], *kept):
        assert (project / name).exists(), name
