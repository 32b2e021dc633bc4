"""The backbones, a family a file. Importing this package registers them in timm."""
if __name__ == "models":
    raise ImportError("the folder models is a link to visionattn/models: import visionattn.models instead")

import pkgutil
from importlib import import_module

from ._family import DenseNorm, Family, Peer, Published, families, family_of

# The modules of the families, whose number grows: every file here that has no leading underscore.
__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

for _name in __all__:
    import_module(f"{__name__}.{_name}")
