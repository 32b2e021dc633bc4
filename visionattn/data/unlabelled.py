"""Images without labels, at any depth of a folder: what a backbone is pretrained on."""
from pathlib import Path
from typing import Literal

from sklearn.model_selection import train_test_split

from ..runtime.folders import EXTENSIONS, find_images
from ..runtime.pixels import MAX_PIXELS
from ..runtime.say import say
from .classification import ClassificationData
from .reading import Faults

__all__ = ["UnlabelledFolderData"]


class UnlabelledFolderData(ClassificationData):
    """All images below ``root``, whatever its folders are called; ``val_fraction`` of them validates.

    Batches are ``(images [B, C, H, W], paths)``, the images normalised and, for training, augmented as
    :class:`ImageFolderData`'s.

    Args:
        root: The folder with the images.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        val_fraction: Share of the images that validates. The choice is fixed: it does not depend on ``seed``.
        verify: False leaves out the check before training, which reads every file's header.
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

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: It holds fewer than two images, or a file that is not an image.
    """

    def __init__(
            self,
            root: str,
            image_size: int = 224,
            batch_size: int = 64,
            num_workers: int = 4,
            seed: int = 0,
            val_fraction: float = 0.05,
            verify: bool = True,
            scale: tuple[float, float] = (0.2, 1.0),
            hflip: float = 0.5,
            color_jitter: float = 0.4,
            auto_augment: str | None = None,
            random_erasing: float = 0.0,
            interpolation: str = "bicubic",
            train_interpolation: str = "bicubic",
            crop_pct: float = 0.875,
            mean: tuple[float, ...] | None = None,
            std: tuple[float, ...] | None = None,
            on_error: Literal["raise", "skip"] = "raise",
            value_range: Literal["type", "file"] | tuple[float, float] = "type",
            max_pixels: int = MAX_PIXELS,
            min_batches: int = 1,
            in_chans: int = 3,
    ):
        super().__init__(
            root, image_size, batch_size, num_workers, seed, verify, None, scale, hflip, color_jitter, auto_augment,
            random_erasing, interpolation, train_interpolation, crop_pct, mean, std, on_error, value_range, max_pixels,
            min_batches, in_chans, False)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"image folder {root} does not exist")
        self.root, self.val_fraction = Path(root), val_fraction
        self.class_names, self.num_classes = [], 0

    def _list_split(self, split: str) -> None:
        faults = Faults(self.root, self.on_error)
        files = self._check_files(find_images(self.root), faults)
        if len(files) < 2:
            raise ValueError(f"{self.root} holds {len(files)} images that can be used ({EXTENSIONS}): two or more are "
                             "needed, some to train and some to validate on")
        count = min(max(round(self.val_fraction * len(files)), 1), len(files) - 1)
        train, val = train_test_split(files, test_size=count, random_state=0)
        say(f"{len(train)} of the images of {self.root} train and {count} validate.")
        parts = {"train": train, "val": val, "test": val}
        self._keep({name: [(file, str(file)) for file in parts[name]] for name in parts}, "train", faults)
