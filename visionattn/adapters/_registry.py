"""The adapters by their names: each is a file of this room whose ``adapter`` is its class."""
import pkgutil
from importlib import import_module
from pathlib import Path

from ._adapter import Adapter

__all__ = ["adapter_class", "names"]


def names() -> list[str]:
    """Names of all adapters."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def adapter_class(name: str) -> type[Adapter]:
    """The class of an adapter.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in names():
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(names())}")
    return import_module(f"{__package__}.{name}").adapter
