"""The kernel layer: pure functions on tensors, each with a naive form that defines it and faster backends."""
from . import dispatch
from .agent import agent_attention, pool_agents
from .dispatch import BackendError, explain, use_backend
from .kept import held_bytes, release_memory
from .kmeans import kmeans_attention
from .neighborhood import neighborhood_attention
from .routed import routed_attention

__all__ = [
    "BackendError", "agent_attention", "explain", "held_bytes", "kmeans_attention", "neighborhood_attention",
    "pool_agents", "release_memory", "routed_attention", "use_backend",
]

dispatch.read_environment()
