"""Our training step against timm's model in a plain loop, and bfloat16 against float32.

    python benchmarks/train_step.py [ROUNDS] [SIDE] [BATCH]

fastvit_t8 on the same batches, with the same AdamW groups and average of weights. Three
steps take turns, so that other load falls on all of them; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

from fastvit import create_model
from fastvit.batches import Batch, BatchPlan
from fastvit.builtin import recipe_for
from fastvit.engine import Engine, build_engine
from fastvit.objective import Objective
from fastvit.parallel import World
from fastvit.recipes import Distill

CLASSES = 100


def ours(amp: str, batch: Batch, rounds: int) -> Callable[[], object]:
    """One update of this project's engine."""
    torch.manual_seed(0)
    recipe = recipe_for("imagenet", "fastvit_t8").with_values(amp=amp)
    plan = BatchPlan(len(batch.targets) * rounds, len(batch.targets))
    model = create_model("fastvit_t8", num_classes=CLASSES)
    loss = Objective(None, nn.CrossEntropyLoss(), Distill())
    engine: Engine = build_engine(model, loss, recipe, plan, World(torch.device("cpu")))
    return lambda: engine.update([batch], 0, 0)


def theirs(batch: Batch) -> Callable[[], object]:
    """The same with timm's model and parts, as its training script has them."""
    torch.manual_seed(0)
    model = timm.create_model("fastvit_t8", num_classes=CLASSES).train()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=1e-3, weight_decay=0.05
    )
    average = timm.utils.ModelEmaV3(model, decay=0.9995)
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        loss = criterion(model(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=1)
        loss.item()

    return step


def main(rounds: int, side: int, size: int) -> None:
    """Interleaved medians."""
    generator = torch.Generator().manual_seed(1)
    batch = Batch(
        torch.randn(size, 3, side, side, generator=generator),
        torch.randint(CLASSES, (size,), generator=generator),
        torch.arange(size),
    )
    steps = {
        "timm, float32": theirs(batch),
        "ours, float32": ours("off", batch, rounds),
        "ours, bfloat16": ours("bfloat16", batch, rounds),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["timm, float32"])
    print(f"fastvit_t8, {size} x 3x{side}x{side}, CPU, {rounds} interleaved steps")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{name:15s} {size / middle:8.1f} images/s, "
            f"{middle / base:.2f} of timm's step"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=10, help="timed steps")
    parser.add_argument("side", nargs="?", type=int, default=128, help="pixels")
    parser.add_argument("batch", nargs="?", type=int, default=8, help="images")
    options = parser.parse_args()
    if min(options.rounds, options.side, options.batch) < 1:
        parser.error("rounds, side and batch are 1 or more")
    main(options.rounds, options.side, options.batch)
