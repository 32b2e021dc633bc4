"""How batches are drawn, the same for every data module: reproducibly, also after a resume and on several devices."""
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler

from ..runtime.say import say
from .report import DataReport

__all__ = ["LoadedData", "collate_detection"]


class LoadedData(pl.LightningDataModule):
    """A data module with ``batch_size``, ``num_workers`` and ``seed``.

    The order of the training images and the random numbers of the worker processes depend on ``seed`` and the epoch
    alone, so that a run which is resumed at an epoch sees what an uninterrupted one would have seen.

    ``setup`` fills ``report``, the table that a run starts with; where it stays without splits no table is shown.

    Attributes:
        in_chans: Channels of the images.
        multi_label: Each image has any number of classes, not one.
    """

    in_chans = 3
    multi_label = False
    image_settings: dict[str, Any] | None = None  # how files become images, as plain values: kept in checkpoints
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of samples; PyTorch's own if None

    def __init__(self, batch_size: int, num_workers: int, seed: int, min_batches: int = 1):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        if min_batches < 1:
            raise ValueError(f"min_batches must be 1 or more, got {min_batches}")
        self.batch_size, self.num_workers, self.seed, self.min_batches = batch_size, num_workers, seed, min_batches
        self.eval_batch_size = batch_size
        self.report = DataReport()

    def _train_loader(
            self, dataset: Dataset, endless: bool = False, weights: Tensor | None = None, repeats: int = 1,
    ) -> DataLoader:
        """Shuffled batches; the last, smaller one is left out unless it is the only one.

        An epoch goes through a dataset several times that is too small for ``min_batches``. Epoch ``e`` of an
        ``endless`` dataset of length ``n`` are its items ``n * e`` to ``n * (e + 1) - 1``. With ``weights``, one for
        each item, an epoch has as many items, drawn with replacement. With ``repeats`` an epoch
        has as many items too, each so many times: of the copies, which follow one another, each process has some.
        """
        ranks, images = self._ranks()[0], len(dataset)  # type: ignore[arg-type]
        times = 1 if endless else math.ceil(self.min_batches * self.batch_size * ranks / images)
        if self.min_batches > 1 and times > 1:
            say(f"An epoch goes through the {images} training images {times} times: data.init_args.min_batches is "
                f"{self.min_batches}.")
            dataset = ConcatDataset([dataset] * times)
            weights = None if weights is None else weights.repeat(times)
        sampler = _EpochSampler(dataset, *self._ranks(), self.seed, endless, weights, repeats)
        full = len(sampler) >= self.batch_size
        return _EpochLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, generator=sampler.generator, drop_last=full,
            **self._loader_args())

    def _eval_loader(self, dataset: Dataset) -> DataLoader:
        """Batches in the order of ``dataset``; several processes share them, and none is seen twice."""
        (ranks, rank), count = self._ranks(), len(dataset)  # type: ignore[arg-type]
        sampler = None
        if ranks > 1:
            if count < ranks:
                raise ValueError(f"{count} images cannot be shared by {ranks} processes; evaluate on fewer devices")
            sampler = UnrepeatedDistributedSampler(dataset, num_replicas=ranks, rank=rank, shuffle=False)
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_args())

    def _loader_args(self) -> dict[str, Any]:
        return dict(
            num_workers=self.num_workers, pin_memory=torch.cuda.is_available(), collate_fn=self.collate)

    def _ranks(self) -> tuple[int, int]:
        """Number of processes that train together, and which one this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


def collate_detection(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A batch of detection: the list of images, which may differ in size, and the list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class _EpochSampler(DistributedSampler):
    """Shuffles by seed and epoch, and seeds the generator that the loader draws its workers' seed from likewise.

    With ``weights`` it draws, as ``WeightedRandomSampler`` does: each process its part of what all of them draw. With
    ``repeats`` it is timm's ``RepeatAugSampler``, but for its epochs, which are not rounded.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int, endless: bool,
                 weights: Tensor | None = None, repeats: int = 1):
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        self.endless, self.weights, self.repeats = endless, weights, repeats
        self.generator = torch.Generator()
        self.set_epoch(0)

    def __iter__(self) -> Iterator[int]:
        if self.weights is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            drawn = torch.multinomial(self.weights, self.total_size, replacement=True, generator=generator)
            return iter(drawn[self.rank::self.num_replicas].tolist())
        if self.repeats > 1:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            places = torch.arange(self.rank, self.total_size, self.num_replicas) // self.repeats
            return iter(order[places % len(order)].tolist())
        first = self.epoch * len(self.dataset) if self.endless else 0  # type: ignore[arg-type]
        return (first + index for index in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.generator.manual_seed((self.seed << 32) + (epoch << 12) + self.rank)


class _EpochLoader(DataLoader):
    """Begins to load at the first batch that is asked for.

    Lightning makes an iterator before it tells the sampler the epoch that a resumed run starts at; the workers of an
    ordinary loader would be seeded and have their first indices by then.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()
