"""Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3)."""
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from .blocks import classifier, conv_norm_relu, init_convolutions, resize

__all__ = ["SemanticFPNHead"]


class SemanticFPNHead(nn.Module):
    """A feature pyramid whose levels are brought to the finest in steps of two and added.

    A level that is ``2^n`` times coarser than the finest takes n convolutions, each followed by bilinear enlargement;
    the finest takes one convolution.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        reductions: Their strides on the image, in pixels; the ratios to the first are rounded to powers of two.
        num_classes: Channels of the logits.
        channels: Width of the convolutions after the pyramid.
        fpn_channels: Width of the pyramid.
        dropout: Before the classifier.
    """

    def __init__(
            self,
            in_channels: Sequence[int],
            reductions: Sequence[int],
            num_classes: int,
            channels: int = 128,
            fpn_channels: int = 256,
            dropout: float = 0.1,
    ):
        super().__init__()
        self.steps = [round(math.log2(reduction / reductions[0])) for reduction in reductions]
        self.fpn = FeaturePyramidNetwork(list(in_channels), fpn_channels)
        self.scale_heads = nn.ModuleList(
            nn.Sequential(*(conv_norm_relu(channels if i else fpn_channels, channels, 3) for i in range(max(1, steps))))
            for steps in self.steps)
        self.classifier = classifier(channels, num_classes, dropout)
        init_convolutions(self.scale_heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` of maps ``[B, in_channels[i], H_i, W_i]``, at the size of the first."""
        pyramid = self.fpn({str(i): x for i, x in enumerate(features)}).values()
        height, width = features[0].shape[-2:]
        total = 0
        for x, convs, steps in zip(pyramid, self.scale_heads, self.steps, strict=True):
            for i, conv in enumerate(convs.children(), 1):
                left = 2 ** max(0, steps - i)  # halvings that remain: sizes as a backbone that rounds up has them
                x = resize(conv(x), (-(-height // left), -(-width // left)))
            total = total + x
        return self.classifier(total)
