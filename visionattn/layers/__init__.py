"""Attention modules, one kind a file."""
from .agent import AgentAttention
from .aggregated import AggregatedAttention, CosineAttention
from .attention_maps import attention_maps
from .auxiliary import AuxiliaryLosses, auxiliary_losses
from .bilevel_routing import BiLevelRoutingAttention, FullAttention
from .cascaded_group import CascadedGroupAttention
from .checkpointing import checkpoint_attention
from .cnn_attention import EfficientLocalAttention, LittleBitAttention, SubspaceAttention, attach_attention
from .combiner import CombinerAttention
from .experts import ExpertAttention, ExpertMlp, TaskRouter, cut_to_task, set_task
from .factorized import FactorizedAttention
from .flow import FlowAttention
from .forward_cross import ForwardCrossAttention
from .gaam import GaussianAdaptiveAttention, gaam
from .gqa import GroupedQueryAttention, group_heads, to_gqa
from .kmeans_routing import KMeansRoutingAttention
from .local_global import LocalGlobalAttention
from .maelre import LongRangeAttention, TokenMerging
from .mixture_of_heads import HeadGates
from .neighborhood import NeighborhoodAttention2d
from .reversed import MessageController, ReversedAttention
from .sparsified import SparsifiedAttention
from .token_pooling import TokenAwarePooling
from .uoe import UnionOfExpertsAttention, UnionOfPerceptrons
from .varied_window import VariedSizeWindowAttention, vary_windows
from .window import WindowAttention

__all__ = [
    "AgentAttention",
    "AggregatedAttention",
    "AuxiliaryLosses",
    "BiLevelRoutingAttention",
    "CascadedGroupAttention",
    "CombinerAttention",
    "CosineAttention",
    "EfficientLocalAttention",
    "ExpertAttention",
    "ExpertMlp",
    "FactorizedAttention",
    "FlowAttention",
    "ForwardCrossAttention",
    "FullAttention",
    "GaussianAdaptiveAttention",
    "GroupedQueryAttention",
    "HeadGates",
    "KMeansRoutingAttention",
    "LittleBitAttention",
    "LocalGlobalAttention",
    "LongRangeAttention",
    "MessageController",
    "NeighborhoodAttention2d",
    "ReversedAttention",
    "SparsifiedAttention",
    "SubspaceAttention",
    "TaskRouter",
    "TokenAwarePooling",
    "TokenMerging",
    "UnionOfExpertsAttention",
    "UnionOfPerceptrons",
    "VariedSizeWindowAttention",
    "WindowAttention",
    "attach_attention",
    "attention_maps",
    "auxiliary_losses",
    "checkpoint_attention",
    "cut_to_task",
    "gaam",
    "group_heads",
    "set_task",
    "to_gqa",
    "vary_windows",
]
