"""The command ``visionattn``. What a command needs is imported when it runs, so that ``--help`` is immediate."""
import argparse
import os
import sys
from importlib import import_module
from typing import NamedTuple

from . import __version__

__all__ = ["main"]


class _Command(NamedTuple):
    module: str  # its main(argv) runs the command
    help: str
    named: bool = False  # whether argv begins with the command's name


_COMMANDS = {
    "train": _Command("visionattn.training", "train on a folder with nothing to configure: FOLDER [--model NAME]"),
    "fit": _Command("visionattn.tasks.run", "train a model and test it: --config RECIPE [--KEY VALUE ...]", named=True),
    "validate": _Command("visionattn.tasks.run", "measure a run on its validation images: RUN [DATA]", named=True),
    "test": _Command("visionattn.tasks.run", "measure a run on its test images: RUN [DATA]", named=True),
    "predict": _Command("visionattn.predict", "predict on any images: RUN IMAGE|FOLDER ...; tables, JSON, pictures"),
    "run": _Command("visionattn.runtime.command", "predict with an exported file, without PyTorch: FILE.onnx IMAGE"),
    "embed": _Command("visionattn.embed", "write the features that a model pools of images: RUN|MODEL|FILE IMAGE"),
    "probe": _Command("visionattn.probe", "train heads on a frozen model's features: --model NAME --data FOLDER"),
    "explain": _Command("visionattn.analysis.explain", "show where a model looks in an image: RUN|MODEL IMAGE; a page"),
    "adapters": _Command("visionattn.adapter_command", "list the adapters that fit trains, show or merge one of a run"),
    "recipes": _Command("visionattn.recipes", "list the recipes that fit takes by name, or print one to edit"),
    "analyze": _Command("visionattn.analysis.analyze", "measure every head of attention of a model: RUN|MODEL DATA"),
    "compare": _Command("visionattn.compare", "show runs side by side: a table, and a picture of their curves"),
    "check-data": _Command("visionattn.data.check", "check a folder of data without training: table, faults, pictures"),
    "export": _Command("visionattn.export", "write a model as an ONNX file and check it"),
    "bench": _Command("visionattn.bench", "time the ops beside their peers, exported models, a run's data", named=True),
    "backends": _Command("visionattn.bench", "show which implementation of each op runs here, and why not", named=True),
    "list": _Command("visionattn.listing", "show the models: size, cost, accuracy and where their weights are"),
    "demo": _Command("visionattn.demo", "train, test and look at a small net: classification, detection, segmentation"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit code.

    What a user can do something about (``ValueError``, ``OSError``, ``RuntimeError`` and the errors of the
    configuration) ends in one line on stderr; ``VISIONATTN_TRACEBACK=1`` shows where it came from.

    Args:
        argv: The command and its options; those of the process if None.

    Returns:
        0, 1 for an error, 2 for a wrong command line or configuration, 130 (or 143) after an interrupt.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    try:
        if command in ("-h", "--help"):
            print(_help())
            return 0
        if command == "--version":
            print(f"visionattn {__version__}")
            return 0
        if command not in _COMMANDS:
            return _fail(f"unknown command {command!r}; known: {', '.join(_COMMANDS)}", code=2)
        module = import_module(_COMMANDS[command].module)
        return module.main(argv if _COMMANDS[command].named else rest) or 0
    except BrokenPipeError:  # the reader of our output has gone, as in `visionattn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        line, code = stop.args if len(stop.args) == 2 else ("interrupted", 130)
        print(f"visionattn: {line}", file=sys.stderr)
        return code
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError, argparse.ArgumentError))
        expected |= type(error).__name__ == "MisconfigurationException"  # Lightning's, which is not imported here
        if not expected or os.environ.get("VISIONATTN_TRACEBACK"):
            raise
        from .runtime.say import one_line

        return _fail(one_line(error), code=2 if isinstance(error, argparse.ArgumentError) else 1)


def _help() -> str:
    lines = "\n".join(f"  {name:<12}{command.help}" for name, command in _COMMANDS.items())
    return (f"usage: visionattn COMMAND [OPTIONS]\n\nSparse-attention vision backbones: train, test, export.\n\n"
            f"commands:\n{lines}\n\noptions:\n  --help    of a command too: visionattn fit --help\n  --version\n\n"
            "An error is one line; VISIONATTN_TRACEBACK=1 in the environment shows where it came from.")


def _fail(message: str, code: int) -> int:
    print(f"visionattn: error: {message}", file=sys.stderr)
    return code

