"""Attention modules, one kind a file."""
from .bilevel_routing import BiLevelRoutingAttention, FullAttention
from .neighborhood import NeighborhoodAttention2d

__all__ = ["BiLevelRoutingAttention", "FullAttention", "NeighborhoodAttention2d"]
