"""Batches of a data set in the order that a run wants them, indexed or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from fastvit.batches import (
    Batch,
    EpochOrder,
    EvaluationImages,
    TrainingImages,
    loader_options,
)
from fastvit.errors import DataError
from fastvit.streams import (
    StreamImages,
    TrainingStreamLoader,
    stream_evaluation_loader,
)


class Loader:
    """A loader whose errors are the same whether workers read or this process does.

    Raises, while it is read:
        DataError: an image is unreadable and has to be read, a stream ended, or a
            process that reads images died.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self.batches
        except DataError as error:
            # torch puts a worker's whole traceback into the message.
            text = str(error)
            if not text.startswith("Caught DataError in DataLoader worker"):
                raise
            raise DataError(text.rpartition("DataError: ")[2].strip()) from error
        except RuntimeError as error:
            text = str(error)
            if not text.startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a process that reads images died: {text.splitlines()[0].rstrip('. ')}"
                ".",
                hint="Use fewer workers, or give the machine more (shared) memory.",
            ) from error


def training_loader(
    images: TrainingImages, order: EpochOrder, workers: int, device: torch.device
) -> Loader:
    """Batches of a process in the given order; of a stream in the stream's own."""
    if isinstance(images.source, StreamImages):
        return Loader(TrainingStreamLoader(images, order, workers, device))
    options = loader_options(workers, device, keep=True)
    return Loader(DataLoader(images, batch_sampler=order, **options))


def evaluation_loader(
    images: EvaluationImages,
    batch_size: int,
    workers: int,
    device: torch.device,
    shard: tuple[int, int] = (0, 1),
) -> Loader:
    """Batches in order; of several processes each gets every world-th image.

    Args:
        shard: (rank, world).
    """
    if isinstance(images.source, StreamImages):
        return Loader(
            stream_evaluation_loader(images, batch_size, workers, device, shard)
        )
    rank, world = shard
    options = loader_options(workers, device, keep=False)
    return Loader(
        DataLoader(
            images,
            batch_size=batch_size,
            sampler=list(range(rank, len(images), world)),  # type: ignore[arg-type]
            **options,
        )
    )
