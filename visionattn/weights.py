"""Checkpoints read from files, a training run's, the authors' or plain state dicts, and their models found by name.

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
from lightning.pytorch.utilities import rank_zero_info
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from . import models  # noqa: F401  (registers the zoo in timm)
from .models._builder import allow_options

__all__ = ["check_name", "check_unadapted", "classes_of", "fitting", "imagenet_names", "read_checkpoint", "sized_args",
           "timm_model"]


def check_name(name: str) -> None:
    """Raises a ValueError that names similar models if timm has none called ``name``."""
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"there is no model {name!r}" + (f"; similar names: {', '.join(close)}" if close else ""))


def check_unadapted(path: str | Path, run: dict[str, Any]) -> None:
    """Raises a ValueError where the weights of a run, by its hyper-parameters, are those of a backbone with an adapter.

    A training does not start from them: without the adapter they are another model's.
    """
    if run.get("steps"):
        raise ValueError(f"{path} is of a class-incremental run, whose weights are in adapters: start from what it "
                         "started from")
    if run.get("adapter"):
        raise ValueError(f"{path} is of a run with the adapter {run['adapter']}: start from the weights that the run "
                         "started from, or from those that visionattn adapters merge makes of it")


def classes_of(name: str, state_dict: dict[str, Tensor]) -> int | None:
    """Classes of the head in a state dict of the model ``name``, timm's or its authors'; None if none is found."""
    classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None)
    heads = (state_dict.get(f"{key}.weight") for key in (classifier, "head", "head.fc", "fc", "classifier"))
    return next((len(head) for head in heads if head is not None and head.ndim > 1), None)


def timm_model(name: str, drop_path_rate: float | None = None, **args: Any) -> Any:
    """``timm.create_model`` with a ValueError of one line for arguments that the model does not have.

    ``drop_path_rate``, which recipes set for whatever model, is left out with one line where a model has none.
    """
    depth = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    try:
        return timm.create_model(name, **args | depth)
    except TypeError as error:
        if depth and "'drop_path_rate'" in str(error):
            rank_zero_info(f"{name} has no stochastic depth: drop_path_rate ({drop_path_rate}) is left out.")
            return timm_model(name, **args)
        raise ValueError(f"{name} does not take these model_args: {error}") from error


def sized_args(name: str, image_size: int, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of a model for images of this size: with ``img_size`` where it has tables for one."""
    args = args or {}
    try:
        with torch.device("meta"):
            timm.create_model(name, **args, img_size=image_size)
    except TypeError:  # takes images of any size
        return args
    return args | {"img_size": image_size}


def imagenet_names(model: Any) -> list[str]:
    """Names of the classes of a model that has ImageNet's, by timm's tables; of others nothing."""
    classes = getattr(model, "num_classes", 0)
    if not classes or classes != getattr(model, "pretrained_cfg", {}).get("num_classes"):
        return []
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [info.index_to_description(label) for label in range(classes)]


@contextmanager
def fitting(name: str, path: str | Path) -> Iterator[None]:
    """Within the context, weights of another model end in a ValueError of one line that names the file ``path``."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).splitlines()
        line = lines[0] if len(lines) == 1 else f"checkpoint {path} is not of the model {name}"
        raise ValueError(line if str(path) in line else f"{path}: {line}") from None


def read_checkpoint(path: str | Path, joint: bool = False) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Reads a checkpoint file.

    Args:
        path: The file.
        joint: Take that of a training of several tasks too, whose weights are those of all of them.

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
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            allow_options()
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"checkpoint {path} pickles objects that are not weights; it was not opened") from None
    except Exception as error:  # whatever a damaged file makes a reader raise
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}, not weights")
    run = content.get("hyper_parameters")
    if isinstance(run, dict) and isinstance(run.get("_tasks"), dict):
        if not joint:
            raise ValueError(f"{path} is of several tasks at once: take the run of one, which their test leaves "
                             f"({', '.join(str(path.parent.parent / task) for task in run['_tasks'])})")
        return _tensors(content.get("state_dict"), f"{path}, the checkpoint of a training run,"), run
    if isinstance(run, dict) and {"backbone", "num_classes"} <= run.keys():
        return _of_run(content, run, path), run
    for wrapper in ("state_dict_ema", "state_dict", "model"):  # the averaged weights go first, as in timm
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return _tensors(content, f"checkpoint {path}"), None


def _of_run(content: dict[str, Any], run: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of the module that a run of ours trained."""
    what = f"{path}, the checkpoint of a training run,"
    for key, kind in {"backbone": str, "num_classes": int}.items():
        if not isinstance(run[key], kind):
            raise ValueError(f"{what} is damaged: {key} of its hyper_parameters must be of the type "
                             f"{kind.__name__}, got {run[key]!r}")
    prefix = "model."
    weights = _tensors(content.get("state_dict"), what)
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not weights:
        raise ValueError(f"{what} holds no weights of a model (entries of state_dict called {prefix}...)")
    return weights


def _tensors(state_dict: Any, what: str) -> dict[str, Tensor]:
    """The state dict as it is, after a look at its kind; ``what`` names its source."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"{what} holds no weights")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{what} holds no weights: a state dict has names with tensors, "
                             f"here is {key!r} with a {type(value).__name__}")
    return state_dict
