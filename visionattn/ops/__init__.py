"""The kernel layer: pure functions on tensors, each with a naive form that defines it and faster backends."""
from . import dispatch
from .agent import AgentProblem, agent_attention, pool_agents
from .aggregated import AggregatedProblem, aggregated_attention
from .case import Case
from .combiner import CombinerProblem, combiner_attention
from .dispatch import BackendError, cases, explain, use_backend
from .factorized import FactorizedProblem, factorized_attention, merge_tiles
from .flow import FlowProblem, flow_attention
from .kept import held_bytes, release_memory
from .kmeans import KMeansProblem, kmeans_attention
from .neighborhood import NeighborhoodProblem, neighborhood_attention
from .reversed import ReversedProblem, reversed_attention
from .routed import RoutedProblem, routed_attention
from .sparsified import SparsifiedProblem, sparsified_attention
from .varied_window import VariedWindowProblem, varied_window_attention

__all__ = [
    "AgentProblem", "AggregatedProblem", "BackendError", "Case", "CombinerProblem", "FactorizedProblem", "FlowProblem",
    "KMeansProblem", "NeighborhoodProblem", "ReversedProblem", "RoutedProblem", "SparsifiedProblem",
    "VariedWindowProblem", "agent_attention", "aggregated_attention", "cases", "combiner_attention", "explain",
    "factorized_attention", "flow_attention", "held_bytes", "kmeans_attention", "merge_tiles", "neighborhood_attention",
    "pool_agents", "release_memory", "reversed_attention", "routed_attention", "sparsified_attention", "use_backend",
    "varied_window_attention",
]

dispatch.read_environment()
