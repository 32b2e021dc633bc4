"""``visionattn explain MODEL|RUN IMAGE``: where a model looks, as pictures and as a page in which the pointer asks."""
import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..dense import dense_backbone_of
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
from .gradcam_dense import find_dense_grad_cams, says_of
from .insides import find_agents, find_clusters, find_windows, inputs_of
from .looks import Look, choose_layers, look_of, too_large
from .panels import draw_clusters, draw_look
from .pictures import draw_routes, draw_trees
from .rollout import find_rollout
from .subject import add_model, label_of, model_of

__all__ = ["explain", "main"]


def main(argv: list[str]) -> int:
    """Runs ``visionattn explain``."""
    parser = argparse.ArgumentParser(
        prog="visionattn explain", description="Shows where a classifier, or the backbone of a detector or segmenter, "
        "looks in an image: pictures, and a page in which the pointer chooses the query. docs/looking.md has more.")
    add_model(parser)
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("--beside", metavar="MODEL", help="a second model, which the pointer moves too")
    parser.add_argument("--layers", choices=["last", "all"], default="last", help=(
        "the last of each stage, or all (default: last)"))
    parser.add_argument("--target", metavar="CLASS", help=(
        "class that Grad-CAM is for (default: what the model says; of a segmenter what has most pixels)"))
    parser.add_argument("--out", default="explain", metavar="FOLDER", help="for what is written (default: explain)")
    args = parser.parse_args(argv)
    _one_image(args.image)  # before models are loaded
    models = [(args.model, Predictor(args.model, args.device, checkpoint=args.checkpoint))]
    if args.beside is not None:
        models.append((args.beside, Predictor(args.beside, args.device)))
    page = explain(models, args.image, args.out, args.layers == "all", args.target)
    say(f"Open {page} in a browser; pictures are beside it.")
    return 0


def explain(
        models: Sequence[tuple[str, Predictor]], image: str | Path, out: str | Path, every: bool = False,
        target: str | None = None) -> Path:
    """Writes pictures and a page of where models look in an image.

    Args:
        models: Names and predictors of one model, or several side by side: classifiers, and runs of detection and
            segmentation, of which the backbone is shown, beside what they find.
        image: An image file.
        out: Folder, which is made.
        every: Show all layers, in place of the last of each stage.
        target: Class that Grad-CAM is for; None for the one that the model names, or that has most pixels.

    Returns:
        The page, ``explain.html``. Pictures are beside it; of several models each has a folder.

    Raises:
        ValueError: A model is not in PyTorch or has not the class, or the image cannot be used.
        FileNotFoundError: There is no such image.
    """
    item, shown = _one_image(image), []
    for number, (name, predictor) in enumerate(models):
        try:
            picture = opened(item, predictor.decoding)
        except ValueError as error:
            raise ValueError(f"{image} cannot be used: {error}") from None
        folder = Path(out) if len(models) == 1 else Path(out) / f"{number + 1}_{_file_name(name)}"
        shown.append(_explained(name, predictor, item, picture, folder, every, target))
    page = Path(out) / "explain.html"
    write_explanation(page, f"Where {' and '.join(name for name, _ in models)} look{'s' * (len(models) == 1)}", shown)
    return page


def _one_image(image: str | Path) -> Item:
    kind, items = items_of(image)
    if kind != "one":
        raise ValueError(f"{image} is not one image: give an image file")
    item, = items
    return item


def _explained(
        name: str, predictor: Predictor, item: Item, image: Any, folder: Path, every: bool,
        target: str | None) -> Explained:
    whole, engine = model_of(name, predictor), cast(Any, predictor.engine)
    label = None if target is None else label_of(name, predictor, target)
    dense, answer = dense_backbone_of(whole), None
    if dense is not None:
        (_, answer, fault), = predictor.predicted([item])
        if answer is None:
            raise ValueError(f"{item.file} cannot be used: {fault}")
    prepared = engine.prepare(image)
    with torch.no_grad():
        x = engine.seen(prepared)
        x = x if dense is None else dense.padded(x)
    model, picture = whole if dense is None else dense, _picture(x, *engine.normalisation)
    with torch.no_grad(), recorded_by_layer(model) as layers, inputs_of(model) as inputs:
        scores = model(x)
    looks, says = [], ""
    if predictor.task == "classification":
        best = int(scores[0].argmax())
        label = best if label is None else label
        says = f"It says: {predictor.names[best]}."
        looks.append(find_grad_cam(model, x, label, predictor.names[label]))
    elif answer is not None:
        says = says_of(answer, engine.task)
        looks += find_dense_grad_cams(engine.task, prepared, x, answer, label)
        answer.save(folder / "answer.png")
    if layers:
        looks.append(find_rollout(layers))
    for layer in choose_layers(layers, every):
        looks += _looks(layer, inputs, picture, folder)
    _draw_others(name, model, layers, x, engine.normalisation, folder, every)
    for look in looks:
        if look.why:
            say(f"{name}: {look.title} is not shown: {look.why}")
        else:
            draw_look(look, picture, folder / f"{_file_name(look.title)}.png")
    drawn = None if answer is None else answer.plot()
    return Explained(name, says, picture, looks[::-1], drawn)  # the last stage first


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
        name: str, model: nn.Module, layers: Sequence[LayerAttention], x: Tensor, normalisation: tuple[Any, Any],
        folder: Path, every: bool) -> None:
    """Pictures of routes and trees, which show more than one query."""
    mean, std = normalisation
    why = too_large(*layers)
    if any(isinstance(layer.module, ReversedAttention) for layer in layers):
        if why:
            say(f"{name}: the tree is not drawn: {why}")
        else:
            draw_trees(model, x, folder / "dependencies.png", [""], mean=mean, std=std)
    routed = [module for module in model.modules() if isinstance(module, BiLevelRoutingAttention)]
    for layer in choose_layers(layers, every):
        if layer.module in routed:
            draw_routes(model, x, folder / f"{_file_name(layer.name)}_routes.png", [layer.name],
                        routed.index(layer.module), mean, std)


def _picture(x: Tensor, mean: Any, std: Any) -> Tensor:
    """What the model sees, ``[height, width, 3]`` in [0, 1]."""
    mean, std = (torch.as_tensor(np.asarray(values, np.float32)).view(-1, 1, 1) for values in (mean, std))
    pixels = (x[0].cpu().float() * std + mean).clamp(0, 1)
    return (pixels if len(pixels) == 3 else pixels.mean(dim=0, keepdim=True).expand(3, -1, -1)).permute(1, 2, 0)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_.")
