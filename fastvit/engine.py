"""One run's moving parts, and one update of them; the loop is in `train`."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvit.batches import Batch, BatchPlan, seed_from
from fastvit.errors import Diverged, RecipeError
from fastvit.objective import Objective
from fastvit.parallel import (
    World,
    average_norms,
    own_statistics,
    set_statistics,
    synchronise_norms,
)
from fastvit.recipes import Recipe

_CHECK_EVERY = 20  # updates between looks at the loss on CUDA, where each one waits
_SLOWER = (
    "Lower lr, lengthen warmup_epochs or set clip_grad=1; the last checkpoint is from "
    "before."
)


@dataclass
class Engine:
    """What changes while a model trains.

    Attributes:
        model: the bare model, whose `state_dict` has its own names.
        forward: the same, wrapped for several processes and compiled.
        shared: what adds gradients up over processes; None where there is one.
        amp: dtype of autocast; None for none.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    scaler: torch.amp.GradScaler
    objective: Objective
    recipe: Recipe
    plan: BatchPlan
    world: World
    shared: DistributedDataParallel | None = None
    ema: ModelEmaV3 | None = None
    amp: torch.dtype | None = None
    pending: list[tuple[int, int, Tensor]] = field(default_factory=list)

    @property
    def lr(self) -> float:
        """The learning rate of the next update, the largest of all groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def update(self, batches: list[Batch], epoch: int, update: int) -> list[float]:
        """One step of the optimiser from its micro-batches; see `checked_losses`.

        Raises:
            Diverged: a loss is not finite. On the CPU nothing has changed then.
        """
        for step, batch in enumerate(batches):
            last = step + 1 == len(batches)
            loss = self._backward(batch, (epoch, update, step), last)
            self.pending.append((epoch, update, loss))
        losses = self.checked_losses()
        self._step()
        done = epoch * self.plan.updates + update + 1
        if self.ema is not None:
            self.ema.update(self.model, step=done)
        self.scheduler.step_update(done)
        return losses

    def _backward(
        self, batch: Batch, place: tuple[int, int, int], last: bool
    ) -> Tensor:
        """Gradients of one micro-batch; its loss, detached."""
        device = self.world.device
        layout = (
            torch.channels_last
            if self.recipe.loop.channels_last
            else torch.contiguous_format
        )
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        targets = batch.targets.to(device, non_blocking=True)
        where = (self.recipe.loop.seed, *place, self.world.rank)
        images, targets = self.objective.mixed(images, targets, *where)
        torch.manual_seed(seed_from(*where, 1))  # drop path and dropout
        share = self.plan.passes
        early = self.shared is not None and not last
        with self.shared.no_sync() if early else nullcontext():
            with autocast(device, self.amp):
                loss = self.objective.loss(self.forward(images), targets, images)
            self.scaler.scale(loss / share).backward()
        return loss.detach()

    def _step(self) -> None:
        options = self.recipe.optimizer
        if options.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            # AGC is not for the classifier (Brock et al., 2021, section 4.1).
            bare = options.clip_mode == "agc"
            parameters = model_parameters(self.model, exclude_head=bare)
            dispatch_clip_grad(parameters, options.clip_grad, options.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def checked_losses(self, now: bool = False) -> list[float]:
        """Losses of batches since the last look, each finite; on CUDA mostly none.

        Raises:
            Diverged: one is not; it says which update it was.
        """
        waits = self.world.device.type == "cuda" and not now
        if waits and len(self.pending) < _CHECK_EVERY * self.plan.passes:
            return []
        places, self.pending = self.pending, []
        losses = [loss.item() for _, _, loss in places]
        for (epoch, update, _), loss in zip(places, losses, strict=True):
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss is {loss} at update {update + 1} of epoch {epoch + 1}.",
                    hint=_SLOWER,
                )
        return losses

    def check_weights(self, epoch: int, update: int) -> None:
        """See that what would be written can be gone on from.

        Raises:
            Diverged: a weight is infinite or not a number.
        """
        tensors = [*self.model.parameters(), *self.evaluated.parameters()]
        finite = torch.stack([value.detach().isfinite().all() for value in tensors])
        if not bool(finite.all()):
            raise Diverged(
                f"a weight is not finite after update {update} of epoch {epoch + 1}.",
                hint=_SLOWER,
            )

    def finish_epoch(self) -> None:
        """Bring the processes' batch norm statistics together."""
        if self.recipe.loop.bn == "average":
            average_norms(self.model, self.world)
            if self.ema is not None:
                average_norms(self.ema.module, self.world)

    def state(self) -> dict[str, Any]:
        """All of it as plain data; every process must ask, the first one gets it."""
        norms = [own_statistics(self.model)]
        if self.ema is not None:
            norms.append(own_statistics(self.ema.module))
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "norms": self.world.gather(norms),
        }

    def load_state(self, state: dict[str, Any], done: int) -> None:
        """Go back to a state, after `done` updates of the whole run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was not in float16 until now
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.world.size == len(state["norms"]):
            norms = state["norms"][self.world.rank]
            set_statistics(self.model, norms[0])
            if self.ema is not None:
                set_statistics(self.ema.module, norms[1])
        self.scheduler.step_update(done)


def build_engine(
    model: nn.Module,
    objective: Objective,
    recipe: Recipe,
    plan: BatchPlan,
    world: World,
) -> Engine:
    """Everything that trains `model`, on its device and in its memory layout."""
    layout = torch.channels_last if recipe.loop.channels_last else torch.preserve_format
    model = model.to(device=world.device, memory_format=layout).train()
    if recipe.loop.bn == "sync":
        model = synchronise_norms(model, world)
    optimizer = build_optimizer(model, recipe)
    amp = amp_dtype(recipe.loop.amp, world.device)
    scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
    decay = recipe.regularise.ema
    warm = recipe.regularise.ema_warmup
    shared = _shared(model, world)
    forward = model if shared is None else shared
    return Engine(
        model=model,
        # Compiled last: torch then splits the graph where gradients are sent.
        forward=torch.compile(forward) if recipe.loop.compile else forward,
        shared=shared,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, recipe, plan.updates),
        scaler=scaler,
        objective=objective,
        recipe=recipe,
        plan=plan,
        world=world,
        ema=ModelEmaV3(model, decay=decay, use_warmup=warm) if decay > 0 else None,
        amp=amp,
    )


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of the recipe's name; norms and biases have no weight decay.

    Raises:
        RecipeError: timm has none of that name, or it needs more than a gradient.
    """
    name = recipe.optimizer.opt
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=recipe.schedule.lr,
            weight_decay=recipe.optimizer.weight_decay,
        )
    except Exception as error:  # each of timm's optimisers refuses in its own way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"opt={name} cannot be used: {reason.rstrip('.')}.",
            hint="adamw, sgd, lamb, …; timm.optim.list_optimizers() has all names.",
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(
            f"opt={name} needs second derivatives, which this loop does not take.",
            hint="Use adamw, sgd, lamb, …",
        )
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, updates: int
) -> CosineLRScheduler:
    """timm's cosine with warm-up, by updates; after its end the rate stays lowest."""
    schedule = recipe.schedule
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs * updates,
        lr_min=schedule.min_lr,
        warmup_t=schedule.warmup_epochs * updates,
        warmup_lr_init=schedule.warmup_lr,
        t_in_epochs=False,
    )
    scheduler.step_update(0)
    return scheduler


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast that a recipe's `amp` means on a device.

    Raises:
        RecipeError: float16 is asked for where gradients cannot be scaled.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else None
    if name == "float16" and device.type != "cuda":
        raise RecipeError(
            f"amp=float16 needs CUDA, this is {device.type}.",
            hint="Use --set amp=bfloat16 here, or amp=off.",
        )
    return {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Autocast to a dtype, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _shared(model: nn.Module, world: World) -> DistributedDataParallel | None:
    """The model with gradients of all processes; None where there is one."""
    if world.size == 1:
        return None
    ids = [world.device.index] if world.device.type == "cuda" else None
    # Statistics are averaged at each epoch's end, or in sync all along.
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
