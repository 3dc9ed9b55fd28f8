"""Kill a training run at random moments, resume it, compare it with a whole run.

    python benchmarks/kill_and_resume.py [KILLS] [EPOCHS]

Two runs of a small model of timm on scikit-learn's digits: one to its end, one that is
killed (SIGKILL) KILLS times, 20 by default, and continued with --resume each time.
Prints where each kill fell, and whether the two final states are equal to the last bit:
weights, their average, the optimiser's state, batch norm statistics. Exit code 1 where
they are not.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fastvit_cli.main import run

from fastvit.checkpoint import read_state
from fastvit.packaged import lay_out, read_packaged

SETTINGS = ("checkpoint_updates=3", "image_size=32", "mixup=0.2", "cutmix=1.0")


def arguments(base: Path, name: str, epochs: int) -> list[str]:
    """The command line of the run called `name`, new or continued."""
    settings = [*SETTINGS, f"epochs={epochs}", "batch_size=64", "micro_batch=64"]
    pairs = [part for text in settings for part in ("--set", text)]
    whole = ["train", str(base / "digits"), "--model", "timm:test_resnet"]
    whole += ["--recipe", "small", *pairs]
    return [*whole, "-o", str(base / name), "--resume", "--quiet"]


def start(base: Path, name: str, epochs: int) -> int:
    """A child process that runs the command; forked, so that torch is there already."""
    child = os.fork()
    if child == 0:
        os._exit(run(arguments(base, name, epochs)))
    return child


def finish(child: int) -> None:
    """Wait for a child that has to end well."""
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def killed_leg(base: Path, epochs: int, wait: float) -> bool:
    """Kill `wait` seconds after a first new checkpoint; False where the run ended."""
    last = base / "killed" / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    child = start(base, "killed", epochs)
    while not last.exists() or last.stat().st_mtime_ns == before:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the parts that are not equal to the last bit."""
    flatten = torch.utils._pytree.tree_flatten_with_path
    keys = ("model", "ema", "optimizer", "scaler", "norms", "position")
    wrong = []
    for key in keys:
        left, right = (dict(flatten(state[key])[0]) for state in (one, other))
        for path in left.keys() | right.keys():
            a, b = left.get(path), right.get(path)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            if not same:
                wrong.append(f"{key}{torch.utils._pytree.keystr(path)}")
    return wrong


def main(kills: int, epochs: int) -> int:
    """Both runs, and the comparison."""
    rng = random.Random(int(os.environ.get("SEED", "0")))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        lay_out(read_packaged("digits"), base / "digits")
        finish(start(base, "whole", epochs))
        done = 0
        while done < kills and killed_leg(base, epochs, rng.uniform(0, 1.5)):
            done += 1
            at = read_state(base / "killed" / "last.pt")["position"]
            print(
                f"kill {done:2d}: the checkpoint stands at epoch {at['epoch'] + 1}, "
                f"update {at['update']}",
                flush=True,
            )
        finish(start(base, "killed", epochs))
        states = [read_state(base / name / "last.pt") for name in ("whole", "killed")]
        wrong = differences(*states)
    print(f"{done} kills; {len(wrong)} parts of the final state differ")
    for name in wrong[:10]:
        print(f"  {name}")
    return int(bool(wrong) or done < kills)


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    sys.exit(main(*(numbers + [20, 30][len(numbers) :])))
