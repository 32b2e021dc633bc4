"""The backbones. Importing this package registers them in timm."""
if __name__ == "models":
    raise ImportError("the folder models is a link to visionattn/models: import visionattn.models instead")

from . import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    dinat_s,
    efficientvit_cga,
    isotropic,
    nat,
    routing_vit,
)

__all__ = [
    "agent_cswin", "agent_deit", "agent_pvt", "agent_swin", "biformer", "dinat_s", "efficientvit_cga", "isotropic",
    "nat", "routing_vit",
]
