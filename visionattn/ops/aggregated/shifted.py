"""Aggregated attention on a CPU: a map of queries meets the map of keys shifted by every place of the window.

Nothing is unfolded, padded or turned: a place of the window is a rectangle of the map of queries and the same one,
shifted, of the map of keys. The scores of all keys of a few rows of queries are together in a workspace that stays in
the cache. The backward pass computes the probabilities again instead of keeping them. Half precision is computed in
float32.
"""
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import differentiated, standard_only
from ..kept import workspace
from ..operator import operator
from . import naive

__all__ = ["run"]

_CHUNK_BYTES = 2 ** 22  # of scores at a time; measured
_LEAST_SAVED = 40  # pooled keys per query that must be saved on average for less to be faster; measured
_LIST_COST = 1.3  # of a query that is in a list, in units of one of a head whose queries are all computed; measured


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        kernel_size: int,
        local_bias: Tensor | None,
        pooled_bias: Tensor | None,
        local_weights: Tensor | None,
        active: Tensor | None = None,
) -> Tensor:
    """The public function with every argument explicit. The naive form stands for it on other devices and where
    standard operators are wanted: in exported graphs, under transforms of torch.func and in forward mode.
    """
    tensors = (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    if q.device.type not in ("cpu", "meta") or standard_only(*tensors):
        return naive.run(*tensors[:5], kernel_size, *tensors[5:], active)
    return _forward(*tensors, active, kernel_size)


@operator("visionattn::aggregated_shifted")
def _forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        local_bias: Tensor | None,
        pooled_bias: Tensor | None,
        local_weights: Tensor | None,
        active: Tensor | None,
        kernel_size: int,
) -> Tensor:
    dtype = q.dtype
    q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights = _wide(
        q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    out = torch.empty(v.shape, dtype=v.dtype, device="cpu")
    places = kernel_size ** 2
    # Lists of queries are the shorter, the more queries there are to choose from.
    for chunk in _chunks(q, v, pooled_k, kernel_size, size=_CHUNK_BYTES if active is None else 4 * _CHUNK_BYTES):
        weights = chunk.local_scores(q, k, local_bias)
        choice = None if active is None else _choice(active[chunk.part].flatten(1, 2), pooled_k.shape[1])
        if choice is None:
            chunk.softmax(weights, q, pooled_k, pooled_bias)
            for image in range(*chunk.images):
                _heads_first(out[image, chunk.rows]).copy_(
                    torch.bmm(chunk.pooled(weights, image), pooled_v[image].transpose(0, 1)))
        else:
            _attend_chosen(chunk, weights, choice, q, pooled_k, pooled_v, pooled_bias, out[chunk.part])
        if local_weights is not None:
            weights[..., :places].add_(local_weights[chunk.part])
        for place, here, there in chunk.places:
            out[here].addcmul_(weights[chunk.within(here)][..., place, None], v[there])
    if active is not None:
        out.masked_fill_(~active[..., None], 0)
    return out.to(dtype)


@operator("visionattn::aggregated_shifted_backward")
def _backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        local_bias: Tensor | None,
        pooled_bias: Tensor | None,
        local_weights: Tensor | None,
        kernel_size: int,
) -> list[Tensor]:
    """Gradients of all tensors, empty for those that are not there, all contiguous."""
    given = (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    grad, q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights = _wide(grad, *given)
    places = kernel_size ** 2
    grads = [torch.zeros(0 if x is None else x.shape, dtype=q.dtype, device="cpu")
             for x in (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)]
    grad_q, grad_k, grad_v, grad_pooled_k, grad_pooled_v, grad_local_bias, grad_pooled_bias, grad_local_weights = grads
    for chunk in _chunks(q, v, pooled_k, kernel_size, _CHUNK_BYTES, buffers=2):
        weights = chunk.softmax(chunk.local_scores(q, k, local_bias), q, pooled_k, pooled_bias)
        scores = chunk.buffer(1)  # the gradient of the weights, then of the scores
        scores[..., :places].zero_()
        for place, here, there in chunk.places:
            chunk.dot(grad[here], v[there], scores[chunk.within(here)][..., place])
            weight = weights[chunk.within(here)][..., place, None]
            grad_v[there].addcmul_(weight, grad[here])
            if local_weights is not None:
                grad_v[there].addcmul_(local_weights[here][..., place, None], grad[here])
        if local_weights is not None:
            grad_local_weights[chunk.part] = scores[..., :places]
        for image in range(*chunk.images):
            incoming, values = _heads_first(grad[image, chunk.rows]), pooled_v[image].transpose(0, 1)
            torch.bmm(incoming, values.mT, out=chunk.pooled(scores, image))
            grad_pooled_v[image].transpose(0, 1).add_(torch.bmm(chunk.pooled(weights, image).mT, incoming))
        torch._softmax_backward_data(scores, weights, -1, weights.dtype, grad_input=scores)
        if local_bias is not None:
            grad_local_bias += scores[..., :places].sum((0, 1, 2))
        for image in range(*chunk.images):
            queries, keys = _heads_first(q[image, chunk.rows]), pooled_k[image].transpose(0, 1)
            pooled = chunk.pooled(scores, image)
            if pooled_bias is not None:
                grad_pooled_bias[:, chunk.tokens] += pooled
            _heads_first(grad_q[image, chunk.rows]).copy_(torch.bmm(pooled, keys))
            grad_pooled_k[image].transpose(0, 1).add_(torch.bmm(pooled.mT, queries))
        for place, here, there in chunk.places:
            score = scores[chunk.within(here)][..., place, None]
            grad_q[here].addcmul_(score, k[there])
            grad_k[there].addcmul_(score, q[here])
    return [x if y is None else x.to(y.dtype) for x, y in zip(grads, given, strict=True)]


# --- Chunks of rows of queries ----------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """A few rows of queries of one image, or several whole images, and the memory for them.

    Attributes:
        images: The first image, and the one after the last.
        rows: Of the map.
        width: Of the map.
        heads: Their number.
        keys: Keys of a query: the places of the window, then the pooled ones.
        kernel_size: Height and width of the window.
        places: Number of each place of the window on the map, with the index of the queries that have it and of what
            they see there.
        memory: For scores, and for a product of two maps.
    """

    images: tuple[int, int]
    rows: slice
    width: int
    heads: int
    keys: int
    kernel_size: int
    places: list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]
    memory: Tensor

    @property
    def part(self) -> tuple[slice, slice]:
        """Index of the chunk in a map."""
        return slice(*self.images), self.rows

    @property
    def tokens(self) -> slice:
        """The rows' tokens in a map that is a line of tokens."""
        return slice(self.rows.start * self.width, self.rows.stop * self.width)

    def within(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Index of a part of a map within the chunk."""
        _, rows, columns = index
        return slice(None), slice(rows.start - self.rows.start, rows.stop - self.rows.start), columns

    def buffer(self, number: int) -> Tensor:
        """Room for scores ``[images, rows, width, heads, keys]``."""
        shape = (self.images[1] - self.images[0], self.rows.stop - self.rows.start, self.width, self.heads, self.keys)
        size = math.prod(shape)
        return self.memory[number * size:(number + 1) * size].view(shape)

    def pooled(self, scores: Tensor, image: int) -> Tensor:
        """The part of the pooled keys, of one image: ``[heads, queries, tokens]``."""
        return _heads_first(scores[image - self.images[0]])[..., self.kernel_size ** 2:]

    def dot(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Products of the vectors of two maps."""
        room = self.memory[len(self.memory) - x.numel():].view(x.shape)
        torch.sum(torch.mul(x, y, out=room), -1, out=out)

    def local_scores(self, q: Tensor, k: Tensor, local_bias: Tensor | None) -> Tensor:
        """The first buffer, with the scores of the window's keys."""
        scores, places = self.buffer(0), self.kernel_size ** 2
        scores[..., :places].fill_(-torch.inf)
        for place, here, there in self.places:
            self.dot(q[here], k[there], scores[self.within(here)][..., place])
        if local_bias is not None:
            scores[..., :places].add_(local_bias)
        return scores

    def softmax(self, scores: Tensor, q: Tensor, pooled_k: Tensor, pooled_bias: Tensor | None) -> Tensor:
        """Adds the scores of the pooled keys to those of the window's; returns the softmax of all, in their place."""
        for image in range(*self.images):
            torch.bmm(_heads_first(q[image, self.rows]), pooled_k[image].permute(1, 2, 0),
                      out=self.pooled(scores, image))
        if pooled_bias is not None:
            table = pooled_bias[:, self.tokens].transpose(0, 1)
            scores[..., self.kernel_size ** 2:].add_(table.unflatten(0, (-1, self.width)))
        return torch.softmax(scores, -1, out=scores)


def _chunks(
        q: Tensor, v: Tensor, pooled_k: Tensor, kernel_size: int, size: int, buffers: int = 1,
) -> Iterator[_Chunk]:
    batch, height, width, heads, _ = q.shape
    keys = kernel_size ** 2 + pooled_k.shape[1]
    row = width * heads * keys * q.element_size()
    rows = min(max(size // row, 1), height)
    rows = -(-height // -(-height // rows))  # of one size, nearly
    images = min(max(size // (row * height), 1), batch)
    dim = max(q.shape[-1], v.shape[-1])
    for first, top in itertools.product(range(0, batch, images), range(0, height, rows)):
        last, bottom = min(first + images, batch), min(top + rows, height)
        tokens = (last - first) * (bottom - top) * width * heads
        places: list[tuple[int, tuple[slice, ...], tuple[slice, ...]]] = []
        for place, (i, j) in enumerate(itertools.product(range(kernel_size), repeat=2)):
            dy, dx = i - kernel_size // 2, j - kernel_size // 2
            y0, y1 = max(top, -dy), min(bottom, height - dy)
            x0, x1 = max(0, -dx), min(width, width - dx)
            if y0 < y1 and x0 < x1:
                here = (slice(first, last), slice(y0, y1), slice(x0, x1))
                places.append((place, here, (here[0], slice(y0 + dy, y1 + dy), slice(x0 + dx, x1 + dx))))
        memory = workspace(tokens * (buffers * keys + dim), q.dtype)
        yield _Chunk((first, last), slice(top, bottom), width, heads, keys, kernel_size, places, memory)


# --- Queries that are chosen ------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """Which queries of a chunk are computed: of some heads all, of others those that lists name, of the rest none.

    Attributes:
        whole: Heads whose queries are all computed.
        listed: Heads that have lists.
        lists: Numbers of the queries ``[images, listed heads, longest]``, filled up with some that are not active.
    """

    whole: list[int]
    listed: list[int]
    lists: Tensor


def _choice(active: Tensor, pooled: int) -> _Choice | None:
    """What to compute for active queries ``[images, queries, heads]``; None for all, where that is as fast."""
    if pooled < _LEAST_SAVED:
        return None
    queries, heads = active.shape[1:]
    most = active.sum(dim=1).amax(dim=0).tolist()
    chosen = sorted((head for head in range(heads) if most[head]), key=most.__getitem__)
    costs = [_LIST_COST * few * most[chosen[few - 1]] + (len(chosen) - few) * queries if few else len(chosen) * queries
             for few in range(len(chosen) + 1)]
    few = costs.index(min(costs))
    if (1 - costs[few] / (heads * queries)) * pooled < _LEAST_SAVED:
        return None
    listed, whole = sorted(chosen[:few]), sorted(chosen[few:])
    longest = max((most[head] for head in listed), default=0)
    order = active[..., listed].transpose(1, 2).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return _Choice(whole, listed, order[..., :longest])


def _attend_chosen(
        chunk: _Chunk, scores: Tensor, choice: _Choice, q: Tensor, pooled_k: Tensor, pooled_v: Tensor,
        pooled_bias: Tensor | None, out: Tensor,
) -> None:
    """The same as :meth:`_Chunk.softmax` and what comes of the pooled values, of the chosen queries; 0 elsewhere.

    Of the scores, only those of the window are looked at and become weights.
    """
    places, (images, rows, width, heads) = chunk.kernel_size ** 2, scores.shape[:-1]
    tokens = rows * width
    queries = q[chunk.part].flatten(1, 2)
    keys, values = (x[slice(*chunk.images)].transpose(1, 2) for x in (pooled_k, pooled_v))
    window = scores[..., :places].flatten(1, 2)
    weights, result = torch.zeros_like(window), out.zero_().flatten(1, 2)
    if choice.whole:
        part = scores.new_empty(images, len(choice.whole), tokens, chunk.keys)
        for i, head in enumerate(choice.whole):
            part[:, i, :, :places] = window[:, :, head]
            torch.bmm(queries[:, :, head], keys[:, head].mT, out=part[:, i, :, places:])
            if pooled_bias is not None:
                part[:, i, :, places:].add_(pooled_bias[head, chunk.tokens])
        torch.softmax(part, -1, out=part)
        for i, head in enumerate(choice.whole):
            weights[:, :, head] = part[:, i, :, :places]
            result[:, :, head] = part[:, i, :, places:] @ values[:, head]
    if choice.listed:
        listed, size = torch.tensor(choice.listed), (images * len(choice.listed), choice.lists.shape[-1])
        image, row = torch.arange(images)[:, None, None], listed[:, None]
        index = ((image * tokens + choice.lists) * heads + row).flatten()
        part = scores.new_empty(*size, chunk.keys)
        part[..., :places] = window.flatten(0, 2).index_select(0, index).view(*size, places)
        picked = queries.reshape(-1, queries.shape[-1]).index_select(0, index).view(*size, -1)
        torch.bmm(picked, keys[:, listed].flatten(0, 1).mT, out=part[..., places:])
        if pooled_bias is not None:
            table = pooled_bias.flatten(0, 1)
            entries = (row * pooled_bias.shape[1] + chunk.tokens.start + choice.lists).flatten()
            part[..., places:].add_(table.index_select(0, entries).view(*size, -1))
        torch.softmax(part, -1, out=part)
        weights.flatten(0, 2).index_copy_(0, index, part[..., :places].flatten(0, 1))
        result.flatten(0, 2).index_copy_(
            0, index, (part[..., places:] @ values[:, listed].flatten(0, 1)).flatten(0, 1))
    window.copy_(weights)


def _heads_first(x: Tensor) -> Tensor:
    """A view ``[heads, queries, dim]`` of rows ``[rows, width, heads, dim]`` of a map."""
    return x.flatten(0, 1).transpose(0, 1)


def _wide(*tensors: Any) -> list[Any]:
    """The tensors in float32 or better, those that are there, with adjacent tokens and channels."""
    compute = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x if x is None else _even(x.to(compute)) for x in tensors]


def _even(x: Tensor) -> Tensor:
    """``x`` itself if its channels are adjacent and its rows a line of tokens, as in views of a fused projection."""
    line = x.ndim < 5 or x.stride(1) == x.stride(2) * x.shape[2]
    return x if line and x.stride(-1) == 1 else x.contiguous()


# --- The operators in graphs ------------------------------------------------------------------------------------------


@_forward.register_fake
def _(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, active, kernel_size):
    return q.new_empty(v.shape)


@_backward.register_fake
def _(grad, *tensors_and_size):
    nothing = grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    return [nothing.clone() if x is None else x.new_empty(x.shape) for x in tensors_and_size[:-1]]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size = inputs
    ctx.save_for_backward(*tensors)  # the last of them is no number


def _autograd(ctx, grad):
    *tensors, active = ctx.saved_tensors
    needed = ctx.needs_input_grad[:8]

    def standard(q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, *tables: Any) -> Tensor:
        local_bias, pooled_bias, local_weights = tables
        return naive.run(q, k, v, pooled_k, pooled_v, ctx.kernel_size, local_bias, pooled_bias, local_weights, active)

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        return *differentiated(standard, tensors, grad, needed), None, None
    if active is not None:
        grad = grad.masked_fill(~active[..., None], 0)
    grads = _backward(grad.contiguous(), *tensors, ctx.kernel_size)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.visionattn.aggregated_shifted)
def _forward_flops(
        q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, active, kernel_size, **kwargs,
) -> int:
    return naive.flops(q, v, pooled_k, kernel_size)


@register_flop_formula(torch.ops.visionattn.aggregated_shifted_backward)
def _backward_flops(
        grad, q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size, **kwargs,
) -> int:
    return naive.backward_flops(q, v, pooled_k, kernel_size)
