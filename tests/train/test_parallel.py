"""Two processes against one: the same losses, weights and statistics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import ranks
import torch
from test_resume import assert_same_state, state
from train_helpers import CPU, write_images

from fastvit.checkpoint import Position, position_of

# float32 sums in another order: two processes add up halves.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """What `ranks.py` left, run by two processes and, under `one/`, by this one."""
    base = tmp_path_factory.mktemp("ranks")
    write_images(base / "data" / "train")
    write_images(base / "data" / "val", each=4)
    damaged = base / "damaged_data"
    shutil.copytree(base / "data", damaged)
    (damaged / "val" / "a" / "1.png").write_bytes(b"")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [ranks.__file__, str(base / "data"), str(base)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("sync", "average"):
        ranks.run(str(base / "data"), base / "one" / kind, CPU, bn=kind)
    return base


def losses(folder: Path) -> list[tuple[float, ...]]:
    keys = ("train_loss", "val_loss", "top1", "lr")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def test_two_synchronised_processes_have_the_loss_curve_of_one(out):
    two, one = losses(out / "sync"), losses(out / "one" / "sync")
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), **CLOSE)
    assert one[0][0] != one[-1][0]  # something was learnt, so there is a curve


def test_two_synchronised_processes_have_the_weights_and_statistics_of_one(out):
    two, one = state(out / "sync"), state(out / "one" / "sync")
    for key in ("model", "ema"):
        assert two[key].keys() == one[key].keys()
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, **CLOSE, msg=name)


def test_the_average_of_statistics_is_the_mean_over_processes(out):
    # With the same weights the means of two halves average to the mean of the whole;
    # variances do not, so that the runs drift apart: compare the call itself.
    for found in torch.load(out / "norms.pt"):
        assert found["averaged"].tolist() == [0.5, 0.5]
    kept = state(out / "average")
    assert len(kept["norms"]) == 2
    for name, value in kept["norms"][0][0].items():
        assert torch.equal(value, kept["norms"][1][0][name])


def test_a_run_of_two_processes_continues_bit_for_bit(out):
    assert_same_state(state(out / "average"), state(out / "stopped"))
    assert losses(out / "average") == losses(out / "stopped")


def test_one_process_goes_on_with_the_losses_of_two():
    state = {"position": asdict(Position(1, 2, 3.0, 2)), "shares": [[3.0, 2], [4.0, 2]]}
    places = [position_of(state, rank, 2) for rank in (0, 1)]
    assert [(at.loss_sum, at.losses) for at in places] == [(3.0, 2), (4.0, 2)]
    assert position_of(state, 0, 1) == Position(1, 2, 7.0, 4)
    more = [position_of(state, rank, 3) for rank in range(3)]
    assert [at.losses for at in more] == [4, 0, 0]
    del state["shares"]  # as older versions wrote
    assert position_of(state, 0, 2) == Position(1, 2, 3.0, 2)
    assert position_of(state, 1, 2).losses == 0


def test_an_image_that_another_process_cannot_read_is_named_and_counted_once(out):
    folder, name = out / "damaged", str(out / "damaged_data" / "val" / "a" / "1.png")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["skipped"], row["images"]) for row in rows] == [(1, 11)] * 3
    notes = torch.load(folder / "notes.pt")
    assert [note for note in notes if note.startswith(f"Skipped {name}: ")] == notes
    assert len(notes) == 1


def test_the_all_reduced_norm_is_the_norm_of_the_whole_batch(out):
    first, second = torch.load(out / "norms.pt")
    whole = ranks.norms(CPU)
    for name in ("y", "dx"):
        joined = torch.cat([first[name], second[name]])
        # Values around 300: float32 keeps five digits of their differences.
        torch.testing.assert_close(joined, whole[name], rtol=1e-4, atol=1e-4)
    # A parameter's gradient is the sum over processes of what each computes.
    total = first["dweight"] + second["dweight"]
    torch.testing.assert_close(total, whole["dweight"], rtol=1e-4, atol=1e-4)
    for name in ("mean", "var"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=0)


def test_compiled_processes_have_the_losses_of_one_and_send_once_an_update(out):
    first, second = torch.load(out / "compiled.pt")
    one = ranks.compiled(CPU)
    # The whole batch's passes lie one after another, each process has its half of one.
    halves = torch.tensor([first["losses"], second["losses"]])
    torch.testing.assert_close(halves.mean(0), torch.tensor(one["losses"]), **CLOSE)
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, **CLOSE)
        assert torch.equal(first["state"][name], second["state"][name])
    assert first["sizes"] and second["sizes"] and one["sizes"]
    assert first["sent"] == second["sent"] == 4  # not in the first pass of each update
