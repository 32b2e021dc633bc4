"""Running a plan of the slab form: the ways between maps ``[batch, height, width, heads, dim]`` and the workspace."""

import torch
from torch import Tensor

from ..kept import workspace
from .plan import Chunk, Move, Plan, columns_of, kind_moves, slab_moves, tile_moves

__all__ = ["Work"]


class Work:
    """A plan with memory: the ways between maps ``[batch, height, width, heads, dim]`` and the workspace."""

    def __init__(self, plan: Plan, backward: bool):
        self.plan = plan
        self.memory = workspace(plan.sizes[backward], plan.dtype)

    def probabilities(
            self, chunk: Chunk, queries: Tensor, keys: Tensor, table: Tensor | None, scale: float, out: Tensor,
    ) -> Tensor:
        """The attention of a chunk's tiles, ``[tiles, queries, keys]``, in ``out``."""
        out.baddbmm_(queries, keys.mT, beta=0, alpha=scale)
        if table is not None:
            for move in kind_moves(self.plan, chunk, shared=len(table) == 1):
                place(out, move).add_(box(table, move))
        return torch.softmax(out, dim=-1, out=out)

    def tiles(self, part: str, chunk: Chunk, dim: int) -> Tensor:
        """Room for the queries of every tile, or what belongs to them, ``[tiles, queries, dim]``."""
        plan = self.plan
        shape = (columns_of(chunk) * plan.y.tiles, plan.queries, dim)
        return self.memory.as_strided(shape, (shape[1] * dim, dim, 1), plan.offsets[part])

    def scores(self, part: str, chunk: Chunk) -> Tensor:
        """Room for the scores of every tile, ``[tiles, queries, keys]``."""
        return self.tiles(part, chunk, self.plan.keys)

    def key_windows(self, chunk: Chunk, dim: int) -> Tensor:
        """The keys of every tile, a view with overlaps ``[tiles, keys, dim]``."""
        y, x = self.plan.y, self.plan.x
        return self.memory.as_strided(
            (columns_of(chunk) * y.tiles, self.plan.keys, dim), (y.step * x.halo * dim, dim, 1),
            self.plan.offsets["keys"])

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
            box(tensor, move).copy_(place(tiles, move))

    def load_keys(self, chunk: Chunk, tensor: Tensor) -> Tensor:
        """Copies a map's tokens to slabs; returns the keys of every tile, there until others are loaded."""
        y, x, dim = self.plan.y, self.plan.x, tensor.shape[-1]
        # What is masked must be finite: rows around the slabs and after the end of the map.
        row, rows = x.halo * dim, y.tiles * y.tile
        count, first = columns_of(chunk), self.plan.offsets["keys"]
        if y.overlaps:
            self.memory[first:first + y.guard * row].zero_()
            self.memory[first + (y.guard + count * rows) * row:][:(y.kernel - y.guard) * row].zero_()
            if y.padding:
                self.memory.as_strided(
                    (count, y.padding * row), (rows * row, 1), first + (y.guard + y.length) * row).zero_()
        for move in slab_moves(self.plan, chunk, tensor.stride(), dim, disjoint=False):
            self._place("keys", move).copy_(box(tensor, move))
        return self.key_windows(chunk, dim)

    def add_keys(self, chunk: Chunk, weights: Tensor, rows: Tensor, scale: float, tensor: Tensor) -> None:
        """Adds the gradients of all tiles' keys, ``scale * weights^T rows``, to the map.

        Overlapping windows are added up in slabs, then halos in the map. Where a class is a tile, every key has one
        gradient: it is copied.
        """
        y, x, dim = self.plan.y, self.plan.x, tensor.shape[-1]
        row, count, first = x.halo * dim, len(weights), self.plan.offsets["dslab"]
        if y.overlaps:
            self.memory[first + count * y.tile * row:][:y.kernel * row].zero_()
        # As many rows as there are from tile to tile do not overlap: a product adds them to the slab itself.
        for shift in range(0, y.halo, y.step):
            part = weights[..., shift * x.halo:(shift + y.step) * x.halo].mT
            shape, place = (count, part.shape[1], dim), first + shift * row
            if part.shape[1] == y.step * x.halo:
                target = self.memory.as_strided(shape, (y.step * row, dim, 1), place)
                target.baddbmm_(part, rows, beta=int(shift > 0), alpha=scale)
            else:  # PyTorch multiplies one by one into what is not contiguous
                rest = self.memory.as_strided(shape, (shape[1] * dim, dim, 1), self.plan.offsets["rest"])
                rest.baddbmm_(part, rows, beta=0, alpha=scale)
                self.memory.as_strided(shape, (y.step * row, dim, 1), place).add_(rest)
        for move in slab_moves(self.plan, chunk, tensor.stride(), dim, disjoint=True):
            target, source = box(tensor, move), self._place("dslab", move)
            target.copy_(source) if self.plan.is_whole else target.add_(source)

    def add_scores(self, part: str, chunk: Chunk, table: Tensor) -> None:
        """Sums scores over all tiles of a kind into the table of their head."""
        for move in kind_moves(self.plan, chunk, shared=False):
            box(table, move)[0, 0, 0, :, 0, 0].add_(self._place(part, move).sum((0, 1, 2, 4, 5)))

    def _place(self, part: str, move: Move) -> Tensor:
        return self.memory.as_strided(move.shape, move.place, self.plan.offsets[part] + move.place_offset)


def place(tensor: Tensor, move: Move) -> Tensor:
    return tensor.as_strided(move.shape, move.place, tensor.storage_offset() + move.place_offset)


def box(tensor: Tensor, move: Move) -> Tensor:
    return tensor.as_strided(move.shape, move.map, tensor.storage_offset() + move.map_offset)
