"""What an exported file says of itself: how it wants its images, what its answers mean, where its weights come from."""
import hashlib
import math
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..dense import backbone_of
from ..heads import Segmenter
from ..heads.detector import DETECTORS
from ..weights import imagenet_names

__all__ = ["describe", "facts", "is_detector", "resize_rule", "weights_sha256"]


def facts(model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The metadata of a model's file, as plain values (docs/export.md lists them), without the sum of its weights.

    Args:
        model: A timm model, a :class:`visionattn.heads.Segmenter` or one of torchvision's detectors; of a training
            run its attribute ``run`` holds the hyper-parameters.
        shape: Of the images, ``[..., channels, height, width]``.
    """
    run: dict[str, Any] = getattr(model, "run", {})
    config = getattr(backbone_of(model), "pretrained_cfg", {})
    channels, size = shape[-3], list(shape[-2:])
    found: dict[str, Any] = {
        "producer": f"visionattn {__version__}",
        "task": _task(model),
        "model": run.get("backbone") or config.get("architecture") or type(model).__name__,
        "license": config.get("license") or "",
        "image_size": size,
        "channels": channels,
    }
    if channels == 3:
        found["channel_order"] = "RGB"
    settings: dict[str, Any] = run.get("_image_settings") or {}
    if found["task"] in ("segmentation", "detection"):  # normalisation is part of the graph
        found |= {"mean": [0.] * channels, "std": [1.] * channels}
    else:
        mean, std = (config.get(key) or [value] for key, value in (("mean", 0.), ("std", 1.)))
        found |= {"mean": run.get("_mean", list(mean)), "std": run.get("_std", list(std))}
    found["resize"] = resize_rule(model, found["task"], size, settings, config)
    if settings.get("decoding"):
        found["decoding"] = settings["decoding"]
    names = _class_names(model, run, found["task"])
    if names:
        found["class_names"] = names
    if run.get("multi_label"):
        found |= {"multi_label": True, "thresholds": run.get("_thresholds")}
    if found["task"] == "detection":
        found |= _selection(model)
        if "picture_score" in run:
            found["picture_score"] = run["picture_score"]
        if run.get("_category_ids"):
            found["category_ids"] = list(run["_category_ids"])
    return found


def describe(found: dict[str, Any]) -> dict[str, str]:
    """A line in words about each input and output that a file with the metadata ``found`` may have, by its name.

    Feature maps are ``map``, without their number.
    """
    order = "RGB" if found.get("channel_order") else f"of {found['channels']} channels"
    order += ", uint8, channels last" if found.get("layout") else ", channels first"
    values = "" if found.get("layout") else ", values in [0, 1]"
    names = "in the order of class_names" if found.get("class_names") else "by their numbers"
    if found["task"] == "detection":
        return {
            "image": f"one image, {order}{values}; normalised and resized inside",
            "boxes": "x1, y1, x2, y2 of each object in pixels of the image, best first",
            "labels": f"classes of the objects from 1 on, {names}",
            "scores": f"confidence of the objects, from {found['score_threshold']:g} to 1",
            "masks": "probability that a pixel of the image belongs to the object",
        }
    if found["task"] == "segmentation":
        return {
            "images": f"images, {order}{values}; normalised inside",
            "logits": f"of each pixel, classes {names}: the largest is the pixel's class, softmax makes probabilities",
        }
    said = {"images": f"images, {order}{values} less mean, divided by std"}
    if found.get("layout"):
        said = {"images": f"images, {order}; resized, cropped and normalised inside"}
    if found["task"] == "features":
        return said | {"map": "a feature map, the finest first", "logits": "what the model without a classifier gives"}
    meaning = "sigmoid makes probabilities, a class is present from its threshold on" if found.get("multi_label") else (
        "softmax makes probabilities")
    return said | {"logits": f"classes {names}: {meaning}"}


def resize_rule(
        model: Any, task: str, size: list[int], settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """How images of other sizes are brought to a model's, as validation does it: ``resize`` of the metadata.

    Args:
        model: Of detection the detector, which resizes itself; of other tasks it is not looked at.
        task: As the metadata have it.
        size: Height and width of a classifier's images.
        settings: A run's image settings; empty of a published model.
        config: A published model's ``pretrained_cfg``.
    """
    if task == "detection":
        transform = model.transform
        return {"inside": True, "shorter_side": transform.min_size[-1], "longest_side": transform.max_size}
    if task == "segmentation":
        wanted = {"shorter_side": settings.get("short_side"), "longest_side": settings.get("max_size")}
        return {"interpolation": "bilinear"} | {key: value for key, value in wanted.items() if value}
    rule = settings or config
    within = [math.floor(side / (rule.get("crop_pct") or 1.)) for side in size]
    said = {"interpolation": rule.get("interpolation") or "bicubic", "centre_crop": size}
    if not settings and config.get("crop_mode") == "squash":
        return said | {"sides": within}
    return said | {"shorter_side": min(within)}


def is_detector(model: nn.Module) -> bool:
    """Whether it is one of torchvision's detectors."""
    return isinstance(model, tuple(DETECTORS.values()))


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's weights in float32: of the names and bytes of its state dict, in the order of the names.

    Two models with equal weights have the same, whatever file the weights came from.
    """
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        x = x.detach().cpu().flatten()
        x = x.float() if x.is_floating_point() else x
        digest.update(x.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _task(model: Any) -> str:
    if isinstance(model, Segmenter):
        return "segmentation"
    if is_detector(model):
        return "detection"
    return "classification" if getattr(model, "num_classes", 0) else "features"


def _class_names(model: Any, run: dict[str, Any], task: str) -> list[str]:
    """A run's own names, ImageNet's of a published model, or the numbers of a detector's labels."""
    if run.get("class_names"):
        return list(run["class_names"])
    if run and task == "detection":
        return [str(label) for label in range(1, 1 + run["num_classes"])]
    return [] if run or task != "classification" else imagenet_names(model)


def _selection(detector: Any) -> dict[str, Any]:
    """Which detections a detector keeps."""
    holder = getattr(detector, "roi_heads", detector)
    return {"score_threshold": float(holder.score_thresh), "nms_threshold": float(holder.nms_thresh),
            "most_detections": int(holder.detections_per_img)}
