"""What two processes do for `test_parallel`: torchrun starts this file.

    torchrun --nproc-per-node 2 ranks.py DATA OUT

Each scenario leaves its checkpoint in a folder of its own; `norms.pt` holds what the
two batch norms computed, `compiled.pt` the losses of compiled updates.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from train_helpers import PREPROCESSING, Recorder, Tiny, small

from fastvit.batches import Batch, BatchPlan
from fastvit.data import open_splits
from fastvit.engine import build_engine
from fastvit.objective import Objective
from fastvit.parallel import (
    World,
    average_norms,
    join_world,
    leave_world,
    synchronise_norms,
)
from fastvit.recipes import Distill
from fastvit.run import Job
from fastvit.train import train

# Mixing pairs images inside a process, and dropout draws for each: both off, so that
# one process and two compute the same.
SAME = {"mixup": 0.0, "cutmix": 0.0, "epochs": 3, "lr": 0.005, "erase_prob": 0.0}


def first_model() -> Tiny:
    """The same weights everywhere."""
    torch.manual_seed(1)
    return Tiny(drop=0.0)


def run(data: str, folder: Path, world: World, listener=None, **values) -> None:
    """One run of all processes."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = values.pop("resume", False)
    job = Job(
        small(**{**SAME, **values}),
        open_splits(data),
        PREPROCESSING,
        folder,
        world,
        resume=resume,
    )
    train(first_model(), job, listener or Recorder())


def stopped_run(data: str, folder: Path, world: World) -> None:
    """The first process is asked to stop in the middle of an epoch; all go on later."""

    def on_step(progress) -> None:
        if (progress.epoch, progress.update) == (2, 1):
            signal.raise_signal(signal.SIGTERM)

    run(data, folder, world, Recorder(on_step=on_step))
    run(data, folder, world, resume=True)


def damaged_run(out: Path, world: World) -> None:
    """An image that the second process alone meets, in each evaluation."""
    listener = Recorder()
    run(str(out / "damaged_data"), out / "damaged", world, listener)
    if world.leads:
        torch.save(listener.notes, out / "damaged" / "notes.pt")


def norms(world: World) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of one synchronised norm over a shared batch."""
    torch.manual_seed(5)
    # A mean far from zero: Σ x² - n μ² in float32 would lose all digits here.
    batch = torch.randn(6, 4, 3, 3) * 2 + 300
    weights = torch.randn(6, 4, 3, 3)
    norm = nn.BatchNorm2d(4, momentum=0.3)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    model = synchronise_norms(nn.Sequential(norm), world)
    mine = slice(world.rank * 3, world.rank * 3 + 3) if world.size > 1 else slice(6)
    x = batch[mine].clone().requires_grad_()
    y = model(x)
    (y * weights[mine]).sum().backward()
    mean = torch.full((2,), float(world.rank))
    other = nn.BatchNorm1d(2)
    other.running_mean.copy_(mean)
    average_norms(other, world)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": norm.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "averaged": other.running_mean,
    }


def compiled(world: World) -> dict[str, Any]:
    """Losses of four compiled updates of two passes over shared batches of eight.

    Without a norm, whose statistics are of one process; `sent` counts how often
    gradients went to the others, `sizes` has the nodes of each compiled graph.
    """
    torch.manual_seed(3)
    model = Tiny(drop=0.0)
    model.norm = nn.Identity()
    recipe = small(**SAME, compile=True, bn="none", warmup_epochs=0)
    objective = Objective(None, nn.CrossEntropyLoss(), Distill())
    plan = BatchPlan(32, 8 // (2 * world.size), 2, world.rank, world.size)
    sizes: list[int] = []

    def backend(graph, inputs):  # compiles nothing, so that no compiler is needed
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    plain = torch.compile
    torch.compile = partial(plain, backend=backend)
    try:
        engine = build_engine(model, objective, recipe, plan, world)
    finally:
        torch.compile = plain
    sent: list[int] = []
    if engine.shared is not None:
        engine.shared.register_comm_hook(sent, counted)
    losses = []
    for update in range(4):
        images, targets = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
        parts = [
            slice(start, start + plan.micro)
            for start in range(world.rank * plan.micro, 8, world.size * plan.micro)
        ]
        batches = [Batch(images[p], targets[p], torch.arange(8)[p]) for p in parts]
        with torch.random.fork_rng():
            losses.append(engine.update(batches, 0, update))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return {"losses": losses, "sent": len(sent), "state": state, "sizes": sizes}


def counted(sent, bucket):  # torch reads annotations, and these would be texts
    """torch's own sum over processes, and a mark that it was asked for."""
    sent.append(bucket.index())
    return allreduce_hook(None, bucket)


def main(data: str, out: Path) -> None:
    world = join_world("cpu", timeout_minutes=1)
    torch.set_num_threads(1)
    run(data, out / "sync", world, bn="sync")
    run(data, out / "average", world)
    stopped_run(data, out / "stopped", world)
    damaged_run(out, world)
    for name, found in (("norms", norms(world)), ("compiled", compiled(world))):
        gathered = world.gather(found)
        if world.leads:
            torch.save(gathered, out / f"{name}.pt")
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
