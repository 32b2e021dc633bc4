"""DHVT: a vision transformer with convolutions and head tokens, made for small data sets.

Paper: "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets" (NeurIPS 2022,
arXiv 2210.05958). Official code: https://github.com/ArieSeirack/DHVT (Apache-2.0); no weights were published.
"""
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.checkpointing import checkpointed
from ..layers.conv_norm import ConvNorm
from ..layers.full import attend
from ._backbone import TokenBackbone
from ._blocks import BaseBlock
from ._builder import build_model, cfg
from ._family import Family, Peer, Published

__all__ = ["DHVT"]


class Affine(nn.Module):
    """A learnt factor and offset for every channel of a map ``[B, dim, H, W]``."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Makes it the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Stem(nn.Module):
    """Sequential overlapping patch embedding (section 3.2): 3x3 convolutions of stride 2 between two affine maps.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the map.
        patch_size: Stride of the map on the image: 2, 4 or 16.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None):
        super().__init__()
        if patch_size not in (2, 4, 16):
            raise ValueError(f"patch_size must be 2, 4 or 16, got {patch_size}")
        dd = {"device": device, "dtype": dtype}
        halvings = patch_size.bit_length() - 1
        widths = [in_chans, *(dim // 2 ** i for i in reversed(range(halvings)))]
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers += [ConvNorm(widths[i], widths[i + 1], 3, stride=2, **dd), nn.GELU()]
        self.pre_affine = Affine(in_chans, **dd)
        self.proj = nn.Sequential(*layers if patch_size == 2 else layers[:-1])
        self.post_affine = Affine(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to the first map ``[B, H / patch_size, W / patch_size, dim]``, rounded up."""
        return self.post_affine(self.proj(self.pre_affine(x))).permute(0, 2, 3, 1)


class HeadInteractionAttention(nn.Module):
    """Head-interacted self-attention (section 3.4): the mean of each head's channels makes a token more.

    The head tokens are keys, values and queries like all; what comes out for them is added, as their mean, to the class
    token.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    inseparable = "its heads are tokens too, which all heads see"  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.head_proj = nn.Linear(self.head_dim, dim, **dd)
        self.head_norm = nn.LayerNorm(self.head_dim, **dd)
        self.act = nn.GELU()
        self.head_embed = nn.Parameter(torch.empty(1, num_heads, dim, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the head tokens' embeddings anew."""
        trunc_normal_(self.head_embed, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N, dim]``, the class token first, to the same."""
        B, N, C = x.shape
        heads = self.head_proj(x.mean(dim=1).reshape(B, self.num_heads, self.head_dim))
        heads = self.act(self.head_norm(heads.reshape(B, self.num_heads, self.num_heads, self.head_dim)))
        x = torch.cat([x, heads.reshape(B, self.num_heads, C) + self.head_embed], dim=1)
        qkv = self.qkv(x).reshape(B, N + self.num_heads, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N + self.num_heads, C))
        first = x[:, :1] + x[:, N:].mean(dim=1, keepdim=True)
        return self.proj_drop(torch.cat([first, x[:, 1:N]], dim=1))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution on maps ``[B, H, W, dim]``, as the matrix product that it is: faster on the CPU."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__(dim, out_dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, H, W, out_dim]``."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class FeedForward(nn.Module):
    """Dynamic aggregation feed-forward (section 3.3): convolutions of the patches; their mean gates the class token.

    Args:
        dim: Channels.
        hidden_dim: Channels of the depthwise convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = PointwiseConv(dim, hidden_dim, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.conv3 = PointwiseConv(hidden_dim, dim, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.compress = nn.Linear(dim, dim // 4, **dd)
        self.excite = nn.Linear(dim // 4, dim, **dd)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens ``[B, 1 + height * width, dim]``, the class token first, to the same."""
        patches = self.conv1(x[:, 1:].unflatten(1, (height, width))).permute(0, 3, 1, 2)
        patches = self.act(self.bn1(patches))
        patches = patches + self.act(self.bn2(self.conv2(patches)))
        patches = self.conv3(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        # Not flatten(2).transpose(1, 2): from there PyTorch's batch norm gets the gradient of a single image with
        # strides that it reads wrongly on the CPU.
        patches = self.bn3(patches).permute(0, 2, 3, 1).flatten(1, 2)
        gate = self.excite(self.act(self.compress(patches.mean(dim=1))))
        return torch.cat([x[:, :1] * gate[:, None], patches], dim=1)


class DHVTBlock(BaseBlock):
    """Attention, then convolutions, each after a norm and beside a shortcut, on tokens ``[B, 1 + H * W, dim]``.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        mlp_ratio: Channels of the depthwise convolution, in ``dim``.
        proj_drop: Dropout rate of the attention's output.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = HeadInteractionAttention(dim, num_heads, proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        """Returns tokens of the same shape."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpointed(self, self.token_branches, x, height, width)
        return self.token_branches(x, height, width)

    def token_branches(self, x: Tensor, height: int, width: int) -> Tensor:
        """What the block computes."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x), height, width))


class DHVT(TokenBackbone):
    """Dynamic hybrid vision transformer; takes images of any size, as it has no table of positions.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: What the head takes: ``"token"``, the class token; ``"avg"``, the mean of the others; "", all.
        patch_size: Stride of the map on the image, in pixels: 2, 4 or 16.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads per block.
        mlp_ratio: Channels of the depthwise convolutions, in ``embed_dim``.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the attention's output.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no stem for the patch size, or ``num_heads`` does not divide ``embed_dim``.
    """

    stem_parts = ("cls_token", "patch_embed")

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "token",
            patch_size: int = 16,
            embed_dim: int = 192,
            depth: int = 12,
            num_heads: int = 3,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.patch_embed = Stem(in_chans, embed_dim, patch_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList([
            DHVTBlock(embed_dim, num_heads, mlp_ratio, proj_drop_rate, rate, **dd) for rate in drop_paths])
        self.finish(
            embed_dim, num_classes, global_pool, drop_rate, norm_layer=partial(nn.LayerNorm, eps=1e-6), **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draws all parameters anew, e.g. after ``to_empty`` of a model that was built on the meta device."""
        super().init_weights(needs_reset)
        trunc_normal_(self.cls_token, std=.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name of the class token; the head tokens' embeddings are decayed, as by the authors."""
        return {"cls_token"}

    def as_tokens(self, x: Tensor) -> Tensor:
        """A map of patches ``[batch, height, width, dim]`` as tokens after the class token."""
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay).

    For images of other channels than the checkpoint's, each takes the mean of the factors and offsets of theirs.
    """
    renamed = {}
    for key, x in state_dict.items():
        key = re.sub(r"^(patch_embed\.proj\.\d)\.0\.", r"\1.conv.", key)
        key = re.sub(r"^(patch_embed\.proj\.\d)\.1\.", r"\1.bn.", key)
        key = key.replace(".attn.ht_", ".attn.head_").replace(".attn.pos_embed", ".attn.head_embed")
        key = key.replace(".mlp.excitation.", ".mlp.excite.")
        if key.endswith(("_affine.alpha", "_affine.beta")):
            key, x = key.replace(".alpha", ".weight").replace(".beta", ".bias"), x.flatten()
        renamed[key] = x
    channels: Any = model.get_submodule("patch_embed.proj.0.conv").in_channels
    for key in ("patch_embed.pre_affine.weight", "patch_embed.pre_affine.bias"):
        if key in renamed and len(renamed[key]) != channels:
            renamed[key] = renamed[key].mean().repeat(channels)
    return renamed


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        pool_size=(14, 14), first_conv="patch_embed.proj.0.conv", license="apache-2.0",
        origin_url="https://github.com/ArieSeirack/DHVT", paper_ids="arXiv:2210.05958",
        paper_name="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
    ) | kwargs)


def _cifar_cfg(patch_size: int) -> dict[str, Any]:
    return _cfg(
        num_classes=100, input_size=(3, 32, 32), pool_size=(32 // patch_size, 32 // patch_size), crop_pct=1.0)


default_cfgs = generate_default_cfgs({
    "dhvt_tiny_cifar_patch4.untrained": _cifar_cfg(4),
    "dhvt_tiny_cifar_patch2.untrained": _cifar_cfg(2),
    "dhvt_small_cifar_patch4.untrained": _cifar_cfg(4),
    "dhvt_small_cifar_patch2.untrained": _cifar_cfg(2),
    "dhvt_tiny_domain_patch16.untrained": _cfg(num_classes=345),
    "dhvt_small_domain_patch16.untrained": _cfg(num_classes=345),
    "dhvt_tiny_imagenet_patch16.untrained": _cfg(),
    "dhvt_small_imagenet_patch16.untrained": _cfg(),
    "test_dhvt.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> DHVT:
    feature_cfg = dict(out_indices=3, feature_cls="getter")  # the last three blocks, as of timm's vision transformers
    return build_model(
        DHVT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg,
        **defaults | kwargs)


@register_model
def dhvt_tiny_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """6.0 M parameters, 0.4 GMACs at 32 px, 100 classes."""
    return _create("dhvt_tiny_cifar_patch4", pretrained, dict(patch_size=4, num_heads=4), **kwargs)


@register_model
def dhvt_tiny_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """5.8 M parameters, 1.7 GMACs at 32 px, 100 classes."""
    return _create("dhvt_tiny_cifar_patch2", pretrained, dict(patch_size=2, num_heads=4), **kwargs)


@register_model
def dhvt_small_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """23.4 M parameters, 1.5 GMACs at 32 px, 100 classes."""
    return _create("dhvt_small_cifar_patch4", pretrained, dict(patch_size=4, embed_dim=384, num_heads=8), **kwargs)


@register_model
def dhvt_small_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """22.8 M parameters, 6.2 GMACs at 32 px, 100 classes."""
    return _create("dhvt_small_cifar_patch2", pretrained, dict(patch_size=2, embed_dim=384, num_heads=8), **kwargs)


@register_model
def dhvt_tiny_domain_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """6.1 M parameters, 1.4 GMACs at 224 px, the 345 classes of DomainNet."""
    return _create("dhvt_tiny_domain_patch16", pretrained, dict(num_heads=4), **kwargs)


@register_model
def dhvt_small_domain_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """23.8 M parameters, 5.0 GMACs at 224 px, the 345 classes of DomainNet."""
    return _create("dhvt_small_domain_patch16", pretrained, dict(embed_dim=384, num_heads=6), **kwargs)


@register_model
def dhvt_tiny_imagenet_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """6.3 M parameters, 1.4 GMACs, published 77.6 % top-1 at 224 px."""
    return _create("dhvt_tiny_imagenet_patch16", pretrained, {}, **kwargs)


@register_model
def dhvt_small_imagenet_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """24.0 M parameters, 5.0 GMACs, published 82.3 % top-1 at 224 px."""
    return _create("dhvt_small_imagenet_patch16", pretrained, dict(embed_dim=384, num_heads=6), **kwargs)


@register_model
def test_dhvt(pretrained: bool = False, **kwargs: Any) -> DHVT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    return _create("test_dhvt", pretrained, dict(embed_dim=48, depth=4, num_heads=4), **kwargs)


family = Family(
    small={"test_dhvt": {}},
    published={
        "dhvt_tiny_imagenet_patch16": Published(77.6, 1.4), "dhvt_small_imagenet_patch16": Published(82.3, 5.1),
    },
    goldens={
        "dhvt_tiny_cifar_patch4": "dhvt_tiny_cifar_patch4", "dhvt_tiny_imagenet_patch16": "dhvt_tiny_imagenet_patch16",
    },
    peers=[Peer("dhvt_tiny_imagenet_patch16", "deit_tiny_patch16_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=lambda variant: (int(variant.partition("_patch")[2] or 16),),
)
