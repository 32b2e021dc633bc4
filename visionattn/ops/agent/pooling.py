"""Agents pooled from a map: the means of its cells."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import exporting
from ..kept import keep

__all__ = ["pool_agents"]


def pool_agents(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means of the cells of a map: adaptive average pooling of ``[batch, height, width, dim]``.

    Cell ``i`` of ``n`` covers the rows from ``floor(i * height / n)`` up to ``ceil((i + 1) * height / n)``, so cells
    overlap where ``n`` does not divide the height; columns alike.

    Args:
        x: The map, e.g. of queries with all heads in ``dim``; may be a strided view.
        grid: Rows and columns of cells.

    Returns:
        ``[batch, rows * columns, dim]``, row by row.
    """
    (height, width), (down, across) = x.shape[1:3], grid
    if not exporting() and height % down == 0 and width % across == 0:
        return F.avg_pool2d(x.permute(0, 3, 1, 2), (height // down, width // across)).flatten(2).transpose(1, 2)
    rows, columns = _cell_weights(height, down, x), _cell_weights(width, across, x)
    # Two small products read a strided map as it is, and can be exported for maps of any size; PyTorch's pooling of
    # unequal cells is slower and cannot.
    x = columns @ x
    return (rows @ x.flatten(2)).unflatten(2, x.shape[2:]).flatten(1, 2)


def _cell_weights(size: int, cells: int, like: Tensor) -> Tensor:
    """``[cells, size]``: what each row or column of a map contributes to the mean of each cell."""
    def make() -> Tensor:
        position = torch.arange(size, device=like.device)
        cell = torch.arange(cells, device=like.device)[:, None]
        inside = (position >= cell * size // cells) & (position < ((cell + 1) * size + cells - 1) // cells)
        weights = inside.to(torch.promote_types(like.dtype, torch.float32))
        return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)

    if not isinstance(size, int):  # symbolic, in an exported graph
        return make()
    return keep("agent cells", (size, cells, like.dtype), make, device=like.device)
