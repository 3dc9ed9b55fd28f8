"""The loss scaler of float16, by torch's own for the CPU: CUDA's path without it."""

from __future__ import annotations

import copy

import pytest
import torch
from train_helpers import CPU, Tiny, small

from fastvit.batches import Batch, BatchPlan
from fastvit.engine import Engine, build_engine
from fastvit.objective import Objective
from fastvit.recipes import Distill

SCALE = 2.0**10  # a power of two: scaling and unscaling lose no bit


def engine_for(scaled: bool, **values) -> Engine:
    torch.manual_seed(0)
    loss = Objective(None, torch.nn.CrossEntropyLoss(), Distill())
    recipe = small(mixup=0.0, cutmix=0.0, warmup_epochs=0, **values)
    engine = build_engine(Tiny(), loss, recipe, BatchPlan(16, 4, 2), CPU)
    if scaled:
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return engine


def batches(factor: float = 1.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            factor * torch.randn(4, 3, 8, 8, generator=generator),
            torch.randint(3, (4,), generator=generator),
            torch.arange(4),
        )
        for _ in range(2)
    ]


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_a_scaled_step_is_the_plain_one(clip, mode):
    plain, scaled = (
        engine_for(flag, clip_grad=clip, clip_mode=mode) for flag in (False, True)
    )
    for update in range(3):
        first = plain.update(batches(), 0, update)
        assert scaled.update(batches(), 0, update) == first
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, scaled.model.state_dict()[name]), name


def test_an_overflow_leaves_the_weights_and_halves_the_scale():
    engine = engine_for(True, weight_decay=0.0)
    before = copy.deepcopy(dict(engine.model.named_parameters()))
    handle = engine.model.head.weight.register_hook(lambda grad: grad * float("inf"))
    engine.update(batches(), 0, 0)
    handle.remove()
    for name, value in engine.model.named_parameters():
        assert torch.equal(value, before[name]), name
        assert value.grad is None  # nothing of it reaches the next step
    assert engine.scaler.get_scale() == SCALE / 2
    engine.update(batches(), 0, 1)
    assert not torch.equal(engine.model.head.weight, before["head.weight"])


def test_the_scale_is_part_of_the_state():
    engine = engine_for(True)
    engine.update(batches(), 0, 0)
    engine.scaler.update(64.0)
    state = copy.deepcopy(engine.state())
    other = engine_for(True)
    other.load_state(state, done=0)
    assert other.scaler.get_scale() == 64.0


def test_a_run_without_a_scaler_continues_with_one():
    state = copy.deepcopy(engine_for(False).state())
    assert state["scaler"] == {}
    engine = engine_for(True)  # as amp=auto does when a run moves from CPU to CUDA
    engine.load_state(state, done=0)
    assert engine.scaler.get_scale() == SCALE


def test_adaptive_clipping_leaves_the_classifier_alone():
    clipped, plain = (
        engine_for(False, clip_grad=clip, clip_mode="agc", opt="sgd", weight_decay=0.0)
        for clip in (1e-6, 0.0)
    )
    for engine in (clipped, plain):
        engine.update(batches(), 0, 0)
    one, other = (dict(e.model.named_parameters()) for e in (clipped, plain))
    assert torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["conv.weight"], other["conv.weight"])
