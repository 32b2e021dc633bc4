"""The heads of attention of any model: found by the structure of its layers, and masked one by one."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.attention_maps import is_compiled
from ..layers.conv_norm import PointwiseConv

__all__ = ["Heads", "find_heads", "masked_heads"]

_ELSEWHERE = {"timm.models.nest"}  # in whose projection's input the first channels of all heads come first


@dataclass(frozen=True)
class Heads:
    """The heads of one attention layer.

    Attributes:
        name: Of the layer within the model.
        layer: The layer.
        count: Number of heads.
        projection: A child of the layer whose input channels are the outputs of the heads, head after head.
        widths: How many of these channels each head has.
    """

    name: str
    layer: nn.Module
    count: int
    projection: nn.Module
    widths: tuple[int, ...]


def find_heads(model: nn.Module) -> list[Heads]:
    """The attention layers of a model that have heads, timm's or ours, in the order in which they stand and run.

    Such a layer has ``num_heads`` (or ``heads``) and a child ``proj``: a linear layer, or a 1x1 convolution of maps
    ``[batch, channels, height, width]``, alone or with norms and activations around it, of the outputs of the heads
    side by side. Heads are equally wide unless the layer has ``head_widths``.

    Left out are gates of channels without a projection, and layers of experts (UoE, ModularViT), whose heads have
    projections of their own that only the tokens that chose them go through.

    Args:
        model: The model.

    Returns:
        One entry a layer. Layers within another one (the windows of MAFormer) come before it.

    Raises:
        ValueError: The model has no such layer, or is compiled or scripted, so that it cannot be looked into.
    """
    if is_compiled(model):
        raise ValueError(
            f"{type(model).__name__} is compiled: nobody can look into its layers; take the model as it was before")
    found: list[Heads] = []
    _collect(model, "", found, set())
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention with heads: no layer of it has both num_heads (or "
                         "heads) and a projection, proj")
    return found


@contextmanager
def masked_heads(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiplies the outputs of heads within the context; gradients flow to the masks::

        mask = torch.ones(12, requires_grad=True)
        with masked_heads(model, {"blocks.0.attn": mask}):
            loss = criterion(model(images), labels)
        loss.backward()  # mask.grad: how much the loss depends on each head

    Multiplied is a head's share of the input of the layer's projection. That is the output of the head but for what the
    layer adds to it before: the values of the head's own channels convolved (agent attention, BiFormer, routing ViT,
    SMT, CSWin), what MAFormer found in windows. In a cascade (EfficientViT) the next head still sees the head as it is;
    gates of heads (MoH) and their selectors (DependencyViT) do not know of the mask.

    Args:
        model: The model; it is as it was when the context ends.
        masks: For each layer to be masked, by its name in :func:`find_heads`, the factors of its heads ``[heads]``; 1
            changes nothing, 0 takes the head away. Layers without an entry stay as they are.

    Raises:
        ValueError: A name is none of a layer with heads, or a mask has not one factor a head.
    """
    layers = {heads.name: heads for heads in find_heads(model)}
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"{type(model).__name__} has no attention layer {name!r} with heads; it has "
                             f"{', '.join(layers)}")
        if tuple(mask.shape) != (layers[name].count,):
            raise ValueError(f"the mask of {name} must have a factor for each of {layers[name].count} heads, "
                             f"[{layers[name].count}], got {list(mask.shape)}")
    handles = []
    try:
        for name, mask in masks.items():
            handles.append(layers[name].projection.register_forward_pre_hook(_Mask(layers[name], mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mask:
    """Multiplies what goes into a projection."""

    def __init__(self, heads: Heads, mask: Tensor):
        self.mask = mask
        self.widths = torch.tensor(heads.widths)
        inner = input_layer(heads.projection)
        self.axis = -1 if isinstance(inner, nn.Linear) else -3

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        factors = self.mask.to(x.device).repeat_interleave(self.widths.to(x.device)).to(x.dtype)
        return x * (factors if self.axis == -1 else factors[:, None, None]), *args[1:]


def input_layer(projection: nn.Module) -> Any:
    """The linear layer or 1x1 convolution that a projection begins with; None if it begins with something else."""
    for module in projection.modules():
        if isinstance(module, (nn.Linear, PointwiseConv)):
            return module
        if isinstance(module, nn.Conv2d):
            return module if tuple(module.kernel_size) == (1, 1) and module.groups == 1 else None
    return None


def _collect(module: nn.Module, name: str, found: list[Heads], seen: set[nn.Module]) -> None:
    """Adds the layers of a module: those within it, then itself."""
    if module in seen:
        return
    seen.add(module)
    for key, child in module.named_children():
        _collect(child, f"{name}.{key}" if name else key, found, seen)
    projection = module._modules.get("proj")
    count = getattr(module, "num_heads", getattr(module, "heads", None))
    if projection is None or not isinstance(count, int) or type(module).__module__ in _ELSEWHERE:
        return
    inner = input_layer(projection)
    if inner is None:
        return
    channels = inner.weight.shape[0] if isinstance(inner, PointwiseConv) else inner.weight.shape[1]
    widths = getattr(module, "head_widths", None)
    if widths is None and channels % count == 0:
        widths = (channels // count,) * count
    if widths is not None and sum(widths) == channels:
        found.append(Heads(name, module, len(widths), projection, tuple(widths)))
