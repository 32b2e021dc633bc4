"""What a call of flow attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch

from ..case import CROSS, PATTERN_WIDTH, Case

__all__ = ["CASES", "FlowProblem", "pattern_case"]


class FlowProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    value_dim: int
    is_causal: bool
    eps_of_sums: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int],
        keys: int | None = None,
        value_dim: int | None = None,
        is_causal: bool = False,
        eps_of_sums: bool = False,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, queries, heads, head_dim]``."""
    batch, queries, heads, head_dim = shape
    keys, value_dim = keys or queries, value_dim or head_dim
    options = {name: True for name, given in (("is_causal", is_causal), ("eps_of_sums", eps_of_sums)) if given}
    problem = FlowProblem(
        queries=queries, keys=keys, heads=heads, head_dim=head_dim, value_dim=value_dim, is_causal=is_causal,
        eps_of_sums=eps_of_sums, dtype=torch.float32, device="cpu")
    # There are no pairs: this many would cost as much as what each token is multiplied by, value_dim columns and three.
    pairs = batch * heads * (queries + keys) * (value_dim + 3) // 2
    return Case(
        problem, {"q": shape, "k": (batch, keys, heads, head_dim), "v": (batch, keys, heads, value_dim)}, options,
        pairs=pairs, summary=f"{keys} keys" + (", causal" if is_causal else ""), groups=groups)


_SMALL = ("small",)
CASES = {
    "flowformer_stage1": _case((1, 3136, 12, 8), eps_of_sums=True),
    "flowformer_stage3": _case((1, 196, 12, 32), eps_of_sums=True),
    "b8_flowformer_stage3": _case((8, 196, 12, 32), eps_of_sums=True),
    "56x56": _case((1, 3136, 2, 32), groups=("families", "usual")),
    "causal": _case((1, 3136, 2, 32), is_causal=True, groups=("families", "usual")),
    **{f"{tokens}_tokens": _case((1, tokens, 4, 32), groups=("scaling",)) for tokens in (196, 784, 3136, 16384)},
    "small": _case((2, 21, 2, 8), value_dim=4, groups=_SMALL),
    "small_other_keys": _case((2, 9, 3, 8), keys=33, eps_of_sums=True, groups=_SMALL),
    "small_causal": _case((2, 70, 2, 8), value_dim=4, is_causal=True, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern == "causal_cross":
        return "what a key gives depends on all queries; on those so far, it would be another for every query"
    return _case((1, tokens, *PATTERN_WIDTH), keys=tokens // 2 if pattern in CROSS else None,
                 is_causal=pattern == "causal_self", groups=())
