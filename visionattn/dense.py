"""Backbones for detection and segmentation: the maps of a model's stages, with what its authors change for them.

For dense tasks the authors of the zoo's families take other windows, dilations or grids than for classification, with
the same weights (each family's ``dense_args``), and some put a norm on each map that they hand to the heads.
"""
import re
import sys
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Literal

import timm
from lightning.pytorch.utilities import rank_zero_info
from timm.layers import LayerNorm2d
from timm.layers.halo_attn import HaloAttn
from timm.models import FeatureInfo, adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .models import DenseNorm, Family, family_of
from .weights import check_name, check_unadapted, fitting, read_checkpoint, timm_model

__all__ = ["DenseBackbone", "backbone_of", "dense_backbone_of"]

# Modules of timm whose authors' dense backbones put a norm on each map that they return; ours say it themselves.
_TIMM_NORMS = dict.fromkeys(
    ("timm.models.swin_transformer", "timm.models.swin_transformer_v2"), DenseNorm("norm", 1e-5))


class DenseBackbone(nn.Module):
    """Stage maps of any model that is registered in timm, ours included, for images of any size.

    The lists ``channels`` and ``reductions`` (strides on the image, in pixels) describe the maps. ``model`` is the timm
    model without what the maps do not need; ``norms`` are the norms on the maps, by level, where the model's authors
    have such: they act on what is returned, not on what the next stage takes.

    Args:
        name: Model name.
        task: ``"detection"`` or ``"segmentation"``: whose settings to take.
        pretrained: Load the published classification weights.
        checkpoint_path: Load this file: classification weights, the backbone or the whole detector or segmenter of
            the model's authors, or the checkpoint of a training run of ours, of any task.
        out_indices: Levels to return, in timm's numbering; None for the last of each resolution from stride 4 on.
        frozen_stages: Number of stages, from the first, that are not trained, the stem with them. They are in eval
            mode for good.
        frozen_norms: Batch norms keep their running statistics in training; their scales are trained.
        model_args: Arguments of the model; they go before the task's settings.

    Raises:
        ValueError: There is no such model or level, an argument does not fit, or the weights are another model's.
        FileNotFoundError: There is no such checkpoint.
    """

    def __init__(
            self,
            name: str,
            task: Literal["detection", "segmentation"],
            pretrained: bool = False,
            checkpoint_path: str | None = None,
            out_indices: list[int] | None = None,
            frozen_stages: int = 0,
            frozen_norms: bool = False,
            model_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        if pretrained and checkpoint_path:
            raise ValueError("pretrained and checkpoint_path were both given; choose one to start from")
        self.name, self.frozen_norms = name, frozen_norms
        family = _family(name)
        settings = family.dense_settings(name, task)
        args = settings | (model_args or {})
        self.in_chans = args.get("in_chans", 3)
        self.model, self.any_size, self.whole_patches = _create(name, pretrained, args)

        stages = _stages(self.model)
        self.level_norm = family.dense_norm
        self.norms = nn.ModuleDict()
        self.patch = stages[0]["reduction"]
        blocks = [module.block_size for module in self.model.modules() if isinstance(module, HaloAttn)]
        if blocks:  # HaloNet's maps must be whole blocks
            self.whole_patches, self.patch = True, max(blocks) * stages[-1]["reduction"]
        state_dict = None if checkpoint_path is None else self._read(checkpoint_path, family)
        known = set(self.model.state_dict())
        self._select([info["index"] for info in stages] if out_indices is None else sorted(out_indices))
        if state_dict is not None:
            self._load(state_dict, known, str(checkpoint_path))
        for layer in self.first_stages(frozen_stages):
            for parameter in layer:
                parameter.requires_grad_(False)
        self.frozen = _until(self.model, stages[frozen_stages - 1]["module"]) if frozen_stages else []
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images ``[B, C, H, W]`` to maps ``[B, channels, H / reduction, W / reduction]``, rounded.

        Images for timm's transformers and HaloNets are padded to whole patches or blocks with zeros at the bottom and
        the right.
        """
        height, width = x.shape[2:]
        x = self.padded(x)
        try:
            maps = self.model.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
        except (AssertionError, RuntimeError) as error:
            if self.any_size:
                raise
            raise ValueError(
                f"{self.name} cannot take images of {x.shape[2]} x {x.shape[3]} ({error}): it is built for one size; "
                "give that as img_size in model_args, or take another model") from error
        if self.whole_patches:
            maps = [x[..., :-(-height // reduction), :-(-width // reduction)]
                    for x, reduction in zip(maps, self.reductions, strict=True)]
        if self.norms:
            maps = [self.norms[str(level)](x) for level, x in zip(self.out_indices, maps, strict=True)]
        return maps

    def padded(self, x: Tensor) -> Tensor:
        """Normalised images as the timm model is given them: padded where it needs whole patches or blocks."""
        if not self.whole_patches:
            return x
        return F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the channels of images in [0, 1]: the model's, or 0.5 if they are not 3."""
        config: Any = self.model.pretrained_cfg
        if self.in_chans == 3:
            return list(config["mean"]), list(config["std"])
        return [0.5] * self.in_chans, [0.5] * self.in_chans

    def first_stages(self, count: int) -> list[list[nn.Parameter]]:
        """Parameters of each of the first ``count`` stages, the stem's with those of the first.

        Raises:
            ValueError: The model has fewer stages.
        """
        stages = _stages(self.model)
        if not 0 <= count <= len(stages):
            raise ValueError(f"{self.name} has {len(stages)} stages, frozen_stages is {count}")
        layers: list[list[nn.Parameter]] = []
        seen: set[nn.Parameter] = set()
        for stage in stages[:count]:
            found = list(self.model.parameters(recurse=False))  # position embeddings
            found += [parameter for module in _until(self.model, stage["module"]) for parameter in module.parameters()]
            layers.append([parameter for parameter in dict.fromkeys(found) if parameter not in seen])
            seen.update(found)
        return layers

    def keep(self, reductions: Collection[int]) -> None:
        """Drops the maps of other reductions than these, and what only they need."""
        self._select([level for level, reduction in zip(self.out_indices, self.reductions, strict=True)
                      if reduction in reductions])

    def train(self, mode: bool = True) -> "DenseBackbone":
        """Sets the mode of what is not frozen."""
        super().train(mode)
        for module in self.frozen if mode else ():
            module.eval()
        if mode and self.frozen_norms:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _select(self, levels: list[int]) -> None:
        """Makes ``levels`` the maps that are returned."""
        infos = self.model.feature_info
        if not levels or not all(0 <= level < len(infos) for level in levels):
            raise ValueError(f"{self.name} has levels 0 to {len(infos) - 1}, out_indices are {levels}")
        info = FeatureInfo(infos, tuple(levels))
        self.out_indices, self.channels, self.reductions = levels, list(info.channels()), list(info.reduction())
        if self.level_norm:
            weight = next(self.model.parameters())
            self.norms = nn.ModuleDict({
                str(level): self.norms[str(level)] if str(level) in self.norms else _level_norm(
                    self.level_norm, level, channels, device=weight.device, dtype=weight.dtype)
                for level, channels in zip(levels, self.channels, strict=True)})
            if self.level_norm.widths is not None:
                self.channels = [self.level_norm.widths[level] for level in levels]
        self.model.prune_intermediate_layers(levels, prune_norm=True, prune_head=True)
        head = getattr(self.model, "head", None)
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):  # older timm leaves ConvNeXt's norm
            self.model.head = nn.Identity()

    def _read(self, path: str, family: Family) -> dict[str, Tensor]:
        """The entries of a checkpoint by our names: those of the model, and those of the norms as ``norms.<level>``."""
        content, run = read_checkpoint(path)
        if run is not None and run["backbone"] != self.name:
            raise ValueError(f"{path} is of the model {run['backbone']}, not {self.name}")
        if run is not None:
            check_unadapted(path, run)
        for prefix in ("backbone.", "body."):  # of a whole detector, the authors' or ours
            inner = {key.removeprefix(prefix): x for key, x in content.items() if key.startswith(prefix)}
            content = inner or content
        norms, weights = {}, {}
        for key, x in content.items():
            ours = _level_norm_key(self.level_norm, key)
            if ours is not None:
                norms[ours] = x
            elif key.startswith("norms."):
                norms[key] = x
            else:
                weights[key.removeprefix("model.")] = x
        with fitting(self.name, path):
            weights = family.checkpoint_filter_fn(weights, self.model)
        return norms | {f"model.{key}": x for key, x in weights.items()}

    def _load(self, state_dict: dict[str, Tensor], known: set[str], path: str) -> None:
        """Loads what is wanted of a checkpoint whose other entries must be ``known`` to the whole model."""
        wanted = self.state_dict()
        config: Any = self.model.pretrained_cfg
        first = config.get("first_conv") or ()
        for name in [first] if isinstance(first, str) else first:  # of weights for other channels, as timm does it
            key = f"model.{name}.weight"
            if {key} <= wanted.keys() & state_dict.keys() and state_dict[key].shape[1] == 3 != wanted[key].shape[1]:
                state_dict[key] = adapt_input_conv(self.in_chans, state_dict[key])
        if not any(key.startswith("norms.") for key in state_dict):
            state_dict |= {key: x for key, x in wanted.items() if key.startswith("norms.")}
        missing = [key for key in wanted if key not in state_dict and not key.endswith(".num_batches_tracked")]
        unexpected = [key for key in state_dict if key.startswith("model.") and key.removeprefix("model.") not in known]
        misshapen = [f"{key}, {list(state_dict[key].shape)} for {list(x.shape)}" for key, x in wanted.items()
                     if key in state_dict and state_dict[key].shape != x.shape]
        fresh = [key for key in missing if key.startswith("norms.")]
        if fresh:  # a run of ours on other levels has not the norms of these
            rank_zero_info(f"{path} has not all norms of the maps: {', '.join(fresh)} start anew")
            missing = [key for key in missing if key not in fresh]
        faults = [f"{len(keys)} {what} (first: {keys[0].removeprefix('model.')})" for keys, what in
                  ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape")) if keys]
        if faults:
            raise ValueError(f"{path} is not a checkpoint of {self.name}: entries {', '.join(faults)}")
        self.load_state_dict({key: x for key, x in state_dict.items() if key in wanted}, strict=False)


def backbone_of(model: nn.Module) -> Any:
    """The timm model in a segmenter or a detector; others are one themselves."""
    found = dense_backbone_of(model)
    return model if found is None else found.model


def dense_backbone_of(model: nn.Module) -> DenseBackbone | None:
    """The backbone of a segmenter or a detector; None in other models."""
    return next((module for module in model.modules() if isinstance(module, DenseBackbone)), None)


def _level_norm(kind: DenseNorm, level: int, channels: int, **dd: Any) -> nn.Module:
    """What the authors put on the map of a level."""
    if kind.widths is None:
        return LayerNorm2d(channels, eps=kind.eps, **dd)
    width = kind.widths[level]
    return nn.Sequential(OrderedDict(
        proj=nn.Conv2d(channels, width, 1, bias=False, **dd), norm=LayerNorm2d(width, eps=kind.eps, **dd)))


def _level_norm_key(kind: DenseNorm | None, key: str) -> str | None:
    """Our name of an entry of the authors' that is of what they put on a map; None for others."""
    if kind is None:
        return None
    parts = {kind.prefix: ""} if kind.widths is None else {kind.prefix: "norm.", kind.projection: "proj."}
    match = re.fullmatch(rf"({'|'.join(map(re.escape, parts))})(\d+)\.(.+)", key)
    return f"norms.{match[2]}.{parts[match[1]]}{match[3]}" if match else None


def _family(name: str) -> Family:
    """The family of a model; what we know of timm's for those that have none."""
    check_name(name)
    module = sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]
    known = dict(checkpoint_filter_fn=module.checkpoint_filter_fn) if hasattr(module, "checkpoint_filter_fn") else {}
    return family_of(name) or Family(small={}, dense_norm=_TIMM_NORMS.get(module.__name__), **known)


def _create(name: str, pretrained: bool, args: dict[str, Any]) -> tuple[Any, bool, bool]:
    """The model, whether it takes images of any size, and whether these must be cut into whole patches."""
    cfg = timm.get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size
    # What timm's Swin and vision transformers call it to take images of any size; the older Swin takes both names, and
    # heeds one.
    for option in ({"strict_img_size": False}, {"dynamic_img_size": True}) if fixed else ():
        try:
            return timm_model(name, pretrained=pretrained, **option | args), True, True
        except ValueError as error:
            if not isinstance(error.__cause__, TypeError) or next(iter(option)) not in str(error.__cause__):
                raise
    model = timm_model(name, pretrained=pretrained, **args)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} gives no maps of its stages (it has no forward_intermediates)")
    return model, not fixed, False


def _stages(model: Any) -> list[dict[str, Any]]:
    """The last level of each resolution from stride 4 on; of models of finer maps alone, that of the coarsest."""
    infos = FeatureInfo(model.feature_info, tuple(range(len(model.feature_info)))).get_dicts()
    last = {info["reduction"]: dict(info, index=index) for index, info in enumerate(infos)}
    return [info for reduction, info in last.items() if reduction >= 4] or [last[max(last)]]


def _until(model: nn.Module, last: str) -> list[nn.Module]:
    """The modules of ``model`` up to the end of the one called ``last``, without those that contain it."""
    modules, reached = [], False
    for name, module in model.named_modules():
        inside = f"{name}.".startswith(f"{last}.")
        if reached and not inside:
            break
        reached |= inside
        if inside or (name and not f"{last}.".startswith(f"{name}.")):
            modules.append(module)
    return modules
