"""Where adapters go in a timm model: blocks, by their ``norm2`` and ``mlp``, and attention, by its ``qkv``."""
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Attention", "Block", "branch_ends", "find_attention", "find_blocks"]


class Block(NamedTuple):
    """A transformer block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``, with or without scales and drop paths.

    Attributes:
        name: Its path in the model.
        module: The block.
        width: Channels of the tokens that it works on, ``[..., width]``.
    """

    name: str
    module: Any
    width: int


class Attention(NamedTuple):
    """An attention whose queries, keys and values come of one matrix.

    Attributes:
        name: Its path in the model.
        module: The attention.
        qkv: The matrix: ``rows`` rows of queries, as many of keys, as many of values, each head after head.
        width: Channels of its input.
        rows: Rows of each of the three.
    """

    name: str
    module: Any
    qkv: nn.Linear
    width: int
    rows: int


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model, the one nearest to the image first.

    Raises:
        ValueError: The model has none.
    """
    found = []
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        norm = parts.get("norm2")
        if "mlp" in parts and isinstance(norm, nn.LayerNorm) and _of_tokens(norm) and branch_ends(module):
            found.append(Block(name, module, norm.normalized_shape[-1]))
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks that an adapter could go into: none of its modules has "
                         "the parts norm2 (a LayerNorm over channels), mlp and drop_path2")
    return found


def find_attention(model: nn.Module) -> list[Attention]:
    """The attention modules of a model, the one nearest to the image first.

    Raises:
        ValueError: The model has none.
    """
    found = []
    for name, module in model.named_modules():
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear) and qkv.out_features % 3 == 0 and not _differs(module):
            found.append(Attention(name, module, qkv, qkv.in_features, qkv.out_features // 3))
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that an adapter could go into: none of its modules "
                         "calls a linear layer qkv for queries, keys and values, one after the other")
    return found


def branch_ends(block: nn.Module) -> list[nn.Module]:
    """What stochastic depth a block has (``nn.Identity`` at a rate of 0): the end of each of its branches."""
    return [module for name, module in block.named_children() if name.startswith("drop_path")]


def _differs(attention: Any) -> bool:
    """Whether an attention's ``qkv`` is not called, or its rows are not a third each of queries, keys and values."""
    return (
        getattr(attention, "q_bias", None) is not None  # BEiT's and Swin v2's, which multiply by the matrix itself
        or getattr(attention, "head_first", False) or hasattr(attention, "val_dim")  # MaxViT's, LeViT's: by heads
        or (hasattr(attention, "kv_heads") and attention.kv_heads != attention.num_heads))


def _of_tokens(norm: nn.LayerNorm) -> bool:
    """Whether channels are its last axis: timm's ``LayerNorm2d``, for maps with channels first, is a LayerNorm too."""
    return not type(norm).__name__.endswith("2d") and len(norm.normalized_shape) == 1
