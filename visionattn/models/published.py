"""What the authors of the models published about them: the figures that ``visionattn list`` and the tests go by."""
from typing import NamedTuple

__all__ = ["PUBLISHED", "Published"]


class Published(NamedTuple):
    """Figures of a model at its own image size."""

    top1: float  # per cent of ImageNet-1k's validation images, single crop
    gmacs: float  # the papers' "FLOPs", 10^9: multiplications with additions counted as one


# Models without an entry were never trained on ImageNet-1k by anybody but their user, or have 22k's classes.
PUBLISHED = {name: Published(*figures) for name, figures in {
    # BiFormer, arXiv 2303.08810, and the table of its repository
    "biformer_tiny": (81.4, 2.2), "biformer_small": (83.8, 4.5), "biformer_base": (84.3, 9.8),
    "biformer_stl": (82.7, 4.6), "biformer_stl_nchw": (82.7, 4.6),
    # NAT, arXiv 2204.07143
    "nat_mini": (81.8, 2.7), "nat_tiny": (83.2, 4.3), "nat_small": (83.7, 7.8), "nat_base": (84.3, 13.7),
    # DiNAT, DiNAT_s and isotropic models, arXiv 2209.15001; the large ones were pre-trained on ImageNet-22k
    "dinat_mini": (81.8, 2.7), "dinat_tiny": (82.7, 4.3), "dinat_small": (83.8, 7.8), "dinat_base": (84.4, 13.7),
    "dinat_large": (86.6, 30.6), "dinat_large_384": (87.4, 89.7), "dinat_large_384_11x11": (87.5, 92.4),
    "dinat_s_tiny": (81.8, 4.5), "dinat_s_small": (83.5, 8.7), "dinat_s_base": (83.8, 15.4),
    "dinat_s_large": (86.5, 34.5), "dinat_s_large_384": (87.4, 101.5),
    "nat_iso_small": (80.0, 4.3), "dinat_iso_small": (80.8, 4.3), "vitrpb_small": (81.2, 4.6),
    "nat_iso_base": (81.6, 16.9), "dinat_iso_base": (82.1, 16.9), "vitrpb_base": (82.5, 17.5),
    # EfficientViT (MSRA), arXiv 2305.07027, and the table of its repository
    "efficientvit_cga_m0": (63.2, 0.079), "efficientvit_cga_m1": (68.4, 0.167), "efficientvit_cga_m2": (70.8, 0.201),
    "efficientvit_cga_m3": (73.4, 0.263), "efficientvit_cga_m4": (74.3, 0.299), "efficientvit_cga_m5": (77.1, 0.522),
    # Agent Attention, arXiv 2312.08874, and the table of its repository
    "agent_deit_t": (74.9, 1.2), "agent_deit_s": (80.5, 4.4), "agent_deit_s_448": (83.1, 17.7),
    "agent_deit_b": (82.0, 17.6),
    "agent_pvt_t": (78.4, 2.0), "agent_pvt_s": (82.2, 4.0), "agent_pvt_m": (83.4, 7.0), "agent_pvt_m_256": (83.8, 9.2),
    "agent_pvt_l": (83.7, 10.4),
    "agent_swin_t": (82.6, 4.5), "agent_swin_s": (83.7, 8.7), "agent_swin_s_288": (84.1, 14.6),
    "agent_swin_b": (84.0, 15.4), "agent_swin_b_384": (84.9, 46.3),
    "agent_cswin_t": (83.1, 4.3), "agent_cswin_s": (83.9, 6.8), "agent_cswin_b": (84.7, 14.9),
    "agent_cswin_b_384": (85.8, 46.3),
}.items()}
