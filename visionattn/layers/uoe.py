"""Experts of tokens: heads that attend among the tokens that chose them, and perceptrons that see these alone.

Union of Experts (arXiv 2503.02495), its selective multi-head attention and its union of perceptrons; written from the
formulas. What is this project's own, say :class:`UnionOfExpertsAttention` and :class:`UnionOfPerceptrons`.
"""
import math

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.dispatch import concrete, no_autocast, numbers, smaller
from ..ops.recording import current_recorder
from ..ops.sdpa import probabilities
from .auxiliary import AuxiliaryLosses, in_backward
from .full import attend
from .mixture_of_heads import balance_loss
from .scripting import unscripted

__all__ = ["UnionOfExpertsAttention", "UnionOfPerceptrons", "expert_attention", "expert_perceptrons", "rotate"]

_UNSEEN = -3e4  # what is added to the scores of keys that are none: exp of it is 0, and every dtype has it


@register_notrace_module
class UnionOfExpertsAttention(AuxiliaryLosses, nn.Module):
    """Attention of each head among the tokens that chose it, ``topk`` heads a token.

    Takes maps ``[batch, height, width, dim]`` and tokens ``[batch, tokens, dim]`` alike; tokens of maps are numbered
    row by row for the rotary positions, unless these are ``axial``. A head that no token chose does nothing.

    This project's own, where the authors' code does otherwise: the outputs of a head are multiplied by its gate, so
    that the router learns (theirs gets no gradient); a head takes the tokens that chose it and no others (theirs fills
    up to the largest number in the batch, on which results then depend); positions follow the number of tokens at
    hand; and the balance loss.

    On a CPU a head's tokens are gathered, for a part ``(topk / num_heads) ** 2`` of the products of scores and values.
    In graphs, transforms and on other devices all heads see all tokens, masked, which gives the same numbers, unless
    ``capacity`` fixes the number of tokens of a head.

    A training forward offers the auxiliary loss ``expert_balance``, see :func:`visionattn.layers.auxiliary_losses`.

    Args:
        dim: Width of the input and of the output.
        num_heads: Heads, the experts; a head's width ``dim / num_heads`` must be a multiple of 4, of 8 if ``axial``.
        topk: Heads of a token; None for half of them.
        axial: Whether half of the rotary channels turn with the row and half with the column, this project's own; the
            layer then takes maps only.
        gate_output: Whether outputs are multiplied by the gates; False is the authors' rule.
        capacity: The most tokens of a head in units of ``topk * tokens / num_heads``, their mean number, rounded up;
            the surplus of least gate is dropped. None for all.
        loss_weight: Weight of the auxiliary loss.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Heads of such a width cannot be, or an option is out of range.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            topk: int | None = None,
            axial: bool = False,
            gate_output: bool = True,
            capacity: float | None = None,
            loss_weight: float = 0.01,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        multiple = 8 if axial else 4
        if dim % (multiple * num_heads):
            raise ValueError(
                f"the width of a head, dim / num_heads = {dim} / {num_heads}, must be a multiple of {multiple}")
        topk = max(num_heads // 2, 1) if topk is None else topk
        if not 1 <= topk <= num_heads or (capacity is not None and capacity <= 0):
            raise ValueError(f"topk must be 1 to {num_heads} and capacity positive, got {topk} and {capacity}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.topk = topk
        self.axial = axial
        self.gate_output = gate_output
        self.capacity = capacity
        self.loss_weight = loss_weight
        width = dim // num_heads
        self.router = nn.Parameter(torch.empty(num_heads, dim, **dd))
        self.router_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.qkv = nn.Parameter(torch.empty(num_heads, dim, 3 * width, **dd))
        self.qkv_bias = nn.Parameter(torch.empty(num_heads, 3 * width, **dd))
        self.proj = nn.Parameter(torch.empty(num_heads, width, dim, **dd))
        self.proj_bias = nn.Parameter(torch.empty(num_heads, dim, **dd))
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape."""
        return self.proj_drop(self._mix(x))

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, topk={self.topk}"

    @unscripted
    def _mix(self, x: Tensor) -> Tensor:
        """What the heads make of the tokens."""
        if self.axial and x.ndim != 4:
            raise ValueError(f"axial positions are those of a map [batch, height, width, dim], got {tuple(x.shape)}")
        shape, size = x.shape, numbers(x.shape[1:3]) if self.axial else None
        x = rotate(x.flatten(1, -2), self.num_heads, size)
        chosen, gates = _route(self, x)
        factors = (gates if self.gate_output else chosen).transpose(1, 2)  # by head
        keys, index = chosen.transpose(1, 2) > 0, None
        if self.capacity is not None or concrete(x):
            kept = None
            if self.capacity is not None:
                tokens, = numbers(x.shape[1:2])
                kept = smaller(math.ceil(self.capacity * self.topk * tokens / self.num_heads), tokens)
            # Heads with fewer tokens fill up with tokens that are no keys, and whose outputs count for nothing.
            index = _places(keys, gates, kept)
            keys, factors = keys.gather(-1, index), factors.gather(-1, index)
        return expert_attention(
            x, index, keys, factors, self.qkv, self.qkv_bias, self.proj, self.proj_bias).reshape(shape)


@register_notrace_module
class UnionOfPerceptrons(AuxiliaryLosses, nn.Module):
    """Gated perceptrons that share the hidden layer of one, each for the tokens that chose it.

    The sum over a token's perceptrons is multiplied by the sum of their gates, from which the router learns: the third
    of the authors' versions. Theirs fills up perceptrons to the largest number of tokens that one has in the batch;
    here each serves those that chose it, so that results depend on no other image.

    On a CPU a perceptron's tokens are gathered. In graphs, transforms and on other devices all perceptrons see all
    tokens, masked, which gives the same numbers.

    A training forward offers the auxiliary loss ``expert_balance``, see :func:`visionattn.layers.auxiliary_losses`.

    Args:
        dim: Width of the input and of the output.
        hidden_dim: Hidden channels of all perceptrons together.
        num_experts: Perceptrons, at least 2.
        topk: Perceptrons of a token, at least one less than there are.
        loss_weight: Weight of the auxiliary loss.
        drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The perceptrons do not divide the hidden channels, or a token has none or all of them.
    """

    def __init__(
            self,
            dim: int,
            hidden_dim: int,
            num_experts: int = 4,
            topk: int = 2,
            loss_weight: float = 0.01,
            drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if hidden_dim % num_experts:
            raise ValueError(f"num_experts {num_experts} must divide hidden_dim {hidden_dim}")
        if not 0 < topk < num_experts:
            raise ValueError(f"topk must be at least 1 and less than num_experts ({num_experts}), got {topk}")
        dd = {"device": device, "dtype": dtype}
        width = hidden_dim // num_experts
        self.topk = topk
        self.loss_weight = loss_weight
        self.router = nn.Parameter(torch.empty(num_experts, dim, **dd))
        self.router_bias = nn.Parameter(torch.empty(num_experts, **dd))
        self.fc1 = nn.Parameter(torch.empty(num_experts, dim, width, **dd))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, width, **dd))
        self.value = nn.Parameter(torch.empty(num_experts, dim, width, **dd))
        self.value_bias = nn.Parameter(torch.empty(num_experts, width, **dd))
        self.fc2 = nn.Parameter(torch.empty(num_experts, width, dim, **dd))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim, **dd))
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape, ``[batch, height, width, dim]`` or ``[batch, tokens, dim]``."""
        return self.drop(self._mix(x))

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_experts={self.fc1.shape[0]}, topk={self.topk}"

    @unscripted
    def _mix(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(1, -2)
        chosen, gates = _route(self, x)
        factors, index = (chosen * gates.sum(dim=-1, keepdim=True)).transpose(1, 2), None
        if concrete(x):
            index = _places(chosen.transpose(1, 2) > 0, gates)
            factors = factors.gather(-1, index)
        return expert_perceptrons(
            x, index, factors, self.fc1, self.fc1_bias, self.fc2, self.fc2_bias, self.value, self.value_bias,
        ).reshape(shape)


def rotate(x: Tensor, num_heads: int, size: tuple[int, int] | None = None) -> Tensor:
    """Tokens ``[batch, tokens, dim]`` with rotary positions, before any projection.

    Of each head's channels the second half is turned by angles of the position, in pairs of neighbours, and put first.

    Args:
        x: The tokens.
        num_heads: Heads.
        size: Height and width of the map that they are, row by row: the first half of the pairs then turns with the
            row and the second with the column. None for positions in the sequence.
    """
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
    half, (tokens,) = second.shape[-1], numbers(x.shape[1:2])

    def angles(count: int, channels: int) -> Tensor:
        rate = 10000. ** (-torch.arange(0, channels, 2, device=x.device, dtype=second.dtype) / channels)
        return torch.arange(count, device=x.device, dtype=second.dtype)[:, None] * rate

    if size is None:
        angle = angles(tokens, half)
    else:
        height, width = size
        rows, columns = angles(height, half // 2)[:, None], angles(width, half // 2)[None]
        angle = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1).flatten(0, 1)
    angle = angle[:, None]
    a, b = second.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).flatten(-2)
    return torch.cat([turned, first], dim=-1).flatten(-2).to(x.dtype)


def expert_attention(
        x: Tensor,
        index: Tensor | None,
        keys: Tensor,
        factors: Tensor,
        qkv: Tensor,
        qkv_bias: Tensor,
        proj: Tensor,
        proj_bias: Tensor,
        scale: float | None = None,
) -> Tensor:
    """The sum over heads of what each makes of its tokens.

    Args:
        x: Tokens ``[batch, tokens, dim]``.
        index: The tokens of each head ``[batch, heads, kept]``; None for all tokens of every head.
        keys: Which of them are keys, booleans of that shape; where none is, all are.
        factors: On their outputs, of that shape.
        qkv: ``[heads, dim, 3 * head_dim]``.
        qkv_bias: ``[heads, 3 * head_dim]``.
        proj: ``[heads, head_dim, dim]``.
        proj_bias: ``[heads, dim]``.
        scale: Factor on scores; None means ``head_dim ** -0.5``.

    Returns:
        ``[batch, tokens, dim]``; 0 for tokens of no head.
    """
    q, k, v = (_own(x, index) @ qkv + qkv_bias[:, None]).chunk(3, dim=-1)
    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    mask = torch.zeros_like(keys, dtype=q.dtype).masked_fill(~keys, _UNSEEN)[..., None, :]
    out = _attend(q, k, v, mask, index, keys, numbers(x.shape)[1])
    return _summed(out, index, factors, proj, proj_bias, x)


def expert_perceptrons(
        x: Tensor,
        index: Tensor | None,
        factors: Tensor,
        fc1: Tensor,
        fc1_bias: Tensor,
        fc2: Tensor,
        fc2_bias: Tensor,
        value: Tensor | None = None,
        value_bias: Tensor | None = None,
) -> Tensor:
    """The sum over perceptrons of what each makes of its tokens.

    That is ``gelu(x fc1) fc2`` or ``(silu(x fc1) * x value) fc2``: the second and the third of the authors' versions.

    Args:
        x: Tokens ``[batch, tokens, dim]``.
        index: The tokens of each perceptron ``[batch, experts, kept]``; None for all tokens of every one.
        factors: On their outputs, of that shape.
        fc1: ``[experts, dim, hidden]``.
        fc1_bias: ``[experts, hidden]``.
        fc2: ``[experts, hidden, dim]``.
        fc2_bias: ``[experts, dim]``.
        value: As ``fc1``, with ``value_bias``; None for the GELU.
        value_bias: As ``fc1_bias``.

    Returns:
        ``[batch, tokens, dim]``; 0 for tokens of no perceptron.
    """
    own = _own(x, index)
    hidden = own @ fc1 + fc1_bias[:, None]
    if value is None or value_bias is None:
        hidden = F.gelu(hidden)
    else:
        hidden = F.silu(hidden) * (own @ value + value_bias[:, None])
    return _summed(hidden, index, factors, fc2, fc2_bias, x)


def _route(layer: UnionOfExpertsAttention | UnionOfPerceptrons, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts each token chose, ones and zeros ``[batch, tokens, experts]``, and its gates; offers the loss."""
    with no_autocast(x.device.type):
        compute = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(compute), layer.router.to(compute), layer.router_bias.to(compute))
        probability = scores.softmax(dim=-1)
        chosen = torch.zeros_like(probability).scatter(-1, probability.topk(layer.topk, dim=-1).indices, 1)
        gates = probability * chosen
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1)
        batch, = numbers(x.shape[:1])
        if layer.training and not in_backward() and not (isinstance(batch, int) and batch == 0):
            layer.keep_auxiliary_loss("expert_balance", layer.loss_weight * balance_loss(probability, chosen))
    return chosen, gates


def _places(taken: Tensor, gates: Tensor, kept: int | None = None) -> Tensor:
    """Numbers ``[batch, experts, kept]`` of each expert's tokens of largest gate, ascending; None: of all ``taken``."""
    if kept is None:
        kept = int(taken.sum(dim=-1).max())
    order = gates.detach().transpose(1, 2).masked_fill(~taken, -1).argsort(dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(dim=-1).values


def _own(x: Tensor, index: Tensor | None) -> Tensor:
    """The tokens of each expert."""
    if index is None:
        return x[:, None]
    return x[:, None].expand(-1, index.shape[1], -1, -1).gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _summed(
        out: Tensor, index: Tensor | None, factors: Tensor, weight: Tensor, bias: Tensor, x: Tensor,
) -> Tensor:
    """What the experts' last linear layers make of ``out``, times the factors, added up at the tokens of x."""
    factors = factors.to(out.dtype)
    out = out * factors[..., None]
    if index is None:
        out = out.transpose(1, 2).flatten(2) @ weight.flatten(0, 1)
        return (out + factors.transpose(1, 2) @ bias).contiguous()
    batch, tokens, dim = numbers(x.shape)
    out = out @ weight + factors[..., None] * bias[:, None]
    place = index.flatten(1)[..., None].expand(-1, -1, dim)
    return out.new_zeros(batch, tokens, dim).scatter_add(1, place, out.flatten(1, 2))


def _draw(layer: nn.Module) -> None:
    """Biases are 0, the router and each expert's weights from Glorot's normal distribution, as the authors' router."""
    for name, parameter in layer.named_parameters():
        if name.endswith("_bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=math.sqrt(2 / sum(parameter.shape[-2:])))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, index: Tensor | None, keys: Tensor, tokens: int) -> Tensor:
    """Attention of each head; offers maps of all tokens, 0 for what a head does not serve."""
    recorder = current_recorder()
    if recorder is None:
        return attend(q, k, v, mask)

    def maps() -> Tensor:
        weights = probabilities(q, k, mask) * keys[..., None]
        if index is None:
            return weights
        rows = weights.new_zeros(*weights.shape[:3], tokens).scatter_add(
            3, index[..., None, :].expand(-1, -1, weights.shape[2], -1), weights)
        return rows.new_zeros(*rows.shape[:2], tokens, tokens).scatter_add(
            2, index[..., None].expand(-1, -1, -1, tokens), rows)

    recorder.offer(maps)
    with recorder.paused():
        return attend(q, k, v, mask)
