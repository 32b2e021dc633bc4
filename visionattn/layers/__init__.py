"""Attention modules, one kind a file."""
from .agent import AgentAttention
from .auxiliary import AuxiliaryLosses, auxiliary_losses
from .bilevel_routing import BiLevelRoutingAttention, FullAttention
from .cascaded_group import CascadedGroupAttention
from .kmeans_routing import KMeansRoutingAttention
from .neighborhood import NeighborhoodAttention2d

__all__ = [
    "AgentAttention",
    "AuxiliaryLosses",
    "BiLevelRoutingAttention",
    "CascadedGroupAttention",
    "FullAttention",
    "KMeansRoutingAttention",
    "NeighborhoodAttention2d",
    "auxiliary_losses",
]
