"""No work is lost: what continues is what would have been, bit for bit."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import timm
import torch
from torch.utils._pytree import tree_flatten
from train_helpers import Recorder, Tiny, deliver, small

from fastvit import checkpoint
from fastvit.errors import CheckpointError, Diverged, ResumeError


def state(folder) -> dict:
    return checkpoint.read_state(folder / checkpoint.LAST)


def assert_same_state(one, other) -> None:
    """Weights, average, optimiser, scaler, position: equal to the last bit."""
    assert one["position"] == other["position"]
    for key in ("model", "ema", "optimizer", "scaler", "norms"):
        left, right = (tree_flatten(s[key])[0] for s in (one, other))
        assert len(left) == len(right)
        for a, b in zip(left, right):
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, key


def assert_finite(kept) -> None:
    for key in ("model", "ema"):
        assert all(value.isfinite().all() for value in kept[key].values())


class Stopped(Exception):
    pass


def stop_at(count: int, act=None):
    """A listener that ends the run after so many updates, as a crash would."""

    def on_step(progress) -> None:
        on_step.seen += 1
        if on_step.seen == count:
            if act is None:
                raise Stopped
            act()

    on_step.seen = 0
    return Recorder(on_step=on_step)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_run_killed_after_any_update_ends_as_if_it_had_not_been(run, tmp_path, count):
    recipe = small(checkpoint_updates=1)
    whole, _ = run(recipe, "whole")
    with pytest.raises(Stopped):
        run(recipe, "killed", stop_at(count))
    _, outcome = run(recipe, "killed", resume=True)
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "killed"))
    for row, other in zip(whole.rows, outcome.history, strict=True):
        for key in ("train_loss", "val_loss", "top1", "lr"):
            assert row[key] == other[key]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_killed_pupil_ends_as_if_it_had_not_been(run, tmp_path, kind):
    torch.manual_seed(2)
    teacher = timm.create_model("test_resnet", num_classes=3)
    torch.save(teacher.state_dict(), tmp_path / "t.pth")
    taught = {"teacher": "test_resnet", "teacher_weights": str(tmp_path / "t.pth")}
    recipe = small(checkpoint_updates=1, kind=kind, **taught)
    run(recipe, "whole")
    with pytest.raises(Stopped):
        run(recipe, "killed", stop_at(4))
    run(recipe, "killed", resume=True)
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "killed"))
    run(small(), "untaught")
    alone, pupil = (state(tmp_path / n)["model"] for n in ("untaught", "whole"))
    assert not torch.equal(alone["head.weight"], pupil["head.weight"])


def test_workers_and_accumulation_order_do_not_change_the_images(run, tmp_path):
    run(small(), "alone")
    run(small(workers=2), "workers")
    assert_same_state(state(tmp_path / "alone"), state(tmp_path / "workers"))


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_the_run(run, tmp_path, kind):
    recipe = small()
    run(recipe, "whole")
    before = signal.getsignal(kind)
    listener = stop_at(2, lambda: deliver(kind))
    _, outcome = run(recipe, "stopped", listener)
    assert outcome.signal == kind
    assert (outcome.position.epoch, outcome.position.update) == (0, 2)
    assert signal.getsignal(kind) == before
    run(recipe, "stopped", resume=True)
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "stopped"))


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(run, tmp_path, monkeypatch):
    recipe = small(checkpoint_updates=1)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 6:  # the recipe, then states: file and folder each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*as it was"):
        run(recipe, "full")
    monkeypatch.undo()
    kept = state(tmp_path / "full")
    assert kept["position"]["update"] > 0
    assert not list((tmp_path / "full").glob(".*.tmp"))
    run(recipe, "full", resume=True)
    run(recipe, "whole")
    assert_same_state(state(tmp_path / "whole"), state(tmp_path / "full"))


def test_a_loss_that_is_no_number_stops_the_run_at_its_update(run, tmp_path):
    def poison():
        with torch.no_grad():
            listener.engine.model.head.bias[0] = float("nan")

    listener = stop_at(4, poison)
    with pytest.raises(Diverged, match="the loss is nan at update 2 of epoch 2"):
        run(small(), "run", listener)
    assert_finite(state(tmp_path / "run"))


def test_weights_that_are_no_numbers_are_never_written(run, tmp_path):
    def poison():
        with torch.no_grad():
            listener.engine.model.head.bias[0] = float("inf")

    listener = stop_at(4, poison)
    with pytest.raises(Diverged, match="not finite after update 1 of epoch 2"):
        run(small(checkpoint_updates=1), "run", listener)
    kept = state(tmp_path / "run")
    assert (kept["position"]["epoch"], kept["position"]["update"]) == (1, 0)
    assert_finite(kept)


def test_another_recipe_does_not_continue_a_run(run):
    run(small(epochs=1, warmup_epochs=0))
    with pytest.raises(ResumeError, match=r"lr was 0\.02, is 0\.01"):
        run(small(epochs=1, warmup_epochs=0, lr=0.01), resume=True)
    run(small(epochs=1, warmup_epochs=0, workers=1, keep_best=2), resume=True)


def test_another_model_does_not_continue_a_run(run):
    run(small(epochs=1, warmup_epochs=0))
    with pytest.raises(ResumeError, match=r"another model: 6 of 8 tensors differ"):
        run(small(epochs=1, warmup_epochs=0), resume=True, model=Tiny(width=4))


def test_a_damaged_checkpoint_is_refused_in_words(run, tmp_path):
    run(small())
    path = tmp_path / "run" / checkpoint.LAST
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ResumeError, match="cannot be read"):
        run(small(), resume=True)


def test_another_number_of_threads_is_said(run):
    recipe = small(checkpoint_updates=1)
    with pytest.raises(Stopped):
        run(recipe, "killed", stop_at(2))
    listener = Recorder()
    torch.set_num_threads(2)
    try:
        run(recipe, "killed", listener, resume=True)
    finally:
        torch.set_num_threads(1)
    assert "1 torch threads became 2" in " ".join(listener.notes)
    assert "OMP_NUM_THREADS=1" in " ".join(listener.notes)


def test_nothing_to_resume_is_said_and_starts_the_run(run):
    listener, outcome = run(small(), resume=True)
    assert "starting from the beginning" in listener.notes[0]
    assert len(outcome.history) == 2
