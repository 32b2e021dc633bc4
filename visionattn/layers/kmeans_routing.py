"""K-means routing as a token mixer of vision backbones.

The routed attention is that of "Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv 2003.05997).
What surrounds it here is this project's own, as the paper's is a language model:

* A depthwise convolution of the values is added, so that a token that no cluster took is still mixed with others.
* With ``assignment="capacity"`` every query goes to exactly one cluster.
* Centroids are directions of running sums, added up over all processes, and a cluster that is hardly used starts anew
  from a token. They need no initial k-means: the first batch outweighs the random start.
"""
import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import kmeans_attention
from ..ops.dispatch import larger, numbers, smaller, transforming
from ..ops.kmeans.clustering import (
    assign_tokens,
    cluster_scores,
    cluster_statistics,
    commitment_loss,
    top_tokens,
    unit_tokens,
)
from .auxiliary import AuxiliaryLosses, in_backward
from .scripting import unscripted

__all__ = ["KMeansRoutingAttention"]

_START = 1e-4  # length of the random centroids, next to nothing beside the first batch's
_DEAD = 0.01  # share of the mean cluster size below which a cluster starts anew
_GOLDEN = (math.sqrt(5) - 1) / 2


@register_notrace_module
class KMeansRoutingAttention(AuxiliaryLosses, nn.Module):
    """Attention within clusters of a map's tokens, wherever they lie, with a convolution of the values beside it.

    Each head has its own clusters. A cluster takes as many queries and keys as make all clusters together cover the
    map, but at least ``num_clusters`` (or all tokens of a smaller map): maps of ``num_clusters ** 2`` tokens and more
    cost ``tokens ** 2 / num_clusters``.

    A training forward updates the centroids (not one in eval mode, and not the recomputation by gradient checkpointing,
    which must be non-reentrant, timm's and PyTorch's default) and offers the auxiliary loss ``commitment``, see
    :func:`visionattn.layers.auxiliary_losses`.

    Buffers: ``centroids [num_heads, num_clusters, head_dim]``, running mean over batches of the sum of each cluster's
    unit queries and keys, of which routing uses the direction only; ``cluster_sizes [num_heads, num_clusters]``,
    running mean of the number of these, in units of the mean cluster size.

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of heads; must divide ``dim``.
        num_clusters: Number of clusters of each head; about the square root of the number of tokens.
        assignment: ``"topk"`` as in the paper: a cluster takes the queries that suit it best, so that a query may be
            taken by several clusters or by none. ``"capacity"``: every query goes to one cluster, the best with room.
            A cluster takes the keys that suit it best either way.
        decay: Of the running means, per training forward.
        commitment: Weight of the commitment loss, the mean squared distance of unit queries and keys from their
            centroids.
        lepe_kernel: Kernel size of the depthwise convolution; odd.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters and buffers.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an option is out of range.
    """

    by_head = ("qkv", "lepe", "centroids", "cluster_sizes")  # see visionattn.analysis.prune_heads
    centroids: Tensor
    cluster_sizes: Tensor

    def __init__(
            self,
            dim: int,
            num_heads: int,
            num_clusters: int,
            assignment: Literal["topk", "capacity"] = "topk",
            decay: float = 0.99,
            commitment: float = 1e-4,
            lepe_kernel: int = 5,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        if num_clusters < 1:
            raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
        if assignment not in ("topk", "capacity"):
            raise ValueError(f"assignment must be 'topk' or 'capacity', got {assignment!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.num_clusters = num_clusters
        self.assignment = assignment
        self.decay = decay
        self.commitment = commitment
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.register_buffer("centroids", torch.empty(num_heads, num_clusters, dim // num_heads, **dd))
        self.register_buffer("cluster_sizes", torch.empty(num_heads, num_clusters, **dd))
        self._directions = torch.empty(0)  # of the centroids in the last training forward
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws random centroids anew."""
        with torch.no_grad():
            self.centroids.copy_(_START * F.normalize(torch.randn_like(self.centroids), dim=-1))
            self.cluster_sizes.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, dim]`` to the same."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(self._attend(q, k, v) + lepe)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, num_clusters={self.num_clusters}, assignment={self.assignment}"

    @unscripted
    def clusters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys that the clusters take in ``forward(x)`` in eval mode, to look at them.

        Returns:
            Two of ``[batch, num_heads, num_clusters, tokens of a cluster]``: numbers of tokens, row by row; -1 is an
            empty place. A token may be taken by several clusters or by none.
        """
        q, k, _ = self.qkv(x).flatten(1, 2).chunk(3, dim=-1)
        units = [unit_tokens(t.unflatten(-1, (self.num_heads, -1))) for t in (q, k)]
        directions = F.normalize(self.centroids.to(units[0].dtype), dim=-1)
        return _members(self.assignment, *(cluster_scores(t, directions) for t in units))

    @unscripted
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Routed attention on maps ``[batch, height, width, dim]``."""
        height, width = numbers(q.shape[1:3])
        q, k, v = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        units = [unit_tokens(t if self.training else t.detach()) for t in (q, k)]
        # A backward pass that runs a training forward is gradient checkpointing: it must find the centroids of the
        # first time, and must not learn from the same tokens twice.
        recomputing = self.training and in_backward()
        directions = self._directions if recomputing else F.normalize(self.centroids.to(units[0].dtype), dim=-1)
        q_scores, k_scores = (cluster_scores(t, directions) for t in units)
        if self.training and transforming():
            raise RuntimeError("k-means routing learns its centroids in training, for which transforms of torch.func "
                               "have no place: call eval() before, or use torch.autograd")
        if self.training:
            tokens = torch.cat(units, dim=2)
            owners = torch.cat([q_scores.argmax(dim=2), k_scores.argmax(dim=2)], dim=2)
            loss = self.commitment * commitment_loss(tokens, directions, owners)
            if not recomputing:
                self._directions = directions
                self.keep_auxiliary_loss("commitment", loss)
                self._update(tokens.detach(), owners)
        x = kmeans_attention(q, k, v, *_members(self.assignment, q_scores, k_scores))
        return x.flatten(-2).unflatten(1, (height, width))

    def _update(self, tokens: Tensor, owners: Tensor) -> None:
        """Takes the tokens of a batch into the centroids; the same on every process."""
        sums, sizes = cluster_statistics(tokens, owners, self.num_clusters)
        # For clusters that start anew: tokens spread over the batch, the first process's.
        batch, _, count, _ = tokens.shape
        seeds = torch.zeros_like(sums)
        if tokens.numel():
            index = (torch.arange(self.num_clusters, device=tokens.device) * _GOLDEN % 1 * (batch * count)).long()
            index = index.clamp(max=batch * count - 1)
            seeds = tokens[index // count, :, index % count].transpose(0, 1)
        if dist.is_available() and dist.is_initialized():
            statistics = torch.cat([sums, sizes[..., None], seeds * (dist.get_rank() == 0)], dim=-1)
            dist.all_reduce(statistics)
            sums, sizes, seeds = statistics.split([sums.shape[-1], 1, seeds.shape[-1]], dim=-1)
            sizes = sizes[..., 0]
        unit = sizes.mean(dim=-1, keepdim=True)
        sizes = torch.lerp(sizes / unit, self.cluster_sizes.to(sizes.dtype), self.decay)
        sums = torch.lerp(sums / unit[..., None], self.centroids.to(sums.dtype), self.decay)
        mean = sizes.mean(dim=-1, keepdim=True)
        dead = sizes < _DEAD * mean
        sums = torch.where(dead[..., None], seeds * mean[..., None], sums)
        # Nothing is learnt from no tokens at all (0 / 0), nor from a batch with an infinity or NaN in it.
        known = sums.isfinite().all(dim=-1).all(dim=-1) & sizes.isfinite().all(dim=-1)
        self.centroids.copy_(torch.where(known[:, None, None], sums, self.centroids.to(sums.dtype)))
        self.cluster_sizes.copy_(
            torch.where(known[:, None], torch.where(dead, mean, sizes), self.cluster_sizes.to(sizes.dtype)))


# A function and no method, which the Python code of scripted modules would not find.
def _members(assignment: str, q_scores: Tensor, k_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of each cluster, of their scores ``[batch, num_heads, num_clusters, tokens]``."""
    num_clusters, tokens = numbers(q_scores.shape[2:])
    window = _window(tokens, num_clusters)
    take = assign_tokens if assignment == "capacity" else top_tokens
    return take(q_scores, window), top_tokens(k_scores, window)


def _window(tokens: int, num_clusters: int) -> int:
    """Tokens that a cluster takes."""
    return smaller(larger(-(-tokens // num_clusters), num_clusters), tokens)
