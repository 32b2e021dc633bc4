"""What the segmentation heads share: convolution blocks, their initialisation, and bilinear resizing."""
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = ["classifier", "conv_norm_relu", "init_convolutions", "resize"]


def conv_norm_relu(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution that keeps the size of the map, batch norm and ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
        norm=nn.BatchNorm2d(channels),
        act=nn.ReLU(inplace=True),
    ))


def classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout of whole channels and a linear layer at every pixel, drawn from N(0, 0.01^2)."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, 0)  # type: ignore[arg-type]
    return nn.Sequential(OrderedDict(drop=nn.Dropout2d(dropout), conv=conv))


def init_convolutions(module: nn.Module) -> None:
    """Draws the weights of the convolutions that batch norm and ReLU follow: He's normal, by fan-out."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of ``x [B, C, H, W]`` to ``size`` (height, width), corners not aligned."""
    height, width = size
    return x if x.shape[-2:] == (height, width) else interpolate(
        x, size=(height, width), mode="bilinear", align_corners=False)
