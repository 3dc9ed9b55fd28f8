"""From images to batches, so that a batch depends on nothing but its place.

Every random choice about an image is seeded by (seed, epoch, index), and every one
about a batch by (seed, epoch, update, pass, rank): the number of workers, what ran
before and where a run was resumed change nothing.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastvit.errors import DataError
from fastvit.images import why_unreadable

_TRIES = 100  # unreadable images in a row, before the data set counts as broken


class ImageSource(Protocol):
    """Where images come from, by index."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its class; any exception means an unreadable one."""
        ...

    def name(self, index: int) -> str:
        """What people call the image: its path."""
        ...


@dataclass(frozen=True)
class Problem:
    """An image that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W), their classes (B,) and places in the data set (B,)."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    problems: tuple[Problem, ...] = ()

    def pin_memory(self) -> Batch:
        """The same in pinned memory; torch's loader calls it."""
        pinned = (self.images.pin_memory(), self.targets.pin_memory(), self.indices)
        return Batch(*pinned, self.problems)


@dataclass(frozen=True)
class BatchPlan:
    """How one update's images are shared out.

    An update takes `passes` x `world` x `micro` images, whatever the split: the same
    ones in one process or eight.
    """

    images: int
    micro: int
    passes: int = 1
    rank: int = 0
    world: int = 1

    @property
    def batch_size(self) -> int:
        """Images of one update, over all processes."""
        return self.micro * self.passes * self.world

    @property
    def updates(self) -> int:
        """Whole updates in an epoch; the images left over are not used in it."""
        return self.images // self.batch_size


def seed_from(*place: int) -> int:
    """A seed of 63 bits that differs for each place."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(*place: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators for a place."""
    seed = seed_from(*place)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class TrainingImages(Dataset):  # type: ignore[type-arg]
    """Augmented images by (epoch, index).

    An image that cannot be read is replaced by the next one that can, so that batches
    keep their size on every process; the batch says which.

    Args:
        strict: an unreadable image ends the run instead.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        strict: bool = False,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.strict = strict

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, ...]:
        epoch, index = place
        problems: list[Problem] = []
        for offset in range(min(_TRIES, len(self.source))):
            found = _read(self.source, (index + offset) % len(self.source))
            if not isinstance(found, Problem):
                seed_generators(self.seed, epoch, index)
                image, target = found
                return self.transform(image), target, index, tuple(problems)
            if self.strict:
                raise DataError(f"{found.name} cannot be read: {found.reason}.")
            problems.append(found)
        raise DataError(
            f"{len(problems)} images in a row cannot be read, the last of them "
            f"{problems[-1].name}: {problems[-1].reason}.",
            hint="Check that the data set was copied whole.",
        )


class EvaluationImages(Dataset):  # type: ignore[type-arg]
    """Images by index, as the model is meant to see them; unreadable ones are left out.

    Args:
        strict: an unreadable image is an error instead.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Tensor],
        *,
        strict: bool = False,
    ) -> None:
        self.source = source
        self.transform = transform
        self.strict = strict

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        found = _read(self.source, index)
        if not isinstance(found, Problem):
            image, target = found
            return self.transform(image), target, index, ()
        if self.strict:
            raise DataError(f"{found.name} cannot be read: {found.reason}.")
        return None, 0, index, (found,)


def _read(source: ImageSource, index: int) -> tuple[Image.Image, int] | Problem:
    """The image, or why there is none.

    Decoders raise whatever the damage leads them to (OSError, SyntaxError,
    struct.error, a decompression bomb's own), so that every exception counts.
    """
    try:
        return source.read(index)
    except Exception as error:
        return Problem(source.name(index), why_unreadable(error))


def collate(samples: Sequence[tuple[Any, ...]]) -> Batch:
    """One batch; what could not be read is in its problems alone."""
    good = [sample for sample in samples if sample[0] is not None]
    problems = tuple(problem for sample in samples for problem in sample[3])
    images = torch.stack([s[0] for s in good]) if good else torch.empty(0, 3, 1, 1)
    targets = torch.tensor([s[1] for s in good], dtype=torch.long)
    indices = torch.tensor([s[2] for s in good], dtype=torch.long)
    return Batch(images, targets, indices, problems)


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process for an epoch, from any update on.

    The order is a permutation drawn from (seed, epoch). Set `epoch` and `first_update`
    before iterating.
    """

    def __init__(self, plan: BatchPlan, seed: int) -> None:
        self.plan = plan
        self.seed = seed
        self.epoch = 0
        self.first_update = 0

    def __len__(self) -> int:
        return (self.plan.updates - self.first_update) * self.plan.passes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, epoch = self.plan, self.epoch
        generator = torch.Generator().manual_seed(seed_from(self.seed, epoch, -1))
        order = torch.randperm(plan.images, generator=generator).tolist()
        for update in range(self.first_update, plan.updates):
            for step in range(plan.passes):
                row = (update * plan.passes + step) * plan.world + plan.rank
                taken = order[row * plan.micro : (row + 1) * plan.micro]
                yield [(epoch, index) for index in taken]


def loader_options(workers: int, device: torch.device, keep: bool) -> dict[str, Any]:
    """What every `DataLoader` here is made with; `keep` its workers between epochs."""
    return {
        "collate_fn": collate,
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": keep and workers > 0,
        "worker_init_fn": _leave_signals_to_the_loop,
        # torch seeds its workers from this generator, not from the global one, which
        # then stays as the loop left it.
        "generator": torch.Generator().manual_seed(0),
    }


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the loop alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
