"""What the ops are compared with: other ways to compute the same, by PyTorch's dense attention and FlexAttention."""
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import NeighborhoodProblem, RoutedProblem
from ..ops.neighborhood import naive

__all__ = ["UNCHECKED", "peers"]

UNCHECKED = ("dense_sdpa",)  # compute something else, so that there is nothing to compare
_SCORES_LIMIT = 2**29  # peers that hold scores of all tokens x tokens are left out above this many


def peers(
        problem: Any, floating: Mapping[str, Tensor], tables: Mapping[str, Tensor], compiled: bool = False,
) -> dict[str, Callable[..., Tensor]]:
    """The other ways to compute a call, by name.

    Args:
        problem: Of the call.
        floating: Its floating-point tensors, which the peers take as keyword arguments.
        tables: Its other tensors.
        compiled: Whether compiled FlexAttention is among them.
    """
    if not {"q", "k", "v"} <= floating.keys():
        return {}
    q, k = floating["q"], floating["k"]
    found: dict[str, Callable[..., Tensor]] = {}
    if isinstance(problem, NeighborhoodProblem) and len(problem.spatial) == 2 and problem.kv_heads == problem.heads \
            and not any(problem.is_causal) and not problem.additional and not problem.return_lse:
        found |= _of_neighborhoods(problem, q, compiled)
    if isinstance(problem, RoutedProblem) and problem.shared_routes and not problem.has_route_weights \
            and problem.key_region_size == problem.region_size:
        found |= _of_routes(problem, q, tables["routes"], compiled)
    if q.shape[-2:] == k.shape[-2:] and _tokens(q) * _tokens(k) <= _SCORES_LIMIT:
        # Whatever else the op takes is left away.
        found["dense_sdpa"] = lambda q, k, v, **others: _dense(q, k, v, F.scaled_dot_product_attention)
    return found


def _tokens(x: Tensor) -> int:
    return x[0, ..., 0, 0].numel()


def _dense(q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor], **options: Any) -> Tensor:
    """Runs an attention of ``[batch, heads, tokens, dim]`` on all tokens of maps ``[batch, *spatial, heads, dim]``."""
    shape = q.shape
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, **options).transpose(1, 2).reshape(*shape[:-1], v.shape[-1])


def _of_neighborhoods(problem: NeighborhoodProblem, q: Tensor, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    batch, heads, device = q.shape[0], problem.heads, q.device
    (height, width), kernel, dilation, stride = (
        problem.spatial, problem.kernel_size, problem.dilation, problem.stride)
    tokens = height * width
    found: dict[str, Callable[..., Tensor]] = {}
    windows = [naive.axis_windows(*axis, False, device) for axis in zip(
        problem.spatial, kernel, dilation, stride, strict=True)]
    if batch * heads * tokens**2 <= _SCORES_LIMIT:
        (rows, offset_y, _), (columns, offset_x, _) = windows
        key = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(tokens, -1)
        if problem.has_bias:
            entry_y, entry_x = (
                (offset + size - 1).expand(height, width, *kernel)
                for offset, size in ((offset_y[:, None, :, None], kernel[0]), (offset_x[None, :, None, :], kernel[1])))

            def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                mask = torch.full((heads, tokens, tokens), -torch.inf, device=device)
                mask = mask.scatter(2, key.expand(heads, -1, -1), bias[:, entry_y, entry_x].view(heads, tokens, -1))
                return _dense(q, k, v, F.scaled_dot_product_attention, attn_mask=mask.to(q.dtype))

            found["masked_sdpa"] = biased
        else:
            mask = torch.zeros(tokens, tokens, dtype=torch.bool, device=device).scatter_(1, key, True)
            found["masked_sdpa"] = lambda q, k, v: _dense(q, k, v, F.scaled_dot_product_attention, attn_mask=mask)

    rows_seen, columns_seen = (
        torch.zeros(length, length, dtype=torch.bool, device=device).scatter_(1, keys, True)
        for length, (keys, _, _) in zip(problem.spatial, windows, strict=True))

    def mask_mod(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rows_seen[query // width, key // width] & columns_seen[query % width, key % width]

    def score_mod(bias: Tensor) -> Callable:
        def add(score: Tensor, _b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            y, x = ((difference // step + size - 1).clamp(0, 2 * size - 2)
                    for difference, step, size in zip(
                        (key // width - query // width, key % width - query % width), dilation, kernel, strict=True))
            return score + bias[head, y, x]
        return add

    return found | _flex(mask_mod, score_mod, None, (batch, heads, tokens), device, compiled)


def _of_routes(
        problem: RoutedProblem, q: Tensor, routes: Tensor, compiled: bool,
) -> dict[str, Callable[..., Tensor]]:
    batch, height, width = q.shape[:3]
    (size_y, size_x), regions = problem.region_size, problem.grid[0] * problem.grid[1]
    allowed = torch.zeros(batch, regions, regions, dtype=torch.bool, device=q.device).scatter_(2, routes[:, 0], True)
    rows, columns = (torch.arange(length, device=q.device) for length in (height, width))
    region = (rows[:, None] // size_y * problem.grid[1] + columns // size_x).flatten()
    found: dict[str, Callable[..., Tensor]] = {}
    if batch * (height * width) ** 2 <= _SCORES_LIMIT:
        mask = allowed[:, None, region][..., region]
        found["masked_sdpa"] = lambda q, k, v: _dense(q, k, v, F.scaled_dot_product_attention, attn_mask=mask)

    def mask_mod(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[b, region[query], region[key]]

    return found | _flex(mask_mod, None, batch, (batch, problem.heads, height * width), q.device, compiled)


def _flex(
        mask_mod: Callable, score_mod: Callable | None, mask_batch: int | None, sizes: tuple[int, int, int],
        device: torch.device, compiled: bool,
) -> dict[str, Callable[..., Tensor]]:
    """FlexAttention, eager (which holds all scores) and compiled; the block mask is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, heads, tokens = sizes
    wanted: dict[str, Callable] = {"flex": flex_attention} if batch * heads * tokens**2 <= _SCORES_LIMIT else {}
    if compiled:
        torch.compiler.reset()  # each case compiles for its own shape and masks
        wanted["flex_compiled"] = torch.compile(flex_attention, dynamic=False)
    if not wanted or tokens**2 > _SCORES_LIMIT:  # making the mask takes a byte for each of them
        return {}
    block_mask = create_block_mask(mask_mod, mask_batch, None, tokens, tokens, device=str(device))

    def flex(attention: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            options = {} if bias is None or score_mod is None else {"score_mod": score_mod(bias)}
            return _dense(q, k, v, attention, block_mask=block_mask, **options)
        return run

    return {name: flex(attention) for name, attention in wanted.items()}
