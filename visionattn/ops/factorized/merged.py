"""Factorized attention on any device: places of tiles are gathered and merged, PyTorch's attention does the rest."""
import torch
from torch import Tensor

from ..sdpa import sdpa_of_few_keys
from .tiles import merged_places

__all__ = ["run"]


def run(q: Tensor, k: Tensor, v: Tensor, window: int, dilations: tuple[int, ...], scale: float) -> Tensor:
    """The public function with every argument explicit."""
    shape, dtype = (*q.shape[:-1], v.shape[-1]), q.dtype
    share = q.shape[3] // len(dilations)
    k, v = (
        torch.cat([merged_places(x.narrow(3, i * share, share), window, dilation)
                   for i, dilation in enumerate(dilations)], dim=2).transpose(1, 2)
        for x in (k, v))
    out = sdpa_of_few_keys(q.to(k.dtype).flatten(1, 2).transpose(1, 2), k, v, scale=scale)
    return out.transpose(1, 2).reshape(shape).to(dtype)
