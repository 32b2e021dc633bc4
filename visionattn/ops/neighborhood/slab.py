"""Two-dimensional neighborhood attention on CPU, in as few and as large matrix products as possible.

The map is cut into tiles of queries. A tile's keys, the union of its windows, are its rows and columns and a halo of
``kernel_size - 1`` around them. Column halos are copied once: the keys of a column of tiles become a slab
``[rows, halo columns, head_dim]``, and slabs lie one after the other. Row halos cost nothing: the keys of a tile are
then consecutive tokens of its slab, so overlapping strided windows make every tile an entry of one batched matrix
product. What a window holds beyond a query's own neighborhood, or beyond the slab, is masked.

Work is done in chunks of tiles whose scores stay in the cache, in buffers that are allocated once. The residue classes
of a dilated axis are more batch. The backward pass computes the probabilities again instead of keeping them. Classes
that are hardly larger than a tile run in PyTorch's dense attention under one mask.
"""
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["slab_attention"]

_CHUNK_BYTES = 4 << 20  # scores of one chunk, unless all are not twice as many (measured)
_DENSE_TOKENS = 18 * 18  # classes up to this size are one tile, done by PyTorch's dense attention (measured)
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
        scale: float,
) -> Tensor:
    """Neighborhood attention on two axes, neither strided nor causal. Differentiable in q, k, v and bias.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``, any strides, on CPU.
        k: Keys, shaped as q.
        v: Values ``[batch, height, width, heads, value_dim]``.
        bias: Relative position bias ``[heads, 2 * kernel_height - 1, 2 * kernel_width - 1]``.
        kernel_size: Window height and width; 1 is allowed here.
        dilation: One per axis.
        scale: Factor on ``q . k``.

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, computed in float32 or better.
    """
    return _slab_forward(q, k, v, bias, list(kernel_size), list(dilation), scale)[0]


@torch.library.custom_op("visionattn::neighborhood_slab", mutates_args=())
def _slab_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel_size: list[int],
        dilation: list[int],
        scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp ``[batch, height, width, heads]`` where the dense backward wants it, else 0."""
    out = q.new_empty(v.shape)
    lse = q.new_zeros(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    with torch.autocast("cpu", enabled=False):
        for work in _works(q, v, kernel_size, dilation):
            table = work.table(bias)
            if work.is_dense:
                queries, keys, values = (work.tokens(x) for x in (q, k, v))
                result, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
                    queries, keys, values, attn_mask=_dense_mask(table), scale=scale)
                work.store_tokens(result, out)
                work.store_tokens(sums.unsqueeze(-1), lse.unsqueeze(-1))
                continue
            for chunk in work.chunks():
                p = work.probabilities(chunk, q, k, table, scale)
                result = torch.bmm(p, work.load_keys("v", chunk, v), out=work.tiles("out", chunk))
                work.store_tiles(chunk, result, out)
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
        scale: float,
        bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and (empty unless ``bias_grad``) bias."""
    compute = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(q.shape)
    dk, dv = k.new_zeros(k.shape, dtype=compute), v.new_zeros(v.shape, dtype=compute)
    dbias = q.new_zeros(0 if bias is None or not bias_grad else bias.shape, dtype=compute)
    with torch.autocast("cpu", enabled=False):
        for work in _works(q, v, kernel_size, dilation):
            table = work.table(bias)
            if work.is_dense and not bias_grad:
                gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *(work.tokens(x) for x in (grad, q, k, v, out)), work.tokens(lse.unsqueeze(-1)).squeeze(-1),
                    0.0, False, attn_mask=_dense_mask(table), scale=scale)
                for gradient, target in zip(gradients, (dq, dk, dv), strict=True):
                    work.store_tokens(gradient, target)
                continue
            dtable = None if table is None or not bias_grad else torch.zeros_like(table)
            for chunk in work.chunks():
                p = work.probabilities(chunk, q, k, table, scale)
                queries, keys = work.tiles("q", chunk), work.key_windows("k", chunk)
                dout, values = work.load_tiles("out", chunk, grad), work.load_keys("v", chunk, v)
                work.add_keys("v", chunk, torch.bmm(p.mT, dout, out=work.windows("dv", chunk)), dv)
                ds = torch.bmm(dout, values.mT, out=work.scores("dscores", chunk))
                torch._softmax_backward_data(ds, p, -1, compute, grad_input=ds)
                if dtable is not None:
                    work.add_scores(chunk, ds, dtable)
                work.add_keys("k", chunk, torch.bmm(ds.mT, queries, out=work.windows("dk", chunk)), dk)
                work.store_tiles(chunk, torch.bmm(ds, keys, out=queries).mul_(scale), dq)
            if dtable is not None:
                work.add_table(dtable, dbias)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias if bias is None else dbias.to(bias.dtype)


@_slab_forward.register_fake
def _(q, k, v, bias, kernel_size, dilation, scale):
    return q.new_empty(v.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@_slab_backward.register_fake
def _(grad, q, k, v, bias, out, lse, kernel_size, dilation, scale, bias_grad):
    dbias = bias.new_empty(bias.shape) if bias_grad else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx, inputs, output):
    q, k, v, bias, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _slab_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.kernel_size, ctx.dilation, ctx.scale, bias_grad)
    return dq, dk, dv, dbias if bias_grad else None, None, None, None


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


def _dense_mask(table: Tensor | None) -> Tensor | None:
    return None if table is None else table[:, 0, 0].unsqueeze(0)


class _Axis(NamedTuple):
    """One axis of the residue classes of the same length, and how it is cut.

    Attributes:
        first: First residue.
        residues: Number of classes.
        dilation: Distance of a class's members in the map.
        length: Members of a class.
        kernel: Window size.
        tile: Queries of a tile.
    """

    first: int
    residues: int
    dilation: int
    length: int
    kernel: int
    tile: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    @property
    def guard(self) -> int:
        """Keys of an inner tile before its first query."""
        return self.kernel // 2 if self.tiles > 1 else 0

    @property
    def halo(self) -> int:
        """Keys of a tile."""
        return self.tile + self.kernel - 1 if self.tiles > 1 else self.length

    def start(self, tile: int, clamped: bool) -> int:
        """First key of a tile; ``clamped``: shifted so that no key lies outside of the axis."""
        start = tile * self.tile - self.guard
        return max(min(start, self.length - self.halo), 0) if clamped else start

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


def _works(q: Tensor, v: Tensor, kernel_size: list[int], dilation: list[int]) -> Iterator["_Work"]:
    batch, height, width, heads, head_dim = q.shape
    groups = (_length_groups(length, dil) for length, dil in zip((height, width), dilation, strict=True))
    for (first_y, residues_y, rows), (first_x, residues_x, columns) in itertools.product(*groups):
        small = rows * columns <= _DENSE_TOKENS
        tile_y, tile_x = (rows, columns) if small else _choose_tile(rows, columns, *kernel_size)
        yield _Work(
            batch, heads, {"q": head_dim, "k": head_dim, "v": v.shape[-1], "out": v.shape[-1]},
            torch.promote_types(q.dtype, torch.float32),
            _Axis(first_y, residues_y, dilation[0], rows, kernel_size[0], tile_y),
            _Axis(first_x, residues_x, dilation[1], columns, kernel_size[1], tile_x),
        )


def _length_groups(length: int, dilation: int) -> list[tuple[int, int, int]]:
    """``(first residue, residues, members)`` of the residue classes, those of the same length together."""
    members, longer = divmod(length, dilation)
    groups = [(0, longer, members + 1), (longer, dilation - longer, members)]
    return [group for group in groups if group[1]]


@functools.lru_cache(maxsize=1024)
def _choose_tile(rows: int, columns: int, kernel_y: int, kernel_x: int) -> tuple[int, int]:
    """Tile height and width of least estimated work."""
    return min(
        itertools.product(_tile_sizes(rows, kernel_y), _tile_sizes(columns, kernel_x)),
        key=lambda tile: _cost(rows, columns, kernel_y, kernel_x, *tile))


def _tile_sizes(length: int, kernel: int) -> list[int]:
    """Sizes for which only the first and the last tile have shifted windows, and none is shifted out of its halo."""
    least, most = kernel // 2 + 1, length - kernel + 1
    sizes = {*range(least, least + 16), *(-(-length // parts) for parts in range(2, 17))}
    return [length, *(
        size for size in sizes if least <= size <= most and not 0 < length % size < kernel - kernel // 2)]


def _cost(rows: int, columns: int, kernel_y: int, kernel_x: int, tile_y: int, tile_x: int) -> float:
    y = _Axis(0, 1, 1, rows, kernel_y, tile_y)
    x = _Axis(0, 1, 1, columns, kernel_x, tile_x)
    queries, keys = y.tile * x.tile, y.halo * x.halo
    # Scores to compute; small products run at a fraction of the speed; copied halo columns.
    return y.tiles * x.tiles * queries * keys * (1 + 8 / queries + 24 / keys) + 8 * x.tiles * x.halo * rows


class _Work:
    """The residue classes of one shape: buffers for a chunk of their tiles, and the ways between tensor and buffer.

    A chunk is a tuple of slices of ``[batch, classes in y, classes in x, heads, columns of tiles]``.
    """

    def __init__(self, batch: int, heads: int, dims: dict[str, int], dtype: torch.dtype, y: _Axis, x: _Axis):
        self.shape = (batch, y.residues, x.residues, heads, x.tiles)
        self.dims, self.dtype, self.y, self.x = dims, dtype, y, x
        self.queries, self.keys = y.tile * x.tile, y.halo * x.halo
        column = y.tiles * self.queries * self.keys * dtype.itemsize
        columns = math.prod(self.shape)
        self.limit = columns if columns * column <= 2 * _CHUNK_BYTES else max(_CHUNK_BYTES // column, 1)
        self.capacity = min(self.limit, columns) * y.tiles
        self.buffers: dict[str, Tensor] = {}

    @property
    def is_dense(self) -> bool:
        """Whether PyTorch's dense attention does it, which has no gradient of a bias."""
        return self.y.tiles == self.x.tiles == 1 and self.dims["q"] == self.dims["v"]

    def chunks(self) -> Iterator[tuple[slice, ...]]:
        """Pieces of at most ``limit`` columns of tiles that are consecutive in the order of ``shape``."""
        axis, inner = len(self.shape) - 1, 1
        while axis > 0 and inner * self.shape[axis] <= self.limit:
            inner *= self.shape[axis]
            axis -= 1
        step = max(self.limit // inner, 1)
        for outer in itertools.product(*map(range, self.shape[:axis])):
            for first in range(0, self.shape[axis], step):
                yield (
                    *(slice(i, i + 1) for i in outer),
                    slice(first, min(first + step, self.shape[axis])),
                    *(slice(0, size) for size in self.shape[axis + 1:]),
                )

    def probabilities(self, chunk, q: Tensor, k: Tensor, table: Tensor | None, scale: float) -> Tensor:
        queries = self.load_tiles("q", chunk, q).mul_(scale)
        scores = torch.bmm(queries, self.load_keys("k", chunk, k).mT, out=self.scores("scores", chunk))
        if table is not None:
            for score, entry in self._by_kind(chunk, scores, table):
                score.add_(entry)
        return torch.softmax(scores, dim=-1, out=scores)

    # Buffers, the part that a chunk uses.

    def _buffer(self, name: str, size: int, zero: bool) -> Tensor:
        if name not in self.buffers:
            new = torch.zeros if zero else torch.empty
            self.buffers[name] = new(size, dtype=self.dtype, device="cpu")
        return self.buffers[name]

    def _used(self, name: str, chunk, rows: int, columns: int, zero: bool = False) -> Tensor:
        count, size = _columns(chunk) * self.y.tiles, rows * columns
        return self._buffer(name, self.capacity * size, zero)[:count * size].view(count, rows, columns)

    def tiles(self, name: str, chunk) -> Tensor:
        return self._used(name, chunk, self.queries, self.dims[name], zero=True)  # padding has no gradient

    def scores(self, name: str, chunk) -> Tensor:
        return self._used(name, chunk, self.queries, self.keys)

    def windows(self, name: str, chunk) -> Tensor:
        return self._used(name, chunk, self.keys, self.dims[name[1:]])

    def _slabs(self, name: str, chunk) -> tuple[Tensor, Tensor]:
        """The whole buffer ``[rows, row]``, guards included, and its slabs ``[*chunk, rows, halo columns, dim]``."""
        dim, rows = self.dims[name[-1]], self.y.tiles * self.y.tile
        buffer = self._buffer(f"{name} slabs", (self.capacity * self.y.tile + self.y.kernel) * self.x.halo * dim, True)
        flat = buffer.view(-1, self.x.halo * dim)
        slabs = flat[self.y.guard:self.y.guard + _columns(chunk) * rows]
        return flat, slabs.view(*(s.stop - s.start for s in chunk), rows, self.x.halo, dim)

    def key_windows(self, name: str, chunk) -> Tensor:
        """The keys of every tile, a view with overlaps ``[tiles, keys, dim]``."""
        dim = self.dims[name]
        return self._slabs(name, chunk)[0].as_strided(
            (_columns(chunk) * self.y.tiles, self.keys, dim), (self.y.tile * self.x.halo * dim, dim, 1))

    # Between a tensor [batch, height, width, heads, dim] and the buffers.

    def _view(self, tensor: Tensor, chunk, rows: tuple, columns: tuple) -> Tensor:
        """Boxes of the map, ``[*chunk but its tiles, column boxes, row boxes, rows, columns, dim]``.

        ``rows`` and ``columns`` are (first member, boxes, members from box to box, members of a box).
        """
        y, x = self.y, self.x
        batch, step_y, step_x, head, step = tensor.stride()
        offset = (
            chunk[0].start * batch
            + (y.first + chunk[1].start + rows[0] * y.dilation) * step_y
            + (x.first + chunk[2].start + columns[0] * x.dilation) * step_x
            + chunk[3].start * head)
        return tensor.as_strided(
            (*(s.stop - s.start for s in chunk[:4]), columns[1], rows[1], rows[3], columns[3], tensor.shape[-1]),
            (batch, step_y, step_x, head, columns[2] * x.dilation * step_x, rows[2] * y.dilation * step_y,
             y.dilation * step_y, x.dilation * step_x, step),
            tensor.storage_offset() + offset)

    def _tile_views(self, chunk, tiles: Tensor, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        y, x, first = self.y, self.x, chunk[4].start
        tiles = tiles.view(*(s.stop - s.start for s in chunk), y.tiles, y.tile, x.tile, tensor.shape[-1])
        for (y0, y1, rows), (x0, x1, columns) in itertools.product(
                y.pieces(0, y.tiles), x.pieces(first, chunk[4].stop)):
            box = tiles[:, :, :, :, x0 - first:x1 - first, y0:y1, :rows, :columns]
            yield box, self._view(
                tensor, chunk, (y0 * y.tile, y1 - y0, y.tile, rows), (x0 * x.tile, x1 - x0, x.tile, columns))

    def load_tiles(self, name: str, chunk, tensor: Tensor) -> Tensor:
        tiles = self.tiles(name, chunk)
        if chunk[4].stop == self.x.tiles and self.x.length % self.x.tile:
            tiles.zero_()  # padding columns, where another chunk may have had queries
        for box, source in self._tile_views(chunk, tiles, tensor):
            box.copy_(source)
        return tiles

    def store_tiles(self, chunk, tiles: Tensor, tensor: Tensor) -> None:
        for box, target in self._tile_views(chunk, tiles, tensor):
            target.copy_(box)

    def _all(self, tensor: Tensor) -> Tensor:
        """View of the classes ``[batch, classes in y, classes in x, heads, rows, columns, dim]``."""
        everything = tuple(slice(0, size) for size in self.shape)
        return self._view(tensor, everything, (0, 1, 1, self.y.length), (0, 1, 1, self.x.length))[:, :, :, :, 0, 0]

    def tokens(self, tensor: Tensor) -> Tensor:
        """``[classes, heads, tokens, dim]``; a view where the strides allow it. The kernels take dim to be dense."""
        tokens = self._all(tensor).to(self.dtype).flatten(4, 5).flatten(0, 2)
        return tokens if tokens.stride(-1) == 1 else tokens.contiguous()

    def store_tokens(self, tokens: Tensor, tensor: Tensor) -> None:
        target = self._all(tensor)
        target.copy_(tokens.reshape(target.shape))

    def load_keys(self, name: str, chunk, tensor: Tensor) -> Tensor:
        y, x, first = self.y, self.x, chunk[4].start
        slabs = self._slabs(name, chunk)[1]
        for _, x0, x1 in x.kinds(first, chunk[4].stop):
            columns = (x.start(x0, clamped=True), x1 - x0, x.tile, x.halo)
            source = self._view(tensor, chunk, (0, 1, 1, y.length), columns)
            slabs[:, :, :, :, x0 - first:x1 - first, :y.length].copy_(source.squeeze(5))
        return self.key_windows(name, chunk)

    def add_keys(self, name: str, chunk, windows: Tensor, tensor: Tensor) -> None:
        """Adds the gradients of all tiles' keys to the map: overlapping windows to slabs, then halos to columns."""
        y, x, first = self.y, self.x, chunk[4].start
        flat, slabs = self._slabs("d" + name, chunk)
        windows = windows.view(windows.shape[0], y.halo, -1)
        count = windows.shape[0]
        flat[count * y.tile:].zero_()
        for shift in range(0, y.halo, y.tile):
            block = windows[:, shift:shift + y.tile]
            target = flat[shift:].as_strided(
                block.shape, (y.tile * flat.shape[1], flat.shape[1], 1), shift * flat.shape[1])
            target.add_(block) if shift else target.copy_(block)
        for tile in range(first, chunk[4].stop):
            columns = (x.start(tile, clamped=True), 1, 1, x.halo)
            target = self._view(tensor, chunk, (0, 1, 1, y.length), columns)
            target[:, :, :, :, 0, 0].add_(slabs[:, :, :, :, tile - first, :y.length])

    # Mask and bias.

    def table(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the scores, ``[heads or 1, kinds in y, kinds in x, queries, keys]``; None for nothing."""
        if bias is None:
            return _mask(self.y, self.x, self.dtype)
        entries = F.pad(bias.to(self.dtype).flatten(1), (0, 1), value=_MASKED)
        return entries[:, _table_index(self.y, self.x)]

    def add_table(self, dtable: Tensor, dbias: Tensor) -> None:
        index = _table_index(self.y, self.x).flatten().expand(len(dbias), -1)
        entries = dbias.new_zeros(len(dbias), dbias[0].numel() + 1).scatter_add_(1, index, dtable.flatten(1))
        dbias.add_(entries[:, :-1].view_as(dbias))

    def _by_kind(self, chunk, scores: Tensor, table: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores ``[*chunk, rows of tiles, queries, keys]`` of every kind, and the table's entry that belongs to it."""
        first, heads = chunk[4].start, chunk[3] if table.shape[0] > 1 else slice(None)
        scores = scores.view(*(s.stop - s.start for s in chunk), self.y.tiles, self.queries, self.keys)
        for (kind_y, y0, y1), (kind_x, x0, x1) in itertools.product(
                self.y.kinds(0, self.y.tiles), self.x.kinds(first, chunk[4].stop)):
            yield scores[:, :, :, :, x0 - first:x1 - first, y0:y1], table[heads, kind_y, kind_x, None, None]

    def add_scores(self, chunk, scores: Tensor, table: Tensor) -> None:
        for score, entry in self._by_kind(chunk, scores, table):
            entry.add_(score.sum((0, 1, 2, 4, 5))[:, None, None])


def _columns(chunk) -> int:
    return math.prod(s.stop - s.start for s in chunk)


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
    query = torch.tensor(tiles, device="cpu")[:, None] * axis.tile + torch.arange(axis.tile, device="cpu")
    query = query.clamp(max=axis.length - 1)  # padding
    start = torch.tensor([axis.start(tile, clamped) for tile in tiles], device="cpu")
    key = (start[:, None] + torch.arange(axis.halo, device="cpu"))[:, None]
    window = (query - axis.kernel // 2).clamp(0, axis.length - axis.kernel)[:, :, None]
    return key - query[:, :, None] + axis.kernel - 1, (key >= window) & (key < window + axis.kernel)
