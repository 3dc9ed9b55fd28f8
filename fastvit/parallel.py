"""Several processes as one: who is who, and what they add up.

Gradients go through torch's DistributedDataParallel. Batch norm statistics are ours
where torch has none: its SyncBatchNorm refuses CPU tensors.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit.errors import TrainingError

_SAID = "why the run ends is said"


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        control: the group for words between processes, on the CPU, so that asking
            does not wait for a GPU; None where there is one process.
        store: the words that stay when processes can no longer reach one another.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    store: dist.Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def highest(self, level: int) -> int:
        """The highest level of all processes; all must ask."""
        if self.control is None:
            return level
        word = torch.tensor([level])
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.control)
        return int(word.item())

    def total(self, numbers: list[float]) -> list[float]:
        """The sum of each number over all processes, in float64; all must ask."""
        if self.control is None:
            return numbers
        words = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(words, group=self.control)
        return words.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """What each process has, by rank, on the first one; all must ask."""
        if self.control is None:
            return [thing]
        found: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(thing, found, dst=0, group=self.control)
        return found or []

    def speaks(self, patience: float = 2.0) -> bool:
        """Whether this process is the one that says why the run ends.

        The first that asks is, without waiting for any other: they may hang in what
        this one left. The first process has `patience` seconds to be it.
        """
        if self.store is None:
            return True
        until = time.monotonic() + (0 if self.leads else patience)
        try:
            while time.monotonic() < until and not self.store.check([_SAID]):
                time.sleep(0.02)
            return self.store.add(_SAID, 1) == 1
        except RuntimeError:  # the store went with the process that had it
            return True


def join_world(device: str, timeout_minutes: float = 30) -> World:
    """Find the other processes that torchrun started; one process alone is a world too.

    Raises:
        TrainingError: they cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(torch.device(device))
    rank = int(os.environ["RANK"])
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    wait = timedelta(minutes=timeout_minutes)
    try:
        store = next(iter(rendezvous("env://", timeout=wait)))[0]
        own = dist.PrefixStore("default_pg", store)
        dist.init_process_group(
            backend, store=own, rank=rank, world_size=size, timeout=wait
        )
        control = dist.new_group(backend="gloo", timeout=wait)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"process {rank} of {size} cannot reach the others: {reason}.",
            hint="Check --nnodes, --rdzv-endpoint and the firewall between machines.",
        ) from error
    words = dist.PrefixStore("fastvit", store)
    return World(torch.device(device), rank, size, control, words)


def leave_world() -> None:
    """End what `join_world` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _SumOverRanks(torch.autograd.Function):
    """y = Σ over ranks of x; each rank's loss reads y, so gradients add up as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class AllReduceBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, on any device.

    μ = Σ x / n, σ² = Σ (x - μ)² / n, sums and n over batch, space and processes; the
    running variance takes n / (n - 1) σ². Two passes, because Σ x² - n μ² cancels.

    Shapes: (N, C, …) to the same.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 axes, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float()
        axes = [0, *range(2, x.dim())]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        count = x.numel() // x.shape[1]
        sums = torch.cat([x.sum(axes), x.new_tensor([float(count)])])
        sums = _SumOverRanks.apply(sums)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        seen = float(self.num_batches_tracked)
        share = 1 / seen if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronise_norms(model: nn.Module, world: World) -> nn.Module:
    """The model with batch norms that see all processes' batches; parameters are kept.

    Raises:
        TrainingError: on the CPU, a norm is of a class that only torch's own
            conversion knows.
    """
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in plain:
            raise TrainingError(
                f"{name} is a {type(module).__name__}, which cannot be synchronised "
                "on the CPU.",
                hint="Use --set bn=average.",
            )
        # In place, so that hooks, names and whoever else holds the module stay right.
        module.__class__ = AllReduceBatchNorm
    return model


def average_norms(model: nn.Module, world: World) -> None:
    """Put the mean over processes of all running statistics in every process."""
    if world.size == 1:
        return
    for buffer in _statistics(model).values():
        dist.all_reduce(buffer)
        buffer /= world.size


def own_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the statistics that differ from process to process, on the CPU."""
    return {name: value.cpu().clone() for name, value in _statistics(model).items()}


def set_statistics(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Put back what `own_statistics` copied."""
    for name, buffer in _statistics(model).items():
        buffer.copy_(values[name])


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
