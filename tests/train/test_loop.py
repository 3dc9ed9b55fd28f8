"""The loop against loops written out by hand."""

from __future__ import annotations

import copy
import csv
import json
import math
import signal
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from test_resume import state
from torch import nn
from train_helpers import CPU, PREPROCESSING, Recorder, Tiny, deliver, small

from fastvit import create_model
from fastvit.batches import Batch, BatchPlan, EpochOrder, TrainingImages
from fastvit.checkpoint import read_state
from fastvit.data import training_transform
from fastvit.engine import amp_dtype, build_engine
from fastvit.errors import RecipeError
from fastvit.objective import Objective
from fastvit.planning import plan_batches, settled
from fastvit.recipes import Distill
from fastvit.runfiles import ranked

STEPS = 20


def constant(**values):
    """A recipe whose learning rate falls along one long cosine, without warm-up."""
    fixed = {"warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0, "lr": 1e-3}
    return small(**{**fixed, "epochs": 10, "weight_decay": 0.05, **values})


def batches(count: int, size: int = 4, side: int = 64, classes: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    rows = torch.arange(size)
    return [
        Batch(
            torch.randn(size, 3, side, side, generator=generator),
            torch.randint(classes, (size,), generator=generator),
            rows,
        )
        for _ in range(count)
    ]


def engine_for(model, recipe, objective, size=4, updates=STEPS):
    plan = BatchPlan(size * updates, size)
    return build_engine(copy.deepcopy(model), objective, recipe, plan, CPU)


def test_twenty_steps_are_those_of_timms_model_and_adamw():
    torch.manual_seed(0)
    ours = create_model("fastvit_t8", num_classes=5, layer_scale_init=0.1)
    theirs = timm.create_model("fastvit_t8", num_classes=5)
    theirs.load_state_dict(ours.state_dict())
    recipe = constant(epochs=2, smoothing=0.0)
    objective = Objective(None, nn.CrossEntropyLoss(), Distill())
    engine = engine_for(ours, recipe, objective)
    groups = [
        {"params": [], "weight_decay": 0.05},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in theirs.named_parameters():
        flat = parameter.ndim <= 1 or name.endswith(".bias")
        groups[flat]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    theirs.train()
    for step, batch in enumerate(batches(STEPS)):
        (found,) = engine.update([batch], 0, step)
        rate = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / (2 * STEPS))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(theirs(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(loss.item(), rel=1e-5), step


def test_accumulated_passes_are_one_batch():
    """Without a norm, whose statistics are of each pass, to the rounding of a sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 3, 8, 8))
    objective = Objective(None, nn.CrossEntropyLoss(), Distill())
    whole = engine_for(model, constant(), objective, size=8)
    parts = engine_for(model, constant(), objective, size=8)
    parts.plan = BatchPlan(8 * STEPS, 2, passes=4)
    for step, batch in enumerate(batches(5, size=8, side=8)):
        pieces = [
            Batch(*(value[k : k + 2] for value in (batch.images, batch.targets)), k)
            for k in range(0, 8, 2)
        ]
        (one,) = whole.update([batch], 0, step)
        several = parts.update(pieces, 0, step)
        assert sum(several) / 4 == pytest.approx(one, rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_average_of_weights_follows_its_formula():
    torch.manual_seed(0)
    objective = Objective(None, nn.CrossEntropyLoss(), Distill())
    recipe = constant(ema=0.9, ema_warmup=False)
    engine = engine_for(Tiny(5), recipe, objective)
    mean = None
    for step, batch in enumerate(batches(4, side=8)):
        engine.update([batch], 0, step)
        weight = engine.model.head.weight.detach().clone()
        # timm copies the weights at the first step, then averages.
        mean = weight if mean is None else 0.9 * mean + 0.1 * weight
    torch.testing.assert_close(engine.evaluated.head.weight, mean)


def test_clipping_bounds_the_gradient_of_a_step():
    torch.manual_seed(0)
    objective = Objective(None, nn.CrossEntropyLoss(), Distill())
    recipe = constant(opt="sgd", clip_grad=0.01, ema=0.0, lr=1.0, weight_decay=0.0)
    engine = engine_for(Tiny(5, drop=0.0), recipe, objective)
    before = copy.deepcopy(engine.model)
    engine.update(batches(1, side=8), 0, 0)
    # The first step of SGD (timm's has Nesterov momentum 0.9) is 1.9 gradients long.
    moved = [a - b for a, b in zip(before.parameters(), engine.model.parameters())]
    length = torch.cat([value.flatten() for value in moved]).norm().item()
    assert length == pytest.approx(0.019, rel=1e-3)


def test_bfloat16_trains_on_the_cpu_and_float16_is_refused_there():
    torch.manual_seed(0)
    objective = Objective(None, nn.CrossEntropyLoss(), Distill())
    engine = engine_for(Tiny(5), constant(amp="bfloat16"), objective)
    seen = []
    engine.model.conv.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    losses = engine.update(batches(1, side=8), 0, 0)
    assert seen == [torch.bfloat16]
    assert math.isfinite(losses[0])
    assert engine.model.head.weight.dtype == torch.float32
    with pytest.raises(RecipeError, match="float16 needs CUDA"):
        amp_dtype("float16", torch.device("cpu"))
    assert amp_dtype("auto", torch.device("cpu")) is None
    assert amp_dtype("auto", torch.device("cuda")) is torch.float16


def test_channels_last_is_off_on_the_cpu_and_on_with_cuda():
    from fastvit.parallel import World

    assert settled(small(), CPU).loop.channels_last is False
    assert settled(small(), World(torch.device("cuda"))).loop.channels_last is True
    with pytest.raises(RecipeError, match="corrupts memory"):
        settled(small(channels_last=True), CPU)


def test_batches_that_cannot_be_shared_are_refused():
    from fastvit.parallel import World

    three = World(torch.device("cpu"), 0, 3)
    with pytest.raises(RecipeError, match="cannot be shared by 3 processes"):
        plan_batches(small(), 100, three)
    plan = plan_batches(small(batch_size=12, micro_batch=2), 100, three)
    assert (plan.micro, plan.passes, plan.updates) == (2, 2, 8)
    # Fewer images than a micro-batch for each: the micro-batch shrinks.
    assert plan_batches(small(batch_size=12, micro_batch=64), 100, three).micro == 4


# ---- whole runs --------------------------------------------------------------------


def test_a_run_learns_what_a_hand_written_loop_learns(run, splits, tmp_path):
    recipe = small(mixup=0.0, cutmix=0.0, smoothing=0.0, ema=0.0, warmup_epochs=0)
    recorder, _ = run(recipe)
    torch.manual_seed(1)
    model = Tiny()
    groups = timm.optim.param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    transform = training_transform(recipe.augment, PREPROCESSING)
    images = TrainingImages(splits.train, transform, seed=42)
    order = EpochOrder(BatchPlan(24, 8), seed=42)
    model.train()
    for epoch in range(2):
        order.epoch, losses = epoch, []
        for update, places in enumerate(order):
            step = epoch * 3 + update
            rate = 1e-5 + (0.02 - 1e-5) * (1 + math.cos(math.pi * step / 6)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            samples = [images[place] for place in places]
            pixels = torch.stack([sample[0] for sample in samples])
            targets = torch.tensor([sample[1] for sample in samples])
            from fastvit.batches import seed_from

            torch.manual_seed(seed_from(42, epoch, update, 0, 0, 1))
            loss = F.cross_entropy(model(pixels), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / 3
        assert recorder.rows[epoch]["train_loss"] == pytest.approx(mean, rel=1e-5)
    kept = state(tmp_path / "run")["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_best_epochs_weights_are_kept_and_no_others(run, tmp_path):
    recipe = small(epochs=6, keep_best=2)
    _, outcome = run(recipe, describe=lambda row: {"epoch": str(row["epoch"])})
    best = ranked(outcome.history)[:2]
    folder = tmp_path / "run"
    names = {path.name for path in folder.glob("epoch-*")}
    assert names == {f"epoch-{row['epoch']:03d}.safetensors" for row in best}
    from fastvit import read_state_dict

    tensors, metadata = read_state_dict(folder / "best.safetensors")
    assert metadata["epoch"] == str(best[0]["epoch"])
    same, _ = read_state_dict(folder / f"epoch-{best[0]['epoch']:03d}.safetensors")
    assert all(torch.equal(tensors[name], same[name]) for name in same)
    assert outcome.best == best[0]


def test_ranking_prefers_accuracy_then_loss_then_the_earlier():
    rows = [
        {"epoch": 1, "top1": 50.0, "val_loss": 1.0},
        {"epoch": 2, "top1": 60.0, "val_loss": 2.0},
        {"epoch": 3, "top1": 60.0, "val_loss": 1.5},
        {"epoch": 4, "top1": 60.0, "val_loss": 1.5},
        {"epoch": 5, "top1": math.nan, "val_loss": 0.0},
    ]
    assert [row["epoch"] for row in ranked(rows)] == [3, 4, 2, 1, 5]


def test_tables_hold_a_row_for_each_epoch(run, tmp_path):
    recorder, _ = run(small(epochs=3))
    folder = tmp_path / "run"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == recorder.rows
    assert [float(row["val_loss"]) for row in rows] == [r["val_loss"] for r in lines]


def test_images_a_second_are_of_training_alone(run):
    class Slow(Recorder):
        def evaluating(self, done, images) -> None:
            time.sleep(0.3)

    listener, _ = run(small(), listener=Slow())
    for row in listener.rows:
        evaluations = 2  # 12 images in batches of 8
        training = 24 / row["images_per_second"]
        assert training < row["seconds"] - 0.3 * evaluations + 0.02  # rounded figures


def test_the_state_is_read_without_running_code(run, tmp_path):
    run(small())
    kept = read_state(tmp_path / "run" / "last.pt")  # weights_only=True
    assert kept["position"] == {
        "epoch": 2,
        "update": 0,
        "loss_sum": 0.0,
        "losses": 0,
        "averaged": False,
    }


def test_a_hand_interrupted_evaluation_is_done_again(run, tmp_path):
    recipe = small()
    whole, _ = run(recipe, "whole")

    class Interrupting(Recorder):
        sent = False

        def evaluating(self, done, images) -> None:
            if not self.sent:  # a second one ends the process at once
                self.sent = True
                deliver(signal.SIGTERM)

    _, outcome = run(recipe, "again", Interrupting())
    assert outcome.signal is not None
    assert outcome.history == []
    assert outcome.position.averaged
    again, _ = run(recipe, "again", resume=True)
    assert again.rows[0]["images_per_second"] == 0  # its updates were another's work
    for key in ("train_loss", "val_loss", "top1"):
        assert [r[key] for r in again.rows] == [r[key] for r in whole.rows]
