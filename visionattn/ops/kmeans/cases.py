"""What a call of k-means attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch
from torch import Tensor

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case, square

__all__ = ["CASES", "KMeansProblem", "pattern_case"]


class KMeansProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    tokens: int
    num_clusters: int
    query_window: int
    key_window: int
    heads: int
    head_dim: int
    value_dim: int
    has_mask: bool
    mask_self: bool
    num_memory: int
    dtype: torch.dtype
    device: str
    requires_grad: bool
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int],
        clusters: int,
        window: int,
        key_window: int | None = None,
        value_dim: int | None = None,
        empty: bool = False,
        mask: bool = False,
        mask_self: bool = False,
        memory: int = 0,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, tokens, heads, head_dim]``; ``empty`` leaves the last place of a cluster empty."""
    batch, tokens, heads, head_dim = shape
    key_window, value_dim = key_window or window, value_dim or head_dim
    problem = KMeansProblem(
        tokens=tokens, num_clusters=clusters, query_window=window, key_window=key_window, heads=heads,
        head_dim=head_dim, value_dim=value_dim, has_mask=mask, mask_self=mask_self, num_memory=memory,
        dtype=torch.float32, device="cpu", requires_grad=False)
    inputs: dict[str, tuple[int, ...]] = {"q": shape, "k": shape, "v": (*shape[:-1], value_dim)}
    if memory:
        inputs["memory_key"] = (heads, clusters, memory, head_dim)
        inputs["memory_value"] = (heads, clusters, memory, value_dim)

    def tables(generator: torch.Generator) -> dict[str, Tensor]:
        scores = torch.rand(2, batch, heads, clusters, tokens, generator=generator)
        made = {"query_index": scores[0].topk(window).indices, "key_index": scores[1].topk(key_window).indices}
        if empty:
            made["query_index"][..., -1] = -1
        if mask:
            made["mask"] = torch.rand(batch, tokens, generator=generator) < 0.75
        return made

    words = [f"{clusters} clusters of {window}" + (f" and {key_window} keys" if key_window != window else "")]
    words += [word for word, holds in (
        ("empty places", empty), ("mask", mask), ("not itself", mask_self), (f"{memory} more keys", memory)) if holds]
    return Case(
        problem, inputs, {"mask_self": True} if mask_self else {}, tables=tables,
        pairs=batch * heads * clusters * window * (key_window + memory), summary=", ".join(words), groups=groups)


_SMALL = ("small",)
CASES = {
    "56x56": _case((1, 3136, 2, 32), clusters=56, window=56, groups=("families", "usual")),
    "28x28": _case((1, 784, 4, 32), clusters=28, window=28),
    "14x14": _case((1, 196, 8, 32), clusters=14, window=14),
    "b8_56x56": _case((8, 3136, 2, 32), clusters=56, window=56),
    "b8_14x14": _case((8, 196, 8, 32), clusters=14, window=14),
    "masked": _case((1, 3136, 2, 32), clusters=56, window=56, mask=True, mask_self=True, memory=4, groups=("usual",)),
    "small": _case((2, 30, 2, 8), clusters=5, window=7, key_window=18, value_dim=4, groups=_SMALL),
    "small_few_keys": _case((2, 30, 2, 8), clusters=4, window=9, key_window=5, groups=_SMALL),
    "small_empty": _case((1, 24, 3, 8), clusters=4, window=8, empty=True, groups=_SMALL),
    "small_masked": _case((2, 24, 2, 8), clusters=3, window=8, mask=True, groups=_SMALL),
    "small_not_itself": _case((2, 24, 2, 8), clusters=3, window=8, mask_self=True, groups=_SMALL),
    "small_more_keys": _case((2, 24, 2, 8), clusters=3, window=8, memory=2, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CROSS:
        return "a cluster's queries and keys are of one sequence"
    if pattern in CAUSAL:
        return "a cluster takes tokens of the whole sequence, and no mask of later ones is defined"
    return _case((1, tokens, *PATTERN_WIDTH), clusters=square(tokens), window=square(tokens), groups=())
