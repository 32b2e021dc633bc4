"""What each layer of a model attends to: attention maps by layer."""
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..dense import DenseBackbone, backbone_of
from ..layers import CascadedGroupAttention
from ..layers.attention_maps import offering_attention
from ..ops.recording import Recorder

__all__ = ["LayerAttention", "recorded_by_layer"]


class LayerAttention:
    """What one layer attended to in a forward pass.

    Attributes:
        name: Of the layer, as ``model.named_modules()`` has it.
        module: The layer: the innermost module that was running.
        model: The model; of a dense backbone the timm model in it.
        around: The modules that were running, from the model to the layer, each with the shape of the first tensor that
            it was given.
        part: Counts the attentions that the layer ran, from 0.
    """

    def __init__(self, model: nn.Module, around: list[tuple[str, nn.Module, tuple[int, ...]]], part: int):
        self.name = around[-1][0]
        self.module: Any = around[-1][1]
        self.model = model
        self.around: list[tuple[Any, tuple[int, ...]]] = [(module, shape) for _, module, shape in around]
        self.part = part
        self._offers: list[tuple[bool, Callable[[], Tensor]]] = []
        self._counts: list[Callable[[], int] | None] = []

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the images that the model was given; those of a dense backbone with their padding."""
        height, width = self.around[0][1][2:]
        return height, width

    @property
    def count(self) -> int:
        """How many numbers :attr:`maps` are, as far as that is known before they are computed."""
        return sum(count() for count in self._counts if count is not None)

    @cached_property
    def maps(self) -> Tensor:
        """Its probabilities ``[batch, heads, queries, keys]``, as :func:`visionattn.layers.attention_maps` has them.

        They are computed when somebody asks, and kept with this object. Of attention within windows
        (``batch`` is the number of all) each image's windows are together. The heads of cascaded group attention are
        those of one map.
        """
        found = []
        for grad, compute in self._offers:
            with torch.set_grad_enabled(grad), Recorder().paused():
                found.append(compute())
        return torch.cat(found, dim=1)


class _ByLayer(Recorder):
    """Takes offers together with the modules that were running."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.running: list[tuple[str, nn.Module, Any]] = []
        self.found: list[LayerAttention] = []

    def offer(self, compute: Callable[[], Tensor], count: Callable[[], int] | None = None) -> None:
        if not self.running:  # not the model's
            return
        module = self.running[-1][1]
        before = [layer for layer in self.found if layer.module is module]
        if before and isinstance(module, CascadedGroupAttention):
            layer = before[0]
        else:
            layer = LayerAttention(self.model, self.running, len(before))
            self.found.append(layer)
        layer._offers.append((torch.is_grad_enabled(), compute))
        layer._counts.append(count)


@contextmanager
def recorded_by_layer(model: nn.Module) -> Iterator[list[LayerAttention]]:
    """Records what the layers of a model attend to in its forward passes within the context::

        with recorded_by_layer(model) as layers:
            logits = model(images)
        for layer in layers:
            print(layer.name, layer.maps.shape)

    The list is filled when the context ends, in the order of the computation; it stays empty for a model without
    attention. Results and gradients are those without the context. Only the thread that enters it is recorded.

    Args:
        model: Any model, ours or timm's; run itself, not through ``forward_features``, as its input says how large the
            images are. Once: of a second run the attentions would count as further parts of the layers. Of a segmenter
            or a detector it is the :class:`visionattn.dense.DenseBackbone`, whose layers have the timm model's names.

    Raises:
        ValueError: The model is compiled or scripted.
    """
    layers: list[LayerAttention] = []
    inner: nn.Module = backbone_of(model) if isinstance(model, DenseBackbone) else model
    recorder, thread = _ByLayer(inner), threading.get_ident()

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == thread:
                given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                if isinstance(model, DenseBackbone) and not name and given is not None:
                    given = model.padded(given)
                recorder.running.append((name, module if name else inner, () if given is None else tuple(given.shape)))
        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            recorder.running.pop()

    hooks = []
    try:
        for name, module in inner.named_modules():
            called = module if name else model  # a dense backbone runs its model by another method than forward
            hooks.append(called.register_forward_pre_hook(enter(name), with_kwargs=True))
            hooks.append(called.register_forward_hook(leave, always_call=True))
        with offering_attention(model, recorder):
            yield layers
    finally:
        for handle in hooks:
            handle.remove()
    layers += recorder.found
