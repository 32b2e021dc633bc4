"""How batches are drawn, the same for every data module: reproducibly, also after a resume and on several devices."""
import math
import random
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset

from ..runtime.say import say
from .report import DataReport

__all__ = ["LoadedData", "collate_detection", "of_classes", "seed_random"]

WORKERS_OUTLIVE = 8  # seconds that loader processes live on after SIGTERM


class LoadedData(pl.LightningDataModule):
    """A data module with ``batch_size``, ``num_workers`` and ``seed``.

    The order of the training images depends on ``seed`` and the epoch alone, and what is random in a batch on these and
    its place in the epoch, so that a run which is resumed, also within an epoch, sees what an uninterrupted one would
    have seen; the images of batches that are done are not loaded again.

    ``setup`` fills ``report``, the table that a run starts with; where it stays without splits no table is shown.

    Attributes:
        in_chans: Channels of the images.
        multi_label: Each image has any number of classes, not one.
    """

    in_chans = 3
    multi_label = False
    image_settings: dict[str, Any] | None = None  # how files become images, as plain values: kept in checkpoints
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of samples; PyTorch's own if None
    classes_now: Callable[[], Collection[int]] | None = None  # whose images an epoch trains on; all if None

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
        if self.classes_now is not None:
            dataset, chosen = of_classes(dataset, self.classes_now())
            weights = None if weights is None else weights[chosen]
        ranks, images = self._ranks()[0], len(dataset)  # type: ignore[arg-type]
        times = 1 if endless else math.ceil(self.min_batches * self.batch_size * ranks / images)
        if self.min_batches > 1 and times > 1:
            say(f"An epoch goes through the {images} training images {times} times: data.init_args.min_batches is "
                f"{self.min_batches}.")
            dataset = ConcatDataset([dataset] * times)
            weights = None if weights is None else weights.repeat(times)
        # Where images are left out, they are from the start: several processes take as many steps as one would.
        full = len(dataset) // ranks >= self.batch_size  # type: ignore[arg-type]
        sampler = _EpochSampler(dataset, *self._ranks(), self.seed, endless, full, weights, repeats)
        loader = _EpochLoader(
            _Seeded(dataset), batch_size=self.batch_size, sampler=sampler, drop_last=full, **self._loader_args())
        loader.done = self._batches_done
        return loader

    def _batches_done(self) -> int:
        """Batches of this epoch that were trained on before a resume."""
        loop = getattr(self.trainer, "fit_loop", None)
        return loop.epoch_loop.batch_progress.current.ready if loop and loop.is_resuming else 0

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
            num_workers=self.num_workers, pin_memory=torch.cuda.is_available(), collate_fn=self.collate,
            worker_init_fn=_outlive)

    def _ranks(self) -> tuple[int, int]:
        """Number of processes that train together, and which one this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


def of_classes(dataset: Any, classes: Collection[int]) -> tuple[Subset, list[int]]:
    """The part of a classification dataset whose images are of ``classes``, and their places in it.

    Raises:
        ValueError: There are none.
    """
    wanted = set(classes)
    places = [place for place in range(len(dataset)) if dataset.label(place) in wanted]
    if not places:
        raise ValueError(f"the data has no images of the classes with the numbers {sorted(wanted)}")
    return Subset(dataset, places), places


def collate_detection(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A batch of detection: the list of images, which may differ in size, and the list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def seed_random(numbers: Sequence[int], devices: bool = False) -> None:
    """Seeds PyTorch, on the CPU or on all devices, NumPy and Python by several numbers that are not negative."""
    torch_seed, numpy_seed, python_seed = (int(x) for x in np.random.SeedSequence(numbers).generate_state(3))
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(torch_seed)  # the former takes 0.1 ms
    np.random.seed(numpy_seed)
    random.seed(python_seed)


class _Place(int):
    """Index of an item, and what its batch is seeded by: seed, epoch, process, place in the epoch."""

    seed: tuple[int, ...]


class _Seeded(Dataset):
    """A dataset whose batches have random numbers of their own, whichever process loads them and after which others."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if isinstance(indices[0], _Place):
            seed_random(indices[0].seed)
        return [self.dataset[int(index)] for index in indices]


class _EpochSampler(DistributedSampler):
    """Shuffles by seed and epoch; leaves the first ``skip`` items of an epoch out.

    With ``weights`` it draws, as ``WeightedRandomSampler`` does: each process its part of what all of them draw. With
    ``repeats`` it is timm's ``RepeatAugSampler``, but for its epochs, which are not rounded.
    """

    skip = 0

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int, endless: bool,
                 drop_last: bool = False, weights: Tensor | None = None, repeats: int = 1):
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self.endless, self.weights, self.repeats = endless, weights, repeats

    def __iter__(self) -> Iterator[int]:
        for place, index in islice(enumerate(self._order()), self.skip, None):
            item = _Place(index)
            item.seed = (self.seed, self.epoch, self.rank, place)
            yield item

    def _order(self) -> Iterator[int]:
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


class _EpochLoader(DataLoader):
    """Begins to load at the first batch that is asked for, in an epoch that is gone on with at the first that is left.

    Lightning makes an iterator before it tells the sampler the epoch that a resumed run starts at; the workers of an
    ordinary loader would have their first indices by then.
    """

    done: Callable[[], int] = staticmethod(lambda: 0)  # batches that are left out

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.sampler.skip = self.done() * (self.batch_size or 1)  # type: ignore[attr-defined]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was done is known to the trainer. Tells Lightning that the loader goes on within epochs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""


def _outlive(worker: int) -> None:
    """Lets a loader process live on after what a scheduler may send to it too: its batches are still asked for.

    Killed at once, it would take the training with it before that has saved its weights.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKERS_OUTLIVE))
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
