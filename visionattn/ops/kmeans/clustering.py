"""Clusters of tokens for k-means routed attention: scores, what a cluster takes, and the statistics it learns from.

"Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv 2003.05997), section 4. A token is compared
by its direction alone. Everything is computed in float32 at least, under autocast too, so that a near tie falls the
same way in training and afterwards, and in a fixed order, so that results repeat.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import exporting, no_autocast

__all__ = ["assign_tokens", "cluster_scores", "cluster_statistics", "commitment_loss", "top_tokens", "unit_tokens"]

_ROUNDS = 4  # in which tokens choose a cluster, before those that found none are placed where there is room


def unit_tokens(x: Tensor) -> Tensor:
    """Directions of queries or keys: ``[batch, tokens, heads, dim]`` to ``[batch, heads, tokens, dim]``, norm 1."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).transpose(1, 2)


def cluster_scores(tokens: Tensor, centroids: Tensor) -> Tensor:
    """Product of every centroid with every token.

    Args:
        tokens: ``[batch, heads, tokens, dim]``, of norm 1.
        centroids: ``[heads, clusters, dim]``, in the dtype of tokens.

    Returns:
        ``[batch, heads, clusters, tokens]``, without gradient. A token belongs to the cluster of its largest score.
    """
    with no_autocast(tokens.device.type):
        return centroids.detach() @ tokens.detach().transpose(-2, -1)


def top_tokens(scores: Tensor, window: int) -> Tensor:
    """The ``window`` tokens of largest score for each cluster; a token may be taken by several clusters or by none.

    Args:
        scores: ``[batch, heads, clusters, tokens]``.
        window: At most the number of tokens.

    Returns:
        ``[batch, heads, clusters, window]``, in no particular order.
    """
    return scores.topk(window, dim=-1, sorted=False).indices


def assign_tokens(scores: Tensor, window: int) -> Tensor:
    """Gives every token to exactly one cluster, and no cluster more than ``window`` tokens.

    In each of four rounds, every token without a cluster chooses the one of its largest score among those with room,
    and a cluster takes those who chose it by their scores, equal scores by number, as far as it has room. Tokens that
    are left then are put in the places that are left, by number.

    Args:
        scores: ``[batch, heads, clusters, tokens]``.
        window: At least tokens / clusters.

    Returns:
        ``[batch, heads, clusters, window]``; -1 is an empty place.
    """
    batch, heads, clusters, tokens = scores.shape
    scores = scores.flatten(0, 1)
    number = torch.arange(tokens, device=scores.device).expand(scores.shape[0], -1)
    # Place p of cluster c is entry c * window + p; one more entry takes what is not to be written.
    table = number.new_full((scores.shape[0], clusters * window + 1), -1)
    taken = number.new_zeros(scores.shape[0], clusters + 1)  # places of each cluster; the last one stands for "none"
    waiting = torch.ones_like(number, dtype=torch.bool)
    for _ in range(_ROUNDS):
        best, choice = scores.masked_fill((taken[:, :-1] >= window)[:, :, None], -torch.inf).max(dim=1)
        choice = torch.where(waiting, choice, clusters)
        # Order of tokens by choice, then by score, then by number; rank counts the tokens before one with its choice.
        order = _order(best, descending=True)
        order = order.gather(1, _order(choice.gather(1, order)))
        applicants = torch.zeros_like(taken).scatter_add(1, choice, torch.ones_like(choice))
        first = applicants.cumsum(dim=1) - applicants
        rank = torch.empty_like(order).scatter(1, order, number) - first.gather(1, choice)
        place = taken.gather(1, choice) + rank
        accepted = waiting & (place < window)
        table = table.scatter(1, torch.where(accepted, choice * window + place, clusters * window), number)
        taken = torch.minimum(taken + applicants, torch.full_like(taken, window))
        waiting = waiting & ~accepted
    free = _order((table[:, :-1] >= 0).long())  # free places, then taken ones
    place = free.gather(1, (waiting.long().cumsum(dim=1) - 1).clamp(min=0))
    table = table.scatter(1, torch.where(waiting, place, clusters * window), number)
    return table[:, :-1].view(batch, heads, clusters, window)


def commitment_loss(tokens: Tensor, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Mean squared distance, over all elements, of tokens from their centroids, with gradient to the tokens; 0 of none.

    Args:
        tokens: ``[batch, heads, tokens, dim]``, of norm 1.
        centroids: ``[heads, clusters, dim]``.
        assignment: int64 ``[batch, heads, tokens]``, the cluster of each token.
    """
    if tokens.numel() == 0:
        return tokens.sum()
    heads = torch.arange(len(centroids), device=centroids.device)[:, None]
    return F.mse_loss(tokens, centroids.detach()[heads, assignment])


def cluster_statistics(tokens: Tensor, assignment: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sum ``[heads, clusters, dim]`` and number ``[heads, clusters]`` of each cluster's tokens in the whole batch.

    Args:
        tokens: ``[batch, heads, tokens, dim]``.
        assignment: int64 ``[batch, heads, tokens]``, the cluster of each token.
        num_clusters: Number of clusters.
    """
    members = assignment[:, :, None] == torch.arange(num_clusters, device=tokens.device)[:, None]
    with no_autocast(tokens.device.type):  # a product has a fixed order, unlike scattered sums on a GPU
        sums = (members.to(tokens.dtype) @ tokens.detach()).sum(dim=0)
    return sums, members.sum(dim=(0, 3)).to(tokens.dtype)


def _order(x: Tensor, descending: bool = False) -> Tensor:
    """Stable argsort of the rows of a matrix."""
    if exporting():  # ONNX knows no stable sort: equal entries are put in order by a second one, of unequal numbers
        values, order = x.sort(dim=1, descending=descending)
        steps = F.pad((values[:, 1:] != values[:, :-1]).long(), (1, 0)).cumsum(dim=1)
        return order.gather(1, (steps * x.shape[1] + order).sort(dim=1).indices)
    return x.argsort(dim=1, descending=descending, stable=True)
