"""Attention for networks of convolutions: gates on maps ``[batch, channels, height, width]``, of any height and width.

All are ``attn_layer`` modules in timm's sense: ``layer(channels)`` makes one, so that its ResNets and MobileNets take
the class, or a ``functools.partial`` of it. :func:`attach_attention` puts them after single modules of any network.
"""
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

__all__ = ["EfficientLocalAttention", "LittleBitAttention", "SubspaceAttention", "attach_attention"]

# Kernel size, channels of a group of the convolution (0 stands for each channel alone), groups of the norm.
VARIANTS = {"T": (5, 0, 32), "B": (7, 0, 16), "S": (5, 8, 16), "L": (7, 8, 16)}


@register_notrace_module
class EfficientLocalAttention(nn.Module):
    """ELA: every channel is multiplied by a gate of each row and one of each column, which see their neighbors.

    The means of the rows, and those of the columns, go through a convolution along the strip, a group norm and a
    sigmoid ("ELA: Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123). There is no
    authors' code; variants are as third parties' versions agree on them. timm's ``"ela"`` is another layer: with a norm
    over all channels and a SiLU before the sigmoid.

    ======= ====== ============================ ==================
    variant kernel channels of a conv's group   groups of the norm
    ======= ====== ============================ ==================
    T       5      1                            32
    B       7      1                            16
    S       5      8                            16
    L       7      8                            16
    ======= ====== ============================ ==================

    Where the channels are no multiple of these numbers, their greatest common divisors with the channels are taken.

    Args:
        channels: Of the map.
        variant: "T" and "B" for light networks, "B" and "S" for deeper, "L" for large ones.
        shared: Rows and columns go through the same convolution and norm, as in all code there is; if not, through one
            each, as the paper's formulas can be read.
        act_layer: Not used; timm's MobileNets give theirs to every such layer.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no such variant.
    """

    def __init__(
            self,
            channels: int,
            variant: Literal["T", "B", "S", "L"] = "B",
            shared: bool = True,
            act_layer: Any = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant of ELA must be one of {', '.join(VARIANTS)}, got {variant!r}")
        dd: Any = {"device": device, "dtype": dtype}
        self.shared = shared
        self.rows = _Strips(channels, *VARIANTS[variant], **dd)
        self.columns = nn.Identity() if shared else _Strips(channels, *VARIANTS[variant], **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        rows, columns = _mean(x, [3]), _mean(x, [2])
        rows = self.rows(rows)
        columns = self.rows(columns) if self.shared else self.columns(columns)
        return x * rows[:, :, :, None] * columns[:, :, None]


class _Strips(nn.Module):
    """Gates of strips ``[batch, channels, length]``."""

    def __init__(self, channels: int, kernel_size: int, group: int, norm_groups: int, **dd: Any):
        super().__init__()
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels // gcd(channels, group or 1),
            bias=False, **dd)
        self.norm = _GroupNorm(gcd(channels, norm_groups), channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).sigmoid()


class _GroupNorm(nn.GroupNorm):
    """PyTorch's, which itself refuses groups of one value, such as one channel of a map of one row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@register_notrace_module
class SubspaceAttention(nn.Module):
    """ULSAM: channels in groups, each with a map of its own that says where its features are enhanced.

    "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks" (WACV 2020, arXiv
    2006.15102), section 3, as the authors' code has it: a scale and an offset per channel, the maximum of 3 x 3
    positions, a weighted sum of the group's channels, norms and ReLUs after both, then a softmax over all positions.
    Features are multiplied by one plus that: by 1 + 1 / positions in the mean, so that little changes but where a map
    is very peaked. The softmax is computed in float32 or better.

    Args:
        channels: Of the map.
        groups: Divides ``channels``; the authors try 1, 4, 8 and 16.
        act_layer: Not used; timm's MobileNets give theirs to every such layer.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``groups`` does not divide ``channels``.
    """

    def __init__(self, channels: int, groups: int = 4, act_layer: Any = None, device=None, dtype=None):
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"groups ({groups}) of ULSAM must be positive and divide its channels ({channels})")
        dd: Any = {"device": device, "dtype": dtype}
        self.groups = groups
        # The authors' running statistics are nearly those of the last batch.
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **dd)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups, **dd)
        self.bn_point = nn.BatchNorm2d(groups, momentum=0.9, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        # A product and a sum, which is faster than a convolution of single values.
        bias = self.conv_dws.bias
        assert bias is not None  # for TorchScript
        a = torch.addcmul(bias[:, None, None], x, self.conv_dws.weight[:, 0])
        a = F.relu(self.bn_dws(a))
        # PyTorch's pooling on CPUs is ten times as fast on maps that have their channels last in memory.
        a = F.max_pool2d(a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 3, stride=1, padding=1)
        a = F.relu(self.bn_point(self.conv_point(a)))
        flat = a.flatten(2)
        flat = flat.softmax(-1, dtype=torch.promote_types(flat.dtype, torch.float32)).to(x.dtype)
        parts = x.unflatten(1, [self.groups, -1])
        return torch.addcmul(parts, parts, flat.reshape_as(a).unsqueeze(2)).flatten(1, 2)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"groups={self.groups}"


@register_notrace_module
class LittleBitAttention(nn.Module):
    """A gate of every channel and position, the sigmoid of a channel's score plus a position's; at first exactly one.

    A proposal of this zoo, after the aim, not after the (unpublished) operation, of "A Little Bit Attention Is All You
    Need for Person Re-Identification" (arXiv 2302.14574): few operations, at few places that are worth their time. The
    channels' scores are two 1x1 convolutions, a ReLU between them, of the map's mean; the positions' are one 1x1
    convolution of the map. A map is multiplied by twice the sigmoid. As both scores start as zeros, the layer changes
    no bit of a trained network's outputs before it is trained itself. The mean is summed in float32 or better.

    Args:
        channels: Of the map.
        reduction: The channels' scores have ``max(8, channels // reduction)`` hidden channels.
        act_layer: Not used; timm's MobileNets give theirs to every such layer.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``reduction`` is not positive.
    """

    def __init__(self, channels: int, reduction: int = 16, act_layer: Any = None, device=None, dtype=None):
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction must be positive, got {reduction}")
        dd: Any = {"device": device, "dtype": dtype}
        hidden = max(8, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, **dd)
        self.fc2 = _ZeroConv(hidden, channels, **dd)
        self.spatial = _ZeroConv(channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        scores = self.fc2(F.relu(self.fc1(_mean(x, [2, 3], keepdim=True)))) + self.spatial(x)
        return x * (2 * scores.sigmoid())


class _ZeroConv(nn.Module):
    """A 1x1 convolution that starts as zeros; no ``nn.Conv2d``, whose weights networks draw after all is built."""

    def __init__(self, dim: int, out_dim: int, **dd: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 1, 1, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def _mean(x: Tensor, axes: list[int], keepdim: bool = False) -> Tensor:
    """The mean, summed in float32 or better."""
    return x.mean(axes, keepdim=keepdim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def attach_attention(
        model: nn.Module,
        positions: Sequence[str],
        layer: Callable[[int], nn.Module],
        images: Tensor,
) -> nn.Module:
    """Puts an attention layer after each of some modules of a network, which is changed in place::

        model = timm.create_model("resnet50", pretrained=True)
        attach_attention(model, ["layer2", "layer3"], LittleBitAttention, torch.zeros(1, 3, 64, 64))

    A module at ``layer2`` becomes an ``nn.Sequential`` of itself, ``module``, and the layer, ``attn``: its weights are
    found at ``layer2.module`` from then on. So load weights of the network before, not after.

    Args:
        model: Any network that has maps ``[batch, channels, height, width]`` at the positions.
        positions: Names of modules as in ``model.named_modules()``, such as stages or blocks.
        layer: Makes a layer for so many channels.
        images: What the model takes; it runs once without gradients, in eval mode, to see the channels.

    Returns:
        The model.

    Raises:
        ValueError: There is no module of a name, it did not run, it does not give such a map, or it is named twice.
    """
    known = {name: module for name, module in model.named_modules() if name}
    for name in positions:
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no module {name!r}; there are "
                             f"{', '.join(child for child, _ in model.named_children())} and what is in them")
        if list(positions).count(name) > 1:
            raise ValueError(f"position {name!r} is named twice")
    if getattr(model, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"{type(model).__name__} has maps with the channels last, which these layers do not take")
    maps = _outputs(model, {name: known[name] for name in positions}, images)
    for name in positions:
        x = maps.get(name)
        if x is None:
            raise ValueError(f"{name} of {type(model).__name__} did not run, so that nothing can be put after it")
        if not isinstance(x, Tensor) or x.ndim != 4:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} of {type(model).__name__} gives no map [batch, channels, height, width] "
                             f"but {shape}")
    # Inner modules first: what is outside keeps its name until then.
    for name in sorted(positions, key=lambda name: -name.count(".")):
        module, x = known[name], maps[name]
        attn = layer(x.shape[1]).to(device=x.device, dtype=x.dtype).train(module.training)
        wrapped = nn.Sequential()
        wrapped.add_module("module", module)
        wrapped.add_module("attn", attn)
        wrapped.training = module.training
        model.set_submodule(name, wrapped)
    return model


def _outputs(model: nn.Module, modules: dict[str, nn.Module], images: Tensor) -> dict[str, Any]:
    """What modules of a model give for images; the model stays as it is."""
    found: dict[str, Any] = {}
    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, out))
               for name, module in modules.items()]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return found
