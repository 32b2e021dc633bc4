"""Sparse-attention vision backbones in timm: run, train and export them on a current PyTorch.

``import visionattn`` registers the models; ``timm.create_model("biformer_tiny")`` then builds one.
"""
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["__version__", "models"]

try:
    __version__ = version("visionattn")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

# The commands `visionattn` and `python -m visionattn` import what they need themselves: --help must not wait for torch.
# (Until Python has found the module to run, argv begins with "-m".)
_program = (sys.argv or [""])[0]
_command = "-m visionattn" in " ".join(sys.orig_argv) if _program == "-m" else Path(_program).stem == "visionattn"
if not _command:
    from . import models
