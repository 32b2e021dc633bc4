"""The attention probabilities of any model, ours or timm's, without a change to the model or its forward pass.

Nothing is hooked or switched in the model. Attention of ours offers its probabilities to a recorder
(:mod:`visionattn.ops.recording`); that of other models is seen where it calls PyTorch, in the thread that asks.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.recording import Recorder, current_recorder
from ..ops.sdpa import probabilities

__all__ = ["attention_maps", "is_compiled", "offering_attention"]

_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_PASSED_THROUGH = {F.dropout, torch.dropout, Tensor.to, Tensor.type_as}  # between a softmax and the values
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


@contextmanager
def attention_maps(model: nn.Module, last: bool = False) -> Iterator[list[Tensor]]:
    """Records the attention probabilities of the forward passes within the context::

        with attention_maps(model) as maps:
            logits = model(images)
        for probabilities in maps:  # [batch, heads, queries, keys], layer by layer
            ...

    The list is filled when the context ends. Gradients flow through the maps where they are on in the forward pass;
    its results are what they are without the context. Seen are PyTorch's ``scaled_dot_product_attention``, a softmax
    that is multiplied by values (after dropout, if it has some), and the ops of this package.

    * Rows are queries, each sums to one before dropout. Tokens are as the layer has them: class tokens and the like
      first, maps row by row; keys may be pooled, or more than the map has.
    * Attention within windows (Swin) gives the maps of its windows: ``batch`` is the number of all windows.
    * Attention of ours to few of the keys (neighborhood, routed, k-means and others) gives whole maps, 0 for keys that
      a query does not see: ``tokens ** 2`` numbers a head. Agent attention gives the product of its two softmaxes, a
      window of variable size what its samples take from each token. In aggregated attention the pooled keys come after
      the map's. In k-means routing rows are means over a query's clusters, 0 for a query of none. Flow attention gives
      what it weighs the values by, rows of which do not sum to one.
    * Reversed attention gives what every token (row) receives from every other one: columns sum, over the heads, to the
      senders' gates.
    * Cascaded group attention computes head after head: each is a map with one head.

    The thread that enters the context records what it runs itself, so several threads may do so with one model. Within
    another such context the inner one alone records.

    Args:
        model: The model that is run, for what is said where it gives no maps; nothing else is to run attention.
        last: Give the last map alone. The others are not computed.

    Yields:
        The maps, of the dtype that the layer's softmax has.

    Raises:
        ValueError: The model gives no maps: it is compiled or scripted, or its forward pass runs no attention that is
            seen.
    """
    maps: list[Tensor] = []
    recorder = Recorder(last)
    with offering_attention(model, recorder):
        yield maps
    maps += recorder.take()
    if not maps:
        raise ValueError(
            f"{type(model).__name__} gives no attention maps: it ran neither scaled_dot_product_attention, nor a "
            "softmax that is multiplied by values, nor attention of visionattn")


@contextmanager
def offering_attention(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within the context, all attention that this thread runs is offered to ``recorder``, and to no other.

    Raises:
        ValueError: The model is compiled or scripted.
    """
    if is_compiled(model):
        raise ValueError(
            f"{type(model).__name__} is compiled: nobody sees the attention in its graph; take the model as it was "
            "before")
    with recorder.recording(), _Watch(recorder):
        yield


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled or scripted, so that nobody sees what happens in it."""
    return any(isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
               or getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


class _Watch(TorchFunctionMode):
    """Offers the probabilities of attention that is written in PyTorch's functions."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder
        self.weights: Tensor | None = None  # of the softmax that was last computed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if current_recorder() is not self.recorder:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _SOFTMAX:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            self.weights = out if axis in (-1, out.ndim - 1) and out.ndim > 2 else None
        elif args and self.weights is not None and args[0] is self.weights:
            if func in _PASSED_THROUGH:
                self.weights = out
            elif func in _PRODUCTS:
                weights, self.weights = self.weights, None
                self.recorder.offer(lambda: _by_head(weights))
        return out

    def _attend(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
    ) -> Tensor:
        """PyTorch's function; with dropout, which weights it keeps is known only if they are computed here."""
        def compute() -> Tensor:
            k = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3) if enable_gqa else key
            mask = attn_mask
            if is_causal:
                mask = torch.ones(query.shape[-2], k.shape[-2], dtype=torch.bool, device=query.device).tril()
            return probabilities(query, k, mask, scale)

        if not dropout_p:
            self.recorder.offer(lambda: _by_head(compute()), lambda: query.shape[:-1].numel() * key.shape[-2])
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        weights = F.dropout(compute(), dropout_p)
        self.recorder.offer(lambda: _by_head(weights))
        if enable_gqa:
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
        return weights.to(value.dtype) @ value


def _by_head(weights: Tensor) -> Tensor:
    """``[batch, heads, queries, keys]`` of weights that have no axis of heads, or several before it."""
    return weights.unsqueeze(1) if weights.ndim == 3 else weights.flatten(0, -4)
