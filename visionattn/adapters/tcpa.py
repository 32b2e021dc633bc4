"""TCPA: prompts before every block of a frozen vision transformer, of which each token sees its own selection.

Paper: "Token Coordinated Prompt Attention is Needed for Visual Prompting" (ICML 2025, arXiv 2505.02406). The class
token and the tokens of the image have a pool of prompts each; keys beside the prompts say which of them a token sees.
"""
import math
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from ..layers.auxiliary import AuxiliaryLosses, in_backward
from ..models.agent_deit import FullAttention
from ..ops.dispatch import exporting, no_autocast
from ..ops.kept import keep
from ..ops.recording import current_recorder
from ..ops.sdpa import probabilities, sdpa
from ._adapter import ROOM, Adapter, classifiers
from ._places import find_blocks

__all__ = [
    "TCPA", "BlockPrompts", "ImagePrompt", "PromptPool", "choose", "coordinated_attention", "fourier", "reweighted",
    "visible",
]

Select = Literal["similarity", "role", "random"]
PLAIN = (Attention, FullAttention)  # attention of all tokens to all, of nothing but queries, keys and values


class TCPA(Adapter):
    """Prompts of two pools a block, of which the class token and each token of the image see the most similar ones.

    Where it goes: into the attention of every block. The tokens that enter the block choose entries of their pool by
    the cosine with their keys; prompts are normed and projected as tokens are, and every token attends to all tokens
    and prompts; the weights of prompts that it has not chosen are then set to 0. It works in models with a class token
    and plain attention. Other tokens that are not of the image (distillation, registers) choose as the class token
    does.

    It trains pools and options, and the head beside them, while the backbone stays in eval mode. Keys learn by the
    distance to the tokens that chose them, which is a loss of its own (``train/prompt_distance``). A file holds all of
    it. Merging leaves it as it is, as the selection depends on the image.

    In the first ``random_epochs`` of a training (:meth:`begin_epoch` says which it is) entries are drawn at random, so
    that all of them learn. Evaluation selects by similarity, or all prompts of the pool with ``select`` ``role``.

    Args:
        class_pool: Entries of the class token's pool.
        class_topk: Entries that it sees.
        class_length: Prompts of an entry.
        image_pool: Entries of the pool of the image's tokens.
        image_topk: Entries that each sees.
        image_length: Prompts of an entry.
        select: ``similarity``; ``role``: each token sees all of its pool; ``random``: training draws in all epochs.
        random_epochs: Epochs of training that draw at random.
        fourier: Whether prompts are Fourier transformed, over channels and over all prompts of a block (VFPT).
        distance: Weight of the distance loss.
        dropout: Rate of the prompts.
        value_prompts: Learn a factor and a summand on the values of the prompts, the same in all blocks.
        image_prompt: Add two learnt convolutions of the image to it.
        reweighting: Weigh the pixels by how far they are from their channel's mean.
        noise: Deviation of noise on tokens and prompts in training; the authors' option has 0.001.

    Raises:
        ValueError: There are no such options, or they do not go together.
    """

    summary = "prompts in every block's attention, of which each token sees its own selection (arXiv 2505.02406)"

    def __init__(
            self,
            class_pool: int = 18,
            class_topk: int = 10,
            class_length: int = 1,
            image_pool: int = 18,
            image_topk: int = 10,
            image_length: int = 1,
            select: Select = "similarity",
            random_epochs: int = 10,
            fourier: bool = True,
            distance: float = 0.01,
            dropout: float = 0.1,
            value_prompts: bool = False,
            image_prompt: bool = False,
            reweighting: bool = False,
            noise: float = 0.0,
    ):
        super().__init__(
            class_pool=class_pool, class_topk=class_topk, class_length=class_length, image_pool=image_pool,
            image_topk=image_topk, image_length=image_length, select=select, random_epochs=random_epochs,
            fourier=fourier, distance=distance, dropout=dropout, value_prompts=value_prompts,
            image_prompt=image_prompt, reweighting=reweighting, noise=noise)
        if select not in get_args(Select):
            raise ValueError(f"tcpa's select must be one of {', '.join(get_args(Select))}, got {select!r}")
        for kind, size, topk, length in (
                ("class", class_pool, class_topk, class_length), ("image", image_pool, image_topk, image_length)):
            if not 1 <= topk <= size or length < 1:
                raise ValueError(f"tcpa's {kind}_topk must be 1 to {kind}_pool and {kind}_length at least 1, got "
                                 f"{topk} of {size}, of {length}")
        if not 0 <= dropout < 1 or min(distance, noise, random_epochs) < 0:
            raise ValueError(f"tcpa's dropout must be from 0 to below 1, and distance, noise and random_epochs not "
                             f"negative, got {dropout}, {distance}, {noise}, {random_epochs}")
        self.sizes, self.topks = (class_pool, image_pool), (class_topk, image_topk)
        self.lengths = class_length, image_length
        self.select, self.random_epochs, self.fourier, self.distance = select, random_epochs, fourier, distance
        self.dropout, self.value_prompts, self.image_prompt = dropout, value_prompts, image_prompt
        self.reweighting, self.noise = reweighting, noise
        self.epoch: int | None = None

    def inject(self, backbone: Any) -> None:
        """Makes the pools and binds them to a timm model.

        Raises:
            ValueError: The model has no class token, or attention that is not plain.
        """
        name = type(backbone).__name__
        if getattr(backbone, "cls_token", None) is None:
            raise ValueError(f"tcpa has prompts for a class token, and {name} has none: take a ViT or DeiT with one, "
                             "or another adapter")
        places = [_Place(block.module) for block in find_blocks(backbone)]
        for place in places:
            attention = getattr(place.block, "attn", None)
            if type(attention) not in PLAIN or not hasattr(place.block, "norm1"):
                raise ValueError(f"tcpa puts prompts into plain attention of all tokens to all, and {name} has "
                                 f"{type(attention).__name__}: take a ViT or DeiT, or another adapter")
        weight = places[0].block.attn.qkv.weight
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        dim, self.prefix = weight.shape[1], backbone.num_prefix_tokens
        blocks = [
            BlockPrompts(dim, self.sizes, self.topks, self.lengths, self.select != "role", self.fourier, self.dropout,
                         **dd)
            for _ in places]
        self.blocks = nn.ModuleList(blocks)
        if self.value_prompts:
            shape = 1, sum(size * length for size, length in zip(self.sizes, self.lengths, strict=True)), dim
            factor, summand = (0.1 * nn.init.kaiming_uniform_(torch.empty(shape, **dd)) for _ in range(2))
            self.value_factor, self.value_summand = nn.Parameter(1 + factor), nn.Parameter(summand)
        if self.image_prompt:
            channels = next(m.in_channels for m in backbone.patch_embed.modules() if isinstance(m, nn.Conv2d))
            self.image = ImagePrompt(channels, **dd)
        if self.image_prompt or self.reweighting:
            self._handles.append(backbone.patch_embed.register_forward_pre_hook(partial(_images, self)))
        for place, prompts in zip(places, blocks, strict=True):
            self._handles.append(place.block.norm1.register_forward_pre_hook(partial(_enter, self, place)))
            self.in_place_of(place.block.attn, partial(_attention, self, place, prompts))
        heads = classifiers(backbone)
        self.keep_still([module for name, module in backbone.named_children()
                         if name != ROOM and not any(module is head for head in heads)])

    def begin_epoch(self, epoch: int) -> None:
        """Says which epoch of the training begins, from 0 on: whether its entries are drawn at random."""
        self.epoch = epoch

    @property
    def at_random(self) -> bool:
        """Whether entries are drawn at random now."""
        if not self.training or self.select == "role":
            return False
        return self.select == "random" or (self.epoch is not None and self.epoch < self.random_epochs)

    def disturbed(self, x: Tensor) -> Tensor:
        """Tokens, with noise in training if there is to be any."""
        return x + self.noise * torch.randn_like(x) if self.noise and self.training else x


class _Place:
    """A block, and the tokens that entered its attention's branch, on their way to the attention."""

    def __init__(self, block: Any):
        self.block = block
        self.tokens: Tensor | None = None


def _images(adapter: TCPA, module: nn.Module, args: Any) -> Any:
    """The images that the backbone is given: weighed, then with what is added."""
    if not adapter.active:
        return None
    images = reweighted(args[0]) if adapter.reweighting else args[0]
    return (adapter.image(images) if adapter.image_prompt else images, *args[1:])


def _enter(adapter: TCPA, place: _Place, module: nn.Module, args: Any) -> Any:
    """Keeps the tokens before the norm, and disturbs what is normed."""
    if not adapter.active:
        return None
    place.tokens = args[0]
    return (adapter.disturbed(args[0]), *args[1:])


def _attention(
        adapter: TCPA, place: _Place, prompts: "BlockPrompts", attention: Any, x: Tensor,
        attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """What stands in place of the attention's forward: its parts, with prompts beside the normed tokens ``x``."""
    if attn_mask is not None or is_causal:
        raise ValueError("tcpa has no masks of its own in attention: attn_mask must be None and is_causal False")
    tokens, place.tokens = place.tokens, None
    assert tokens is not None
    seen, distance = prompts.select(tokens, adapter.prefix, adapter.at_random)
    if distance is not None and adapter.training and not in_backward():
        prompts.keep_auxiliary_loss("prompt_distance", adapter.distance * distance)
    added = place.block.norm1.forward(adapter.disturbed(prompts.inserted(x.shape[0])))  # without the hooks of tokens
    q, k, v = _heads(attention, x)
    _, prompt_k, prompt_v = _heads(attention, added)
    if adapter.value_prompts:
        beside = prompt_v.transpose(1, 2).flatten(2) * adapter.value_factor + adapter.value_summand
        prompt_v = beside.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    q, k, prompt_k = attention.q_norm(q), attention.k_norm(k), attention.k_norm(prompt_k)
    out = coordinated_attention(q, k, v, prompt_k, prompt_v, seen, attention.scale).transpose(1, 2).flatten(2)
    out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def _heads(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[batch, heads, tokens, head_dim]`` of normed tokens."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class BlockPrompts(AuxiliaryLosses, nn.Module):
    """The pools of one block: that of the class token, and that of the image's tokens.

    Args:
        dim: Channels.
        sizes: Entries of both.
        topks: Entries that a token sees of its pool.
        lengths: Prompts of an entry.
        by_keys: Whether tokens choose; else they see all of their pool.
        fourier: Whether the prompts of both are transformed together.
        dropout: Rate of the prompts.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            sizes: tuple[int, int],
            topks: tuple[int, int],
            lengths: tuple[int, int],
            by_keys: bool = True,
            fourier: bool = True,
            dropout: float = 0.0,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.topks, self.by_keys, self.fourier = topks, by_keys, fourier
        self.cls, self.image = (
            PromptPool(dim, size, length, by_keys, device=device, dtype=dtype)
            for size, length in zip(sizes, lengths, strict=True))
        self.drop = nn.Dropout(dropout)
        self.register_buffer("fixed", None, persistent=False)

    def inserted(self, batch: int) -> Tensor:
        """The prompts, those of the class token first, ``[1, prompts, dim]``; in training ``[batch, prompts, dim]``."""
        if self.fixed is not None:
            return self.fixed
        pools = self.cls.prompts, self.image.prompts
        if not self.training:
            return keep("prompts", self.fourier, lambda: self._made(1), sources=pools, owner=self,
                        device=pools[0].device) if self.fourier else self._made(1)
        return self._made(batch)

    def _made(self, batch: int) -> Tensor:
        prompts = torch.cat([pool.prompts.flatten(0, 1) for pool in (self.cls, self.image)])
        prompts = self.drop(prompts.expand(batch, -1, -1))
        return fourier(prompts) if self.fourier else prompts

    def fuse(self) -> "BlockPrompts":
        """Computes the prompts once and for all, as for an exported file."""
        self.fixed = self._made(1).detach()
        return self

    def select(self, tokens: Tensor, prefix: int, at_random: bool = False) -> tuple[Tensor, Tensor | None]:
        """Which prompts each of the tokens ``[batch, tokens, dim]`` sees, the first ``prefix`` as class tokens.

        Returns:
            1 or 0, ``[batch or 1, tokens, prompts]``, and the distance of tokens and chosen keys, if any were chosen.
        """
        kinds = list(zip((self.cls, self.image), self.topks, (tokens[:, :prefix], tokens[:, prefix:]), strict=True))
        parts, distance = [], None
        for pool, topk, own in kinds:
            size, length = pool.prompts.shape[:2]
            if not self.by_keys:
                parts.append(torch.ones(1, own.shape[1], size * length, device=tokens.device))
                continue
            similarity = pool.similarity(own)
            index, apart = choose(similarity, topk, torch.rand_like(similarity) if at_random else None)
            parts.append(visible(index, size, length))
            distance = apart if distance is None else distance + apart
        own, others = parts
        seen = torch.cat([F.pad(own, (0, others.shape[-1])), F.pad(others, (own.shape[-1], 0))], dim=1)
        return seen, distance


class PromptPool(nn.Module):
    """The entries that one kind of tokens chooses from in one block: a key and some prompts each.

    Args:
        dim: Channels.
        size: Number of entries.
        length: Prompts of an entry.
        keys: Whether there are keys to choose by.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, size: int, length: int, keys: bool = True, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if keys:
            self.keys = nn.Parameter(torch.empty(size, dim, **dd).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(size, length, dim, **dd).uniform_(-1, 1))

    def similarity(self, tokens: Tensor) -> Tensor:
        """Cosines of tokens ``[..., dim]`` and keys, ``[..., size]``, in float32 or better."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with no_autocast(tokens.device.type):  # rounded more, other entries would be the most similar ones
            return F.normalize(tokens.to(dtype), dim=-1) @ F.normalize(self.keys.to(dtype), dim=-1).mT


def choose(similarity: Tensor, topk: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numbers of the entries that each token sees, and how far their keys are from it.

    Args:
        similarity: Cosines of tokens and keys ``[..., size]``.
        topk: Entries that a token sees.
        scores: Random numbers of that shape: a token then sees the entries of the lowest, not the most similar ones.

    Returns:
        Numbers ``[..., topk]``, and the mean of ``1 - cosine`` of what was chosen, a scalar.
    """
    index = (similarity.detach() if scores is None else -scores).topk(topk, dim=-1).indices
    return index, (1 - similarity.gather(-1, index)).mean()


def visible(index: Tensor, size: int, length: int) -> Tensor:
    """1 for the prompts of the entries ``index [..., topk]``, else 0: ``[..., size * length]``, float32."""
    seen = torch.zeros(*index.shape[:-1], size, device=index.device).scatter(-1, index, 1.0)
    return seen.repeat_interleave(length, dim=-1) if length > 1 else seen


def coordinated_attention(
        q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, seen: Tensor,
        scale: float | None = None) -> Tensor:
    """Attention to all tokens and prompts, from which the prompts that a token does not see are then left out.

    The weights of a token's prompts that are left out are missing in its sum of weights: they are 0 after the softmax.
    With m the weight that all prompts have together, that is the attention with prompts whose values are zero, plus m
    times the softmax over the prompts alone, masked: what a fused kernel computes, and a small matrix.

    Args:
        q: Queries ``[batch, heads, tokens, dim]``.
        k: Keys.
        v: Values.
        prompt_k: Keys of the prompts ``[batch or 1, heads, prompts, dim]``.
        prompt_v: Values of the prompts.
        seen: 1 where a token sees a prompt, else 0: ``[batch or 1, tokens, prompts]``.
        scale: Factor on ``q . k``; None means ``dim ** -0.5``.

    Returns:
        The attention ``[batch, heads, tokens, dim]``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    recorder = current_recorder()
    if recorder is not None:  # of maps of attention those between tokens
        keys = torch.cat([prompt_k.expand(k.shape[0], -1, -1, -1), k], dim=2)
        recorder.offer(lambda: probabilities(q, keys, scale=scale)[..., prompt_k.shape[2]:])
        with recorder.paused():
            return coordinated_attention(q, k, v, prompt_k, prompt_v, seen, scale)
    shape = (q.shape[0], -1, -1, -1)
    # One more channel of the values, 1 for prompts and 0 for tokens, gives m; 8 as kernels want it.
    values = F.pad(v, (0, 8))
    blank = F.pad(torch.zeros_like(prompt_v), (0, 8), value=1.0).expand(shape)
    keys = torch.cat([prompt_k.expand(shape), k], dim=2)
    out = sdpa(F.pad(q, (0, 8)), F.pad(keys, (0, 8)), torch.cat([blank, values], dim=2), scale=scale)
    out, mass = out[..., :-8], out[..., -8:-7]
    shares = (q @ prompt_k.mT * scale).softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return out + mass * ((shares * seen[:, None]).to(prompt_v.dtype) @ prompt_v)


def fourier(prompts: Tensor) -> Tensor:
    """Real part of the Fourier transform of prompts ``[..., prompts, dim]`` along both axes, not normalised (VFPT)."""
    wide = prompts.to(torch.promote_types(prompts.dtype, torch.float32))
    if not exporting():
        return torch.fft.fft2(wide).real.to(prompts.dtype)
    # Runtimes of exported files know products.
    rows, columns = (_waves(length, wide) for length in prompts.shape[-2:])
    return (rows[0] @ wide @ columns[0] - rows[1] @ wide @ columns[1]).to(prompts.dtype)


def _waves(length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, length]`` of the discrete Fourier transform."""
    steps = torch.arange(length, device=like.device)
    angles = (2 * math.pi / length) * (steps[:, None] * steps % length).double()
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def reweighted(images: Tensor) -> Tensor:
    """Images ``[batch, channels, height, width]`` whose pixels are weighed by how far they are from their mean."""
    apart = (images - images.mean(dim=(2, 3), keepdim=True)).square()
    count = images.shape[2] * images.shape[3] - 1
    return images * (apart / (4 * (apart.sum(dim=(2, 3), keepdim=True) / count + 1e-3)) + 0.5).sigmoid()


class ImagePrompt(nn.Module):
    """Adds two convolutions of an image, with a PReLU between, to it.

    Args:
        channels: Of the image.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, channels: int = 3, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(channels, 3 * channels, 11, padding=5, **dd)
        self.act = nn.PReLU(**dd)
        self.conv2 = nn.Conv2d(3 * channels, channels, 11, padding=5, **dd)

    def forward(self, images: Tensor) -> Tensor:
        """Returns images of the same shape."""
        return images + self.conv2(self.act(self.conv1(images)))


adapter = TCPA
