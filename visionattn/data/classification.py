"""What the classification data have in common, wherever their labels come from: transforms, checks, loaders."""
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..runtime.folders import EXTENSIONS, find_images
from ..runtime.pixels import Decoding
from ..runtime.say import say
from .decoded import DecodedImages, decoded_images
from .loading import LoadedData, of_classes
from .reading import SEVERAL, UNREADABLE, Faults, find_faults, read_image, read_tensor, say_shared
from .report import DataReport, SplitReport

__all__ = ["ClassificationData", "Sample", "evaluation_transform", "normalisation"]

Sample = tuple[Path, Any]  # a file and its label: a number, or those of all its classes

HINT = "replace or remove it, or set on_error to skip"
SHOWN = 20  # files that are named one by one


class ClassificationData(LoadedData):
    """Images with one label each or, where ``multi_label``, any number of them.

    A format's class sets ``class_names``, ``num_classes`` and ``multi_label`` and says by ``_list_split`` what a split
    holds; the rest is done here. ``samples[split]`` are the checked images of a split: ``[(file, label), ...]`` with
    labels from 0 on, or the tuple of an image's labels.

    Args:
        root: Folder or file of the data.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        verify: False leaves out the check before training, which reads every file's header.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        scale: Smallest and largest share of a training image that its random crop covers.
        hflip: Probability of a mirrored training image.
        color_jitter: Strength of random brightness, contrast and saturation where there is no ``auto_augment``.
        auto_augment: timm's policy, such as ``rand-m9-mstd0.5-inc1``, or None.
        random_erasing: Probability that a training image has a random rectangle replaced by noise.
        interpolation: Of evaluation images: ``bilinear`` or ``bicubic``.
        train_interpolation: Of training images: ``bilinear``, ``bicubic`` or ``random``.
        crop_pct: Share of the resized evaluation image that its centre crop keeps.
        mean: Of the channels in [0, 1], for normalisation; None for ImageNet's, or 0.5 where ``in_chans`` is not 3.
        std: The same.
        on_error: ``raise`` or ``skip``: what to do with a file that cannot be read as an image.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch.
        in_chans: Channels of the images.
        balanced_sampling: Draw training images so that every class comes equally often.
        repeats: Times that an epoch shows an image, each time changed at random anew, and so many fewer images.
        cache_dir: Folder that decoded training images are kept in.

    Raises:
        ValueError: An argument is out of its range.
    """

    class_names: list[str]
    num_classes: int

    def __init__(
            self, root: str, image_size: int, batch_size: int, num_workers: int, seed: int, verify: bool,
            predict_root: str | None, scale: tuple[float, float], hflip: float, color_jitter: float,
            auto_augment: str | None, random_erasing: float, interpolation: str, train_interpolation: str,
            crop_pct: float, mean: tuple[float, ...] | None, std: tuple[float, ...] | None,
            on_error: Literal["raise", "skip"], value_range: Literal["type", "file"] | tuple[float, float],
            max_pixels: int, min_batches: int, in_chans: int, balanced_sampling: bool,
            repeats: int = 1, cache_dir: str | None = None):
        super().__init__(batch_size, num_workers, seed, min_batches)
        Faults(root, on_error)  # complains about on_error
        self.on_error, self.verify, self.predict_root = on_error, verify, predict_root
        self.decoding = Decoding(value_range, max_pixels, in_chans).check()
        if repeats < 1 or (repeats > 1 and balanced_sampling):
            raise ValueError(f"repeats must be 1 or more, and 1 with balanced_sampling, got {repeats}")
        if cache_dir is not None and in_chans != 3:
            raise ValueError(f"cache_dir keeps images of three channels, and in_chans is {in_chans}: leave it out")
        self.in_chans, self.balanced_sampling, self.repeats = in_chans, balanced_sampling, repeats
        self.image_size, self.cache_dir = image_size, cache_dir
        self.normalisation = means, stds = normalisation(mean, std, in_chans)
        self.image_settings = dict(
            image_size=image_size, interpolation=interpolation, crop_pct=crop_pct, mean=means, std=stds,
            decoding=self.decoding._asdict())
        self.eval_transform = evaluation_transform(image_size, interpolation, crop_pct, means, stds)
        if in_chans == 3:
            common: dict[str, Any] = dict(input_size=image_size, mean=tuple(means), std=tuple(stds))
            self.train_transform = _within_ranges(create_transform(
                **common, is_training=True, scale=scale, hflip=hflip, color_jitter=color_jitter,
                auto_augment=auto_augment, re_prob=random_erasing, re_mode="pixel", interpolation=train_interpolation))
        else:
            if auto_augment or color_jitter:
                say(f"Images of {in_chans} channels are cropped, mirrored and erased at random; auto_augment and "
                    "color_jitter are of colours and left out.")
            self.train_transform = v2.Compose([
                v2.RandomResizedCrop(image_size, scale, interpolation=_MODES[train_interpolation]),
                v2.RandomHorizontalFlip(hflip), _Clamp(), v2.Normalize(means, stds),
                RandomErasing(random_erasing, mode="pixel", device="cpu")])
        self.report = DataReport("images")
        self.samples: dict[str, list[Sample]] = {}

    def setup(self, stage: str) -> None:
        """Lists (and checks) the images that ``stage`` needs: ``samples[split]`` is ``[(file, label), ...]``."""
        predicted = () if self.predict_root else ("test",)
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": predicted}[stage]
        for split in needed:
            if split not in self.samples:
                self._list_split(split)

    def train_dataloader(self) -> DataLoader:
        """Augmented training images, shuffled."""
        weights = self._sampling_weights() if self.balanced_sampling else None
        images = self._images(self.samples["train"], self.train_transform)
        if self.cache_dir is not None:
            images.decoded = decoded_images(
                Path(self.cache_dir), [file for file, _ in images.samples], self.image_size, self.decoding,
                HINT)
        return self._train_loader(images, weights=weights, repeats=self.repeats)

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self.plain_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self.plain_dataloader("test")

    def plain_dataloader(self, split: str, classes: Collection[int] | None = None) -> DataLoader:
        """Images of ``train``, ``val`` or ``test`` in their order, as evaluation sees them.

        ``classes``: their images alone.
        """
        images: Dataset = self._images(self.samples[split], self.eval_transform)
        return self._eval_loader(images if classes is None else of_classes(images, classes)[0])

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_root`` (or the test images) with their path in place of the label."""
        if self.predict_root is None:
            files = [file for file, _ in self.samples["test"]]
        else:
            if not Path(self.predict_root).is_dir():
                raise FileNotFoundError(f"predict_root {self.predict_root} is not a folder")
            faults = Faults(self.predict_root, self.on_error)
            files = self._check_files(find_images(Path(self.predict_root)), faults)
            if not files:
                raise ValueError(f"predict_root {self.predict_root} holds no images ({EXTENSIONS})")
            self.report.splits["predict"] = SplitReport(len(files), {}, faults.listed, faults.more)
        named = [(file, str(file)) for file in files]
        return self._eval_loader(_Images(named, self.eval_transform, self.decoding))

    @abstractmethod
    def _list_split(self, split: str) -> None:
        """Fills ``samples`` and the report of a split, and of others that are read with it."""

    def _keep(self, listed: dict[str, list[Sample]], source: str, faults: Faults) -> None:
        """Keeps samples that were listed and checked, with what was wrong with others of the split ``source``."""
        self.samples |= listed
        for name, part in listed.items():
            counts = Counter(one for _, label in part for one in (label if self.multi_label else [label]))
            left_out = (faults.listed, faults.more) if name == source else ([], 0)
            self.report.splits[name] = SplitReport(
                len(part), {class_: counts[label] for label, class_ in enumerate(self.class_names)}, *left_out)
        for name in ("val", "test"):
            known = self.verify and name in self.samples and "train" in self.samples
            if known and (name in listed or "train" in listed):
                say_shared(name, *([file for file, _ in self.samples[part] if isinstance(file, Path)]
                                   for part in (name, "train")))

    def _images(self, samples: list[Sample], transform: Callable[[Any], Tensor]) -> "_Images":
        return _Images(samples, transform, self.decoding, self.num_classes if self.multi_label else None)

    def _sampling_weights(self) -> Tensor:
        """What draws every class equally often; an image of several classes counts as the rarest of them."""
        labels = [set(label) if self.multi_label else {label} for _, label in self.samples["train"]]
        counts = Counter(one for group in labels for one in group or {None})
        return torch.tensor([max(1 / counts[one] for one in group or {None}) for group in labels], dtype=torch.float64)

    def _check_files(self, files: list[Path], faults: Faults) -> list[Path]:
        """``files`` without the unreadable ones; an error if there are such and they are not to be skipped."""
        if not (self.verify or faults.skip):
            return files
        looks = find_faults(partial(self.decoding.look, decode=faults.skip), files)
        bad = [(file, look.fault) for file, look in zip(files, looks, strict=True) if look.fault]
        if bad and not faults.skip:
            more = f" (and {len(bad) - 1} more such files)" if len(bad) > 1 else ""
            raise ValueError(f"{bad[0][0]} cannot be read as an image: {bad[0][1]}{more}; {HINT}")
        for file, look in zip(files, looks, strict=True):
            if look.fault:
                faults.add(str(file), UNREADABLE, look.fault)
            elif look.animated:
                faults.note(str(file), SEVERAL, remedy="read by the first of them")
        if bad:
            names = "".join(f"\n  {file}: {fault}" for file, fault in bad[:SHOWN])
            say(f"Left out {len(bad)} of {len(files)} files that cannot be read as images:{names}")
        return [file for file, look in zip(files, looks, strict=True) if not look.fault]


def normalisation(
        mean: Sequence[float] | None, std: Sequence[float] | None, in_chans: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel; for None ImageNet's, or 0.5 where these are not three."""
    half = [0.5] * in_chans
    result = (list(mean or (IMAGENET_DEFAULT_MEAN if in_chans == 3 else half)),
              list(std or (IMAGENET_DEFAULT_STD if in_chans == 3 else half)))
    for name, values in zip(("mean", "std"), result, strict=True):
        if len(values) != in_chans:
            raise ValueError(f"{name} has {len(values)} values, and in_chans is {in_chans}")
    return result


def evaluation_transform(
        image_size: int, interpolation: str, crop_pct: float, mean: Sequence[float],
        std: Sequence[float]) -> Callable[[Any], Tensor]:
    """What makes normalised images ``[C, S, S]`` of pictures or, of other channels than three, of tensors in [0, 1]."""
    if len(mean) == 3:
        return create_transform(
            input_size=image_size, mean=tuple(mean), std=tuple(std), crop_pct=crop_pct, interpolation=interpolation)
    return v2.Compose([v2.Resize(int(image_size / crop_pct), _MODES[interpolation]), v2.CenterCrop(image_size),
                       _Clamp(), v2.Normalize(mean, std)])


class _Images(Dataset):
    """Reads images with their labels, of multi-label images as ``[classes]`` of 0 and 1; a path is handed through."""

    def __init__(
            self, samples: list[tuple[Path, Any]], transform: Callable[[Any], Tensor], decoding: Decoding,
            several: int | None = None):
        self.samples, self.transform, self.decoding, self.several = samples, transform, decoding, several
        self.decoded: DecodedImages | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def file_name(self, index: int) -> str:
        return str(self.samples[index][0])

    def label(self, index: int) -> Any:
        return self.samples[index][1]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        file, label = self.samples[index]
        if self.several is not None:
            label = torch.zeros(self.several).index_fill_(0, torch.tensor(label, dtype=torch.int64), 1)
        if self.decoded is not None:
            return self.transform(self.decoded[index]), label
        read: Callable[..., Any] = read_image if self.decoding.channels == 3 else read_tensor
        return self.transform(read(file, HINT, self.decoding)), label


class _Clamp(torch.nn.Module):
    """Cuts off what an interpolation overshoots."""

    def forward(self, image: Tensor) -> Tensor:
        return image.clamp(0, 1)


_MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC,
          "random": v2.InterpolationMode.BICUBIC}


def _within_ranges(transform: Any) -> Any:
    """The transform, whose augmentations never ask Pillow for what it refuses: to posterise to no bits at all."""
    for step in transform.transforms:
        operations = [*getattr(step, "ops", ()), *(op for part in getattr(step, "policy", ()) for op in part)]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_one_bit_or_more, operation.level_fn)
    return transform


def _one_bit_or_more(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    return (max(1, *level_fn(level, hparams)),)
