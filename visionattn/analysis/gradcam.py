"""Grad-CAM of any classifier of timm's form, by captum.

"Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (ICCV 2017, arXiv 1610.02391).
"""
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .looks import Look
from .places import token_grid

__all__ = ["captum_grad_cam", "find_grad_cam", "grad_cam", "look_of_cam"]

TITLE = "Grad-CAM"


def grad_cam(model: nn.Module, images: Tensor, labels: int | list[int]) -> Tensor:
    """Where the last map of a model speaks for a class.

    The map is that of the last entry of ``model.feature_info``; of a model that reads a class token it is the one that
    enters the last block, as nothing reads what its other tokens become there.

    Args:
        model: A classifier in eval mode, ours or timm's.
        images: ``[batch, channels, height, width]``.
        labels: Classes, of all images or of each.

    Returns:
        ``[batch, rows, columns]`` of the map, 0 or more.

    Raises:
        ValueError: The model does not say which map is its last, or that is no map.
        ModuleNotFoundError: captum is missing.
    """
    info = [entry for entry in getattr(model, "feature_info", ()) or () if entry.get("module")]
    if not info:
        raise ValueError(f"{type(model).__name__} has no feature_info, which would say where its last map is")
    classes, prefix = info[-1], int(getattr(model, "num_prefix_tokens", 0) or 0)
    if prefix and len(_output(model, classes["module"], images).shape) == 3:
        if len(info) < 2:
            raise ValueError(f"{type(model).__name__} has one block, after which only its class token is read")
        classes = info[-2]
    probe = _Probe(model, model.get_submodule(classes["module"]), classes["num_chs"], images)
    return captum_grad_cam(probe, probe.seen, images, labels)


def captum_grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, labels: int | list[int] | None) -> Tensor:
    """Grad-CAM of the map that ``layer`` gives, channels first.

    Args:
        model: Takes images to scores ``[batch, classes]``, or ``[batch]`` of which there are no labels to choose.
        layer: A part of it.
        images: ``[batch, channels, height, width]``.
        labels: Classes, of all images or of each.

    Returns:
        ``[batch, rows, columns]``, 0 or more.

    Raises:
        ModuleNotFoundError: captum is missing.
    """
    try:
        captum = import_module("captum.attr")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "captum":
            raise
        raise ModuleNotFoundError("Grad-CAM needs the package captum: pip install visionattn[explain]") from None
    with torch.enable_grad():
        found = captum.LayerGradCam(model, layer).attribute(images, labels, relu_attributions=True)
    return found[:, 0].detach()


def find_grad_cam(model: nn.Module, images: Tensor, label: int, name: str) -> Look:
    """The Grad-CAM of one image as a look that depends on no point, or why there is none."""
    try:
        return look_of_cam(grad_cam(model, images, label), images.shape[2:], name)
    except (ValueError, ModuleNotFoundError) as error:
        return Look(TITLE, why=str(error))


def look_of_cam(cam: Tensor, image: Sequence[int], name: str, title: str = TITLE) -> Look:
    """A map ``[1, rows, columns]`` of an image (height, width) as a look, ``name`` being what it speaks for."""
    if not cam.any():
        return Look(title, why=f"nothing in this map speaks for {name}")
    side = 8 if max(image) > 64 else 1  # it is smooth, so that larger cells show it as well
    size = -(-image[0] // side), -(-image[1] // side)
    cells = nn.functional.interpolate(cam[:, None], size=size, mode="bilinear").cpu()
    return Look(title, torch.zeros(1, 0, 0, *size), side=side, fixed=cells[:, 0], fixed_name=f"for {name}")


def _output(model: nn.Module, name: str, images: Tensor) -> Tensor:
    found: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, out: found.append(out))
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    if not found or not isinstance(found[-1], Tensor):
        raise ValueError(f"{name} of {type(model).__name__} returns no tensor")
    return found[-1]


class _Probe(nn.Module):
    """A model whose map at a layer passes, channels first, through the module ``seen``.

    Captum looks at outputs of modules, and takes the second axis for the channels.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, channels: int, images: Tensor):
        super().__init__()
        self.model, self.layer, self.channels = model, layer, channels
        self.seen = nn.Identity()
        self.image = images.shape[2], images.shape[3]

    def forward(self, images: Tensor) -> Tensor:
        handle = self.layer.register_forward_hook(lambda module, inputs, out: self._through(out))
        try:
            return self.model(images)
        finally:
            handle.remove()

    def _through(self, out: Tensor) -> Tensor:
        if out.ndim == 4:
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            if (out.shape[1] == self.channels) != (out.shape[3] == self.channels):
                last = out.shape[3] == self.channels
            if not last:
                return self.seen(out.clone()).clone()  # what follows may write over it
            return self.seen(out.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()
        prefix = int(getattr(self.model, "num_prefix_tokens", 0) or 0)
        grid = token_grid(self.model, self.image, out.shape[1] - prefix) if out.ndim == 3 else None
        if grid is None:
            raise ValueError(f"it is not known where the {out.shape[1]} tokens of {type(self.model).__name__} lie")
        tokens = self.seen(out[:, prefix:].transpose(1, 2).unflatten(2, grid).contiguous())
        return torch.cat([out[:, :prefix], tokens.flatten(2).transpose(1, 2)], dim=1)
