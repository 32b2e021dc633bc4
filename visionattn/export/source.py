"""A model on its way into a file: a copy of it, what it is captured with, and how its file is compared with it."""
import copy
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ..dense import backbone_of
from ..heads import Segmenter
from .check import IMAGES, Check, photographs, relative
from .graph import explained

__all__ = ["MULTIPLE", "Source", "plain", "source_of"]

MULTIPLE, MOST = 32, 4096  # of free image sizes: multiples of the one, up to the other


class Source(NamedTuple):
    """What exporters are told of a model that takes batches of images to logits, or to a list of maps."""

    model: nn.Module
    images: Tensor  # to capture it with
    free: dict[int, Any]  # axes of the images whose lengths are free
    names: list[str]  # of its outputs
    check: Check


def plain(model: nn.Module, fuse: bool) -> Any:
    """A copy of a model as it is exported: float32 on the CPU, in eval mode; with norms folded if ``fuse`` says so."""
    model = copy.deepcopy(model).cpu().float().eval()
    return reparameterize_model(model, inplace=True) if fuse else model


def source_of(model: Any, image_size: tuple[int, int] | None, dynamic_size: bool) -> Source:
    """What exporters are told of a model, no detector, as :func:`plain` makes it.

    Raises:
        ValueError: ``dynamic_size`` with sides that are no multiples of 32.
        RuntimeError: The model cannot take images of this size.
    """
    channels, *own_size = _image_shape(model)
    size = (image_size or own_size)[0], (image_size or own_size)[1]
    if dynamic_size and any(side % MULTIPLE for side in size):
        raise ValueError(f"free sizes are multiples of {MULTIPLE}; the example of {size[0]} x {size[1]} is not one")
    with torch.inference_mode(), explained("PyTorch cannot export this model"):
        answers = model(torch.zeros(1, channels, *size))
    features = isinstance(answers, (list, tuple))
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    example = size
    if dynamic_size:
        # Multiples of the coarsest stride keep the maps' sizes free of rounding, which torch.export cannot solve.
        rows, columns = (torch.export.Dim(name, min=2, max=MOST // MULTIPLE) for name in ("rows", "columns"))
        free |= {2: MULTIPLE * rows, 3: MULTIPLE * columns}
        # PyTorch takes lengths that are 1 in the example, such as the number of windows, for 1 in every image.
        example = 2 * max(size[0], own_size[0]), 2 * max(size[1], own_size[1])
    sizes = [size, (size[0] + 32, size[1]), (size[0], size[1] + 64)] if dynamic_size else [size]
    check = Check(
        answer=lambda images: tuple(model(images)) if features else (model(images),),
        difference=relative,
        draw=_in_unit_range if isinstance(model, Segmenter) else _normalised,
        shapes=[(batch, channels, *size) for size in sizes for batch in (1, IMAGES)])
    names = [f"map_{i}" for i in range(len(answers))] if features else ["logits"]
    return Source(model, torch.randn(2, channels, *example), free, names, check)


def _in_unit_range(*shape: int, generator: torch.Generator) -> Tensor:
    """Photographs; of several images the last one is random."""
    images = photographs(*shape, generator=generator)
    if len(images) > 1:
        images[-1] = torch.rand(*shape[1:], generator=generator)
    return images


def _normalised(*shape: int, generator: torch.Generator) -> Tensor:
    """Photographs as classifiers take them; of several images the last one is random."""
    images = (photographs(*shape, generator=generator) - 0.45) / 0.225  # about what is usual of their channels
    if len(images) > 1:
        images[-1] = torch.randn(*shape[1:], generator=generator)
    return images


def _image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was made for, or its run validated on."""
    settings = getattr(model, "run", {}).get("_image_settings") or {}
    model = backbone_of(model)
    channels, height, width = model.pretrained_cfg["input_size"]
    inner = getattr(model, "model", model)  # of what timm wraps for features
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    channels = getattr(inner, "in_chans", first.in_channels if first else channels)
    made_for = getattr(inner, "img_size", None) or getattr(getattr(inner, "patch_embed", None), "img_size", None)
    made_for = settings.get("image_size") or made_for or settings.get("short_side") or settings.get("crop_size")
    return channels, *(to_2tuple(made_for) if made_for else (height, width))
