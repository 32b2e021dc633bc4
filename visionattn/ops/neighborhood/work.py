"""Running a plan of the slab form: the ways between maps ``[batch, height, width, heads, dim]`` and the workspace."""

import torch
from torch import Tensor

from ..kept import workspace
from .plan import Chunk, Move, Plan, columns_of, kind_moves, slab_moves, tile_moves

__all__ = ["Work", "class_tokens", "store_class_tokens"]


class Work:
    """A plan with memory: the ways between maps ``[batch, height, width, heads, dim]`` and the workspace."""

    def __init__(self, plan: Plan, backward: bool):
        self.plan = plan
        self.memory = workspace(plan.sizes[backward], plan.dtype)

    def probabilities(self, chunk: Chunk, q: Tensor, k: Tensor, table: Tensor | None, scale: float) -> Tensor:
        """The chunk's attention, ``[tiles, queries, keys]``."""
        queries = self.load_tiles("q", chunk, q).mul_(scale)
        scores = torch.bmm(queries, self.load_keys("k", chunk, k).mT, out=self.scores("scores", chunk))
        if table is not None:
            for move in kind_moves(self.plan, chunk, shared=len(table) == 1):
                self._place("scores", move).add_(box(table, move))
        return torch.softmax(scores, dim=-1, out=scores)

    def tiles(self, part: str, chunk: Chunk, dim: int) -> Tensor:
        """Room for the queries of every tile, or what belongs to them, ``[tiles, queries, dim]``."""
        plan = self.plan
        shape = (columns_of(chunk) * plan.y.tiles, plan.queries, dim)
        return self.memory.as_strided(shape, (shape[1] * dim, dim, 1), plan.offsets[part])

    def scores(self, part: str, chunk: Chunk) -> Tensor:
        """Room for the scores of every tile, ``[tiles, queries, keys]``."""
        return self.tiles(part, chunk, self.plan.keys)

    def windows(self, chunk: Chunk, dim: int) -> Tensor:
        """Room for the gradients of all keys of every tile, ``[tiles, keys, dim]``."""
        shape = (columns_of(chunk) * self.plan.y.tiles, self.plan.keys, dim)
        return self.memory.as_strided(shape, (shape[1] * dim, dim, 1), self.plan.offsets["windows"])

    def key_windows(self, part: str, chunk: Chunk, dim: int) -> Tensor:
        """The keys of every tile, a view with overlaps ``[tiles, keys, dim]``."""
        y, x = self.plan.y, self.plan.x
        return self.memory.as_strided(
            (columns_of(chunk) * y.tiles, self.plan.keys, dim), (y.tile * x.halo * dim, dim, 1),
            self.plan.offsets[part])

    def load_tiles(self, part: str, chunk: Chunk, tensor: Tensor) -> Tensor:
        """Copies a map's tokens to their tiles."""
        tiles = self.tiles(part, chunk, tensor.shape[-1])
        if self.plan.y.padding or self.plan.x.padding:
            tiles.zero_()  # padding has no gradient
        for move in tile_moves(self.plan, chunk, tensor.stride(), tensor.shape[-1]):
            self._place(part, move).copy_(box(tensor, move))
        return tiles

    def store_tiles(self, chunk: Chunk, tiles: Tensor, tensor: Tensor) -> None:
        """Copies tiles to a map."""
        for move in tile_moves(self.plan, chunk, tensor.stride(), tensor.shape[-1]):
            box(tensor, move).copy_(tiles.as_strided(
                move.shape, move.place, tiles.storage_offset() + move.place_offset))

    def load_keys(self, part: str, chunk: Chunk, tensor: Tensor) -> Tensor:
        """Copies a map's tokens to slabs; returns the keys of every tile (:meth:`key_windows`)."""
        y, x, dim = self.plan.y, self.plan.x, tensor.shape[-1]
        # What is masked must be finite: rows around the slabs and after the end of the map.
        row, rows = x.halo * dim, y.tiles * y.tile
        count, first = columns_of(chunk), self.plan.offsets[part]
        if y.tiles > 1:
            self.memory[first:first + y.guard * row].zero_()
            self.memory[first + (y.guard + count * rows) * row:][:(y.kernel - y.guard) * row].zero_()
        if y.padding:
            self.memory.as_strided(
                (count, y.padding * row), (rows * row, 1), first + (y.guard + y.length) * row).zero_()
        for move in slab_moves(self.plan, chunk, tensor.stride(), dim, disjoint=False):
            self._place(part, move).copy_(box(tensor, move))
        return self.key_windows(part, chunk, dim)

    def add_keys(self, chunk: Chunk, windows: Tensor, tensor: Tensor) -> None:
        """Adds the gradients of all tiles' keys to the map: overlapping windows to slabs, then halos to columns."""
        y, x, dim = self.plan.y, self.plan.x, tensor.shape[-1]
        row, count, first = x.halo * dim, windows.shape[0], self.plan.offsets["dslab"]
        windows = windows.view(count, y.halo, row)
        self.memory[first + count * y.tile * row:][:y.kernel * row].zero_()
        for shift in range(0, y.halo, y.tile):
            block = windows[:, shift:shift + y.tile]
            target = self.memory.as_strided(block.shape, (y.tile * row, row, 1), first + shift * row)
            target.add_(block) if shift else target.copy_(block)
        for move in slab_moves(self.plan, chunk, tensor.stride(), dim, disjoint=True):
            box(tensor, move).add_(self._place("dslab", move))

    def add_scores(self, part: str, chunk: Chunk, table: Tensor) -> None:
        """Sums scores over all tiles of a kind into the table of their head."""
        for move in kind_moves(self.plan, chunk, shared=False):
            box(table, move)[0, 0, 0, :, 0, 0].add_(self._place(part, move).sum((0, 1, 2, 4, 5)))

    def _place(self, part: str, move: Move) -> Tensor:
        return self.memory.as_strided(move.shape, move.place, self.plan.offsets[part] + move.place_offset)


def box(tensor: Tensor, move: Move) -> Tensor:
    return tensor.as_strided(move.shape, move.map, tensor.storage_offset() + move.map_offset)


def class_tokens(plan: Plan, tensor: Tensor) -> Tensor:
    """``[classes, heads, tokens, dim]`` of a dense plan; a view where the strides allow it."""
    return _all(plan, tensor).to(plan.dtype).flatten(4, 5).flatten(0, 2)


def store_class_tokens(plan: Plan, tokens: Tensor, tensor: Tensor) -> None:
    """The inverse of :func:`class_tokens`, into ``tensor``."""
    target = _all(plan, tensor)
    target.copy_(tokens.reshape(target.shape))


def _all(plan: Plan, tensor: Tensor) -> Tensor:
    """View of a dense plan's classes ``[batch, classes in y, classes in x, heads, rows, columns, dim]``."""
    everything = tuple((0, size) for size in plan.shape)
    move, = tile_moves(plan, everything, tensor.stride(), tensor.shape[-1])
    return box(tensor, move)[:, :, :, :, 0, 0]
