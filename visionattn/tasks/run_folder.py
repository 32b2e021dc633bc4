"""Run folders: where a run and its checkpoints lie, also after it was moved or copied."""
import inspect
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from .. import data
from ..data.classification import normalisation
from ..data.digits import MEAN, STD
from ..runtime.pixels import Decoding
from ..runtime.say import say

__all__ = ["Moved", "Run", "find_run", "moved_run", "new_run_folder", "relocated", "with_run", "with_run_folders"]

_SETTINGS = ("image_size", "interpolation", "crop_pct", "mean", "std", "short_side", "max_size")  # of data modules
_NEW = "VISIONATTN_NEW_RUN"  # where a process leaves the name for those that Lightning starts for other devices


def new_run_folder() -> str:
    """``runs/<date and time>``, the same in all processes of a run.

    Raises:
        ValueError: The processes were started by somebody else and cannot agree on a time.
    """
    apart = "TORCHELASTIC_RUN_ID" in os.environ or "VISIONATTN_RAY" in os.environ
    if apart or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError("processes that torchrun, srun or Ray started cannot name a run by the time: give them all "
                         "the same --trainer.default_root_dir")
    if os.environ.get("LOCAL_RANK", "0") == "0" or _NEW not in os.environ:
        os.environ[_NEW] = f"runs/{time.strftime('%Y-%m-%d-%H%M%S')}"
    return os.environ[_NEW]


class Moved(NamedTuple):
    """A run folder that was moved or copied, by the paths in its configuration and of its configuration."""

    before: str
    now: Path


def moved_run(file: Path) -> Moved | None:
    """Where the run of a configuration lies if ``file`` is a run's own ``config.yaml`` and not where it was written."""
    run = file.parent
    if file.name != "config.yaml" or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("# lightning.pytorch=="):  # as Lightning marks what it saves
        return None
    try:
        trainer = yaml.safe_load(text)["trainer"]
        before, logged_here = trainer["default_root_dir"], trainer["logger"] in (None, True)
    except (yaml.YAMLError, KeyError, TypeError):  # the parser will say what is wrong
        return None
    if not ((run / "checkpoints").is_dir() or (logged_here and (run / "metrics.csv").is_file())):
        return None
    if not isinstance(before, str) or run.resolve().is_relative_to(Path(before).resolve()):
        return None
    return Moved(before, run)


def with_run(argv: list[str]) -> list[str]:
    """The arguments where ``test RUN [DATA] ...`` (or ``validate``) stands for the run's configuration and checkpoint.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: A checkpoint has no configuration beside it.
    """
    command, *rest = argv
    if command not in ("test", "validate") or not rest or rest[0].startswith("-"):
        return argv
    run, rest = find_run(rest[0]), rest[1:]
    if run.folder is None:
        raise ValueError(f"{run.checkpoint} has no config.yaml of its run beside it, which says how to {command}")
    arguments = ["--config", str(run.folder / "config.yaml"), "--trainer.default_root_dir", str(run.folder),
                 "--ckpt_path", str(run.checkpoint)]
    if rest and not rest[0].startswith("-"):
        arguments += ["--data.init_args.root", rest.pop(0)]
    return [command, *arguments, *rest]


def with_run_folders(argv: list[str]) -> list[str]:
    """The arguments where a run's own configuration means the folder that it lies in, wherever the run was before."""
    arguments = []
    for index, argument in enumerate(argv):
        arguments.append(argument)
        if index and argv[index - 1] in ("--config", "-c"):
            moved = moved_run(Path(argument))
        else:
            moved = moved_run(Path(argument.partition("=")[2])) if argument.startswith("--config=") else None
        if moved:
            say(f"The run of {moved.now / 'config.yaml'} was at {moved.before} and is taken where it is now.")
            arguments += ["--trainer.default_root_dir", str(moved.now)]
    return arguments


def relocated(value: Any, moved: Moved) -> Any:
    """``value``, a configuration, the state of a callback or a part of them, with the run's paths as they are now."""
    if isinstance(value, str) and (value == moved.before or value.startswith(moved.before.rstrip("/") + "/")):
        return str(moved.now) + value[len(moved.before.rstrip("/")):]
    if isinstance(value, list):
        return [relocated(item, moved) for item in value]
    if isinstance(value, dict):
        return {relocated(key, moved): relocated(item, moved) for key, item in value.items()}
    if isinstance(value, Namespace):
        for key in list(value.keys()):
            value[key] = relocated(value[key], moved)
    return value


class Run(NamedTuple):
    """A trained model on disk.

    Attributes:
        checkpoint: The file with the weights.
        folder: The run folder, in which ``config.yaml`` is; None for a checkpoint alone.
    """

    checkpoint: Path
    folder: Path | None

    def image_settings(self) -> dict[str, Any]:
        """How files become the images of the run, from its configuration: for checkpoints that do not say it.

        Raises:
            ValueError: There is no configuration, or its data are not of this package.
        """
        text = (self.folder / "config.yaml").read_text(encoding="utf-8") if self.folder else "{}"
        section = (yaml.safe_load(text) or {}).get("data") or {}
        module = getattr(data, str(section.get("class_path")).rpartition(".")[2], None)
        if module is None:
            raise ValueError(f"{self.checkpoint} does not say how its images are made, as it is of an earlier version "
                             "or of other data: lay the config.yaml of its run beside it, with data of this package")
        known = {name: parameter.default for name, parameter in inspect.signature(module).parameters.items()}
        known |= section.get("init_args") or {}
        settings = {name: known[name] for name in _SETTINGS if name in known}
        if module is data.DigitsData:
            chans = known["in_chans"]
            return settings | dict(interpolation="bicubic", crop_pct=1.0, mean=[MEAN] * chans, std=[STD] * chans,
                                   decoding={"channels": chans})
        chans = known.get("in_chans", 3)
        if "mean" in settings:
            settings["mean"], settings["std"] = normalisation(settings["mean"], settings["std"], chans)
        return settings | {"decoding": {name: known[name] for name in Decoding._fields if name in known} | {
            "channels": chans}}


def find_run(path: str | Path) -> Run:
    """The best checkpoint of a run folder (the last, where there is no best one), or the run of a checkpoint.

    Raises:
        FileNotFoundError: There is no such folder, checkpoint, or checkpoint in the folder.
    """
    path = Path(path)
    if path.is_dir():
        kept = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        found = next((file for file in kept if file.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path} is not the folder of a training run: it has no checkpoints/best.ckpt")
        return Run(found, path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no run folder or checkpoint {path}")
    near = (path.parent.parent, path.parent) if path.parent.name == "checkpoints" else (path.parent,)
    return Run(path, next((folder for folder in near if (folder / "config.yaml").is_file()), None))
