"""Pictures of what a model attends to."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from .layers import BiLevelRoutingAttention

__all__ = ["Routes", "draw_routes", "find_routes"]


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
    pixels = images.cpu() * torch.as_tensor(std).view(-1, 1, 1) + torch.as_tensor(mean).view(-1, 1, 1)
    pixels = pixels.clamp(0, 1).permute(0, 2, 3, 1)
    panels_across = min(len(images), 4)
    panels_down = -(-len(images) // panels_across)
    figure = Figure(figsize=(2.6 * panels_across, 2.9 * panels_down + 0.5), layout="constrained")
    figure.suptitle("dashed: a query region; tinted: the regions it attends to, the best one most", fontsize=10)
    for number, (image, title) in enumerate(zip(pixels, titles, strict=True)):
        axes = figure.add_subplot(panels_down, panels_across, number + 1)
        axes.imshow(image.mean(dim=-1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _contrast(image: Tensor, place: tuple[int, int], region: tuple[float, float]) -> float:
    top, left = round(place[0] * region[0]), round(place[1] * region[1])
    patch = image[top:top + max(round(region[0]), 1), left:left + max(round(region[1]), 1)]
    return patch.std(correction=0).item() if patch.numel() else 0.0
