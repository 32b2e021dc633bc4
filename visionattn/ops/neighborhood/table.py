"""Mask and bias of the slab form: what is added to scores, ``[heads or 1, kinds in y, kinds in x, queries, keys]``."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kept import keep
from .plan import Axis, Plan

__all__ = ["add_to_bias", "table_of"]

_MASKED = -1e30  # finite: a row of padding has no valid key and must not become NaN


def table_of(plan: Plan, bias: Tensor | None) -> Tensor | None:
    """What is added to the scores of a plan's tiles; None for nothing."""
    if bias is None:
        return keep("neighborhood mask", (plan.y, plan.x, plan.dtype), lambda: _mask(plan.y, plan.x, plan.dtype))
    owner = bias if bias._base is None else bias._base
    return keep(
        "neighborhood bias", (plan.y, plan.x, plan.dtype), lambda: _compose(plan, bias), sources=[bias], owner=owner)


def add_to_bias(plan: Plan, dtable: Tensor, dbias: Tensor) -> None:
    """Adds the gradient of a table to that of the bias that it was made of."""
    index = _table_index(plan.y, plan.x).flatten().expand(len(dbias), -1)
    entries = dbias.new_zeros(len(dbias), dbias[0].numel() + 1).scatter_add_(1, index, dtable.flatten(1))
    dbias.add_(entries[:, :-1].view_as(dbias))


def _compose(plan: Plan, bias: Tensor) -> Tensor:
    entries = F.pad(bias.to(plan.dtype).flatten(1), (0, 1), value=_MASKED)
    index = _table_index(plan.y, plan.x)
    return entries.index_select(1, index.flatten()).view(len(entries), *index.shape)


def _table_index(y: Axis, x: Axis) -> Tensor:
    """Entry of the bias table of every (kind in y, kind in x, query, key); its size where the key is masked."""
    return keep("neighborhood entries", (y, x), lambda: _make_table_index(y, x))


def _make_table_index(y: Axis, x: Axis) -> Tensor:
    (offset_y, valid_y), (offset_x, valid_x) = _axis_index(y, clamped=False), _axis_index(x, clamped=True)
    index = offset_y[:, None, :, None, :, None] * (2 * x.kernel - 1) + offset_x[:, None, :, None, :]
    valid = valid_y[:, None, :, None, :, None] & valid_x[:, None, :, None, :]
    index = torch.where(valid, index, (2 * y.kernel - 1) * (2 * x.kernel - 1))
    return index.flatten(4, 5).flatten(2, 3)


def _mask(y: Axis, x: Axis, dtype: torch.dtype) -> Tensor | None:
    index = _table_index(y, x)
    masked = index == (2 * y.kernel - 1) * (2 * x.kernel - 1)
    if not masked.any():
        return None
    return torch.zeros(index.shape, dtype=dtype, device="cpu").masked_fill_(masked, _MASKED)[None]


def _axis_index(axis: Axis, clamped: bool) -> tuple[Tensor, Tensor]:
    """Of every (kind of tile, query, key): offset into the bias table, and whether the query sees the key."""
    tiles = [first for _, first, _ in axis.kinds(0, axis.tiles)]
    queries = [[min(tile * axis.tile + i, axis.length - 1) for i in range(axis.tile)] for tile in tiles]  # padded
    query = torch.tensor(queries, device="cpu")[:, :, None]
    window = torch.tensor([[axis.window(i) for i in row] for row in queries], device="cpu")[:, :, None]
    start = torch.tensor([axis.start(tile, clamped) for tile in tiles], device="cpu")
    key = (start[:, None] + torch.arange(axis.halo, device="cpu"))[:, None]
    return key - query + axis.kernel - 1, (key >= window) & (key < window + axis.kernel)
