"""The backbones. Importing this package registers them in timm."""
if __name__ == "models":
    raise ImportError("the folder models is a link to visionattn/models: import visionattn.models instead")

from . import biformer, dinat_s, isotropic, nat

__all__ = ["biformer", "dinat_s", "isotropic", "nat"]
