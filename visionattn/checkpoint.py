"""Models with trained weights: from a training run's checkpoint, the authors' file or a plain state dict.

Nothing here unpickles more than tensors, plain containers and options (argparse's namespaces, yacs's nodes).
"""
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import models  # noqa: F401  (registers the zoo in timm)
from .models._builder import tensors_only

__all__ = ["check_name", "create_model", "fitting", "read_checkpoint", "timm_model"]


def create_model(
        name: str | None,
        checkpoint: str | Path | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
) -> nn.Module:
    """A timm model, with the weights of ``checkpoint`` if one is given; for the checkpoint of a run what it trained.

    That is a timm model too (``ClassificationTask``), a :class:`visionattn.heads.Segmenter` (``SegmentationTask``) or
    one of torchvision's detectors (``DetectionTask``). Nothing is downloaded for it.

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
    if "detector" in run or "head" in run:
        model = _dense_model(run, checkpoint)
    else:
        model = timm.create_model(
            run["backbone"], num_classes=run["num_classes"], in_chans=run.get("in_chans", 3),
            **run.get("model_args") or {})
    with fitting(run["backbone"], checkpoint):
        model.load_state_dict(state_dict)
    return model


def check_name(name: str) -> None:
    """Raises a ValueError that names similar models if timm has none called ``name``."""
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"there is no model {name!r}" + (f"; similar names: {', '.join(close)}" if close else ""))


def timm_model(name: str, **args: Any) -> Any:
    """``timm.create_model`` with a ValueError of one line for arguments that the model does not have."""
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise ValueError(f"{name} does not take these model_args: {error}") from error


@contextmanager
def fitting(name: str, path: str | Path) -> Iterator[None]:
    """Within the context, weights of another model end in a ValueError of one line that names the file ``path``."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).splitlines()
        line = lines[0] if len(lines) == 1 else f"checkpoint {path} is not of the model {name}"
        raise ValueError(line if str(path) in line else f"{path}: {line}") from None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Reads a checkpoint file.

    Returns:
        The weights (of a run: of the module that it trained), and the hyper-parameters of the run (None if it is not
        a run's checkpoint).

    Raises:
        ValueError: The file is damaged, holds no weights, or pickles anything but tensors and plain containers.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path), None
        with tensors_only():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"checkpoint {path} pickles objects that are not weights; it was not opened") from None
    except (RuntimeError, EOFError, OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}, not weights")
    run = content.get("hyper_parameters")
    if isinstance(run, dict) and {"backbone", "num_classes"} <= run.keys():
        prefix = "model."
        weights = {key[len(prefix):]: value for key, value in content["state_dict"].items() if key.startswith(prefix)}
        return weights, run
    for wrapper in ("state_dict_ema", "state_dict", "model"):  # the averaged weights go first, as in timm
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not content:
        raise ValueError(f"checkpoint {path} holds no weights")
    return content, None


def _dense_model(run: dict[str, Any], path: str | Path) -> nn.Module:
    """The detector or segmenter of a run's hyper-parameters, with fresh weights."""
    from .tasks import DetectionTask, SegmentationTask  # here, because they import this module

    args = {key: value for key, value in run.items() if not key.startswith("_")}  # what LightningCLI adds begins so
    args |= {"pretrained": False, "checkpoint_path": None}
    try:
        task = DetectionTask(**args) if "detector" in run else SegmentationTask(**args)
    except TypeError as error:
        raise ValueError(f"{path} is not of this version of visionattn: {error}") from None
    return task.model


def _from_state_dict(name: str, path: str | Path, classes: dict[str, Any]) -> nn.Module:
    # In the overlay too: timm drops a file's head when the configured number of classes is another one.
    overlay = {"file": str(path), "custom_load": False} | classes
    with fitting(name, path):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **classes)
