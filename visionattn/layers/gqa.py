"""Attention whose query heads share fewer key and value heads, and how trained heads become such groups.

"Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention" (arXiv 2408.08454): groups of one size (GQA),
groups whose sizes follow the norms of the keys (KDGQA, DGQA), and groups whose outputs are disturbed (PGQA).
"""
from collections.abc import Mapping
from typing import Any, Literal, Optional, get_args

import torch
import torch.distributed as dist
from timm.layers import register_notrace_module
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..ops.dispatch import transforming
from .auxiliary import in_backward
from .full import attend
from .scripting import unscripted

__all__ = ["GroupedQueryAttention", "group_heads", "to_gqa"]

Allocation = Literal["static", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa"]


@register_notrace_module
class GroupedQueryAttention(nn.Module):
    """Attention of all tokens to all, with ``kv_heads`` heads of keys and values for ``num_heads`` of queries.

    Takes maps ``[batch, height, width, dim]`` and tokens ``[batch, tokens, dim]`` alike. Query head ``h`` reads the key
    and value head ``owner[h]``. With ``kv_heads`` equal to ``num_heads`` it is plain attention, with the names of
    weights that timm's vision transformers have.

    How ``owner`` comes about:

    * ``"static"``: groups of one size, in order.
    * ``"kdgqa"``: every training forward cuts the query heads in order into groups whose sizes are shares of the key
      heads' norms (Frobenius, summed over the batch), after the smallest is subtracted.
    * ``"dgqa_diff"``, ``"dgqa_ema"``: every ``window_size`` training forwards likewise, by the change of the norms, or
      by a moving average of them.
    * ``"pgqa"``: static groups; noise as strong as the signal is subtracted from the output of the heads, and their
      means, in training, if :attr:`generator` is set.

    Unlike in the authors' code, eval keeps the groups of the last training forward, which are saved with the weights,
    so that what an image gives does not depend on others; DGQA rounds shares by largest remainder, not at random; and
    where the norms tell no groups apart (the authors' code then does not end) groups are static.

    Args:
        dim: Width of the input and of the output.
        num_heads: Heads of queries; divides ``dim``.
        kv_heads: Heads of keys and values; divides ``num_heads``. None for half of them.
        allocation: See above.
        window_size: Training forwards between two allocations of DGQA.
        live_eval: The authors' rule: eval allocates by the batch at hand and disturbs as training does.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The heads do not divide each other, or there is no such allocation.
    """

    by_head = ("qkv", "owner")  # see visionattn.analysis.prune_heads
    owner: Tensor
    cache: Tensor
    steps: Tensor

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kv_heads: int | None = None,
            allocation: Allocation = "static",
            window_size: int = 300,
            live_eval: bool = False,
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        kv_heads = max(num_heads // 2, 1) if kv_heads is None else kv_heads
        _check_groups(num_heads, kv_heads)
        if allocation not in get_args(Allocation):
            raise ValueError(f"allocation must be one of {', '.join(get_args(Allocation))}, got {allocation!r}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kv_heads = kv_heads
        self.allocation = allocation
        self.window_size = window_size
        self.live_eval = live_eval
        plain = kv_heads == num_heads and allocation == "static"
        self.inseparable = "" if plain else "its heads share keys and values"
        self.generator: Any = None  # of the noise of PGQA, on the device of the input
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * head_dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        dynamic = allocation.startswith(("kdgqa", "dgqa"))
        self.register_buffer("owner", torch.empty(num_heads, dtype=torch.long, device=device), persistent=dynamic)
        if allocation.startswith("dgqa"):
            self.register_buffer("cache", torch.empty(kv_heads, dtype=torch.float32, device=device))
            self.register_buffer("steps", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the groups to static ones."""
        self.owner.copy_(self._static_owner())
        if self.allocation.startswith("dgqa"):
            self.cache.zero_()
            self.steps.zero_()

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """Returns a tensor of x's shape; the other arguments are timm's, whose blocks pass them, and change nothing."""
        if attn_mask is not None or is_causal:
            raise ValueError("grouped query attention takes no mask: attn_mask must be None and is_causal False")
        return self.proj_drop(self.proj(self._attend(self.qkv(x.flatten(1, -2))))).reshape(x.shape)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, kv_heads={self.kv_heads}, allocation={self.allocation}"

    @unscripted
    def _attend(self, qkv: Tensor) -> Tensor:
        """The heads side by side, of projected tokens ``[batch, tokens, queries, keys and values side by side]``."""
        heads, groups = self.num_heads, self.kv_heads
        q, k, v = qkv.unflatten(-1, (heads + 2 * groups, -1)).transpose(1, 2).split([heads, groups, groups], dim=1)
        owner = self.owner
        if self.allocation not in ("static", "pgqa") and (self.training or self.live_eval):
            if not in_backward():  # gradient checkpointing must find the groups of the first time
                self._allocate(k.detach())
            owner = self.owner.clone()  # autograd keeps it until the backward pass, which may come after the next call
        if groups < heads:
            k, v = k.index_select(1, owner), v.index_select(1, owner)
        out = attend(q, k, v)
        if self.allocation == "pgqa" and (self.training or self.live_eval) and self.generator is not None:
            if not in_backward():
                self._noise = torch.rand(
                    groups, heads // groups, out.shape[2] * out.shape[3], generator=self.generator, device=out.device,
                    dtype=torch.promote_types(out.dtype, torch.float32))
            out = disturb(out, self._noise)
        return out.transpose(1, 2).flatten(2)

    def _static_owner(self) -> Tensor:
        return torch.arange(self.num_heads, device=self.owner.device) // (self.num_heads // self.kv_heads)

    def _allocate(self, k: Tensor) -> None:
        """Sets the groups by keys ``[batch, kv_heads, tokens, head_dim]``; the same on every process in training."""
        if transforming():
            raise RuntimeError("groups follow the keys of whole batches in training, for which transforms of "
                               "torch.func have no place: call eval() before, or use torch.autograd")
        norms = k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(dim=(2, 3)).sqrt().sum(dim=0)
        if self.training and dist.is_available() and dist.is_initialized():
            dist.all_reduce(norms)
        if self.allocation != "kdgqa":
            norms = norms.to(self.cache.dtype)  # else the same batch again would differ by what the cache rounds off
        known = norms.isfinite().all() & (norms > 0).any()  # an empty batch says nothing
        if self.allocation == "kdgqa":
            owner = self._owner(_shares_above_least(norms, self.num_heads))
        else:
            cache = self.cache
            weights = (cache - norms).abs() if self.allocation == "dgqa_diff" else 0.9 * norms + 0.1 * cache
            owner = self._owner(_largest_remainders(weights / weights.sum() * self.num_heads))
            due = known
            if self.training:
                due = known & (self.steps % self.window_size == 0)
                norms = (cache + norms) / self.window_size
                self.steps.add_(1)
            self.cache.copy_(torch.where(due, norms, cache))
            known = due
        self.owner.copy_(torch.where(known, owner, self.owner))

    def _owner(self, sizes: Tensor) -> Tensor:
        """The group of every query head, of the sizes of the groups in order; static where they are NaN."""
        head = torch.arange(self.num_heads, device=sizes.device)
        owner = (head[:, None] >= sizes.cumsum(0)).sum(dim=1)
        return torch.where(sizes.isfinite().all(), owner, self._static_owner())


def disturb(out: Tensor, noise: Tensor) -> Tensor:
    """PGQA: subtracts standardised noise of the spread of each head's output, and the output's mean.

    Args:
        out: Outputs of the heads ``[batch, num_heads, tokens, head_dim]``.
        noise: Uniform in [0, 1), for all samples: ``[kv_heads, num_heads / kv_heads, tokens * head_dim]``; the entries
            ``[:, j, j]`` count as 0.

    Returns:
        Outputs of the same shape and dtype.
    """
    groups, heads, entries = noise.shape
    rows = out.to(noise.dtype).flatten(2).unflatten(1, (groups, heads))
    noise = noise * (torch.arange(heads, device=noise.device)[:, None] != torch.arange(entries, device=noise.device))
    spread = noise.std(dim=-1, keepdim=True)
    noise = (noise - noise.mean(dim=-1, keepdim=True)) / torch.where(spread == 0, 1, spread)
    mean, spread = rows.mean(dim=-1, keepdim=True), rows.std(dim=-1, keepdim=True)
    return (rows - (noise * spread + mean)).reshape(out.shape).to(out.dtype)


def to_gqa(state_dict: Mapping[str, Tensor], num_heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Groups the heads of a trained vision transformer: keys and values of a group are the mean of its heads'.

    Takes entries ``*.attn.qkv.weight`` and ``.bias``, as timm has them, to those of :class:`GroupedQueryAttention`;
    leaves all others as they are. The model must be trained further: its accuracy drops until then.

    Args:
        state_dict: Weights by name.
        num_heads: Heads of the attention.
        kv_heads: Heads of keys and values to make of them; divides ``num_heads``.

    Returns:
        The new weights by the same names.

    Raises:
        ValueError: The numbers of heads do not fit, or the state dict has no such entries.
    """
    _check_groups(num_heads, kv_heads)
    found = {key: _pooled(key, value, num_heads, kv_heads)
             for key, value in state_dict.items() if key.endswith(("attn.qkv.weight", "attn.qkv.bias"))}
    if not found:
        raise ValueError("there is nothing to group: no entry of the state dict ends in attn.qkv.weight")
    return {**state_dict, **found}


def group_heads(model: nn.Module, kv_heads: int) -> nn.Module:
    """Groups the heads of all attention modules of a trained vision transformer, in place; see :func:`to_gqa`.

    Args:
        model: One of timm's with :class:`timm.models.vision_transformer.Attention` (ViT, DeiT, DINOv2, ...), or one
            with attention of this class that is not grouped yet.
        kv_heads: Heads of keys and values; divides the number of heads. All of them changes no result.

    Returns:
        The model.

    Raises:
        ValueError: The model has no such attention, or some that cannot be grouped.
    """
    found: list[tuple[str, nn.Module, str, Any]] = [
        (f"{name}.{key}" if name else key, parent, key, module)
        for name, parent in model.named_modules() for key, module in parent.named_children()
        if isinstance(module, Attention) or (type(module) is GroupedQueryAttention
                                             and module.kv_heads == module.num_heads)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention of timm's vision transformers to group")
    for name, _, _, attn in found:
        _check_groups(attn.num_heads, kv_heads)
        extras = [part for part in ("q_norm", "k_norm", "norm", "gate")
                  if not isinstance(getattr(attn, part, None), (nn.Identity, type(None)))]
        if getattr(attn, "attn_drop", None) is not None and attn.attn_drop.p:
            extras.append("attn_drop")
        if attn.proj.in_features != attn.qkv.in_features or attn.proj.bias is None or extras:
            raise ValueError(f"{name} cannot be grouped: it has {', '.join(extras) or 'heads or a projection'} that "
                             "grouped query attention has not")
    for _, parent, key, plain in found:
        weight, bias = plain.qkv.weight, plain.qkv.bias
        attn = GroupedQueryAttention(
            weight.shape[1], plain.num_heads, kv_heads, qkv_bias=bias is not None, proj_drop=plain.proj_drop.p,
            device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            attn.qkv.weight.copy_(_pooled(key, weight, plain.num_heads, kv_heads))
            if bias is not None:
                attn.qkv.bias.copy_(_pooled(key, bias, plain.num_heads, kv_heads))
        attn.proj = plain.proj
        setattr(parent, key, attn.train(plain.training))
    return model


def _pooled(key: str, rows: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """The rows of queries, keys and values of all heads, those of keys and values as means of consecutive heads."""
    if rows.shape[0] % (3 * num_heads):
        raise ValueError(f"{key} has {rows.shape[0]} rows, which are not queries, keys and values of {num_heads} heads")
    q, k, v = rows.chunk(3)
    means = [x.unflatten(0, (kv_heads, num_heads // kv_heads, -1)).mean(dim=1).flatten(0, 1) for x in (k, v)]
    return torch.cat([q, *means])


def _check_groups(num_heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"kv_heads ({kv_heads}) must divide the number of heads, {num_heads}")


def _shares_above_least(norms: Tensor, heads: int) -> Tensor:
    """Sizes of KDGQA's groups; NaN for equal norms."""
    shares = norms - norms.min()
    sizes = (shares / shares.sum() * heads).round()
    for _ in range(len(norms)):  # each share is rounded by a half at most
        surplus = sizes.sum() - heads
        group = torch.where(surplus > 0, sizes.argmax(), sizes.argmin())
        sizes = sizes - surplus.sign() * (torch.arange(len(sizes), device=sizes.device) == group)
    return sizes


def _largest_remainders(shares: Tensor) -> Tensor:
    """Shares rounded to whole numbers of their sum."""
    sizes = shares.floor()
    missing = (shares.sum() - sizes.sum()).round()
    rank = (shares - sizes).argsort(descending=True, stable=True).argsort()
    return sizes + (rank < missing)
