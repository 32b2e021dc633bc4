"""A backbone with a segmentation head, and the ways of running it over an image: whole, in windows, at many scales."""
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dense import DenseBackbone
from ..runtime.tiles import window_starts
from .blocks import resize
from .segformer import SegFormerHead
from .semantic_fpn import SemanticFPNHead
from .taskexpert import TaskExpertHead
from .upernet import FCNHead, UPerNetHead

__all__ = ["HeadName", "Segmenter", "make_head", "multi_scale", "sliding_window"]

HeadName = Literal["upernet", "semantic_fpn", "segformer", "taskexpert"]
_WIDTHS = {"upernet": 512, "semantic_fpn": 128, "segformer": 256, "taskexpert": 256}  # the papers', but for the last


class Segmenter(nn.Module):
    """Segmentation network: normalisation, backbone, head.

    Args:
        backbone: Gives the maps, finest first.
        num_classes: Channels of the logits.
        head: ``upernet``, ``semantic_fpn``, ``segformer`` or ``taskexpert``.
        channels: Width of the head; None for the papers' (512 of UPerNet, 128 of Semantic FPN, 256 of SegFormer), and
            256 of TaskExpert's idea. Semantic FPN's pyramid is twice as wide, the auxiliary head half as wide.
        auxiliary: Add an FCN head on the last but one map, for an auxiliary loss.
    """

    mean: Tensor
    std: Tensor

    def __init__(
            self,
            backbone: DenseBackbone,
            num_classes: int,
            head: HeadName = "upernet",
            channels: int | None = None,
            auxiliary: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = make_head(backbone, num_classes, head, channels)
        self.auxiliary_head = None
        if auxiliary:
            if len(backbone.channels) < 2:
                raise ValueError(f"{backbone.name} gives a single map here and the auxiliary head needs the last but "
                                 "one: set auxiliary_weight to 0")
            width = channels or _WIDTHS[head]
            self.auxiliary_head = FCNHead(backbone.channels[-2], num_classes, max(1, width // 2))
        for name, values in zip(("mean", "std"), backbone.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """What the backbone is given of ``images [B, C, H, W]`` in [0, 1]."""
        return (images - self.mean) / self.std

    def features(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps of ``images [B, C, H, W]`` in [0, 1]."""
        return self.backbone(self.normalised(images))

    def forward(self, images: Tensor, maps: bool = False) -> Any:
        """Logits ``[B, classes, H, W]`` of ``images [B, C, H, W]`` in [0, 1].

        With ``maps`` a list of what the head gives and, if there is one, the auxiliary head: logits ``[B, classes, h,
        w]`` before they are enlarged.
        """
        features = self.features(images)
        logits = self.head(features)
        if not maps:
            return resize(logits, images.shape[-2:])
        return [logits] if self.auxiliary_head is None else [logits, self.auxiliary_head(features[-2])]


def make_head(backbone: DenseBackbone, outputs: int, head: HeadName, channels: int | None = None) -> nn.Module:
    """A head that takes a backbone's maps to ``[B, outputs, H, W]`` at the size of the finest.

    Raises:
        ValueError: There is no such head.
    """
    if head not in _WIDTHS:
        *names, last = _WIDTHS
        raise ValueError(f"head must be {', '.join(names)} or {last}, got {head!r}")
    channels = channels or _WIDTHS[head]
    if head == "upernet":
        return UPerNetHead(backbone.channels, outputs, channels)
    if head == "segformer":
        return SegFormerHead(backbone.channels, outputs, channels)
    if head == "taskexpert":
        return TaskExpertHead(backbone.channels, outputs, channels)
    return SemanticFPNHead(backbone.channels, backbone.reductions, outputs, channels, 2 * channels)


def sliding_window(
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        window: int,
        stride: int,
) -> Tensor:
    """Logits of ``images`` as the mean over overlapping square windows.

    Args:
        model: Takes ``[B, C, h, w]`` to logits ``[B, classes, h, w]``.
        images: ``[B, C, H, W]``.
        window: Side of the windows; an image side below it is one window.
        stride: Step between windows; the last one is moved back to end at the image's edge.

    Returns:
        Logits ``[B, classes, H, W]``.
    """
    height, width = images.shape[-2:]
    total = torch.zeros((), device=images.device)  # takes its shape from the first window
    count = images.new_zeros(height, width)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = model(images[place])
            if not total.ndim:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            count[place] += 1
    return total / count


def multi_scale(
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        size: Sequence[int],
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
) -> Tensor:
    """Mean probability over resized and mirrored copies of the images.

    Args:
        model: Takes ``[B, C, h, w]`` to logits ``[B, classes, h, w]``.
        images: ``[B, C, H, W]``.
        size: Height and width of the result.
        scales: Factors on the images' sides.
        flip: Also mirror every copy.

    Returns:
        ``[B, classes, *size]``: logits for one copy, else the logarithms of the mean probabilities.
    """
    height, width = images.shape[-2:]
    views = [(scale, mirror) for scale in scales for mirror in ((False, True) if flip else (False,))]
    total = torch.zeros((), device=images.device)
    for scale, mirror in views:
        copy = resize(images, (max(1, round(scale * height)), max(1, round(scale * width))))
        logits = resize(model(copy.flip(-1)).flip(-1) if mirror else model(copy), size)
        if len(views) == 1:
            return logits
        total = total + logits.float().softmax(dim=1)
    return (total / len(views)).clamp(min=1e-12).log()
