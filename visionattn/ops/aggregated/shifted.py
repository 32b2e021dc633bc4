"""Aggregated attention on a CPU: a map of queries meets the map of keys shifted by every place of the window.

Nothing is unfolded, padded or turned: a place of the window is a rectangle of the map of queries and the same one,
shifted, of the map of keys. The scores of all keys of a few rows of queries are together in a workspace that stays in
the cache. The backward pass computes the probabilities again instead of keeping them. Half precision is computed in
float32.
"""
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import differentiated, standard_only
from ..kept import workspace
from . import naive

__all__ = ["run"]

_CHUNK_BYTES = 2 ** 20  # of scores at a time, about a core's L2 cache


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
) -> Tensor:
    """The public function with every argument explicit. The naive form stands for it on other devices and where
    standard operators are wanted: in exported graphs, under transforms of torch.func and in forward mode.
    """
    tensors = (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    if q.device.type not in ("cpu", "meta") or standard_only(*tensors):
        return naive.run(*tensors[:5], kernel_size, *tensors[5:])
    return _forward(*tensors, kernel_size)


@torch.library.custom_op("visionattn::aggregated_shifted", mutates_args=())
def _forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        local_bias: Tensor | None,
        pooled_bias: Tensor | None,
        local_weights: Tensor | None,
        kernel_size: int,
) -> Tensor:
    dtype = q.dtype
    q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights = _wide(
        q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    assert q is not None
    assert v is not None
    out = torch.empty(v.shape, dtype=v.dtype, device="cpu")
    places = kernel_size ** 2
    for chunk in _chunks(q, v, pooled_k, kernel_size):
        weights = chunk.probabilities(q, k, pooled_k, local_bias, pooled_bias)
        for image in range(*chunk.images):
            _heads_first(out[image, chunk.rows]).copy_(
                torch.bmm(chunk.pooled(weights, image), pooled_v[image].transpose(0, 1)))
        if local_weights is not None:
            weights[..., :places].add_(local_weights[chunk.part])
        for place, here, there in chunk.places:
            out[here].addcmul_(weights[chunk.within(here)][..., place, None], v[there])
    return out.to(dtype)


@torch.library.custom_op("visionattn::aggregated_shifted_backward", mutates_args=())
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
    for chunk in _chunks(q, v, pooled_k, kernel_size, buffers=2):
        weights = chunk.probabilities(q, k, pooled_k, local_bias, pooled_bias)
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

    def probabilities(
            self, q: Tensor, k: Tensor, pooled_k: Tensor, local_bias: Tensor | None, pooled_bias: Tensor | None,
    ) -> Tensor:
        """The softmax of the scores, in the first buffer."""
        scores, places = self.buffer(0), self.kernel_size ** 2
        scores[..., :places].fill_(-torch.inf)
        for place, here, there in self.places:
            self.dot(q[here], k[there], scores[self.within(here)][..., place])
        if local_bias is not None:
            scores[..., :places].add_(local_bias)
        for image in range(*self.images):
            torch.bmm(_heads_first(q[image, self.rows]), pooled_k[image].permute(1, 2, 0),
                      out=self.pooled(scores, image))
        if pooled_bias is not None:
            table = pooled_bias[:, self.tokens].transpose(0, 1)
            scores[..., places:].add_(table.unflatten(0, (-1, self.width)))
        return torch.softmax(scores, -1, out=scores)


def _chunks(q: Tensor, v: Tensor, pooled_k: Tensor, kernel_size: int, buffers: int = 1) -> Iterator[_Chunk]:
    batch, height, width, heads, _ = q.shape
    keys = kernel_size ** 2 + pooled_k.shape[1]
    row = width * heads * keys * q.element_size()
    rows = min(max(_CHUNK_BYTES // row, 1), height)
    rows = -(-height // -(-height // rows))  # of one size, nearly
    images = min(max(_CHUNK_BYTES // (row * height), 1), batch)
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


def _heads_first(x: Tensor) -> Tensor:
    """A view ``[heads, queries, dim]`` of rows ``[rows, width, heads, dim]`` of a map."""
    return x.flatten(0, 1).transpose(0, 1)


def _wide(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors in float32 or better, those that are there, with adjacent tokens and channels."""
    first = tensors[0]
    assert first is not None
    compute = torch.promote_types(first.dtype, torch.float32)
    return [x if x is None else _even(x.to(compute)) for x in tensors]  # type: ignore[misc]


def _even(x: Tensor) -> Tensor:
    """``x`` itself if its channels are adjacent and its rows a line of tokens, as in views of a fused projection."""
    line = x.ndim < 5 or x.stride(1) == x.stride(2) * x.shape[2]
    return x if line and x.stride(-1) == 1 else x.contiguous()


# --- The operators in graphs ------------------------------------------------------------------------------------------


@_forward.register_fake
def _(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size):
    return q.new_empty(v.shape)


@_backward.register_fake
def _(grad, *tensors_and_size):
    nothing = grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    return [nothing.clone() if x is None else x.new_empty(x.shape) for x in tensors_and_size[:-1]]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:8]

    def standard(*given: Tensor | None) -> Tensor:
        return naive.run(*given[:5], ctx.kernel_size, *given[5:])  # type: ignore[call-arg, arg-type]

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        return *differentiated(standard, tensors, grad, needed), None
    grads = _backward(grad.contiguous(), *tensors, ctx.kernel_size)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.visionattn.aggregated_shifted)
def _forward_flops(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size, **kwargs) -> int:
    return naive.flops(q, v, pooled_k, kernel_size)


@register_flop_formula(torch.ops.visionattn.aggregated_shifted_backward)
def _backward_flops(
        grad, q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size, **kwargs,
) -> int:
    return naive.backward_flops(q, v, pooled_k, kernel_size)
