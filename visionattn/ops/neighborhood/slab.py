"""Two-dimensional neighborhood attention on CPU, in as few and as large matrix products as possible.

The map is cut into tiles of queries. A tile's keys, the union of its windows, are its rows and columns and a halo of
``kernel_size - stride`` around them. Column halos are copied once: the keys of a column of tiles become a slab
``[rows, halo columns, head_dim]``, and slabs lie one after the other. Row halos cost nothing: the keys of a tile are
then consecutive tokens of its slab, so overlapping strided windows make every tile an entry of one batched matrix
product. What a window holds beyond a query's own neighborhood, or beyond the slab, is masked.

Work is done in chunks of tiles whose scores stay in the cache, in a workspace that a thread keeps from call to call:
on the maps of a backbone, fresh pages and the arithmetic of views would cost as much as the products. What depends on
shapes and strides only, a plan of chunks and copies, is therefore cached too. The residue classes of a dilated axis
are more batch. The backward pass computes the probabilities again instead of keeping them. Classes that are hardly
larger than a tile run in PyTorch's dense attention under one mask.
"""
import contextlib
import functools
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["release_memory", "slab_attention"]

_CHUNK_BYTES = 4 << 20  # scores of one chunk, unless all are not twice as many (measured)
_DENSE_TOKENS = 14 * 14  # classes up to this size are one tile, done by PyTorch's dense attention (measured)
_WORKSPACE_BYTES = 64 << 20  # a thread keeps no larger workspace
_TABLE_BYTES = 128 << 20  # tables of biases that are kept
_MASKED = -1e30  # finite: a row of padding has no valid key and must not become NaN

# The kernels of PyTorch's dense attention on CPU: its public function does not return what the backward needs.
_aten = torch.ops.aten


def slab_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
        scale: float,
) -> Tensor:
    """Neighborhood attention on two axes, not causal. Differentiable in q, k, v and bias.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``, any strides, on CPU.
        k: Keys, shaped as q.
        v: Values ``[batch, height, width, heads, value_dim]``.
        bias: Relative position bias ``[heads, 2 * kernel_height - 1, 2 * kernel_width - 1]``.
        kernel_size: Window height and width; 1 is allowed here.
        dilation: One per axis.
        stride: Queries that share a window, one per axis.
        scale: Factor on ``q . k``.

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, computed in float32 or better.
    """
    return _slab_forward(q, k, v, bias, list(kernel_size), list(dilation), list(stride), scale)[0]


def release_memory() -> None:
    """Gives back what is kept between calls: this thread's workspace, and the tables of biases."""
    _memory.kept = None
    with _tables_lock:
        _tables.clear()


@torch.library.custom_op("visionattn::neighborhood_slab", mutates_args=())
def _slab_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel_size: list[int],
        dilation: list[int],
        stride: list[int],
        scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp ``[batch, height, width, heads]`` where the dense backward wants it, else 0."""
    compute = torch.promote_types(q.dtype, torch.float32)
    plans = _plans(q.shape, v.shape[-1], compute, tuple(kernel_size), tuple(dilation), tuple(stride))
    with _no_autocast():
        if plans[0].is_whole:
            queries, keys, values = (x.flatten(1, 2).transpose(1, 2).to(compute) for x in (q, k, v))
            out, lse = _dense(queries, keys, values, _table(plans[0], bias), scale)
            return (out.transpose(1, 2).reshape(v.shape).to(q.dtype),
                    lse.transpose(1, 2).contiguous().view(q.shape[:-1]))
        out = q.new_empty(v.shape)
        lse = q.new_zeros(q.shape[:-1], dtype=compute)
        for plan in plans:
            table = _table(plan, bias)
            if plan.is_dense:
                queries, keys, values = (_tokens(plan, x) for x in (q, k, v))
                result, sums = _dense(queries, keys, values, table, scale)
                _store_tokens(plan, result, out)
                _store_tokens(plan, sums.unsqueeze(-1), lse.unsqueeze(-1))
                continue
            work = _Work(plan, backward=False)
            for chunk in plan.chunks:
                p = work.probabilities(chunk, q, k, table, scale)
                values = work.load_keys("v", chunk, v)
                work.store_tiles(chunk, torch.bmm(p, values, out=work.tiles("out", chunk, plan.value_dim)), out)
    return out, lse


@torch.library.custom_op("visionattn::neighborhood_slab_backward", mutates_args=())
def _slab_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        kernel_size: list[int],
        dilation: list[int],
        stride: list[int],
        scale: float,
        bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and (empty unless ``bias_grad``) bias."""
    compute = torch.promote_types(q.dtype, torch.float32)
    plans = _plans(q.shape, v.shape[-1], compute, tuple(kernel_size), tuple(dilation), tuple(stride))
    dbias = q.new_zeros(0 if bias is None or not bias_grad else bias.shape, dtype=compute)
    with _no_autocast():
        if plans[0].is_whole:
            tensors = [x.flatten(1, 2).transpose(1, 2).to(compute) for x in (grad, q, k, v, out)]
            sums = lse.flatten(1, 2).transpose(1, 2)
            gradients = _dense_backward(tensors, sums, _table(plans[0], bias), scale, bias_grad)
            if bias_grad:
                _add_table(plans[0], gradients[3], dbias)
            dq, dk, dv = (
                x.transpose(1, 2).reshape(y.shape).to(y.dtype) for x, y in zip(gradients[:3], (q, k, v), strict=True))
            return dq, dk, dv, dbias if bias is None else dbias.to(bias.dtype)
        dq = q.new_empty(q.shape)
        dk, dv = k.new_zeros(k.shape, dtype=compute), v.new_zeros(v.shape, dtype=compute)
        for plan in plans:
            table = _table(plan, bias)
            if plan.is_dense:
                sums = _tokens(plan, lse.unsqueeze(-1)).squeeze(-1)
                gradients = _dense_backward(
                    [_tokens(plan, x) for x in (grad, q, k, v, out)], sums, table, scale, bias_grad)
                for gradient, target in zip(gradients[:3], (dq, dk, dv), strict=True):
                    _store_tokens(plan, gradient, target)
                if bias_grad:
                    _add_table(plan, gradients[3], dbias)
                continue
            work = _Work(plan, backward=True)
            dtable = None if table is None or not bias_grad else torch.zeros_like(table)
            for chunk in plan.chunks:
                p = work.probabilities(chunk, q, k, table, scale)
                queries, keys = work.tiles("q", chunk, plan.head_dim), work.key_windows("k", chunk, plan.head_dim)
                dout, values = work.load_tiles("dout", chunk, grad), work.load_keys("v", chunk, v)
                work.add_keys(chunk, torch.bmm(p.mT, dout, out=work.windows(chunk, plan.value_dim)), dv)
                ds = torch.bmm(dout, values.mT, out=work.scores("dscores", chunk))
                torch._softmax_backward_data(ds, p, -1, compute, grad_input=ds)
                if dtable is not None:
                    work.add_scores("dscores", chunk, dtable)
                work.add_keys(chunk, torch.bmm(ds.mT, queries, out=work.windows(chunk, plan.head_dim)), dk)
                work.store_tiles(chunk, torch.bmm(ds, keys, out=queries).mul_(scale), dq)
            if dtable is not None:
                _add_table(plan, dtable, dbias)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias if bias is None else dbias.to(bias.dtype)


@_slab_forward.register_fake
def _(q, k, v, bias, kernel_size, dilation, stride, scale):
    return q.new_empty(v.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@_slab_backward.register_fake
def _(grad, q, k, v, bias, out, lse, kernel_size, dilation, stride, scale, bias_grad):
    dbias = bias.new_empty(bias.shape) if bias_grad else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx, inputs, output):
    q, k, v, bias, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _slab_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, bias_grad)
    return dq, dk, dv, dbias if bias_grad else None, None, None, None, None


_slab_forward.register_autograd(_backward, setup_context=_setup_context)


def _flops(q_shape, v_shape, kernel_size) -> int:
    batch, height, width, heads, head_dim = q_shape
    return 2 * batch * height * width * heads * math.prod(kernel_size) * (head_dim + v_shape[-1])


@register_flop_formula(torch.ops.visionattn.neighborhood_slab)
def _(q_shape, k_shape, v_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    return _flops(q_shape, v_shape, kernel_size)


@register_flop_formula(torch.ops.visionattn.neighborhood_slab_backward)
def _(grad_shape, q_shape, k_shape, v_shape, bias_shape, output_shape, lse_shape, kernel_size, *args, **kwargs) -> int:
    # Scores again, then four products. (No argument may be called out_shape: PyTorch passes one of that name.)
    return 5 * _flops(q_shape, v_shape, kernel_size) // 2


def _no_autocast() -> contextlib.AbstractContextManager:
    """Entering a context takes as long as a small operator, so only where it changes anything."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


# PyTorch's dense attention on ``[batch, heads, tokens, dim]``, whose kernels want dim to be dense.


def _dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_dense_mask(table), scale=scale)


def _dense_backward(
        tensors: list[Tensor], lse: Tensor, table: Tensor | None, scale: float, table_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, if asked for, of the table, which PyTorch's kernel does not have.

    ``tensors`` are the incoming gradient, q, k, v and the output.
    """
    grad, q, k, v, _ = tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    if table is None or not table_grad:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse, 0.0, False, attn_mask=_dense_mask(table), scale=scale)
    batch, heads, tokens, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (q, k, v))
    dtable = torch.empty_like(table)
    size = heads * tokens * tokens
    step = min(max(_CHUNK_BYTES // (size * q.element_size()), 1), batch)
    memory = _memory.take(2 * step * size, q.dtype)
    for images in (slice(i, min(i + step, batch)) for i in range(0, batch, step)):
        count = (images.stop - images.start) * heads
        p, ds = memory[:2 * count * tokens * tokens].view(2, count, tokens, tokens)
        queries, keys, values, dout = (x[images].reshape(count, tokens, -1) for x in (q * scale, k, v, grad))
        scores = torch.bmm(queries, keys.mT, out=p).view(-1, heads, tokens, tokens).add_(table[:, 0, 0])
        torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(p.mT, dout, out=dv[images].view_as(values))
        torch._softmax_backward_data(torch.bmm(dout, values.mT, out=ds), p, -1, p.dtype, grad_input=ds)
        dscores = ds.view(-1, heads, tokens, tokens)
        if images.start == 0:
            torch.sum(dscores, 0, out=dtable[:, 0, 0])
        else:
            dtable[:, 0, 0] += dscores.sum(0)
        torch.bmm(ds.mT, queries, out=dk[images].view_as(keys))
        torch.bmm(ds, keys, out=dq[images].view_as(queries)).mul_(scale)
    return dq, dk, dv, dtable


def _dense_mask(table: Tensor | None) -> Tensor | None:
    return None if table is None else table[:, 0, 0].unsqueeze(0)


# Plans: how a map is cut, and which boxes of it are copied where. They depend on shapes and strides only.


class _Axis(NamedTuple):
    """One axis of the residue classes of the same length, and how it is cut.

    Attributes:
        first: First residue.
        residues: Number of classes.
        dilation: Distance of a class's members in the map.
        length: Members of a class.
        kernel: Window size.
        stride: Queries that share a window.
        tile: Queries of a tile.
    """

    first: int
    residues: int
    dilation: int
    length: int
    kernel: int
    stride: int
    tile: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    @property
    def padding(self) -> int:
        """Queries of the last tile that do not exist."""
        return self.tiles * self.tile - self.length

    @property
    def guard(self) -> int:
        """Keys of an inner tile before its first query."""
        return self.kernel // 2 - self.stride // 2 if self.tiles > 1 else 0

    @property
    def halo(self) -> int:
        """Keys of a tile."""
        return self.tile + self.kernel - self.stride if self.tiles > 1 else self.length

    def start(self, tile: int, clamped: bool) -> int:
        """First key of a tile; ``clamped``: shifted so that no key lies outside of the axis."""
        start = tile * self.tile - self.guard
        return max(min(start, self.length - self.halo), 0) if clamped else start

    def window(self, query: int) -> int:
        """First key that a query sees."""
        leader = min(query // self.stride * self.stride + self.stride // 2, self.length - 1)
        return max(min(leader - self.kernel // 2, self.length - self.kernel), 0)

    def kinds(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Cuts the tiles ``first`` to ``last`` into ``(kind, first, last)``; tiles of a kind have the same mask."""
        bounds = sorted({0, min(1, self.tiles), max(self.tiles - 1, 0), self.tiles})
        for kind, (low, high) in enumerate(itertools.pairwise(bounds)):
            if max(low, first) < min(high, last):
                yield kind, max(low, first), min(high, last)

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Cuts the tiles ``first`` to ``last`` into ``(first, last, queries)``: full tiles and the ragged one."""
        full = self.length // self.tile
        if first < min(last, full):
            yield first, min(last, full), self.tile
        if last > full:
            yield full, last, self.length - full * self.tile

    @property
    def fits(self) -> bool:
        """Whether only the first and the last tile have shifted windows, and none is shifted out of its halo."""
        if self.tiles == 1:
            return True
        if self.tile % self.stride or self.halo > self.length:
            return False
        for tile in range(self.tiles):
            inner = 0 < tile < self.tiles - 1
            for query in range(tile * self.tile, min((tile + 1) * self.tile, self.length), self.stride):
                place = self.window(query) - self.start(tile, clamped=False)
                if (inner and place != query % self.tile) or not 0 <= place <= self.halo - self.kernel:
                    return False
                if not 0 <= self.window(query) - self.start(tile, clamped=True) <= self.halo - self.kernel:
                    return False
        return True


class _Plan:
    """The residue classes of one shape, cut into chunks of tiles.

    A chunk is ``(first, last)`` for each of the axes ``shape``: batch, classes in y, classes in x, heads, columns of
    tiles.
    """

    def __init__(
            self, batch: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, y: _Axis, x: _Axis,
    ):
        self.shape = (batch, y.residues, x.residues, heads, x.tiles)
        self.head_dim, self.value_dim, self.dtype, self.y, self.x = head_dim, value_dim, dtype, y, x
        self.queries, self.keys = y.tile * x.tile, y.halo * x.halo
        # PyTorch's dense attention has no gradient of a bias, and wants equal dims.
        self.is_dense = y.tiles == x.tiles == 1 and head_dim == value_dim
        self.is_whole = self.is_dense and y.residues == x.residues == y.dilation == x.dilation == 1
        column = y.tiles * self.queries * self.keys * dtype.itemsize
        columns = math.prod(self.shape)
        limit = columns if columns * column <= 2 * _CHUNK_BYTES else max(_CHUNK_BYTES // column, 1)
        self.chunks = list(self._chunks(limit))
        # Where the parts of the workspace are, in elements: of the forward pass, then what the backward adds.
        tiles, dim = min(limit, columns) * y.tiles, max(head_dim, value_dim)
        sizes = {
            "q": tiles * self.queries * dim, "out": 0, "scores": tiles * self.queries * self.keys,
            "k": self._slab_size(tiles, head_dim), "v": self._slab_size(tiles, value_dim),
            "dout": tiles * self.queries * value_dim, "dscores": tiles * self.queries * self.keys,
            "windows": tiles * self.keys * dim, "dslab": self._slab_size(tiles, dim)}
        ends = list(itertools.accumulate(-(-size // 16) * 16 for size in sizes.values()))  # lines of the cache
        self.offsets = dict(zip(sizes, [0, *ends], strict=False))
        self.offsets["out"] = self.offsets["q"]  # queries are not needed once there are scores
        self.sizes = {False: ends[4], True: ends[-1]}

    def _slab_size(self, tiles: int, dim: int) -> int:
        return (tiles * self.y.tile + self.y.kernel) * self.x.halo * dim

    def _chunks(self, limit: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """Pieces of at most ``limit`` columns of tiles that are consecutive in the order of ``shape``."""
        axis, inner = len(self.shape) - 1, 1
        while axis > 0 and inner * self.shape[axis] <= limit:
            inner *= self.shape[axis]
            axis -= 1
        step = max(limit // inner, 1)
        for outer in itertools.product(*map(range, self.shape[:axis])):
            for first in range(0, self.shape[axis], step):
                yield (
                    *((i, i + 1) for i in outer),
                    (first, min(first + step, self.shape[axis])),
                    *((0, size) for size in self.shape[axis + 1:]),
                )


_Chunk = tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=256)
def _plans(
        shape: tuple[int, ...], value_dim: int, dtype: torch.dtype, kernel_size: tuple[int, ...],
        dilation: tuple[int, ...], stride: tuple[int, ...],
) -> list[_Plan]:
    """One plan for each pair of lengths that residue classes have."""
    batch, height, width, heads, head_dim = shape
    groups = (_length_groups(length, dil) for length, dil in zip((height, width), dilation, strict=True))
    plans = []
    for (first_y, residues_y, rows), (first_x, residues_x, columns) in itertools.product(*groups):
        def axes(tile_y: int, tile_x: int, y=(first_y, residues_y, rows), x=(first_x, residues_x, columns)):
            return (_Axis(y[0], y[1], dilation[0], y[2], kernel_size[0], stride[0], tile_y),
                    _Axis(x[0], x[1], dilation[1], x[2], kernel_size[1], stride[1], tile_x))

        whole = axes(rows, columns)
        chosen = whole if rows * columns <= _DENSE_TOKENS else min(
            itertools.starmap(axes, itertools.product(*map(_tile_sizes, whole))), key=lambda pair: _cost(*pair))
        plans.append(_Plan(batch, heads, head_dim, value_dim, dtype, *chosen))
    return plans


def _length_groups(length: int, dilation: int) -> list[tuple[int, int, int]]:
    """``(first residue, residues, members)`` of the residue classes, those of the same length together."""
    members, longer = divmod(length, dilation)
    groups = [(0, longer, members + 1), (longer, dilation - longer, members)]
    return [group for group in groups if group[1]]


def _tile_sizes(axis: _Axis) -> list[int]:
    """Sizes worth considering: the whole axis, equal parts, and some from the least that holds its shifted windows."""
    least = axis.kernel // 2 - axis.stride // 2 + 1
    sizes = {-(-size // axis.stride) * axis.stride for size in (
        *range(least, least + 16), *(-(-axis.length // parts) for parts in range(2, 17)))}
    return [axis.length, *(size for size in sizes if size < axis.length and axis._replace(tile=size).fits)]


def _cost(y: _Axis, x: _Axis) -> float:
    """Estimated work."""
    queries, keys = y.tile * x.tile, y.halo * x.halo
    # Scores to compute; small products run at a fraction of the speed; copied halo columns.
    return y.tiles * x.tiles * queries * keys * (1 + 8 / queries + 24 / keys) + 8 * x.tiles * x.halo * y.length


class _Move(NamedTuple):
    """A box of a map and its place in a part of the workspace: the same shape, two sets of strides and offsets."""

    shape: tuple[int, ...]
    place: tuple[int, ...]
    place_offset: int
    map: tuple[int, ...]
    map_offset: int


def _move(
        plan: _Plan, chunk: _Chunk, map_strides: tuple[int, ...], dim: int, rows: tuple[int, int, int, int],
        columns: tuple[int, int, int, int], place: tuple[int, ...], place_offset: int,
) -> _Move:
    """Boxes of the map, ``[*chunk but its tiles, column boxes, row boxes, rows, columns, dim]``.

    ``rows`` and ``columns`` are (first member, boxes, members from box to box, members of a box); ``place`` has the
    strides of the same axes in the workspace.
    """
    y, x = plan.y, plan.x
    batch, step_y, step_x, head, step = map_strides
    offset = (
        chunk[0][0] * batch
        + (y.first + chunk[1][0] + rows[0] * y.dilation) * step_y
        + (x.first + chunk[2][0] + columns[0] * x.dilation) * step_x
        + chunk[3][0] * head)
    shape = (*(last - first for first, last in chunk[:4]), columns[1], rows[1], rows[3], columns[3], dim)
    strides = (
        batch, step_y, step_x, head, columns[2] * x.dilation * step_x, rows[2] * y.dilation * step_y,
        y.dilation * step_y, x.dilation * step_x, step)
    return _Move(shape, place, place_offset, strides, offset)


def _outer_strides(chunk: _Chunk, column: int) -> tuple[int, ...]:
    """Strides of the axes of a chunk whose columns of tiles are ``column`` elements each."""
    strides = [column]
    for first, last in reversed(chunk[1:]):
        strides.append(strides[-1] * (last - first))
    return tuple(reversed(strides))


@functools.lru_cache(maxsize=4096)
def _tile_moves(plan: _Plan, chunk: _Chunk, map_strides: tuple[int, ...], dim: int) -> list[_Move]:
    """Between a map and tiles ``[*chunk, rows of tiles, rows, columns, dim]``."""
    y, x, first = plan.y, plan.x, chunk[4][0]
    tile = y.tile * x.tile * dim
    place = (*_outer_strides(chunk, y.tiles * tile), tile, x.tile * dim, dim, 1)
    return [
        _move(plan, chunk, map_strides, dim, (y0 * y.tile, y1 - y0, y.tile, rows),
              (x0 * x.tile, x1 - x0, x.tile, columns), place, (x0 - first) * place[4] + y0 * tile)
        for (y0, y1, rows), (x0, x1, columns) in itertools.product(y.pieces(0, y.tiles), x.pieces(*chunk[4]))
    ]


@functools.lru_cache(maxsize=4096)
def _slab_moves(
        plan: _Plan, chunk: _Chunk, map_strides: tuple[int, ...], dim: int, disjoint: bool,
) -> list[_Move]:
    """Between a map and slabs ``[*chunk, rows, halo columns, dim]``, after the guard.

    ``disjoint``: the boxes of a move do not overlap in the map, so that it may be written to.
    """
    y, x, first = plan.y, plan.x, chunk[4][0]
    row = x.halo * dim
    slab = y.tiles * y.tile * row
    place = _outer_strides(chunk, slab)
    moves = []
    for _, x0, x1 in x.kinds(*chunk[4]):
        step = min(-(-x.halo // x.tile), x1 - x0) if disjoint else 1
        for start in range(x0, x0 + step):
            columns = (x.start(start, clamped=True), len(range(start, x1, step)), step * x.tile, x.halo)
            moves.append(_move(
                plan, chunk, map_strides, dim, (0, 1, 1, y.length), columns,
                (*place[:4], step * place[4], slab, row, dim, 1), y.guard * row + (start - first) * slab))
    return moves


@functools.lru_cache(maxsize=4096)
def _kind_moves(plan: _Plan, chunk: _Chunk, shared: bool) -> list[_Move]:
    """Between a table and scores ``[*chunk, rows of tiles, queries, keys]``, one for each kind of tile.

    ``shared``: the table is the same for all heads.
    """
    y, x, first = plan.y, plan.x, chunk[4][0]
    tile, kinds_x = plan.queries * plan.keys, len(list(x.kinds(0, x.tiles)))
    head = 0 if shared else len(list(y.kinds(0, y.tiles))) * kinds_x * tile
    place = (*_outer_strides(chunk, y.tiles * tile), tile, plan.keys, 1)
    outer = tuple(last - start for start, last in chunk[:4])
    return [
        _Move((*outer, x1 - x0, y1 - y0, plan.queries, plan.keys), place, (x0 - first) * place[4] + y0 * tile,
              (0, 0, 0, head, 0, 0, plan.keys, 1), chunk[3][0] * head + (kind_y * kinds_x + kind_x) * tile)
        for (kind_y, y0, y1), (kind_x, x0, x1) in itertools.product(y.kinds(0, y.tiles), x.kinds(*chunk[4]))
    ]


# Running a plan.


class _Memory(threading.local):
    kept: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory that the thread's next call uses again."""
        size = count * dtype.itemsize
        if self.kept is None or self.kept.numel() < size:
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            if size > _WORKSPACE_BYTES:
                return memory.view(dtype)
            self.kept = memory
        return self.kept[:size].view(dtype)


_memory = _Memory()


class _Work:
    """A plan with memory: the ways between maps ``[batch, height, width, heads, dim]`` and the workspace."""

    def __init__(self, plan: _Plan, backward: bool):
        self.plan = plan
        self.memory = _memory.take(plan.sizes[backward], plan.dtype)

    def probabilities(self, chunk: _Chunk, q: Tensor, k: Tensor, table: Tensor | None, scale: float) -> Tensor:
        queries = self.load_tiles("q", chunk, q).mul_(scale)
        scores = torch.bmm(queries, self.load_keys("k", chunk, k).mT, out=self.scores("scores", chunk))
        if table is not None:
            for move in _kind_moves(self.plan, chunk, shared=len(table) == 1):
                self._place("scores", move).add_(_box(table, move))
        return torch.softmax(scores, dim=-1, out=scores)

    def tiles(self, part: str, chunk: _Chunk, dim: int) -> Tensor:
        plan = self.plan
        shape = (_columns(chunk) * plan.y.tiles, plan.queries, dim)
        return self.memory.as_strided(shape, (shape[1] * dim, dim, 1), plan.offsets[part])

    def scores(self, part: str, chunk: _Chunk) -> Tensor:
        return self.tiles(part, chunk, self.plan.keys)

    def windows(self, chunk: _Chunk, dim: int) -> Tensor:
        """Room for the gradients of all keys of every tile, ``[tiles, keys, dim]``."""
        shape = (_columns(chunk) * self.plan.y.tiles, self.plan.keys, dim)
        return self.memory.as_strided(shape, (shape[1] * dim, dim, 1), self.plan.offsets["windows"])

    def key_windows(self, part: str, chunk: _Chunk, dim: int) -> Tensor:
        """The keys of every tile, a view with overlaps ``[tiles, keys, dim]``."""
        y, x = self.plan.y, self.plan.x
        return self.memory.as_strided(
            (_columns(chunk) * y.tiles, self.plan.keys, dim), (y.tile * x.halo * dim, dim, 1), self.plan.offsets[part])

    def load_tiles(self, part: str, chunk: _Chunk, tensor: Tensor) -> Tensor:
        tiles = self.tiles(part, chunk, tensor.shape[-1])
        if self.plan.y.padding or self.plan.x.padding:
            tiles.zero_()  # padding has no gradient
        for move in _tile_moves(self.plan, chunk, tensor.stride(), tensor.shape[-1]):
            self._place(part, move).copy_(_box(tensor, move))
        return tiles

    def store_tiles(self, chunk: _Chunk, tiles: Tensor, tensor: Tensor) -> None:
        for move in _tile_moves(self.plan, chunk, tensor.stride(), tensor.shape[-1]):
            _box(tensor, move).copy_(tiles.as_strided(
                move.shape, move.place, tiles.storage_offset() + move.place_offset))

    def load_keys(self, part: str, chunk: _Chunk, tensor: Tensor) -> Tensor:
        y, x, dim = self.plan.y, self.plan.x, tensor.shape[-1]
        # What is masked must be finite: rows around the slabs and after the end of the map.
        row, rows = x.halo * dim, y.tiles * y.tile
        count, first = _columns(chunk), self.plan.offsets[part]
        if y.tiles > 1:
            self.memory[first:first + y.guard * row].zero_()
            self.memory[first + (y.guard + count * rows) * row:][:(y.kernel - y.guard) * row].zero_()
        if y.padding:
            self.memory.as_strided(
                (count, y.padding * row), (rows * row, 1), first + (y.guard + y.length) * row).zero_()
        for move in _slab_moves(self.plan, chunk, tensor.stride(), dim, disjoint=False):
            self._place(part, move).copy_(_box(tensor, move))
        return self.key_windows(part, chunk, dim)

    def add_keys(self, chunk: _Chunk, windows: Tensor, tensor: Tensor) -> None:
        """Adds the gradients of all tiles' keys to the map: overlapping windows to slabs, then halos to columns."""
        y, x, dim = self.plan.y, self.plan.x, tensor.shape[-1]
        row, count, first = x.halo * dim, windows.shape[0], self.plan.offsets["dslab"]
        windows = windows.view(count, y.halo, row)
        self.memory[first + count * y.tile * row:][:y.kernel * row].zero_()
        for shift in range(0, y.halo, y.tile):
            block = windows[:, shift:shift + y.tile]
            target = self.memory.as_strided(block.shape, (y.tile * row, row, 1), first + shift * row)
            target.add_(block) if shift else target.copy_(block)
        for move in _slab_moves(self.plan, chunk, tensor.stride(), dim, disjoint=True):
            _box(tensor, move).add_(self._place("dslab", move))

    def add_scores(self, part: str, chunk: _Chunk, table: Tensor) -> None:
        """Sums scores over all tiles of a kind into the table of their head."""
        for move in _kind_moves(self.plan, chunk, shared=False):
            _box(table, move)[0, 0, 0, :, 0, 0].add_(self._place(part, move).sum((0, 1, 2, 4, 5)))

    def _place(self, part: str, move: _Move) -> Tensor:
        return self.memory.as_strided(move.shape, move.place, self.plan.offsets[part] + move.place_offset)


def _box(tensor: Tensor, move: _Move) -> Tensor:
    return tensor.as_strided(move.shape, move.map, tensor.storage_offset() + move.map_offset)


def _tokens(plan: _Plan, tensor: Tensor) -> Tensor:
    """``[classes, heads, tokens, dim]`` of a dense plan; a view where the strides allow it."""
    return _all(plan, tensor).to(plan.dtype).flatten(4, 5).flatten(0, 2)


def _store_tokens(plan: _Plan, tokens: Tensor, tensor: Tensor) -> None:
    target = _all(plan, tensor)
    target.copy_(tokens.reshape(target.shape))


def _all(plan: _Plan, tensor: Tensor) -> Tensor:
    """View of a dense plan's classes ``[batch, classes in y, classes in x, heads, rows, columns, dim]``."""
    everything = tuple((0, size) for size in plan.shape)
    move, = _tile_moves(plan, everything, tensor.stride(), tensor.shape[-1])
    return _box(tensor, move)[:, :, :, :, 0, 0]


def _columns(chunk: _Chunk) -> int:
    return math.prod(last - first for first, last in chunk)


# Mask and bias: what is added to the scores, ``[heads or 1, kinds in y, kinds in x, queries, keys]``.


_tables: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()
_tables_lock = threading.Lock()


def _table(plan: _Plan, bias: Tensor | None) -> Tensor | None:
    """None for nothing. The table of a bias is kept, with the values that it was made of."""
    if bias is None:
        return _mask(plan.y, plan.x, plan.dtype)
    # Compared by value: a version counter does not see every way to change a parameter (`.data`), and the memory of a
    # freed one is used again.
    key = (bias.data_ptr(), bias.shape, bias.dtype, plan.y, plan.x, plan.dtype)
    with _tables_lock:
        source, table = _tables.get(key, (None, None))
        if source is None or table is None or not torch.equal(source, bias):
            with torch.inference_mode(False), torch.no_grad():
                source, table = bias.clone(), _compose(plan, bias)
            _tables[key] = source, table
        _tables.move_to_end(key)
        while len(_tables) > 1 and sum(kept.nbytes for _, kept in _tables.values()) > _TABLE_BYTES:
            _tables.popitem(last=False)
        return table


def _compose(plan: _Plan, bias: Tensor) -> Tensor:
    entries = F.pad(bias.to(plan.dtype).flatten(1), (0, 1), value=_MASKED)
    index = _table_index(plan.y, plan.x)
    return entries.index_select(1, index.flatten()).view(len(entries), *index.shape)


def _add_table(plan: _Plan, dtable: Tensor, dbias: Tensor) -> None:
    index = _table_index(plan.y, plan.x).flatten().expand(len(dbias), -1)
    entries = dbias.new_zeros(len(dbias), dbias[0].numel() + 1).scatter_add_(1, index, dtable.flatten(1))
    dbias.add_(entries[:, :-1].view_as(dbias))


@functools.lru_cache(maxsize=64)
def _table_index(y: _Axis, x: _Axis) -> Tensor:
    """Entry of the bias table of every (kind in y, kind in x, query, key); its size where the key is masked."""
    with torch.inference_mode(False):
        (offset_y, valid_y), (offset_x, valid_x) = _axis_index(y, clamped=False), _axis_index(x, clamped=True)
        index = offset_y[:, None, :, None, :, None] * (2 * x.kernel - 1) + offset_x[:, None, :, None, :]
        valid = valid_y[:, None, :, None, :, None] & valid_x[:, None, :, None, :]
        index = torch.where(valid, index, (2 * y.kernel - 1) * (2 * x.kernel - 1))
        return index.flatten(4, 5).flatten(2, 3)


@functools.lru_cache(maxsize=64)
def _mask(y: _Axis, x: _Axis, dtype: torch.dtype) -> Tensor | None:
    with torch.inference_mode(False):
        index = _table_index(y, x)
        masked = index == (2 * y.kernel - 1) * (2 * x.kernel - 1)
        if not masked.any():
            return None
        return torch.zeros(index.shape, dtype=dtype, device="cpu").masked_fill_(masked, _MASKED)[None]


def _axis_index(axis: _Axis, clamped: bool) -> tuple[Tensor, Tensor]:
    """Of every (kind of tile, query, key): offset into the bias table, and whether the query sees the key."""
    tiles = [first for _, first, _ in axis.kinds(0, axis.tiles)]
    queries = [[min(tile * axis.tile + i, axis.length - 1) for i in range(axis.tile)] for tile in tiles]  # padded
    query = torch.tensor(queries, device="cpu")[:, :, None]
    window = torch.tensor([[axis.window(i) for i in row] for row in queries], device="cpu")[:, :, None]
    start = torch.tensor([axis.start(tile, clamped) for tile in tiles], device="cpu")
    key = (start[:, None] + torch.arange(axis.halo, device="cpu"))[:, None]
    return key - query + axis.kernel - 1, (key >= window) & (key < window + axis.kernel)
