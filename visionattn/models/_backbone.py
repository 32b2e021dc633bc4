"""What backbones share: the interface that timm asks for, and initial values.

Two kinds of backbones are here. A :class:`Backbone` works on maps, ``[batch, height, width, channels]`` or ``[batch,
channels, height, width]``, that its parts (stages, or blocks of one resolution) hand on. A :class:`TokenBackbone` works
on tokens ``[batch, prefix + height * width, channels]``, the class token and the like first. A family that does
something else on the way overrides the one method that does it; each says so.
"""
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import ClassifierHead, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn
from torch.fx import Proxy

from ..ops.dispatch import numbers

__all__ = ["Backbone", "TokenBackbone", "init_convolution", "stage_levels"]


def stage_levels(dims: Sequence[int], stride: int = 4) -> list[dict[str, Any]]:
    """``feature_info`` of stages of these widths, the first of which has this stride and the others twice the last's."""
    return [dict(num_chs=dim, reduction=stride * 2 ** i, module=f"stages.{i}") for i, dim in enumerate(dims)]


def init_convolution(module: nn.Conv2d) -> None:
    """Draws a convolution's weights anew from He's normal distribution, by its outputs of a group; biases are zero."""
    fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
    nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """A backbone on maps: everything but the constructor, and the forward pass where it is out of the ordinary.

    A subclass has ``in_chans``, ``feature_info`` (the channels, the reduction and the module of each part), the modules
    ``stem_parts``, and the parts (stages or blocks) as an ``nn.Sequential`` whose name is ``parts``. Its constructor
    ends with :meth:`finish`. If its images go another way to the first map it overrides :meth:`embed`, and if maps go
    another way through the parts :meth:`run_parts` and :meth:`forward_features`. If small images do not survive a
    part, it sets ``min_sizes``, the least height and width that each part needs, before it calls :meth:`finish`.
    """

    parts = "stages"
    stem_parts: tuple[str, ...] = ("patch_embed",)  # what makes the first map from an image
    output_fmt = "NHWC"  # or "NCHW": of the maps that the parts hand on
    min_size = 1  # least height and width of an image, in pixels
    if TYPE_CHECKING:  # torch.jit.script would stumble over these
        feature_info: list[dict[str, Any]]
        patch_embed: nn.Module
        stages: Any
        norm: nn.Module
        head: Any
        min_sizes: Sequence[int]

    def finish(
            self,
            num_features: int,
            num_classes: int,
            global_pool: str,
            drop_rate: float,
            norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
            *,
            head_layer: Callable[..., Any] = ClassifierHead,
            **dd: Any,
    ) -> None:
        """Adds the final norm and the head, and draws the weights.

        Args:
            num_features: Channels of the last map.
            num_classes: Classes of the head; 0 for none.
            global_pool: How the head pools the last map; "" for not at all.
            drop_rate: Dropout rate before the classifier.
            norm_layer: Makes the final norm; None for none.
            head_layer: Makes the head, a ``ClassifierHead`` of timm's or one derived from it.
            dd: Device and dtype of the parameters.
        """
        self.num_classes = num_classes
        self.num_features = num_features
        if hasattr(self, "min_sizes"):
            self.min_size = self.min_sizes[-1]
        self.norm = nn.Identity() if norm_layer is None else norm_layer(num_features, **dd)
        self.head = head_layer(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd)
        self.head_hidden_size = num_features * self.head.global_pool.feat_mult()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draws all parameters anew, e.g. after ``to_empty`` of a model that was built on the meta device."""
        if next(self.parameters()).is_meta:
            return  # nothing to draw, and half of the time that building takes
        self.apply(partial(self.init_module, needs_reset=needs_reset))

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module: of a linear layer from a normal distribution of deviation 0.02, cut at 2.

        Args:
            module: Whose parameters to draw, those of its children are drawn already.
            needs_reset: Other layers than linear ones draw theirs anew as well, as PyTorch does.
        """
        if needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters into layers, for layer decay."""
        stem = rf"^(?:{'|'.join(self.stem_parts)})"
        if self.parts != "stages":
            return dict(stem=stem, blocks=[(rf"^{self.parts}\.(\d+)", None), (r"^norm", (99999,))])
        return dict(stem=stem, blocks=r"^stages\.(\d+)" if coarse else [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^norm", (99999,)),
        ])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the blocks' inner values a second time instead of keeping them."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> Any:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier (0 classes: none) and, if given, the pooling ("": none)."""
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool)
        weight = next(self.parameters())  # timm 1.0.24 makes the new layer float32 on the CPU
        self.head.to(device=weight.device, dtype=weight.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images ``[batch, in_chans, height, width]``."""
        return self.patch_embed(x)

    def first_map(self, x: Tensor) -> Tensor:
        """:meth:`embed` of images that are large enough for all parts.

        Raises:
            ValueError: They are smaller than ``min_size``.
        """
        if not torch.jit.is_scripting():
            check_size(x, self.min_size)
        return self.embed(x)

    def run_parts(self, x: Tensor, taken: Collection[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        """Runs the first parts on images, without the final norm.

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            taken: Numbers of the parts whose maps to return besides.
            stop: Number of parts to run.

        Returns:
            The map after the last of them, and those taken, in the format ``output_fmt``.
        """
        maps = []
        x = self.first_map(x)
        for i, part in enumerate(getattr(self, self.parts)[:stop]):
            x = part(x)
            if i in taken:
                maps.append(x)
        return x, maps

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the parts (stages; blocks of models of one resolution).

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            indices: Parts whose maps to return: the last n if an int, all if None.
            norm: Apply the final norm to the last part's map.
            stop_early: Compute no part after the last one that is asked for.
            output_fmt: "NCHW", or the model's own format, of the returned maps.
            intermediates_only: Return these maps only.

        Returns:
            The final features (as :meth:`forward_features`) and the maps, or the latter only.
        """
        formats = ["NCHW"] if self.output_fmt == "NCHW" else ["NCHW", self.output_fmt]
        if output_fmt not in formats:
            raise ValueError(f"output_fmt must be {' or '.join(formats)}, got {output_fmt!r}")
        parts = len(getattr(self, self.parts))
        take_indices, max_index = feature_take_indices(parts, indices)
        stop = max_index + 1 if stop_early else parts
        x, maps = self.run_parts(x, take_indices, stop)
        if stop == len(self.feature_info):
            x = self.norm(x)
            if norm and stop - 1 in take_indices:
                maps[-1] = x
        if output_fmt != self.output_fmt:
            maps = [taken.permute(0, 3, 1, 2).contiguous() for taken in maps]
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drops the parts after the last one of ``indices``, and what is asked for besides; returns the indices."""
        parts = getattr(self, self.parts)
        take_indices, max_index = feature_take_indices(len(parts), indices)
        prune_end = max_index < len(parts) - 1
        setattr(self, self.parts, parts[:max_index + 1])
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
            if hasattr(self, "min_sizes"):
                self.min_size = self.min_sizes[max_index]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Last map after the final norm, in the format ``output_fmt``."""
        return self.norm(self.stages(self.first_map(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies a map of :meth:`forward_features`; ``pre_logits`` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]`` of images ``[batch, in_chans, height, width]``."""
        return self.forward_head(self.forward_features(x))


def check_size(images: Tensor, least: int) -> None:
    """Refuses images that are too small; symbolic sizes (export) are not compared, which would limit the program."""
    if isinstance(images, Proxy):  # of a graph, which is for any size
        return
    height, width = numbers(images.shape[-2:])
    if any(isinstance(side, int) and side < least for side in (height, width)):
        raise ValueError(f"images must have at least {least} x {least} pixels for this model, got {height} x {width}")


class TokenBackbone(Backbone):
    """A backbone of blocks on tokens of one resolution, prefix tokens (a class token) first.

    A subclass has what a :class:`Backbone` has, and says in :meth:`as_tokens` how a map of patches becomes tokens. Its
    ``blocks`` are an ``nn.ModuleList``; each takes tokens, height and width of the map. If tokens go another way through
    the blocks (some are dropped, or handed to later blocks) it overrides :meth:`run_parts`, which returns whole maps, and
    :meth:`forward_features`.
    """

    parts = "blocks"
    output_fmt = "NLC"
    if TYPE_CHECKING:
        blocks: Any

    def finish(
            self,
            num_features: int,
            num_classes: int,
            global_pool: str,
            drop_rate: float,
            norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
            num_prefix_tokens: int = 1,
            **dd: Any,
    ) -> None:
        """Adds the final norm and the head, and draws the weights.

        Args:
            num_features: Channels of the tokens.
            num_classes: Classes of the head; 0 for none.
            global_pool: What the head takes: ``"token"``, the first prefix token; ``"avg"`` or another way to pool the
                tokens after the prefix; "", all tokens.
            drop_rate: Dropout rate before the classifier.
            norm_layer: Makes the final norm; None for none.
            num_prefix_tokens: Class tokens and the like, before those of the map.
            dd: Device and dtype of the parameters.
        """
        self.norm = nn.Identity() if norm_layer is None else norm_layer(num_features, **dd)
        self.num_prefix_tokens = num_prefix_tokens
        self.global_pool = global_pool
        self.head_drop = nn.Dropout(drop_rate)
        self.num_features = self.head_hidden_size = num_features
        self.reset_classifier(num_classes)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def get_classifier(self) -> Any:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier (0 classes: none) and, if given, what it takes ("": all tokens)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        weight = next(self.parameters())
        self.head = nn.Identity() if num_classes == 0 else nn.Linear(
            self.num_features, num_classes, device=weight.device, dtype=weight.dtype)

    @torch.jit.ignore
    def map_size(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of images of this height and width, the last ones padded."""
        height, width = to_2tuple(img_size)
        patch = self.feature_info[0]["reduction"]
        return -(-height // patch), -(-width // patch)

    def as_tokens(self, x: Tensor) -> Tensor:
        """A map of patches ``[batch, height, width, dim]`` as tokens after the prefix, with their positions if any."""
        raise NotImplementedError

    def run_parts(self, x: Tensor, taken: Collection[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        """Runs the first blocks on images, without the final norm.

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            taken: Numbers of the blocks after which to return the tokens as a map.
            stop: Number of blocks to run.

        Returns:
            The tokens after the last of them, and the maps ``[batch, height, width, dim]``, without prefix tokens.
        """
        maps = []
        x = self.first_map(x)
        height, width = x.shape[1], x.shape[2]
        x = self.as_tokens(x)
        for i, block in enumerate(self.blocks[:stop]):
            x = block(x, height, width)
            if i in taken:
                maps.append(x[:, self.num_prefix_tokens:].unflatten(1, (height, width)))
        return x, maps

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the blocks, without the prefix tokens.

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            indices: Blocks whose maps to return: the last n if an int, all if None.
            norm: Apply the final norm to all maps.
            stop_early: Compute no block after the last one that is asked for.
            output_fmt: "NCHW" or "NLC", of the returned maps.
            intermediates_only: Return these maps only.

        Returns:
            The final features (as :meth:`forward_features`) and the maps, or the latter only.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, maps = self.run_parts(x, take_indices, max_index + 1 if stop_early else len(self.blocks))
        if norm:
            maps = [self.norm(taken) for taken in maps]
        maps = [taken.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else taken.flatten(1, 2)
                for taken in maps]
        return maps if intermediates_only else (self.norm(x), maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, the prefix tokens first: ``[batch, prefix + height * width, num_features]``."""
        x = self.first_map(x)
        height, width = x.shape[1], x.shape[2]
        x = self.as_tokens(x)
        for block in self.blocks:
            x = block(x, height, width)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies tokens of :meth:`forward_features`; ``pre_logits`` stops before the classifier."""
        x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)
