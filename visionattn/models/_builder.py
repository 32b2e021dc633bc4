"""How every family of the zoo builds a model: timm's builder, with loading errors that fit on one line."""
import argparse
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

__all__ = ["CheckpointError", "allow_options", "build_model", "cfg"]

StateDict = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """Pretrained weights that cannot be fetched, cannot be read or are not this model's; the message is one line."""


def cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """A timm pretrained cfg with this zoo's defaults: ImageNet-1k at 224 px, bicubic, a classifier called ``head``."""
    return dict(
        url=url, num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, classifier="head",
    ) | kwargs


def build_model(
        cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool = False,
        *,
        pretrained_filter_fn: Callable[[StateDict, Any], StateDict],
        feature_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
) -> Any:
    """Builds a model as ``timm.models.build_model_with_cfg`` does.

    Args:
        cls: The model's class.
        variant: Registered name.
        pretrained: Load the weights that the pretrained cfg names.
        pretrained_filter_fn: Takes a state dict with the authors' names or with ours, and the model; returns ours.
        feature_cfg: Options of ``features_only``; by default four levels through ``forward_intermediates``.
        kwargs: Arguments of timm's builder and of ``cls``.

    Raises:
        CheckpointError: The pretrained weights cannot be fetched or read, or belong to another model.
    """
    features_only = kwargs.get("features_only", False)
    model: Any = None
    reading = False  # between the end of the constructor and the first sight of the state dict

    def construct(**model_args: Any) -> nn.Module:
        nonlocal model, reading
        model = cls(**model_args)
        reading = pretrained
        return model

    def rename_and_check(state_dict: Any, model: nn.Module) -> StateDict:
        nonlocal reading
        reading = False
        renamed = pretrained_filter_fn(_tensors(state_dict, variant), model)
        _check_fit(renamed, model, variant, features_only)
        return renamed

    if pretrained:
        allow_options()
    try:
        return build_model_with_cfg(
            construct, variant, pretrained,
            pretrained_filter_fn=rename_and_check,
            feature_cfg=feature_cfg or dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **kwargs | dict(cache_dir=_cache_dir(variant, **kwargs)),
        )
    except Exception as error:
        if model is None or not reading or not (message := _reading_error(error, variant, model.pretrained_cfg)):
            raise
        raise CheckpointError(message) from None


def allow_options() -> None:
    """Lets ``torch.load(weights_only=True)`` take the options that authors save beside tensors, in the whole process.

    These are argparse's namespaces and yacs's nodes; the latter come out as dicts, without a look at yacs. To be called
    before each reading: others' ``torch.serialization.safe_globals`` may end what is allowed.
    """
    torch.serialization.add_safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")])


def _cache_dir(
        variant: str,
        cache_dir: str | None = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict | None = None,
        **_: Any,
) -> str | None:
    """A folder of its own for a download whose URL does not end in a file name, as torch.hub files by that name."""
    url = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).url
    if cache_dir is None and isinstance(url, str) and url and not PurePosixPath(urlparse(url).path).suffix:
        return os.path.join(torch.hub.get_dir(), "checkpoints", variant)
    return cache_dir


def _reading_error(error: Exception, variant: str, cfg: dict[str, Any]) -> str | None:
    """One line for an exception that came while timm fetched or read a checkpoint; None if there is none to read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    file, remote = cfg.get("file"), cfg.get("hf_hub_id") or cfg.get("url")
    if file:
        if not os.path.exists(file):
            return f"{variant}: there is no checkpoint {file!r}"
        return f"{variant}: {file!r} cannot be read as a checkpoint of tensors ({reason})"
    if remote:
        return (f"{variant}: cannot get weights from {remote} ({reason}); if you have the file, pass it: "
                f"timm.create_model({variant!r}, pretrained=True, pretrained_cfg_overlay=dict(file='PATH'))")
    return None


def _tensors(state_dict: Any, variant: str) -> StateDict:
    """Unwraps ``{"model": ...}`` and ``{"state_dict": ...}``; averaged weights beside them go first, as in timm."""
    for key in ("state_dict_ema", "model", "state_dict"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if not isinstance(state_dict, dict) or not state_dict or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()):
        raise CheckpointError(f"{variant}: the checkpoint holds no state dict (names with tensors)")
    return state_dict


def _check_fit(state_dict: StateDict, model: Any, variant: str, features_only: bool) -> None:
    """Complains about every entry that timm will not adapt itself (classifier, input channels) and cannot load."""
    cfg, wanted = model.pretrained_cfg, model.state_dict()
    free = _weights(cfg.get("classifier")) if features_only or model.num_classes != cfg.get("num_classes") else ()
    adapted = [name for name in _weights(cfg.get("first_conv"))
               if name in wanted and wanted[name].ndim == 4 and wanted[name].shape[1] != cfg["input_size"][0]]

    def shape(name: str, x: Tensor) -> list[int]:
        return [*x.shape[:1], *x.shape[2:]] if name in adapted else list(x.shape)

    # Batch norm starts its own counter where a checkpoint has none.
    missing = [name for name in wanted if name not in state_dict and name not in free
               and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in state_dict if name not in wanted and name not in free]
    misshapen = [f"{name}, {list(x.shape)} for {list(wanted[name].shape)}" for name, x in state_dict.items()
                 if name in wanted and name not in free and shape(name, x) != shape(name, wanted[name])]
    faults = [f"{len(names)} {what} (first: {names[0]})" for names, what in
              ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape")) if names]
    if faults:
        source = cfg.get("file") or cfg.get("hf_hub_id") or cfg.get("url")
        source = "the state dict" if cfg.get("state_dict") else source
        raise CheckpointError(f"{variant}: {source} is a checkpoint of another model: entries {', '.join(faults)}")


def _weights(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the tensors of the layers ``names``."""
    layers = (names,) if isinstance(names, str) else names or ()
    return tuple(f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias"))
