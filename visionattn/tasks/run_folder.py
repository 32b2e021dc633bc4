"""Run folders: where a run lies, also after it was moved or copied."""
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from ..data.report import say

__all__ = ["Moved", "moved_run", "relocated", "with_run_folders"]


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
    """``value``, a configuration or a part of it, with the run's paths as they are now."""
    if isinstance(value, str) and (value == moved.before or value.startswith(moved.before.rstrip("/") + "/")):
        return str(moved.now) + value[len(moved.before.rstrip("/")):]
    if isinstance(value, list):
        return [relocated(item, moved) for item in value]
    if isinstance(value, (dict, Namespace)):
        for key in list(value.keys()):
            value[key] = relocated(value[key], moved)
    return value
