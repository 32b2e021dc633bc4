"""Keys merged from the tiles of a map that a dilated window spans."""
from typing import Literal

import torch
from torch import Tensor

from ..dispatch import larger, numbers
from ..kept import keep

__all__ = ["merge_tiles", "merged_places"]


def merge_tiles(
        x: Tensor, window: int = 7, dilation: int = 1, merging: Literal["tiles", "runs"] = "tiles") -> Tensor:
    """What all tiles of a map have at each place of a window, merged to one token.

    Tiles have ``(window - 1) * dilation + 1`` rows and columns, of which every ``dilation``-th is one of the window's.
    A map that is not of whole tiles is reflected at the bottom and the right, again and again where it is smaller than
    half a tile (PyTorch's reflection padding refuses that).

    Args:
        x: The map ``[batch, height, width, heads, dim]``.
        window: Rows and columns of places in a tile.
        dilation: Rows and columns from one place to the next.
        merging: ``"tiles"`` takes the mean over the tiles. ``"runs"`` lays the channels of a head out one tile after
            the other and takes the mean of every run of as many numbers as there are tiles, which mixes channels: what
            the authors of FaViT compute.

    Returns:
        ``[batch, window ** 2, heads, dim]``, places row by row.

    Raises:
        ValueError: There is no such ``merging``.
    """
    if merging not in ("tiles", "runs"):
        raise ValueError(f"merging must be 'tiles' or 'runs', got {merging!r}")
    return merged_places(x, window, dilation, merging).to(x.dtype)


def merged_places(x: Tensor, window: int, dilation: int, merging: str = "tiles") -> Tensor:
    """:func:`merge_tiles`, not rounded: in float32 or better."""
    rows, columns = (_places(length, window, dilation, x.device) for length in numbers(x.shape[1:3]))
    x = x.index_select(1, rows).index_select(2, columns).to(torch.promote_types(x.dtype, torch.float32))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # [batch, tiles, window, tiles, window, heads, dim]
    if merging == "tiles":
        return x.mean(dim=(1, 3)).flatten(1, 2)
    x = x.permute(0, 2, 4, 5, 1, 3, 6)
    return x.flatten(4).unflatten(4, (x.shape[-1], -1)).mean(dim=-1).flatten(1, 2)


def _places(length: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """The positions on an axis that tiles take, one tile after the other; those beyond its end are reflected."""
    side = (window - 1) * dilation + 1

    def make() -> Tensor:
        tiles = torch.arange((length + side - 1) // side, device=device) * side
        places = (tiles[:, None] + torch.arange(window, device=device) * dilation).flatten()
        period = larger(2 * (length - 1), 1)
        places = places % period
        return torch.minimum(places, period - places)

    if not isinstance(length, int):  # symbolic, in an exported graph
        return make()
    return keep("places of tiles", (length, window, dilation), make, device=device)
