"""Sparse-attention vision backbones in timm: run, train and export them on a current PyTorch.

``import visionattn`` registers the models; ``timm.create_model("biformer_tiny")`` then builds one.
"""
import sys
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["__version__", "models"]


def _runs_the_command(installed: Distribution | None) -> bool:
    """Whether this process is the command ``visionattn`` or ``python -m visionattn``."""
    program = (sys.argv or [""])[0]
    if program == "-m":  # until Python has found the module to run
        return _module_to_run(sys.orig_argv[1:]) == "visionattn"
    if Path(program).stem != "visionattn":
        return False
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        return True
    # Any script may be called so: ours is the one that was installed. (On Windows it is packed into an .exe.)
    scripts = [file for file in (installed and installed.files) or () if file.stem == "visionattn"]
    ours = {Path(str(file.locate())).resolve().with_suffix("") for file in scripts}
    return Path(program).resolve().with_suffix("") in ours


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


_installed: Distribution | None = None
__version__ = "0.0.0"  # of a checkout that is not installed
with suppress(PackageNotFoundError):
    _installed = distribution("visionattn")
    __version__ = _installed.version

# The command imports what it needs itself: --help must not wait for torch.
if not _runs_the_command(_installed):
    from . import models
