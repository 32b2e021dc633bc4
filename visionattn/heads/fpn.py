"""Feature pyramids for detection, also over backbones whose finest map is too coarse for one."""
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

__all__ = ["FeaturePyramid"]


class FeaturePyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid, with levels that are finer than the backbone's maps where these are wanted.

    Such levels are made as EfficientViT's authors do for detection: by 2 x 2 transposed convolutions of stride 2, the
    first on the finest sum of the top-down path, each followed by a 3 x 3 convolution. Of the levels that are coarser
    than the maps, one is made by subsampling the coarsest level (as of Mask R-CNN), two by convolutions on the
    coarsest map (as of RetinaNet).

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        reductions: Their strides on the image, in pixels.
        strides: Of the pyramid's levels. Each is twice the one before it.
        channels: Width of the pyramid.

    Raises:
        ValueError: The strides do not double, lack one of the maps', or go further than two levels beyond these.
    """

    def __init__(self, in_channels: Sequence[int], reductions: Sequence[int], strides: Sequence[int], channels: int):
        first, last = reductions[0], reductions[-1]
        finer, coarser = [s for s in strides if s < first], [s for s in strides if s > last]
        doubling = [strides[0] * 2 ** i for i in range(len(strides))]
        if list(strides) != doubling or set(strides) - {*finer, *coarser} != set(reductions) or len(coarser) > 2:
            raise ValueError(f"a pyramid over maps of stride {list(reductions)} cannot have levels of stride "
                             f"{list(strides)}: they must double, and end at {4 * last} or before")
        extra: ExtraFPNBlock | None = None
        if coarser:
            extra = LastLevelMaxPool() if len(coarser) == 1 else LastLevelP6P7(in_channels[-1], channels)
        super().__init__(list(in_channels), channels, extra)
        self.out_channels = channels
        self.up_blocks = nn.ModuleList(nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in finer)
        self.up_layer_blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in finer)
        for module in (*self.up_blocks, *self.up_layer_blocks):  # as torchvision does for the other levels
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> "OrderedDict[str, Tensor]":  # type: ignore[override]
        """The backbone's maps to the levels, finest first, called "0", "1", ..."""
        sums = [block(x) for block, x in zip(self.inner_blocks, maps, strict=True)]
        for i in reversed(range(len(sums) - 1)):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], size=sums[i].shape[-2:], mode="nearest")
        levels = [block(x) for block, x in zip(self.layer_blocks, sums, strict=True)]
        finest = sums[0]
        for up_block, layer_block in zip(self.up_blocks, self.up_layer_blocks, strict=True):
            finest = up_block(finest)
            levels.insert(0, layer_block(finest))
        if self.extra_blocks is not None:
            levels, _ = self.extra_blocks(levels, maps, [])
        return OrderedDict((str(i), level) for i, level in enumerate(levels))
