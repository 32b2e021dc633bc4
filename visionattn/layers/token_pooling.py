"""Token-aware average pooling (TAP): each token takes in its surroundings, as far as it finds useful.

Paper: "Robustifying Token Attention for Vision Transformers" (ICCV 2023, arXiv 2303.11126), section 3.1.
"""
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TokenAwarePooling"]


class TokenAwarePooling(nn.Module):
    """A mixture, of each token's own, of the map and of its means over neighborhoods of growing dilation.

    The first scale is the map itself. Scale ``k`` is the mean of the 3 x 3 tokens that are ``k`` apart; those beyond
    the edges count as zeros. Two convolutions with a batch norm between them say how much of each scale a token takes,
    the same for all channels.

    Args:
        dim: Channels.
        num_scales: Scales; with 1 the layer changes nothing.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no scale.
    """

    def __init__(self, dim: int, num_scales: int = 4, device=None, dtype=None):
        super().__init__()
        if num_scales < 1:
            raise ValueError(f"num_scales must be 1 or more, got {num_scales}")
        dd = {"device": device, "dtype": dtype}
        self.num_scales = num_scales
        self.predictor = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False, **dd),
            nn.BatchNorm2d(num_scales, **dd),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, dim]`` to the same."""
        weights = self.predictor(x.permute(0, 3, 1, 2)).softmax(dim=1).unsqueeze(-1)
        height, width, margin = x.shape[1], x.shape[2], self.num_scales - 1
        padded = F.pad(x, (0, 0, margin, margin, margin, margin))
        out = x * weights[:, 0]
        for k in range(1, self.num_scales):
            # The sums over three rows, then over three columns: four additions a scale instead of eight.
            sums = padded.narrow(1, margin - k, height) + padded.narrow(1, margin, height) + padded.narrow(
                1, margin + k, height)
            sums = sums.narrow(2, margin - k, width) + sums.narrow(2, margin, width) + sums.narrow(
                2, margin + k, width)
            out = out + sums * (weights[:, k] / 9)
        return out
