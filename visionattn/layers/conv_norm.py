"""A convolution with its batch norm, and a batch norm with its linear layer, that fold into one layer for inference."""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..ops.dispatch import exporting

__all__ = ["ConvNorm", "NormLinear", "PointwiseConv"]


class ConvNorm(nn.Module):
    """Convolution without a bias (odd kernel, padded to keep the size), then batch norm; maps ``[batch, dim, h, w]``.

    A 1x1 convolution is computed as a matrix product over channels-last maps, which the CPU does without repacking; so
    the result of one is channels-last in memory, and convolutions, norms and activations keep it so.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        kernel_size: Side of the kernel, odd.
        stride: Stride.
        groups: Groups of channels that do not see each other.
        shortcut: Whether the input is added to the result; needs the same channels and stride 1.
        gain: Initial scale of the norm; 0 starts a branch that does nothing.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            kernel_size: int = 1,
            stride: int = 1,
            groups: int = 1,
            shortcut: bool = False,
            gain: float = 1.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride = stride
        self.pointwise = kernel_size == stride == groups == 1
        self.shortcut = shortcut
        self.gain = gain
        self.conv = nn.Conv2d(
            dim, out_dim, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_dim, **dd)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the scale of the norm to ``gain``."""
        nn.init.constant_(self.bn.weight, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[batch, out_dim, h, w]``, divided by the stride and rounded up."""
        if torch.jit.is_scripting():
            y = self.conv(x)
        elif self.pointwise and not exporting():
            y = F.linear(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1)).permute(0, 3, 1, 2)
        else:  # ONNX Runtime has no use for channels-last maps: there the product would only bring transpositions
            y = self.conv(x)
        y = self.bn(y)
        return x + y if self.shortcut else y

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Returns one layer that does the same in eval mode, norm and shortcut folded into the convolution."""
        old = self.conv
        gain, offset = _scale_and_shift(self.bn)
        weight = old.weight.to(gain.dtype) * gain[:, None, None, None]
        if self.shortcut:
            weight += nn.init.dirac_(torch.empty_like(weight), groups=old.groups)
        dd: dict[str, Any] = dict(device=old.weight.device, dtype=old.weight.dtype)
        if self.pointwise:
            return _fill(PointwiseConv(old.in_channels, old.out_channels, **dd), weight.flatten(1).T, offset)
        size: Any = old.kernel_size
        layer = nn.Conv2d(
            old.in_channels, old.out_channels, size, stride=self.stride, padding=size[0] // 2, groups=old.groups, **dd)
        return _fill(layer, weight, offset)


class PointwiseConv(nn.Module):
    """A 1x1 convolution with a bias as a matrix product over channels-last maps, as :meth:`ConvNorm.fuse` makes it.

    Its weight is ``[dim, out_dim]``, the layout that small products run fastest in.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, out_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, dim, h, w]`` to ``[batch, out_dim, h, w]``."""
        if torch.jit.is_scripting():
            return F.conv2d(x, self.weight.t()[:, :, None, None], self.bias)
        if exporting():
            return F.conv2d(x, self.weight.t()[:, :, None, None], self.bias)
        batch, dim, height, width = x.shape
        y = torch.addmm(self.bias, x.permute(0, 2, 3, 1).reshape(-1, dim), self.weight)
        return y.unflatten(0, [batch, height, width]).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return "{}, {}".format(*self.weight.shape)


class NormLinear(nn.Module):
    """Batch norm of features ``[batch, dim]``, then a linear layer to ``[batch, out_dim]``.

    Args:
        dim: Features of the input.
        out_dim: Features of the output.
        drop: Dropout rate between the two.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.bn: nn.Module = nn.BatchNorm1d(dim, **dd)
        self.drop = nn.Dropout(drop)
        self.linear = nn.Linear(dim, out_dim, **dd)
        trunc_normal_(self.linear.weight, std=.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[batch, out_dim]``."""
        return self.linear(self.drop(self.bn(x)))

    @torch.no_grad()
    def fuse(self) -> "NormLinear":
        """Folds the norm (as in eval mode) into the linear layer, in place; returns self."""
        if isinstance(self.bn, nn.Identity):
            return self
        old = self.linear
        gain, offset = _scale_and_shift(self.bn)
        weight = old.weight.to(gain.dtype)
        layer = nn.Linear(old.in_features, old.out_features, device=old.weight.device, dtype=old.weight.dtype)
        self.linear = _fill(layer, weight * gain, weight @ offset + old.bias)
        self.bn = nn.Identity()
        return self


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by and adds in eval mode, in float32 at least."""
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    weight, bias, mean, var = (x.to(dtype) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    gain = weight * (var + norm.eps).rsqrt()
    return gain, bias - mean * gain


def _fill(layer: Any, weight: Tensor, bias: Tensor) -> Any:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
