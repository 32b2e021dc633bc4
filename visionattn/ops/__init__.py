"""The kernel layer: pure functions on tensors, each with a naive form that defines it and faster backends."""
from . import dispatch
from .dispatch import BackendError, explain, use_backend
from .neighborhood import neighborhood_attention
from .routed import routed_attention

__all__ = ["BackendError", "explain", "neighborhood_attention", "routed_attention", "use_backend"]

dispatch.read_environment()
