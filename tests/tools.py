"""The project's tools, as modules: they are run as scripts, each of which finds the others beside it."""
import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load_tool"]

TOOLS = Path(__file__).parent.parent / "tools"


def load_tool(name: str) -> ModuleType:
    """The module of ``tools/<name>.py``."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)
