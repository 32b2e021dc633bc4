"""Attention to the keys that a cheap predictor finds for every image, head and query.

"Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (arXiv 2303.13755),
section 3. That queries may share their keys is this project's own, and so is what happens on maps of other sizes.
"""
import math
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, Optional, Tuple  # noqa: UP035 - TorchScript reads Optional and Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops import sparsified_attention
from ..ops.dispatch import larger, no_autocast, numbers
from ..ops.kept import keep
from ..ops.recording import current_recorder, unit_values
from ..ops.sdpa import probabilities
from .auxiliary import AuxiliaryLosses, in_backward
from .full import attend
from .scripting import unscripted

__all__ = ["KeyPredictor", "SparsifiedAttention", "guess_attention", "resize_factors", "score_keys"]

Grid = tuple[int, int]  # rows and columns

_COEFFICIENTS = 8  # of a list that count
_LEAST = 0.02  # that an entry of the basis has to be larger than
_BELOW = 1e-6  # factor on the others: they settle nothing but ties, of keys that would all have a score of zero


class KeyPredictor(nn.Module):
    """A guess of the attention, of low rank, that costs less than the attention.

    Of queries and keys at half the width, the keys are summed up into ``rank`` tokens by the learnt factor ``down
    [tokens, rank]``; the attention to these, a softmax, weights a basis of attention patterns, the learnt factor ``up
    [tokens, rank]``. Both are for maps of ``size``. For other maps their rows are interpolated, and those of ``down``
    scaled by the number of tokens, so that the sum over an even map stays.

    Args:
        num_heads: Heads of the attention; they share the parameters.
        head_dim: Channels of a head.
        size: Height and width of the map that the factors are for.
        rank: Columns of the factors.
        num_prefix_tokens: Number of class tokens before the map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            num_heads: int,
            head_dim: int,
            size: Grid,
            rank: int = 32,
            num_prefix_tokens: int = 0,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.size = size
        self.num_prefix_tokens = num_prefix_tokens
        self.rank = rank
        self.scale = num_heads ** -0.5  # of the heads, not of the channels: so it is in the authors' models
        self.q = nn.Linear(head_dim, max(head_dim // 2, 1), **dd)
        self.k = nn.Linear(head_dim, max(head_dim // 2, 1), **dd)
        self.down = nn.Parameter(torch.empty(num_prefix_tokens + math.prod(size), rank, **dd))
        self.up = nn.Parameter(torch.empty(num_prefix_tokens + math.prod(size), rank, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the factors anew."""
        for factor in (self.down, self.up):
            trunc_normal_(factor, std=.02)

    @torch.jit.ignore
    @torch.no_grad()
    def set_input_size(self, size: Grid) -> None:
        """Makes the factors those of maps of another size; they become new parameters."""
        factors = resize_factors(self.down, self.up, self.size, size, self.num_prefix_tokens)
        for name, factor in zip(("down", "up"), factors, strict=True):
            setattr(self, name, nn.Parameter(factor.clone(), requires_grad=getattr(self, name).requires_grad))
        self.size = size


@register_notrace_module
class SparsifiedAttention(AuxiliaryLosses, nn.Module):
    """Attention of every query to the share of the keys that a :class:`KeyPredictor` finds best for it.

    Class tokens attend to all keys; they are keys like others to the map's tokens. Choosing keys has no gradient: the
    predictor learns in training with ``reconstruct`` alone, where the attention is to all keys and the squared
    distance of the predictor's guess from it, summed over heads, queries and keys and averaged over images, is offered
    as auxiliary loss ``reconstruction``, see :func:`visionattn.layers.auxiliary_losses`. Without ``reconstruct``
    training attends to the chosen keys, as evaluation always does, and the predictor is frozen.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        size: Height and width of the map that the predictor's factors are for.
        budget: Keys of a query as a share of all, rounded up to whole keys; 1 for full attention.
        queries_per_list: Consecutive queries that have their keys in common, for speed. 1, the paper's, lets each
            have its own.
        rank: Columns of the predictor's factors.
        reconstruct: Whether the predictor learns in training.
        loss_weight: Weight of the auxiliary loss.
        num_prefix_tokens: Number of class tokens before the map.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an option is out of range.
    """

    by_head = ("qkv",)  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            size: Grid,
            budget: float = 0.25,
            queries_per_list: int = 1,
            rank: int = 32,
            reconstruct: bool = True,
            loss_weight: float = 0.01,
            num_prefix_tokens: int = 0,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        if not 1e-4 <= budget <= 1:
            raise ValueError(f"budget must be at least 0.0001 and at most 1, a share of the keys, got {budget}")
        if queries_per_list < 1 or rank < 1:
            raise ValueError(f"queries_per_list and rank must be at least 1, got {queries_per_list} and {rank}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.budget = budget
        self.queries_per_list = queries_per_list
        self.reconstruct = reconstruct
        self.loss_weight = loss_weight
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.predictor = KeyPredictor(num_heads, dim // num_heads, size, rank, num_prefix_tokens, **dd)
        self.predictor.requires_grad_(reconstruct)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Optional[Tuple[int, int]] = None) -> Tensor:  # noqa: UP006, UP045
        """A map ``[batch, height, width, dim]`` to the same.

        With ``size``, the map's height and width, x and the result are ``[batch, num_prefix_tokens + height * width,
        dim]``.
        """
        height, width = (x.shape[1], x.shape[2]) if size is None else size
        return self.proj_drop(self.proj(self._attend(self.qkv(x.flatten(1, -2)), height, width))).reshape(x.shape)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, budget={self.budget}, queries_per_list={self.queries_per_list}"

    @unscripted
    def _attend(self, qkv: Tensor, height: int, width: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [batch, tokens, heads, head_dim]
        size, count = numbers((height, width)), self.num_prefix_tokens
        recorder = current_recorder()
        with nullcontext() if recorder is None else recorder.paused():  # the predictor's softmax is no attention
            index = None
            if self.training and self.reconstruct:
                loss = self.loss_weight * _distance(self.predictor, q[:, count:], k, size)
                if not in_backward():  # gradient checkpointing comes a second time
                    self.keep_auxiliary_loss("reconstruction", loss)
            elif self.budget < 1:
                scores = score_keys(self.predictor, q[:, count:].detach(), k.detach(), size, self.queries_per_list)
                index = scores.topk(_keys_of_a_query(self.budget, k), dim=-1, sorted=False).indices
            out = _mix(q, k, v, index, count, self.queries_per_list)
        if recorder is not None:
            unit, = unit_values(v)
            recorder.offer(lambda: _mix(q, k, unit, index, count, self.queries_per_list).transpose(1, 2))
        return out.flatten(2)


# Functions of a predictor and no methods, which the Python code of scripted modules would not find.


def guess_attention(predictor: Any, q: Tensor, k: Tensor, size: Grid) -> Tensor:
    """What a :class:`KeyPredictor` takes for the attention, with gradients.

    Args:
        predictor: A :class:`KeyPredictor`.
        q: Queries ``[batch, queries, heads, head_dim]``.
        k: Keys ``[batch, keys, heads, head_dim]``, those of class tokens and of a map of ``size``.
        size: Height and width of the map.

    Returns:
        ``[batch, heads, queries, keys]`` in float32 or better.
    """
    down, up = _factors(predictor, size)
    with no_autocast(q.device.type):
        return _coefficients(predictor, q, k, down) @ up.to(_wide(q)).transpose(0, 1)


def score_keys(predictor: Any, q: Tensor, k: Tensor, size: Grid, queries_per_list: int = 1) -> Tensor:
    """What keys are chosen by: the guess of the largest coefficients and of the basis' largest magnitudes alone.

    Args:
        predictor: As of :func:`guess_attention`, and so are the next three.
        q: Queries.
        k: Keys.
        size: Height and width of the map.
        queries_per_list: Consecutive queries whose coefficients are added up before that; the last ones may be fewer.

    Returns:
        ``[batch, heads, lists, keys]`` in float32 or better.
    """
    down, up = _factors(predictor, size)
    with no_autocast(q.device.type):
        coefficients = _coefficients(predictor, q, k, down)
        if queries_per_list > 1:
            coefficients = F.pad(coefficients, (0, 0, 0, _missing(q, queries_per_list)))
            coefficients = coefficients.unflatten(2, (-1, queries_per_list)).sum(dim=3)
        largest = coefficients.topk(min(_COEFFICIENTS, predictor.rank), dim=-1)
        coefficients = torch.zeros_like(coefficients).scatter(-1, largest.indices, largest.values)
        basis = up.to(_wide(q)).abs()
        return coefficients @ torch.where(basis > _LEAST, basis, _BELOW * basis).transpose(0, 1)


def resize_factors(down: Tensor, up: Tensor, old: Grid, new: Grid, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """A predictor's factors ``[num_prefix_tokens + height * width, rank]`` for maps of another size (bilinear)."""
    # A symbolic size (export) must not be compared: the answer would hold for the example's size only.
    if all(isinstance(side, int) for side in new) and new == old:
        return down, up

    def resized(factor: Tensor) -> Tensor:
        rows = factor[num_prefix_tokens:].unflatten(0, old).flatten(1)
        rows = _interpolation(old[0], new[0], factor) @ rows
        return (_interpolation(old[1], new[1], factor) @ rows.unflatten(1, (old[1], -1))).flatten(0, 1)

    summing = resized(down) * (math.prod(old) / (new[0] * new[1]))
    return torch.cat([down[:num_prefix_tokens], summing]), torch.cat([up[:num_prefix_tokens], resized(up)])


def _interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """``[new, old]``: linear interpolation as a matrix, as exact in other runtimes: nearly equal scores abound."""
    ends, places = (torch.arange(n, dtype=_wide(like), device=like.device) for n in (old, new))
    places = ((places + 0.5) * old / new - 0.5).clamp(0, old - 1)
    return (1 - (places[:, None] - ends).abs()).clamp(min=0).to(like.dtype)


def _factors(predictor: Any, size: Grid) -> tuple[Tensor, Tensor]:
    """Those for a map of this size."""
    down, up = predictor.down, predictor.up
    return keep("factors", size, lambda: resize_factors(down, up, predictor.size, size, predictor.num_prefix_tokens),
                sources=[down, up], owner=predictor)


def _coefficients(predictor: Any, q: Tensor, k: Tensor, down: Tensor) -> Tensor:
    """Attention of the queries to the summed keys, ``[batch, heads, queries, rank]``."""
    wide, dtype = _wide(q), predictor.down.dtype
    layers = predictor.q, predictor.k
    q, k = (F.linear(x.to(dtype), layer.weight, layer.bias).to(wide) for x, layer in zip((q, k), layers, strict=True))
    summed = k.permute(0, 2, 3, 1) @ down.to(wide)  # [batch, heads, half of head_dim, rank]
    return (predictor.scale * q.transpose(1, 2) @ summed).softmax(dim=-1)


def _distance(predictor: Any, q: Tensor, k: Tensor, size: Grid) -> Tensor:
    """Squared distance of the guess from the attention, which stays as it is: a sum, averaged over the images."""
    target = probabilities(q.detach().transpose(1, 2), k.detach().transpose(1, 2))
    return (guess_attention(predictor, q, k, size) - target).square().sum() / larger(q.shape[0], 1)


def _keys_of_a_query(budget: float, k: Tensor) -> Any:
    share, (tokens,) = Fraction(budget).limit_denominator(10_000), numbers(k.shape[1:2])
    return (tokens * share.numerator + share.denominator - 1) // share.denominator  # of no negatives: ONNX truncates


def _missing(q: Tensor, queries_per_list: int) -> Any:
    """How many queries the last list lacks."""
    return (queries_per_list - numbers(q.shape[1:2])[0] % queries_per_list) % queries_per_list


def _mix(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, full: int, queries_per_list: int) -> Tensor:
    """The attention's result, of which the first ``full`` queries, or all without an index, see all keys.

    Tensors are ``[batch, tokens, heads, dim]``.
    """
    if index is None:
        return _full(q, k, v)
    queries, tokens = q[:, full:], q.shape[1] - full
    if queries_per_list > 1:
        queries = F.pad(queries, (0, 0, 0, 0, 0, _missing(queries, queries_per_list)))
    out = sparsified_attention(queries, k, v, index)[:, :tokens]
    return torch.cat([_full(q[:, :full], k, v).to(out.dtype), out], dim=1) if full else out


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to all keys, on tensors ``[batch, tokens, heads, dim]``."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of scores: a near tie should fall the same way in training and afterwards."""
    return torch.promote_types(x.dtype, torch.float32)
