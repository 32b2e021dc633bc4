"""torchvision's detectors over any backbone of the zoo."""
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from ..dense import DenseBackbone
from .fpn import FeaturePyramid

__all__ = ["DETECTORS", "build_detector"]

DETECTORS: dict[str, type[nn.Module]] = {
    "fcos": detection.FCOS,
    "retinanet": detection.RetinaNet,
    "faster_rcnn": detection.FasterRCNN,
    "mask_rcnn": detection.MaskRCNN,
}


class PyramidBackbone(nn.Module):
    """``body`` and ``fpn`` in the form that torchvision's detectors take: images to a dict of maps of one width."""

    def __init__(self, body: nn.Module, fpn: FeaturePyramid):
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, fpn.out_channels

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalised images ``[B, 3, H, W]`` to the pyramid's levels, finest first."""
        return self.fpn(self.body(images))


def build_detector(
        name: str,
        body: DenseBackbone,
        num_classes: int,
        strides: Sequence[int] | None = None,
        channels: int = 256,
        anchor_scale: float | None = None,
        **kwargs: Any,
) -> Any:
    """Returns a detector: torchvision's class ``name`` on a feature pyramid over ``body``.

    It takes images ``[C, H, W]`` in [0, 1] and targets as torchvision's detectors do, with labels from 1 on.

    Args:
        name: ``fcos``, ``retinanet``, ``faster_rcnn`` or ``mask_rcnn``.
        body: The backbone; of its maps those whose stride is one of the pyramid's are kept.
        num_classes: Without the background.
        strides: Of the pyramid's levels; None for 8 to 128 (FCOS, RetinaNet) or 4 to 64 (R-CNN).
        channels: Width of the pyramid and of the heads, a multiple of 64 for FCOS.
        anchor_scale: Side of the anchors in units of their level's stride; None for 1 (FCOS), 4 (RetinaNet, which has
            three sizes from there to the next octave) or 8 (R-CNN).
        kwargs: Arguments of torchvision's class.

    Raises:
        ValueError: There is no such detector or argument, or the backbone has no maps for the strides.
    """
    if name not in DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(DETECTORS)}, got {name!r}")
    known = inspect.signature(DETECTORS[name]).parameters
    for key in kwargs:
        if key not in known:  # torchvision would drop it silently
            raise ValueError(f"{name} has no argument {key}; it has {', '.join(known)}")
    if name == "fcos" and channels % 64:  # one value a group cannot be normalised, as on a map of one position
        raise ValueError(f"fcos has norms of 32 groups: its width must be a multiple of 64, got {channels}")
    two_stage = name.endswith("rcnn")
    if strides is None:
        finest, beyond = (4, 2) if two_stage else (8, 4)
        coarsest = min(16 * finest, beyond * body.reductions[-1])
        strides = [stride for stride in (4, 8, 16, 32, 64, 128) if finest <= stride <= coarsest]
    if not set(strides) & set(body.reductions):
        raise ValueError(f"the backbone has maps of stride {body.reductions}, none for strides {list(strides)}")
    body.keep(strides)
    backbone = PyramidBackbone(body, FeaturePyramid(body.channels, body.reductions, strides, channels))

    scale = anchor_scale or {"fcos": 1, "retinanet": 4}.get(name, 8)
    octave = [2 ** (i / 3) for i in range(3)] if name == "retinanet" else [1]
    anchors = AnchorGenerator(
        tuple(tuple(scale * stride * size for size in octave) for stride in strides),
        (((1.0,) if name == "fcos" else (0.5, 1.0, 2.0)),) * len(strides))
    mean, std = body.normalisation
    common: dict[str, Any] = dict(image_mean=mean, image_std=std)
    if not two_stage:
        return DETECTORS[name](
            backbone, num_classes + 1, anchor_generator=anchors, **common | dict(score_thresh=0.05) | kwargs)
    # The heads are torchvision's own for a pyramid of 256 channels.
    common |= dict(
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(channels * 7 * 7, 4 * channels),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(4 * channels, num_classes + 1))
    if name == "mask_rcnn":
        common |= dict(
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1))
    return DETECTORS[name](backbone, **common | kwargs)
