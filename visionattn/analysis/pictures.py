"""Pictures of what a model attends to."""
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..dense import backbone_of
from ..layers import BiLevelRoutingAttention, ReversedAttention, attention_maps

__all__ = ["Routes", "Trees", "draw_routes", "draw_trees", "find_routes", "find_trees"]


class Routes(NamedTuple):
    """The routes of one layer on a batch of images, in pixels.

    Attributes:
        table: Routed regions of every region, best first, numbered row by row ``[batch, regions, topk]``.
        grid: Rows and columns of regions.
        region: Height and width of a region in pixels.
    """

    table: Tensor
    grid: tuple[int, int]
    region: tuple[float, float]


def find_routes(model: nn.Module, images: Tensor, layer: int = -1) -> Routes:
    """Runs ``model`` on ``images [batch, channels, height, width]`` and returns the routes that one layer took.

    Args:
        model: A model with bi-level routing attention; it runs in eval mode and is put back as it was.
        images: As the model takes them.
        layer: Which of the model's routing layers, counted from the first; negative from the last.

    Raises:
        ValueError: The model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, BiLevelRoutingAttention)]
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"the model has {len(layers)} layers of bi-level routing attention, there is no layer {layer}")
    seen: list[Tensor] = []
    hook = layers[layer].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(images)
            table, tokens = layers[layer].route(seen[0])
    finally:
        hook.remove()
        model.train(training)
    stride = images.shape[2] / seen[0].shape[1], images.shape[3] / seen[0].shape[2]
    columns = -(-seen[0].shape[2] // tokens[1])
    columns = max(columns, layers[layer].n_win) if layers[layer].pad == "input" else columns
    return Routes(
        table[:, 0], (table.shape[2] // columns, columns), (tokens[0] * stride[0], tokens[1] * stride[1]))


class Trees(NamedTuple):
    """A tree of dependencies of the patches of each of some images.

    Attributes:
        parents: Parent of every patch, numbered row by row, ``[batch, patches]``; the root is its own.
        mass: What every patch sends to its parent, over all layers looked at, ``[batch, patches]``; 0 for the root.
        grid: Rows and columns of patches.
        patch: Height and width of a patch in pixels.
    """

    parents: Tensor
    mass: Tensor
    grid: tuple[int, int]
    patch: tuple[float, float]


def find_trees(model: nn.Module, images: Tensor) -> Trees:
    """Runs ``model`` on ``images [batch, channels, height, width]`` and reads from its messages who depends on whom.

    What a patch sends to another is summed over heads and layers. The root is the patch that receives most. From there
    a tree grows, by the patch that sends most to one that is in it already: so every patch reaches the root, though its
    parent need not be the one that it sends most to. Layers after tokens were pruned are left out.

    Args:
        model: A DependencyViT, also as a dense backbone; it runs in eval mode and is put back as it was.
        images: As the model takes them.

    Raises:
        ValueError: The model has no reversed attention.
    """
    if not any(isinstance(module, ReversedAttention) for module in model.modules()):
        raise ValueError("the model has no reversed attention, from whose messages a tree is read")
    sizes: list[torch.Size] = []
    embed: Any = backbone_of(model).patch_embed
    hook = embed.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[1:3]))
    training = model.training
    try:
        with torch.no_grad(), attention_maps(model) as maps:
            model.eval()(images)
    finally:
        hook.remove()
        model.train(training)
    rows, columns = sizes[0]
    whole = [received.sum(dim=1) for received in maps if received.shape[2] == rows * columns]
    grown = [_grow_tree(sent) for sent in torch.stack(whole).sum(dim=0).transpose(1, 2).cpu()]
    parents, mass = (torch.stack(found) for found in zip(*grown, strict=True))
    return Trees(parents, mass, (rows, columns), (images.shape[2] / rows, images.shape[3] / columns))


def _grow_tree(sent: Tensor) -> tuple[Tensor, Tensor]:
    """Parents and the mass sent to them, of what patches send to each other ``[patches, patches]``, senders first."""
    sent = sent.clone().fill_diagonal_(0)
    root = int(sent.sum(dim=0).argmax())
    parents, mass = torch.full((len(sent),), root), sent[:, root].clone()
    outside = torch.ones(len(sent), dtype=torch.bool)
    outside[root] = False
    for _ in range(len(sent) - 1):
        child = int(mass.masked_fill(~outside, -1).argmax())
        outside[child] = False
        better = outside & (sent[:, child] > mass)
        parents[better], mass[better] = child, sent[better, child]
    mass[root] = 0
    return parents, mass


def draw_trees(
        model: nn.Module,
        images: Tensor,
        path: str | Path,
        titles: Sequence[str],
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
) -> None:
    """Draws each image with the tree that :func:`find_trees` reads from it, and writes the picture to ``path``.

    A line goes from every patch to its parent, the thicker the more patches hang on it, of one colour for each subtree
    of the root. The root has a ring.

    Args:
        model: A DependencyViT.
        images: ``[batch, channels, height, width]`` with 1 or 3 channels, as the model takes them.
        path: Picture file; its ending says the format.
        titles: A line over each image.
        mean: Mean that was subtracted from the images, one for all channels or one for each.
        std: Standard deviation that they were divided by.

    Raises:
        ValueError: The model has no reversed attention.
    """
    trees = find_trees(model, images)
    figure, panels = _panels(images, titles, mean, std)
    figure.suptitle("ring: the root; lines: from patches to their parents, a colour for each subtree", fontsize=10)
    for number, (axes, _) in enumerate(panels):
        parents = trees.parents[number].tolist()
        root = next(patch for patch, parent in enumerate(parents) if patch == parent)
        paths = [_ancestors(parents, patch) for patch in range(len(parents))]  # from the patch to the root
        subtrees = [child for child, parent in enumerate(parents) if parent == root and child != root]
        hanging = Counter(chain.from_iterable(paths))  # patches of the subtree of each, itself among them
        places = [((patch % trees.grid[1] + 0.5) * trees.patch[1] - 0.5, (patch // trees.grid[1] + 0.5)
                   * trees.patch[0] - 0.5) for patch in range(len(parents))]
        for child, parent in enumerate(parents):
            if child != root:
                colour = f"C{subtrees.index(paths[child][-2]) % 10}"
                axes.plot(*zip(places[child], places[parent], strict=True), color=colour,
                          linewidth=0.8 + 0.5 * hanging[child] ** 0.5, marker="o", markersize=1.5)
        axes.plot(*places[root], marker="o", markersize=12, markerfacecolor="none", markeredgecolor="red",
                  markeredgewidth=2.5)
    _save(figure, path)


def _ancestors(parents: Sequence[int], patch: int) -> list[int]:
    """A patch, its parent and so on, up to the root."""
    found = [patch]
    while parents[found[-1]] != found[-1]:
        found.append(parents[found[-1]])
    return found


def draw_routes(
        model: nn.Module,
        images: Tensor,
        path: str | Path,
        titles: Sequence[str],
        layer: int = -1,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
) -> None:
    """Draws each image with the regions that one of its regions was routed to, and writes the picture to ``path``.

    The query region is the one whose pixels vary most; it has a dashed frame. The regions it attends to are tinted,
    the best one strongest; a region may attend to itself.

    Args:
        model: A model with bi-level routing attention.
        images: ``[batch, channels, height, width]`` with 1 or 3 channels, as the model takes them.
        path: Picture file; its ending says the format.
        titles: A line over each image.
        layer: Which of the model's routing layers.
        mean: Mean that was subtracted from the images, one for all channels or one for each.
        std: Standard deviation that they were divided by.

    Raises:
        ValueError: The model has no such layer.
    """
    routes = find_routes(model, images, layer)
    (rows, columns), (height, width) = routes.grid, routes.region
    figure, panels = _panels(images, titles, mean, std)
    figure.suptitle("dashed: a query region; tinted: the regions it attends to, the best one most", fontsize=10)
    for number, (axes, image) in enumerate(panels):
        query = max(range(rows * columns), key=lambda region: _contrast(image, divmod(region, columns), routes.region))
        topk = routes.table.shape[2]
        for rank, region in enumerate(routes.table[number, query].tolist()):
            corner = region % columns * width - 0.5, region // columns * height - 0.5
            axes.add_patch(Rectangle(corner, width, height, facecolor="tab:orange", edgecolor="tab:orange",
                                     alpha=0.6 - 0.35 * rank / topk))
        corner = query % columns * width - 0.5, query // columns * height - 0.5
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="deepskyblue", linewidth=2.5,
                                 linestyle="--"))
        axes.set_xlim(-0.5, max(image.shape[1], columns * width) - 0.5)
        axes.set_ylim(max(image.shape[0], rows * height) - 0.5, -0.5)
    _save(figure, path)


def _panels(
        images: Tensor, titles: Sequence[str], mean: float | Sequence[float], std: float | Sequence[float],
) -> tuple[Figure, list[tuple[Any, Tensor]]]:
    """A figure with a grey panel for each image, and the panels with the images ``[height, width, channels]``."""
    pixels = images.cpu() * torch.as_tensor(std).view(-1, 1, 1) + torch.as_tensor(mean).view(-1, 1, 1)
    pixels = pixels.clamp(0, 1).permute(0, 2, 3, 1)
    across = min(len(images), 4)
    down = -(-len(images) // across)
    figure = Figure(figsize=(2.6 * across, 2.9 * down + 0.5), layout="constrained")
    panels = []
    for number, (image, title) in enumerate(zip(pixels, titles, strict=True)):
        axes = figure.add_subplot(down, across, number + 1)
        axes.imshow(image.mean(dim=-1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        panels.append((axes, image))
    return figure, panels


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _contrast(image: Tensor, place: tuple[int, int], region: tuple[float, float]) -> float:
    top, left = round(place[0] * region[0]), round(place[1] * region[1])
    patch = image[top:top + max(round(region[0]), 1), left:left + max(round(region[1]), 1)]
    return patch.std(correction=0).item() if patch.numel() else 0.0
