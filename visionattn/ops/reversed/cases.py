"""What a call of reversed attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case

__all__ = ["CASES", "ReversedProblem", "pattern_case"]


class ReversedProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    senders: int
    receivers: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int],
        value_dim: int | None = None,
        weighted: bool = True,
        receivers: int | None = None,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, senders, heads, head_dim]``."""
    batch, senders, heads, head_dim = shape
    value_dim, receivers = value_dim or head_dim, receivers or senders
    problem = ReversedProblem(
        senders=senders, receivers=receivers, heads=heads, head_dim=head_dim, value_dim=value_dim, dtype=torch.float32,
        device="cpu")
    inputs: dict[str, tuple[int, ...]] = {
        "q": shape, "k": (batch, receivers, heads, head_dim), "v": (batch, senders, heads, value_dim)}
    if weighted:
        inputs["weights"] = (batch, senders, heads)
    return Case(problem, inputs, pairs=batch * heads * senders * receivers,
                summary="weights" if weighted else "no weights", groups=groups)


_SMALL = ("small",)
CASES = {
    "tiny": _case((1, 196, 12, 16)),
    "vit_small": _case((1, 196, 12, 32)),
    "b8_tiny": _case((8, 196, 12, 16)),
    "14x14": _case((1, 196, 2, 32), groups=("scaling", "usual")),
    "28x28": _case((1, 784, 2, 32), groups=("scaling",)),
    "56x56": _case((1, 3136, 2, 32), groups=("scaling", "usual")),
    "128x128": _case((1, 16384, 1, 32), groups=("scaling",)),
    "small": _case((2, 21, 2, 8), value_dim=4, groups=_SMALL),
    "small_no_weights": _case((2, 19, 2, 8), weighted=False, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CAUSAL:
        return "a sender's softmax is over all receivers, later ones among them"
    # Outputs are the receivers', whose part is that of queries elsewhere.
    return _case((1, tokens // 2 if pattern in CROSS else tokens, *PATTERN_WIDTH), receivers=tokens, weighted=False,
                 groups=())
