"""Models with trained weights: a training run's checkpoint, of any task, turned into its model again."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..weights import fitting, read_checkpoint
from .adapting import adapt
from .base import Task
from .classification import ClassificationTask, create_classifier
from .detection import DetectionTask
from .incremental import IncrementalTask
from .segmentation import SegmentationTask

__all__ = ["create_model", "load_task"]


def create_model(
        name: str | None,
        checkpoint: str | Path | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
) -> nn.Module:
    """A timm model, with the weights of ``checkpoint`` if one is given; for the checkpoint of a run what it trained.

    That is a timm model too (``ClassificationTask``), a :class:`visionattn.heads.Segmenter` (``SegmentationTask``) or
    one of torchvision's detectors (``DetectionTask``). Nothing is downloaded for it. Its attribute ``run`` holds the
    run's hyper-parameters.

    Args:
        name: Model name; may be None for the checkpoint of a training run, which knows it.
        checkpoint: A training run's ``.ckpt``, the authors' file, or a state dict (``.pth``, ``.safetensors``).
        pretrained: Download the authors' weights (not together with ``checkpoint``).
        num_classes: Classes of the head; None takes the checkpoint's or the model's own.

    Raises:
        ValueError: The file is not a checkpoint, or not one of this model, or its run cannot be rebuilt.
        FileNotFoundError: There is no such file.
    """
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if checkpoint is None:
        if name is None:
            raise ValueError("give the name of a model, or a checkpoint that knows it")
        return timm.create_model(name, pretrained=pretrained, **classes)
    if pretrained:
        raise ValueError("pretrained weights and a checkpoint were both asked for; choose one")
    state_dict, run = read_checkpoint(checkpoint)
    if run is None:
        if name is None:
            raise ValueError(f"{checkpoint} holds weights only; say which model they are of")
        return _from_state_dict(name, checkpoint, classes)
    if name not in (None, run["backbone"]):
        raise ValueError(f"{checkpoint} is of the model {run['backbone']}, not {name}")
    if num_classes not in (None, run["num_classes"]):
        raise ValueError(f"{checkpoint} has {run['num_classes']} classes, not {num_classes}")
    with _rebuilding(checkpoint):
        whole = any(key in run for key in ("detector", "head", "steps"))
        model = _task(run, checkpoint).model if whole else _classifier(run)
    with fitting(run["backbone"], checkpoint):
        model.load_state_dict(state_dict)
    model.run = run
    return model


def load_task(checkpoint: str | Path) -> tuple[Task, dict[str, Any]]:
    """The task of a training run, in eval mode on the CPU, and the run's hyper-parameters.

    Raises:
        ValueError: The file is not the checkpoint of a training run, or its run cannot be rebuilt.
        FileNotFoundError: There is no such file.
    """
    state_dict, run = read_checkpoint(checkpoint)
    if run is None:
        raise ValueError(f"{checkpoint} holds weights only, not the checkpoint of a training run")
    with _rebuilding(checkpoint):
        task = _task(run, checkpoint)
    with fitting(run["backbone"], checkpoint):
        task.model.load_state_dict(state_dict)
    return task.eval(), run


@contextmanager
def _rebuilding(path: str | Path) -> Iterator[None]:
    """Within the context, whatever a run's hyper-parameters break ends in a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(reason if str(path) in reason else f"{path}: its run cannot be rebuilt: {reason}") from error


def _classifier(run: dict[str, Any]) -> nn.Module:
    """The classifier of a run's hyper-parameters, with fresh weights."""
    args = {"num_classes": run["num_classes"], "in_chans": run.get("in_chans", 3)}
    model = create_classifier(
        run["backbone"], False, None, args | (run.get("model_args") or {}), run.get("pooling"))
    adapt(model, run)
    return model


def _task(run: dict[str, Any], path: str | Path) -> Task:
    """The task of a run's hyper-parameters, with fresh weights."""
    if not run["num_classes"]:
        raise ValueError(f"{path} is a pretrained backbone, which has no classes: start a training from it "
                         "(checkpoint_path)")
    args = {key: value for key, value in run.items() if not key.startswith("_")}  # what is not the task's begins so
    args |= {"pretrained": False, "checkpoint_path": None}
    kinds = {"detector": DetectionTask, "head": SegmentationTask, "steps": IncrementalTask}
    kind = next((kind for key, kind in kinds.items() if key in run), ClassificationTask)
    try:
        return kind(**args)
    except TypeError as error:
        raise ValueError(f"{path} is not of this version of visionattn: {error}") from None


def _from_state_dict(name: str, path: str | Path, classes: dict[str, Any]) -> nn.Module:
    # In the overlay too: timm drops a file's head when the configured number of classes is another one.
    overlay = {"file": str(path), "custom_load": False} | classes
    with fitting(name, path):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **classes)
