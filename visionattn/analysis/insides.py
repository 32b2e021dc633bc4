"""What layers of some kinds choose inside: agents, clusters and windows of their own."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import AgentAttention, KMeansRoutingAttention, VariedSizeWindowAttention, varied_window
from .by_layer import LayerAttention
from .looks import Look, look_at
from .places import cell_boxes, token_places

__all__ = ["Clusters", "find_agents", "find_clusters", "find_windows", "inputs_of"]

_KINDS = (AgentAttention, KMeansRoutingAttention, VariedSizeWindowAttention)


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[dict[nn.Module, tuple[Any, ...]]]:
    """Within the context, keeps what the layers that can be looked into are given."""
    found: dict[nn.Module, tuple[Any, ...]] = {}
    hooks = [module.register_forward_pre_hook(lambda module, args: found.update({module: args}))
             for module in model.modules() if isinstance(module, _KINDS)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def find_agents(layer: LayerAttention, inputs: tuple[Any, ...]) -> list[Look]:
    """The two softmaxes of agent attention: what each agent gathers, and which agents each token reads.

    An agent is the mean of the queries of a cell of the map, and is shown there.
    """
    module, places, image = layer.module, token_places(layer), layer.image
    x, *size = inputs
    height, width = size[0] if size else x.shape[1:3]
    pixels = float(places.keys[0, -1, 2] - places.keys[0, -1, 0])
    cells = cell_boxes((height, width), module.agent_grid)[None] * pixels
    with torch.no_grad():
        gathered, read = module.agent_maps(*inputs)
    return [
        look_at(f"{layer.name}: what agents gather", gathered, places._replace(queries=cells, prefix=0), image),
        look_at(f"{layer.name}: agents that are read", read, places._replace(keys=cells, others=""), image)]


class Clusters(NamedTuple):
    """The clusters of k-means routing.

    Attributes:
        owner: The first cluster that takes a token as a query, ``[heads, rows, columns]``; -1 where none does.
        look: The tokens that share a cluster with a query, as queries.
    """

    owner: Tensor
    look: Look


def find_clusters(layer: LayerAttention, inputs: tuple[Any, ...]) -> Clusters:
    """In which cluster each token of a map is."""
    module, places, (x,) = layer.module, token_places(layer), inputs
    with torch.no_grad():
        taken = module.clusters(x)[0][0].cpu()  # [heads, clusters, tokens of a cluster]
    tokens = x.shape[1] * x.shape[2]
    member = torch.zeros(*taken.shape[:2], tokens + 1)
    member.scatter_(2, taken.where(taken >= 0, tokens), 1)  # an empty place is a token more
    member = member[..., :tokens]
    owner = torch.where(member.any(dim=1), member.argmax(dim=1), -1).unflatten(1, x.shape[1:3])
    shared = (member.transpose(1, 2) @ member > 0).float()
    return Clusters(owner, look_at(f"{layer.name}: clusters", shared[None], places, layer.image))


def find_windows(layer: LayerAttention, inputs: tuple[Any, ...], look: Look) -> Look:
    """The look with the window of varied size that the keys of each query are sampled from, for each head."""
    module, (x,) = layer.module, inputs
    with torch.no_grad():
        windows = module.windows(x)[0].float().cpu()  # [rows, columns, heads, 4]
    before = varied_window._padding((x.shape[1], x.shape[2]), module.window_size, module.rules == "vitae_dense")[0]
    pixels = float(look.rows[0, 1] - look.rows[0, 0])
    row, column = (
        ((edges[:, 0] / pixels).round().long() + first) // side
        for edges, first, side in zip((look.rows, look.columns), before, module.window_size, strict=True))
    return look._replace(windows=windows[row][:, column].permute(2, 0, 1, 3) * pixels)
