"""``visionattn explain MODEL|RUN IMAGE``: where a model looks, as pictures and as a page in which the pointer asks."""
import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import (
    AgentAttention,
    BiLevelRoutingAttention,
    KMeansRoutingAttention,
    ReversedAttention,
    VariedSizeWindowAttention,
)
from ..predictor import Predictor
from ..runtime.say import say
from ..runtime.sources import Item, items_of, opened
from .by_layer import LayerAttention, recorded_by_layer
from .explain_page import Explained, write_explanation
from .gradcam import find_grad_cam
from .insides import find_agents, find_clusters, find_windows, inputs_of
from .looks import Look, choose_layers, look_of
from .panels import draw_clusters, draw_look
from .pictures import draw_routes, draw_trees
from .rollout import find_rollout
from .subject import add_model, model_of

__all__ = ["explain", "main"]


def main(argv: list[str]) -> int:
    """Runs ``visionattn explain``."""
    parser = argparse.ArgumentParser(
        prog="visionattn explain", description="Shows where a classifier looks in an image: pictures, and a page in "
        "which the pointer chooses the query. docs/looking.md has more.")
    add_model(parser)
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("--beside", metavar="MODEL", help="a second model, which the pointer moves too")
    parser.add_argument("--layers", choices=["last", "all"], default="last", help=(
        "the last of each stage, or all (default: last)"))
    parser.add_argument("--out", default="explain", metavar="FOLDER", help="for what is written (default: explain)")
    args = parser.parse_args(argv)
    _one_image(args.image)  # before models are loaded
    models = [(args.model, Predictor(args.model, args.device, checkpoint=args.checkpoint))]
    if args.beside is not None:
        models.append((args.beside, Predictor(args.beside, args.device)))
    page = explain(models, args.image, args.out, every=args.layers == "all")
    say(f"Open {page} in a browser; pictures are beside it.")
    return 0


def explain(
        models: Sequence[tuple[str, Predictor]], image: str | Path, out: str | Path, every: bool = False) -> Path:
    """Writes pictures and a page of where models look in an image.

    Args:
        models: Names and predictors of one classifier, or several side by side.
        image: An image file.
        out: Folder, which is made.
        every: Show all layers, in place of the last of each stage.

    Returns:
        The page, ``explain.html``. Pictures are beside it; of several models each has a folder.

    Raises:
        ValueError: A model is no classifier in PyTorch, or the image cannot be used.
        FileNotFoundError: There is no such image.
    """
    item, shown = _one_image(image), []
    for number, (name, predictor) in enumerate(models):
        try:
            picture = opened(item, predictor.decoding)
        except ValueError as error:
            raise ValueError(f"{image} cannot be used: {error}") from None
        folder = Path(out) if len(models) == 1 else Path(out) / f"{number + 1}_{_file_name(name)}"
        shown.append(_explained(name, predictor, picture, folder, every))
    page = Path(out) / "explain.html"
    write_explanation(page, f"Where {' and '.join(name for name, _ in models)} look{'s' * (len(models) == 1)}", shown)
    return page


def _one_image(image: str | Path) -> Item:
    kind, items = items_of(image)
    if kind != "one":
        raise ValueError(f"{image} is not one image: give an image file")
    item, = items
    return item


def _explained(name: str, predictor: Predictor, image: Any, folder: Path, every: bool) -> Explained:
    model, engine = model_of(name, predictor), cast(Any, predictor.engine)
    if predictor.task not in ("classification", "features"):
        raise ValueError(f"{name} is for {predictor.task}, explain is for classifiers: give its backbone by name")
    settings = engine.settings if hasattr(engine, "task") else engine.config
    x = torch.as_tensor(engine.prepare(image))[None].to(engine.device)
    picture = _picture(x, settings)
    with torch.no_grad(), recorded_by_layer(model) as layers, inputs_of(model) as inputs:
        scores = model(x)
    looks, says = [], ""
    if predictor.task == "classification":
        label = int(scores[0].argmax())
        says = f"It says: {predictor.names[label]}."
        looks.append(find_grad_cam(model, x, label, predictor.names[label]))
    if layers:
        looks.append(find_rollout(layers))
    for layer in choose_layers(layers, every):
        looks += _looks(layer, inputs, picture, folder)
    _draw_others(model, layers, x, settings, folder, every)
    for look in looks:
        if look.why:
            say(f"{name}: {look.title} is not shown: {look.why}")
        else:
            draw_look(look, picture, folder / f"{_file_name(look.title)}.png")
    return Explained(name, says, picture, looks[::-1])  # the last stage first


def _looks(
        layer: LayerAttention, inputs: dict[nn.Module, tuple[Any, ...]], picture: Tensor, folder: Path) -> list[Look]:
    look = look_of(layer)
    given = inputs.get(layer.module)
    if look.why or given is None:
        return [look]
    if isinstance(layer.module, AgentAttention):
        return [*find_agents(layer, given), look]
    if isinstance(layer.module, KMeansRoutingAttention):
        found = find_clusters(layer, given)
        draw_clusters(
            found.owner, found.look.title, picture, folder / f"{_file_name(found.look.title)}_coloured.png")
        return [found.look, look]
    if isinstance(layer.module, VariedSizeWindowAttention):
        return [find_windows(layer, given, look)]
    return [look]


def _draw_others(
        model: nn.Module, layers: Sequence[LayerAttention], x: Tensor, settings: dict[str, Any], folder: Path,
        every: bool) -> None:
    """Pictures of routes and trees, which show more than one query."""
    mean, std = settings["mean"], settings["std"]
    if any(isinstance(layer.module, ReversedAttention) for layer in layers):
        draw_trees(model, x, folder / "dependencies.png", [""], mean=mean, std=std)
    routed = [module for module in model.modules() if isinstance(module, BiLevelRoutingAttention)]
    for layer in choose_layers(layers, every):
        if layer.module in routed:
            draw_routes(model, x, folder / f"{_file_name(layer.name)}_routes.png", [layer.name],
                        routed.index(layer.module), mean, std)


def _picture(x: Tensor, settings: dict[str, Any]) -> Tensor:
    """What the model sees, ``[height, width, 3]`` in [0, 1]."""
    mean, std = (torch.as_tensor(np.asarray(settings[key], np.float32)).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = (x[0].cpu().float() * std + mean).clamp(0, 1)
    return (pixels if len(pixels) == 3 else pixels.mean(dim=0, keepdim=True).expand(3, -1, -1)).permute(1, 2, 0)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_.")
