"""Sparse-attention vision backbones in timm: run, train and export them on a current PyTorch.

``import visionattn`` registers the models; ``timm.create_model("biformer_tiny")`` then builds one.
"""
import sys
import sysconfig
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .predictor import Predictor

__all__ = ["Predictor", "__version__", "models", "train"]


def train(folder: str | Path, model: str | None = None, task: str | None = None, **options: Any) -> Any:
    """Trains, tests and exports a model on a folder of data, as the command ``visionattn train`` does.

    Args:
        folder: The data, or COCO's JSON file, or YOLO's ``data.yaml``.
        model: Name of any model of timm's or ours; None for a small one.
        task: ``classification``, ``detection`` or ``segmentation``; None: guessed.
        options: Options of ``visionattn fit``; in their names ``__`` stands for the dot: ``trainer__max_epochs=10``.

    Returns:
        A :class:`visionattn.training.TrainedRun`: run folder, metrics of the test images, best weights, ONNX file, and
        the ``fit`` command that is the same.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds nothing to train on, something in it is wrong, or there is no such model.
    """
    return import_module(f"{__name__}.training").train(folder, model, task, **options)  # with all that it imports


def _runs_the_command() -> bool:
    """Whether this process is the command ``visionattn`` or ``python -m visionattn``."""
    program = (sys.argv or [""])[0]
    if program == "-m":  # until Python has found the module to run
        return _module_to_run(sys.orig_argv[1:]) == "visionattn"
    if Path(program).stem != "visionattn":
        return False
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        return True
    # Any script may be called so: ours lies where this Python's commands are installed.
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    folders = {Path(sysconfig.get_path("scripts", scheme)).resolve() for scheme in schemes}
    return Path(program).parent.resolve() in folders


def _module_to_run(arguments: list[str]) -> str:
    """The name after ``-m`` on Python's command line, where options may share a dash or have a value of their own."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--check-hash-based-pycs":
            next(rest, "")
        elif not argument.startswith("--"):
            for place, option in enumerate(argument[1:], start=2):
                if option in "mXW":
                    value = argument[place:] or next(rest, "")
                    if option == "m":
                        return value
                    break
    return ""


__version__ = "0.0.0"  # of a checkout that is not installed
with suppress(PackageNotFoundError):
    __version__ = version("visionattn")

# The command imports what it needs itself: --help must not wait for torch.
if not _runs_the_command():
    try:
        from . import models
    except ModuleNotFoundError as error:  # exported files run without PyTorch, the models do not
        if (error.name or "").partition(".")[0] not in ("torch", "torchvision", "timm"):
            raise


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for."""
    if name == "Predictor":
        return import_module(f"{__name__}.predictor").Predictor
    if name == "models":
        try:
            return import_module(f"{__name__}.models")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"visionattn's models need the package {error.name}: pip install visionattn", name=error.name) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
