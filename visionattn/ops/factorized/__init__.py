"""Factorized attention: every query sees as many keys as a window has places, each merged from all over the map.

Definition: "FaViT: Factorization Vision Transformers" (arXiv 2312.08614), section 3. The map of keys is cut into tiles
that a dilated window spans; a key is what all tiles have at one place of the window. Time and memory are linear in the
number of queries and keys. How the published models merge tiles and project what is merged is the layer's business, for
which :func:`merge_tiles` is here.
"""
from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import merged, naive
from .cases import CASES, FactorizedProblem, pattern_case
from .tiles import merge_tiles

__all__ = ["FactorizedProblem", "factorized_attention", "merge_tiles"]

_op = Op("factorized_attention", [
    Backend("merged", any_problem, merged.run),
    Backend("naive", any_problem, naive.run),
], CASES, pattern_case=pattern_case)


def factorized_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int = 7,
        dilations: tuple[int, ...] = (1,),
        scale: float | None = None,
        backend: str | None = None,
) -> Tensor:
    """Softmax attention of all queries to ``window ** 2`` keys, each the mean of one place of all tiles of the map.

    A head of dilation r cuts the maps of keys and values into tiles of ``(window - 1) * r + 1`` rows and columns and
    takes ``window x window`` places of each, r apart. Maps that are not of whole tiles are reflected at the bottom and
    the right, again and again where a map is smaller than half a tile. A map of ``window x window`` keys at dilation 1
    is one tile: attention to all of its keys.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``.
        k: Keys ``[batch, key height, key width, heads, head_dim]``.
        v: Values ``[batch, key height, key width, heads, value_dim]``.
        window: Rows and columns of places in a tile.
        dilations: Of equal shares of the heads, in their order.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"merged"`` or ``"naive"``; None chooses (see :mod:`visionattn.ops.dispatch`).

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in
        float32 or better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    problem = _problem(q, k, v, window, dilations, wants_gradients(q, k, v), standard_only(q, k, v))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), (q, k, v))
    return _op.run(
        problem, backend, q, k, v, window, problem.dilations, problem.head_dim ** -0.5 if scale is None else scale)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, window: int, dilations: tuple[int, ...], requires_grad: bool, standard: bool,
) -> FactorizedProblem:
    _check(q, k, v, window, dilations)
    return FactorizedProblem(
        size=(q.shape[1], q.shape[2]), key_size=(k.shape[1], k.shape[2]), heads=q.shape[3], head_dim=q.shape[4],
        value_dim=v.shape[4], window=window, dilations=tuple(dilations), dtype=q.dtype, device=q.device.type,
        requires_grad=requires_grad, standard_only=standard)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, dilations: tuple[int, ...]) -> None:
    if not q.ndim == k.ndim == v.ndim == 5:
        raise ValueError(f"q, k and v must be [batch, height, width, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape[0] != q.shape[0] or k.shape[3:] != q.shape[3:]:
        raise ValueError(f"k must have q's batch, heads and head_dim: got {shapes(q=q, k=k, v=v)}")
    if v.shape[:4] != k.shape[:4]:
        raise ValueError(f"v must have k's batch, height, width and heads: got {shapes(q=q, k=k, v=v)}")
    check_sizes(q=q, k=k, v=v)
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive int, got {window!r}")
    if not dilations or not all(isinstance(dilation, int) and dilation > 0 for dilation in dilations):
        raise ValueError(f"dilations must be positive ints, got {dilations!r}")
    if q.shape[3] % len(dilations):
        raise ValueError(f"{len(dilations)} dilations must divide the {q.shape[3]} heads into equal shares")
    check_alike(q, k=k, v=v)
