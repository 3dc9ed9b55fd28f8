"""Data sets that can only be read from front to back, through timm's readers.

A stream has no index, so its order is the reader's: by (seed, epoch) and by the number
of workers. A run continues at the update where it stopped by reading the epoch again up
to there. In evaluation every process reads all of it and keeps its share, so that each
image counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastvit.batches import (
    Batch,
    EpochOrder,
    EvaluationImages,
    TrainingImages,
    loader_options,
    seed_from,
    seed_generators,
)
from fastvit.errors import DataError

Transform = Callable[[Image.Image], Tensor]


@dataclass
class StreamImages:
    """A split of a data set that has no index.

    Attributes:
        data: timm's name of it.
        size: how many images it says that it has.
    """

    data: str
    root: str
    split: str
    mode: str
    class_names: tuple[str, ...] = ()
    size: int = 0

    def __len__(self) -> int:
        return self.size

    def dataset(self, batch_size: int, *, training: bool) -> Any:
        """timm's iterable data set of it."""
        return create_dataset(
            self.data,
            root=self.root,
            split=self.split,
            is_training=training,
            batch_size=batch_size,
            input_img_mode=self.mode,
        )

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Nothing: there is no image by its index."""
        raise DataError(f"{self.data} can only be read from front to back")

    def name(self, index: int) -> str:
        """The image's place in the order of reading."""
        return f"image {index}"


class _TrainingStream(IterableDataset):  # type: ignore[type-arg]
    """Augmented images of one worker; those of batches before `done` are left out."""

    def __init__(self, images: TrainingImages, order: EpochOrder, done: int) -> None:
        assert isinstance(images.source, StreamImages)
        self.images = images
        self.order = order
        self.done = done
        self.dataset = images.source.dataset(order.plan.micro, training=True)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        worker, workers = _worker()
        source = self.images.source
        plan, epoch = self.order.plan, self.order.epoch
        self.dataset.set_loader_cfg(num_workers=workers)
        self.dataset.set_epoch(epoch)
        for count, (image, target) in enumerate(_pairs(self.dataset, source)):
            place = (count * workers + worker) * plan.world + plan.rank
            # Batch n of worker w is batch n x workers + w of the process.
            if count // plan.micro * workers + worker < self.done:
                yield None, 0, place, ()
                continue
            seed_generators(self.images.seed, epoch, place)
            yield self.images.transform(image), int(target), place, ()


class _EvaluationStream(IterableDataset):  # type: ignore[type-arg]
    """Images of one worker; of several processes each keeps every world-th."""

    def __init__(self, images: EvaluationImages, shard: tuple[int, int]) -> None:
        assert isinstance(images.source, StreamImages)
        self.images = images
        self.rank, self.world = shard
        self.dataset = images.source.dataset(1, training=False)
        # timm's readers share a stream out as well, but count some images twice.
        reader = self.dataset.reader
        reader.dist_rank, reader.dist_num_replicas = 0, 1

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        worker, workers = _worker()
        source = self.images.source
        self.dataset.set_loader_cfg(num_workers=workers)
        for count, (image, target) in enumerate(_pairs(self.dataset, source)):
            if count % self.world == self.rank:
                yield (
                    self.images.transform(image),
                    int(target),
                    count * workers + worker,
                    (),
                )


class TrainingStreamLoader:
    """The batches of an epoch, from the update on where the order says.

    Raises, while it is read:
        DataError: the stream ends before the epoch does.
    """

    def __init__(
        self,
        images: TrainingImages,
        order: EpochOrder,
        workers: int,
        device: torch.device,
    ) -> None:
        self.images = images
        self.order = order
        self.workers = workers
        self.device = device

    def __iter__(self) -> Iterator[Batch]:
        plan = self.order.plan
        done = self.order.first_update * plan.passes
        wanted = plan.updates * plan.passes
        stream = _TrainingStream(self.images, self.order, done)
        options = loader_options(self.workers, self.device, keep=False)
        # The readers shuffle with their workers' seeds, which come from here.
        options["generator"].manual_seed(seed_from(self.images.seed, self.order.epoch))
        loader = DataLoader(stream, batch_size=plan.micro, drop_last=True, **options)
        _check_shards(self.images.source, stream.dataset.reader, plan.world, loader)
        seen = 0
        for batch in loader:
            if seen >= done:
                yield batch
            seen += 1
            if seen == wanted:
                return
        source = self.images.source
        raise DataError(
            f"the stream ended after {seen} of {wanted} batches of an epoch: it says "
            f"that it has {len(source)} images.",
            hint="Mend the number of images that the data set says it has.",
        )


def stream_evaluation_loader(
    images: EvaluationImages,
    batch_size: int,
    workers: int,
    device: torch.device,
    shard: tuple[int, int],
) -> DataLoader:  # type: ignore[type-arg]
    """Batches of a stream, in the reader's order."""
    stream = _EvaluationStream(images, shard)
    options = loader_options(workers, device, keep=False)
    return DataLoader(stream, batch_size=batch_size, **options)


def _pairs(dataset: Any, source: Any) -> Iterator[tuple[Image.Image, Any]]:
    """Images and classes; whatever a reader raises is about the data."""
    try:
        yield from dataset
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source.data} cannot be read on: {reason.rstrip('.')}."
        ) from error


def _check_shards(source: Any, reader: Any, world: int, loader: Any) -> None:
    """See that each reading process has a shard: timm's reader waits forever else."""
    shards = len(reader.split_info.filenames) if "wds/" in source.data.lower() else 0
    readers = world * max(1, loader.num_workers)
    if 0 < shards < readers:
        raise DataError(
            f"{source.data} has {shards} shards for {readers} reading processes.",
            hint=f"Use --set workers={shards // world}, or make more shards.",
        )


def _worker() -> tuple[int, int]:
    """This worker and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
