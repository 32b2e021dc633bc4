"""The attention modules of TransNeXt: a window and pooled keys in one softmax, and full attention for the last stage.

"TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (arXiv 2311.17132), sections 3.1 to 3.4. Both
compare unit vectors, scale the scores by the logarithm of the number of keys, and add a bias that a small network
computes from the offset of query and key, for maps of any size.
"""
import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple, trunc_normal_
from torch import Tensor, nn

from ..ops import aggregated_attention, pool_agents
from ..ops.aggregated.naive import inside
from ..ops.dispatch import exporting, in_forward_mode, larger, numbers, smaller, transforming
from ..ops.kept import keep
from ..ops.sdpa import sdpa
from .scripting import unscripted

__all__ = ["AggregatedAttention", "CosineAttention", "PositionBias"]

Grid = tuple[int, int]  # rows and columns

_HIDDEN = 512  # width of the network of the position bias
_CHUNK_BYTES = 2 ** 20  # of its hidden layer at a time
_FEW_KEYS = 128  # with fewer pooled keys no time is saved by leaving queries out


class PositionBias(nn.Module):
    """A perceptron that computes a bias of every head from the offset of a query and a key: log-spaced continuous ones.

    Offsets are in units of the map that the weights were trained on, so that there is a bias on maps of any size.

    Args:
        num_heads: Heads, each of which has a bias of its own.
        trained_size: Height and width of the map of queries in pretraining; one number where they are the same.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, num_heads: int, trained_size: int | Grid, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.trained_size: Grid = to_2tuple(trained_size)
        self.hidden = nn.Linear(2, _HIDDEN, **dd)
        self.out = nn.Linear(_HIDDEN, num_heads, **dd)


def _position_bias(
        network: PositionBias, queries: Grid, keys: Grid, made_for: tuple[int, int] | None = None,
) -> Tensor:
    """The bias of maps of these sizes.

    Keys are the means of the cells that the map of queries is pooled to (the queries themselves if there are as many).

    Args:
        network: Computes it from offsets.
        queries: Rows and columns of queries.
        keys: Rows and columns of keys.
        made_for: Rows (as many as columns) of queries and of keys of the map that the bias is computed for and
            interpolated from, linearly; None computes it for the sizes themselves.

    Returns:
        ``[heads, rows * columns of queries, rows * columns of keys]``.
    """
    weight, out_weight = _numbers(network.hidden.weight), _numbers(network.out.weight)
    sources = [weight, network.hidden.bias, out_weight, network.out.bias]

    def make() -> Tensor:
        # An axis has few different offsets: the network runs for these, and the bias is taken from the result.
        axes = [_Axis(q, k, made_for, weight.device) for q, k in zip(queries, keys, strict=True)]
        y, x = (_coordinates(axis.offsets, trained).to(weight.dtype)
                for axis, trained in zip(axes, network.trained_size, strict=True))
        table = _network(y, x, *sources)
        for dim, axis in enumerate(axes, 1):
            table = axis.take(table, dim)
        table = table.unflatten(2, (queries[1], keys[1])).unflatten(1, (queries[0], keys[0]))
        return table.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    if not all(isinstance(size, int) for size in (*queries, *keys)):  # symbolic, in an exported graph
        return make()
    return keep("position bias", (queries, keys, made_for), make, sources=sources, owner=network, device=weight.device)


def _numbers(weight: Tensor) -> Tensor:
    """The numbers of a weight that torchao or the like quantised, whose tensors can be multiplied but not be read."""
    return weight.dequantize() if type(weight).dequantize is not Tensor.dequantize else weight


def _network(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Biases of all pairs of vertical and horizontal coordinates, ``[heads, rows, columns]``."""
    rows = y[:, None] * weight[:, 0]
    columns = x[:, None] * weight[:, 1] + bias
    if exporting() or rows.device.type == "meta":
        parts = [rows]
    else:
        parts = list(rows.split(max(_CHUNK_BYTES // (columns.numel() * columns.element_size()), 1)))
    return torch.cat([
        F.linear((part[:, None] + columns).relu(), out_weight, out_bias) for part in parts
    ]).permute(2, 0, 1)


def _coordinates(offsets: Tensor, trained_size: int) -> Tensor:
    """What the network sees of offsets in tokens; computed in float32, as in training."""
    offsets = offsets / max(trained_size - 1, 1) * 8
    return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)


class _Axis:
    """Offsets of queries and keys along one axis.

    Attributes:
        offsets: The different offsets that there are, in tokens, ``[offsets]``.
        index: For each pair of a query and a key the number of its offset; of several, where the bias between these is
            asked for, ``[terms, queries * keys]``.
        weights: The share of each; None for one.
    """

    def __init__(self, queries: Any, keys: Any, made_for: tuple[int, int] | None, device: torch.device):
        own = made_for is None or (queries, keys) == made_for
        count, cells = (queries, keys) if made_for is None else made_for
        position, cell = (torch.arange(n, device=device) for n in (count, cells))
        if isinstance(count, int) and isinstance(cells, int) and count % cells == 0:
            step = count // cells
            least = step * (cells - 1)
            index = position[:, None] - step * cell + least
            offsets = torch.arange(count + least, device=device) - (least + (step - 1) / 2)
        else:  # means of places are whole or half numbers
            start, end = cell * count // cells, ((cell + 1) * count + cells - 1) // cells
            index = 2 * position[:, None] - (start + end - 1) + 2 * (count - 1)
            offsets = (torch.arange(4 * count - 3, device=device) - 2 * (count - 1)) / 2
        self.offsets = offsets.float()
        self.index, self.weights = index.flatten()[None], None
        if not own:
            places = [_between(old, new, device) for old, new in ((count, queries), (cells, keys))]
            (query, query_share), (key, key_share) = places
            self.index = index[query[:, None, :, None], key[None, :, None, :]].flatten(2).flatten(0, 1)
            self.weights = (query_share[:, None, :, None] * key_share[None, :, None, :]).flatten(2).flatten(0, 1)

    def take(self, table: Tensor, dim: int) -> Tensor:
        """The entries of a table of offsets for all pairs of a query and a key."""
        if self.weights is None:
            return table.index_select(dim, self.index[0])
        shape = [-1 if axis == dim else 1 for axis in range(table.ndim)]
        terms = [table.index_select(dim, index) * share.to(table.dtype).view(shape)
                 for index, share in zip(self.index.unbind(), self.weights.unbind(), strict=True)]
        return torch.stack(terms).sum(dim=0) if exporting() else sum(terms[1:], terms[0])


def _between(old: Any, new: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two places of an axis that each new place lies between, and their shares in it, ``[2, new]``."""
    place = ((torch.arange(new, device=device, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(min=0)
    first = place.floor().clamp(max=old - 1)
    share = place - first
    return torch.stack([first, (first + 1).clamp(max=old - 1)]).long(), torch.stack([1 - share, share])


class _Attention(nn.Module):
    """What both kinds of attention have: unit vectors, their scale, the position bias, gates of heads, the output."""

    by_head = (  # see visionattn.analysis.prune_heads
        "temperature", "query_embedding", "position_bias.out", "local_bias", "learnable_tokens", "learnable_bias", "q",
        "kv", "qkv",
    )

    def __init__(
            self, dim: int, num_heads: int, trained_size: int | Grid, bias_size: int | None, gate: nn.Module | None,
            dd: dict[str, Any],
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        self.num_heads = num_heads
        self.bias_size = bias_size
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.position_bias = PositionBias(num_heads, trained_size, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.gate = gate
        self.inseparable = "" if gate is None else "its gates weigh the heads against each other"

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the parameters that are no layer's anew."""
        nn.init.constant_(self.temperature, math.log(math.exp(1 / 0.24) - 1))  # softplus makes it 1 / 0.24
        trunc_normal_(self.query_embedding, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, dim]`` to the same."""
        if self.gate is None:
            heads = self.heads(x, None)
        else:
            gates = self.gate(x)
            heads = self.heads(x, gates) * gates.unsqueeze(-1)
        return self.proj(heads.flatten(3))

    def heads(self, x: Tensor, gates: Optional[Tensor]) -> Tensor:  # noqa: UP045 - TorchScript
        """The output of each head, ``[batch, height, width, heads, head_dim]``; anything where its gate is 0."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, trained_size={self.position_bias.trained_size}, bias_size={self.bias_size}"


@register_notrace_module
class AggregatedAttention(_Attention):
    """Attention on a map ``[batch, height, width, dim]`` of any size: to the window around a query and to pooled keys.

    The keys of the window and those pooled from the whole map share one softmax. To the window's weights after it comes
    a term of learnt tokens, "positional attention", which depends on the query alone.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        trained_size: Height and width of the map in pretraining; one number where they are the same.
        pool_ratio: The map is pooled to ``height // pool_ratio`` by ``width // pool_ratio`` keys (at least one).
        kernel_size: Height and width of the window, odd.
        pool_size: Height and width that the map is pooled to instead, whatever its size (not more than its own), so
            that the cost is linear in the number of tokens.
        bias_size: Height and width of the map that the position bias is computed for and interpolated from; None
            computes it for each map's own size.
        gate: Computes the factors of the heads' outputs ``[batch, height, width, num_heads]`` from the input.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an option is out of range.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            trained_size: int | Grid,
            pool_ratio: int,
            kernel_size: int = 3,
            pool_size: int | None = None,
            bias_size: int | None = None,
            gate: nn.Module | None = None,
            device=None,
            dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, trained_size, bias_size, gate, dd)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        for name, value in (("pool_ratio", pool_ratio), ("pool_size", pool_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.pool_ratio = pool_ratio
        self.pool_size = pool_size
        self.kernel_size = kernel_size
        places = kernel_size ** 2
        self.local_bias = nn.Parameter(torch.empty(num_heads, places, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, places, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, places, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the parameters that are no layer's anew."""
        super().reset_parameters()
        trunc_normal_(self.local_bias, std=.0004)
        trunc_normal_(self.learnable_tokens, std=.02)
        nn.init.zeros_(self.learnable_bias)

    def heads(self, x: Tensor, gates: Optional[Tensor]) -> Tensor:  # noqa: UP045 - TorchScript
        """The output of each head, ``[batch, height, width, heads, head_dim]``; anything where its gate is 0."""
        # The 1x1 convolution of channels that are adjacent is a linear layer.
        pooled = self._pool(F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias)))
        return self._attend(self.q(x), self.kv(x), self.kv(self.norm(pooled)), gates)

    @unscripted
    def _pool(self, x: Tensor) -> Tensor:
        return pool_agents(x, tuple(_cells(side, self.pool_ratio, self.pool_size) for side in numbers(x.shape[1:3])))

    @unscripted
    def _attend(
            self, q: Tensor, kv: Tensor, pooled: Tensor, gates: Optional[Tensor],  # noqa: UP045 - TorchScript
    ) -> Tensor:
        size, dim = numbers(q.shape[1:3]), self.query_embedding.shape[-1]
        cells: Any = tuple(_cells(side, self.pool_ratio, self.pool_size) for side in size)
        units = F.normalize(_split(q, dim), dim=-1, eps=1e-12)
        lines = units.flatten(0, 2).transpose(0, 1)
        tokens, token_bias = self.learnable_tokens.to(lines.dtype), self.learnable_bias.to(lines.dtype)
        if torch.compiler.is_exporting():
            # With the weights on the left: on the right onnxruntime quantises one matrix by channels, no stack of them.
            local_weights = (tokens.mT @ lines.mT).mT + token_bias
        else:
            local_weights = torch.baddbmm(token_bias, lines, tokens)
        local_weights = local_weights.transpose(0, 1).unflatten(0, units.shape[:3])
        made_for = None
        if self.bias_size is not None:
            made_for = self.bias_size, _cells(self.bias_size, self.pool_ratio, self.pool_size)
        bias = _position_bias(self.position_bias, size, cells, made_for)
        scale = _log_lengths(size, cells, self.kernel_size, units)
        q = _scaled(units, self.temperature, self.query_embedding, scale)
        (k, v), (pooled_k, pooled_v) = (_split(t, dim).chunk(2, dim=-2) for t in (kv, pooled))
        k, pooled_k = (F.normalize(t, dim=-1, eps=1e-12) for t in (k, pooled_k))
        k, v, pooled_k, pooled_v = (t.to(q.dtype) for t in (k, v, pooled_k, pooled_v))
        return aggregated_attention(
            q, k, v, pooled_k, pooled_v, self.kernel_size, local_bias=self.local_bias, pooled_bias=bias,
            local_weights=local_weights, active=_active(gates, cells))


@register_notrace_module
class CosineAttention(_Attention):
    """Attention of all tokens of a map ``[batch, height, width, dim]`` of any size, by the same rules.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        trained_size: Height and width of the map in pretraining; one number where they are the same.
        bias_size: Height and width of the map that the position bias is computed for and interpolated from; None
            computes it for each map's own size.
        gate: Computes the factors of the heads' outputs ``[batch, height, width, num_heads]`` from the input.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            trained_size: int | Grid,
            bias_size: int | None = None,
            gate: nn.Module | None = None,
            device=None,
            dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, trained_size, bias_size, gate, dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.reset_parameters()

    def heads(self, x: Tensor, gates: Optional[Tensor]) -> Tensor:  # noqa: UP045 - TorchScript
        """The output of each head, ``[batch, height, width, heads, head_dim]``."""
        return self._attend(self.qkv(x))

    @unscripted
    def _attend(self, qkv: Tensor) -> Tensor:
        size, dim = numbers(qkv.shape[1:3]), self.query_embedding.shape[-1]
        q, k, v = _split(qkv.flatten(1, 2), dim).chunk(3, dim=-2)
        q, k = (F.normalize(t, dim=-1, eps=1e-12) for t in (q, k))
        made_for = None if self.bias_size is None else (self.bias_size, self.bias_size)
        bias = _position_bias(self.position_bias, size, size, made_for)
        tokens = size[0] * size[1]
        scale = math.log(tokens) if isinstance(tokens, int) else torch.log(
            torch.scalar_tensor(tokens, dtype=torch.float32, device=q.device)).to(q.dtype)
        q = _scaled(q, self.temperature, self.query_embedding, scale)
        q, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, k, v))
        return sdpa(q, k, v, bias.to(q.dtype), scale=1.).transpose(1, 2).unflatten(1, size)


# Functions, as Python code that scripted modules call sees their tensors only.

def _split(x: Tensor, dim: int) -> Tensor:
    """``[..., heads * dim]`` to ``[..., heads, dim]``, where there may be several parts of all heads."""
    return x.unflatten(-1, (-1, dim))


def _scaled(units: Tensor, temperature: Tensor, query_embedding: Tensor, scale: Any) -> Tensor:
    """Queries for scores, from unit queries ``[..., heads, head_dim]`` and the scale of their lengths."""
    return (units + query_embedding.squeeze(1)) * (F.softplus(temperature).squeeze(1) * scale)


def _active(gates: Tensor | None, cells: Grid) -> Tensor | None:
    """Which queries must be computed; None for all, also where it takes no less time to leave some out."""
    if gates is None or gates.device.type != "cpu" or torch.is_grad_enabled():
        return None
    if not isinstance(cells[0] * cells[1], int) or cells[0] * cells[1] < _FEW_KEYS:
        return None
    if torch.compiler.is_compiling() or exporting() or transforming() or in_forward_mode(gates):
        return None
    return gates != 0


def _cells(side: Any, ratio: int, pool_size: int | None) -> Any:
    """Cells that a side of the map is pooled to."""
    return larger(side // ratio, 1) if pool_size is None else smaller(pool_size, side)


def _log_lengths(size: Grid, cells: Grid, kernel_size: int, like: Tensor) -> Tensor:
    """Logarithm of the number of keys of each query, ``[height, width, 1, 1]``, in the dtype and on the device of
    ``like``; computed in float32, as in training."""
    def make() -> Tensor:
        count = inside(*size, kernel_size, like.device).sum(dim=-1) + cells[0] * cells[1]
        return count.float().log().to(like.dtype)[:, :, None, None]

    if not all(isinstance(side, int) for side in (*size, *cells)):
        return make()
    return keep("log lengths", (size, cells, kernel_size, like.dtype), make, device=like.device)
