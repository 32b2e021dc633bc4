"""Routed attention by the project's Triton kernels, imported when they first run."""
from torch import Tensor

from .. import triton_support

__all__ = ["run", "supports"]


def supports(problem) -> tuple[bool, str]:
    """Whether the kernels can do the problem, and why not."""
    if problem.has_route_weights:
        return False, "the triton kernels take no route weights"
    return triton_support.supports(problem)


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        region_size: tuple[int, int],
        key_region_size: tuple[int, int],
        scale: float,
        route_weights: None,
) -> Tensor:
    """The public function with every argument explicit."""
    from .triton_kernels import attention

    return attention(q, k, v, routes, region_size, key_region_size, scale)
