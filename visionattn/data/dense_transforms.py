"""Training transforms of pictures together with their boxes and masks, on torchvision's ``tv_tensors``."""
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2 import query_size

__all__ = ["IGNORE", "SegmentationTransform", "detection_transform", "resize_shorter", "to_image"]

IGNORE = 255  # label of pixels that neither train nor count
FILL = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]  # of uint8 images: nothing, once normalised
MIDDLE = 0.5  # the same of images in [0, 1] of other channels than three
CROPS = 10  # crops tried for one in which no class prevails


def detection_transform(
        sizes: list[int] | None, max_size: int | None, hflip: float, large_scale_jitter: int | None,
        channels: int = 3, detr_crops: bool = False) -> v2.Transform:
    """The training transform of ``(image, target)``.

    Args:
        sizes: The shorter side becomes one of these; None leaves the image's size.
        max_size: Bound of the longer side, with ``sizes``.
        hflip: Probability of a mirrored image.
        large_scale_jitter: Side of the square image that a resize by 0.1 to 2 and a crop (or padding) lead to, in
            place of ``sizes``; None is off.
        channels: Of the images.
        detr_crops: Half of the images are first resized to a shorter side of 400, 500 or 600, and cropped to a height
            and a width between 384 and 600 (DETR, arXiv 2005.12872, section 4).

    Returns:
        Takes an image and a target whose ``boxes`` and ``masks`` are ``tv_tensors`` to the same in random size.
        Objects that are smaller than a pixel then lose ``boxes``, ``labels``, ``masks``, ``area`` and ``iscrowd``
        together, also if none is left.
    """
    resize: list[v2.Transform] = []
    if detr_crops:
        resize = [v2.RandomApply([v2.RandomShortestSize([400, 500, 600]), _RandomSizeCrop(384, 600)])]
    if large_scale_jitter is not None:
        side = large_scale_jitter, large_scale_jitter
        fill: Any = {tv_tensors.Image: FILL if channels == 3 else MIDDLE, tv_tensors.Mask: 0}
        resize = [v2.ScaleJitter(side), v2.RandomCrop(side, pad_if_needed=True, fill=fill)]
    elif sizes is not None:
        resize.append(v2.RandomShortestSize(sizes, max_size))
    return v2.Compose([*resize, v2.RandomHorizontalFlip(hflip), v2.ClampBoundingBoxes(),
                       v2.SanitizeBoundingBoxes(labels_getter=_per_object)])


class _RandomSizeCrop(v2.Transform):
    """Crops to a height and a width from ``least`` to ``most``, or the image's own where that is less."""

    def __init__(self, least: int, most: int):
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = query_size(flat_inputs)
        crop = [min(int(torch.randint(self.least, self.most + 1, ())), side) for side in size]
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(size, crop, strict=True))
        return dict(top=top, left=left, height=crop[0], width=crop[1])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class SegmentationTransform:
    """The training transform of an image and its labels: random resize, crop, flip and colours.

    Args:
        crop_size: Height and width of the result.
        short_side: Length of the shorter side at a scale of 1; None leaves the image's own size.
        max_size: Bound of the longer side at a scale of 1.
        scale: Range of the random scale.
        cat_max_ratio: Largest share of one class in the crop: ten crops are tried for one that keeps to it.
        hflip: Probability of a mirrored image.
        color_jitter: Strength of random contrast and saturation (brightness a quarter, hue a tenth of it); 0 is off.
    """

    def __init__(
            self, crop_size: int, short_side: int | None, max_size: int | None, scale: tuple[float, float],
            cat_max_ratio: float, hflip: float, color_jitter: float):
        self.crop_size, self.short_side, self.max_size = crop_size, short_side, max_size
        self.scale, self.cat_max_ratio, self.hflip = scale, cat_max_ratio, hflip
        self.jitter = v2.ColorJitter(color_jitter / 4, color_jitter, color_jitter, color_jitter / 10)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``image [C, H, W]`` (of three channels uint8) and ``labels [H, W]`` to the same of ``crop_size``."""
        least, largest = self.scale
        scale = least + (largest - least) * torch.rand(()).item()
        size = _scaled(tuple(image.shape[-2:]), self.short_side, self.max_size, scale)
        image = F.resize(image, list(size), antialias=True)
        labels = F.resize(labels[None], list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
        image, labels = self._crop(image, labels)
        if torch.rand(()) < self.hflip:
            image, labels = image.flip(-1), labels.flip(-1)
        return self.jitter(image), labels

    def _crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = min(self.crop_size, labels.shape[0]), min(self.crop_size, labels.shape[1])
        for _ in range(CROPS):
            top = int(torch.randint(labels.shape[0] - height + 1, ()))
            left = int(torch.randint(labels.shape[1] - width + 1, ()))
            part = labels[top:top + height, left:left + width]
            counts = torch.bincount(part[part != IGNORE].flatten())
            if len(counts) and counts.max() < self.cat_max_ratio * counts.sum():
                break
        fill = FILL if len(image) == 3 else MIDDLE
        padding = [0, 0, self.crop_size - width, self.crop_size - height]
        image = F.pad(image[:, top:top + height, left:left + width], padding, fill=fill)
        return image, F.pad(part[None], padding, fill=IGNORE)[0]


def resize_shorter(image: Tensor, short_side: int | None, max_size: int | None) -> Tensor:
    """An evaluation image whose shorter side is ``short_side`` (its own if None), the longer ``max_size`` at most."""
    size = _scaled(tuple(image.shape[-2:]), short_side, max_size, 1.0)
    return image if size == image.shape[-2:] else F.resize(image, list(size), antialias=True)


def to_image(image: Tensor) -> Tensor:
    """float32 in [0, 1] of an image of uint8 or in [0, 1]."""
    return F.to_dtype(image, torch.float32, scale=True)


def _scaled(size: tuple[int, ...], short_side: int | None, max_size: int | None, scale: float) -> tuple[int, int]:
    """Height and width with the shorter side ``short_side`` and the longer ``max_size`` at most, times ``scale``."""
    if short_side is not None:
        scale *= min(short_side / min(size), float("inf") if max_size is None else max_size / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def _per_object(inputs: Any) -> tuple[Tensor, ...]:
    """What a target holds for each object, beside boxes and masks."""
    _, target = inputs
    return target["labels"], target["area"], target["iscrowd"]
