"""How the slab form cuts a map, and which boxes of it are copied where: numbers that follow from shapes and strides.

The map is cut into residue classes (of dilated axes), these into tiles of queries, and the tiles are done in chunks
whose scores stay in the cache.
"""
import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = [
    "Axis", "Chunk", "Move", "Plan", "columns_of", "kind_moves", "plans", "slab_moves", "tile_moves",
]

_CHUNK_BYTES = 2 << 20  # scores of one chunk (measured)

Chunk = tuple[tuple[int, int], ...]  # (first, last) on each of the axes of Plan.shape


class Axis(NamedTuple):
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
        """Number of tiles."""
        return -(-self.length // self.tile)

    @property
    def padding(self) -> int:
        """Queries of the last tile that do not exist."""
        return self.tiles * self.tile - self.length

    @property
    def overlaps(self) -> bool:
        """Whether the rows of tiles share one copy of the keys. One or two have their own: they reach inwards only."""
        return self.tiles > 2

    @property
    def guard(self) -> int:
        """Keys of an inner tile before its first query."""
        return self.kernel // 2 - self.stride // 2 if self.overlaps else 0

    @property
    def halo(self) -> int:
        """Keys of a tile."""
        if self.overlaps:
            return self.tile + self.kernel - self.stride
        if self.tiles == 1:
            return self.length
        return max(self.window(self.tile - 1) + self.kernel, self.length - self.window(self.tile))

    @property
    def step(self) -> int:
        """Rows of a slab from tile to tile."""
        return self.tile if self.overlaps else self.halo

    def start(self, tile: int, clamped: bool) -> int:
        """First key of a tile; ``clamped``: shifted so that no key lies outside of the axis."""
        start = tile * self.tile - self.guard
        return max(min(start, self.length - self.halo), 0) if clamped or not self.overlaps else start

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


class Plan:
    """The residue classes of one shape, cut into chunks of tiles.

    A chunk is ``(first, last)`` for each of the axes ``shape``: batch, classes in y, classes in x, heads, columns of
    tiles.
    """

    def __init__(
            self, batch: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, y: Axis, x: Axis,
    ):
        self.shape = (batch, y.residues, x.residues, heads, x.tiles)
        self.head_dim, self.value_dim, self.dtype, self.y, self.x = head_dim, value_dim, dtype, y, x
        self.queries, self.keys = y.tile * x.tile, y.halo * x.halo
        self.is_whole = y.tiles == x.tiles == 1  # a class is a tile
        column = y.tiles * self.queries * self.keys * dtype.itemsize
        columns = math.prod(self.shape)
        self.pairs = columns * y.tiles * self.queries * self.keys  # of a query and a key, in all tiles
        limit = columns if columns * column <= _CHUNK_BYTES else max(_CHUNK_BYTES // column, 1)
        self.chunks = list(self._chunks(limit))
        # Where the parts of the workspace are, in elements: of the forward pass, then what the backward adds.
        tiles, dim = min(limit, columns) * y.tiles, max(head_dim, value_dim)
        sizes = {
            "q": tiles * self.queries * dim, "out": 0, "scores": tiles * self.queries * self.keys,
            "keys": self._slab_size(tiles, dim),
            "dout": tiles * self.queries * value_dim, "dscores": tiles * self.queries * self.keys,
            "dslab": self._slab_size(tiles, dim), "rest": tiles * (y.halo % y.step) * x.halo * dim}
        ends = list(itertools.accumulate(-(-size // 16) * 16 for size in sizes.values()))  # lines of the cache
        self.offsets = dict(zip(sizes, [0, *ends], strict=False))
        self.offsets["out"] = self.offsets["q"]  # queries are not needed once there are scores
        self.sizes = {False: ends[3], True: ends[-1]}

    def _slab_size(self, tiles: int, dim: int) -> int:
        return (tiles * self.y.step + self.y.kernel) * self.x.halo * dim

    def _chunks(self, limit: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """Pieces of at most ``limit`` columns of tiles that are consecutive in the order of ``shape``."""
        axis, inner = len(self.shape) - 1, 1
        while axis > 0 and inner * self.shape[axis] <= limit:
            inner *= self.shape[axis]
            axis -= 1
        step = max(limit // inner, 1)
        step = -(-self.shape[axis] // -(-self.shape[axis] // step))  # pieces as equal as can be
        for outer in itertools.product(*map(range, self.shape[:axis])):
            for first in range(0, self.shape[axis], step):
                yield (
                    *((i, i + 1) for i in outer),
                    (first, min(first + step, self.shape[axis])),
                    *((0, size) for size in self.shape[axis + 1:]),
                )


@functools.lru_cache(maxsize=4096)
def columns_of(chunk: Chunk) -> int:
    """Columns of tiles in a chunk."""
    return math.prod(last - first for first, last in chunk)


@functools.lru_cache(maxsize=256)
def plans(
        shape: tuple[int, ...], value_dim: int, dtype: torch.dtype, kernel_size: tuple[int, ...],
        dilation: tuple[int, ...], stride: tuple[int, ...],
) -> list[Plan]:
    """One plan for each pair of lengths that residue classes have."""
    batch, height, width, heads, head_dim = shape
    groups = (_length_groups(length, dil) for length, dil in zip((height, width), dilation, strict=True))
    plans = []
    for (first_y, residues_y, rows), (first_x, residues_x, columns) in itertools.product(*groups):
        def axes(tile_y: int, tile_x: int, y=(first_y, residues_y, rows), x=(first_x, residues_x, columns)):
            return (Axis(y[0], y[1], dilation[0], y[2], kernel_size[0], stride[0], tile_y),
                    Axis(x[0], x[1], dilation[1], x[2], kernel_size[1], stride[1], tile_x))

        chosen = min(
            itertools.starmap(axes, itertools.product(*map(_tile_sizes, axes(rows, columns)))),
            key=lambda pair: _cost(*pair))
        plans.append(Plan(batch, heads, head_dim, value_dim, dtype, *chosen))
    return plans


def _length_groups(length: int, dilation: int) -> list[tuple[int, int, int]]:
    """``(first residue, residues, members)`` of the residue classes, those of the same length together."""
    members, longer = divmod(length, dilation)
    groups = [(0, longer, members + 1), (longer, dilation - longer, members)]
    return [group for group in groups if group[1]]


def _tile_sizes(axis: Axis) -> list[int]:
    """Sizes worth considering: the whole axis, equal parts, and some from the least that holds its shifted windows."""
    least = axis.kernel // 2 - axis.stride // 2 + 1
    sizes = {-(-size // axis.stride) * axis.stride for size in (
        *range(least, least + 16), *(-(-axis.length // parts) for parts in range(2, 17)))}
    return [axis.length, *(size for size in sizes if size < axis.length and axis._replace(tile=size).fits)]


def _cost(y: Axis, x: Axis) -> float:
    """Estimated work."""
    queries, keys = y.tile * x.tile, y.halo * x.halo
    # Scores to compute; small products run at a fraction of the speed; copied halo columns.
    return y.tiles * x.tiles * queries * keys * (1 + 8 / queries + 24 / keys) + 8 * x.tiles * x.halo * y.length


class Move(NamedTuple):
    """A box of a map and its place in a part of the workspace: the same shape, two sets of strides and offsets."""

    shape: tuple[int, ...]
    place: tuple[int, ...]
    place_offset: int
    map: tuple[int, ...]
    map_offset: int


def _move(
        plan: Plan, chunk: Chunk, map_strides: tuple[int, ...], dim: int, rows: tuple[int, int, int, int],
        columns: tuple[int, int, int, int], place: tuple[int, ...], place_offset: int,
) -> Move:
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
    return Move(shape, place, place_offset, strides, offset)


def _outer_strides(chunk: Chunk, column: int) -> tuple[int, ...]:
    """Strides of the axes of a chunk whose columns of tiles are ``column`` elements each."""
    strides = [column]
    for first, last in reversed(chunk[1:]):
        strides.append(strides[-1] * (last - first))
    return tuple(reversed(strides))


@functools.lru_cache(maxsize=4096)
def tile_moves(plan: Plan, chunk: Chunk, map_strides: tuple[int, ...], dim: int) -> list[Move]:
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
def slab_moves(
        plan: Plan, chunk: Chunk, map_strides: tuple[int, ...], dim: int, disjoint: bool,
) -> list[Move]:
    """Between a map and slabs ``[*chunk, rows, halo columns, dim]``, after the guard.

    ``disjoint``: the boxes of a move do not overlap in the map, so that it may be written to.
    """
    y, x, first = plan.y, plan.x, chunk[4][0]
    row = x.halo * dim
    slab = y.tiles * y.step * row
    place = _outer_strides(chunk, slab)
    if y.overlaps or y.tiles == 1:
        boxes = [(0, 1, 1, y.length)]
    elif disjoint:
        boxes = [(y.start(tile, clamped=True), 1, 1, y.halo) for tile in range(y.tiles)]
    else:
        boxes = [(0, y.tiles, y.start(1, clamped=True), y.halo)]
    moves = []
    for _, x0, x1 in x.kinds(*chunk[4]):
        step = min(-(-x.halo // x.tile), x1 - x0) if disjoint else 1
        for start in range(x0, x0 + step):
            columns = (x.start(start, clamped=True), len(range(start, x1, step)), step * x.tile, x.halo)
            moves += [
                _move(
                    plan, chunk, map_strides, dim, rows, columns,
                    (*place[:4], step * place[4], y.halo * row, row, dim, 1),
                    (y.guard + tile * y.halo) * row + (start - first) * slab)
                for tile, rows in enumerate(boxes)]
    return moves


@functools.lru_cache(maxsize=4096)
def kind_moves(plan: Plan, chunk: Chunk, shared: bool) -> list[Move]:
    """Between a table and scores ``[*chunk, rows of tiles, queries, keys]``, one for each kind of tile.

    ``shared``: the table is the same for all heads.
    """
    y, x, first = plan.y, plan.x, chunk[4][0]
    tile, kinds_x = plan.queries * plan.keys, len(list(x.kinds(0, x.tiles)))
    head = 0 if shared else len(list(y.kinds(0, y.tiles))) * kinds_x * tile
    place = (*_outer_strides(chunk, y.tiles * tile), tile, plan.keys, 1)
    outer = tuple(last - start for start, last in chunk[:4])
    return [
        Move((*outer, x1 - x0, y1 - y0, plan.queries, plan.keys), place, (x0 - first) * place[4] + y0 * tile,
              (0, 0, 0, head, 0, 0, plan.keys, 1), chunk[3][0] * head + (kind_y * kinds_x + kind_x) * tile)
        for (kind_y, y0, y1), (kind_x, x0, x1) in itertools.product(y.kinds(0, y.tiles), x.kinds(*chunk[4]))
    ]
