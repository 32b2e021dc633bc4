"""``visionattn analyze MODEL|RUN DATA``: what each head of attention is worth and looks at, and what pruning costs."""
import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from .. import data
from ..data.classification import ClassificationData
from ..data.guess import guess_data
from ..predictor import Predictor
from ..runtime.say import say
from ..runtime.sources import Item, opened
from .clusters import cluster_patterns, cropped, patterns_of
from .head_page import write_head_page
from .head_table import HeadRow, draw_clusters_of_heads, draw_heads, table_text, write_table
from .heads import find_heads
from .importance import Ablation, ablate_heads, gradient_importance, loss_and_accuracy
from .measures import Attended, measure_attention
from .prune import inseparable_heads, least_important, prune_heads, save_pruned
from .subject import add_model, model_of

__all__ = ["analyze", "main"]

CLUSTERS = 6
ROUNDS = 7  # of timing

Measure = Literal["gradient", "ablation"]


def main(argv: list[str]) -> int:
    """Runs ``visionattn analyze``."""
    parser = argparse.ArgumentParser(
        prog="visionattn analyze", description="Shows of every head of a classifier's attention how much the answers "
        "depend on it and what it looks at: a table, pictures, and a page in which a head is picked. docs/looking.md "
        "has more.")
    add_model(parser)
    parser.add_argument("data", metavar="DATA", help=(
        "images by class, as of visionattn validate: those for validation are taken"))
    parser.add_argument("--images", type=int, default=64, metavar="N", help="how many of them (default: 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at once (default: 8)")
    parser.add_argument("--prune", type=int, default=0, metavar="N", help=(
        "take the N least important heads away, and say what it costs and saves"))
    parser.add_argument("--by", choices=["gradient", "ablation"], default="gradient", help=(
        "importance that --prune goes by (default: gradient)"))
    parser.add_argument("--out", default="analysis", metavar="FOLDER", help="for what is written (default: analysis)")
    args = parser.parse_args(argv)
    predictor = Predictor(args.model, args.device, checkpoint=args.checkpoint)
    rows = analyze(args.model, predictor, args.data, args.out, args.images, args.batch, args.prune, args.by)
    print(table_text(rows))
    say(f"Everything is in {args.out}: open {Path(args.out) / 'heads.html'} in a browser.")
    return 0


def analyze(
        name: str, predictor: Predictor, root: str | Path, out: str | Path, images: int = 64, batch: int = 8,
        prune: int = 0, by: Measure = "gradient") -> list[HeadRow]:
    """Measures the heads of a classifier, and writes ``heads.csv``, pictures and the page ``heads.html``.

    Labels are those of the data where their classes are the model's. Where none of them is, what the model says takes
    the place of the labels: losses are of that class, accuracies how often a changed model agrees with it.

    Args:
        name: Of the model, as it is shown.
        predictor: The classifier.
        root: Folder or table of images by class.
        out: Folder, which is made.
        images: How many of the images, evenly from all.
        batch: Images at once, but of gradients, which take one.
        prune: How many heads are taken away: the least important ones; ``pruned.safetensors`` is what is left.
        by: How important they are.

    Returns:
        What is known of each head, layer by layer.

    Raises:
        ValueError: The model is no classifier in PyTorch with attention, its classes and those of the data fit in part,
            or an option does not fit the model.
        FileNotFoundError: There are no such data.
    """
    if images < 1 or batch < 1 or prune < 0:
        raise ValueError(f"images and batch must be 1 or more and prune 0 or more, got {images}, {batch} and {prune}")
    model, engine = model_of(name, predictor), cast(Any, predictor.engine)
    if predictor.task != "classification" or engine.meaning.thresholds is not None:
        raise ValueError(f"{name} is no classifier with one class an image, which analyze is for")
    if prune:
        _choose({heads.name: torch.zeros(heads.count) for heads in find_heads(model)}, model, prune)  # or refuses
    x, labels, known = _read(predictor, model, root, images)
    attended = measure_attention(model, x, batch)
    counts, gradient, ablation = _counts(model, attended), {}, None
    try:
        find_heads(model)
    except ValueError as error:
        if not counts:
            raise
        say(f"Importance is not known: {error}.")
    else:
        gradient = gradient_importance(model, x, labels)
        loss_and_accuracy(model, x[:batch], labels[:batch], batch)
        began = time.perf_counter()
        loss_and_accuracy(model, x, labels, batch)
        seconds = (time.perf_counter() - began) * sum(map(len, gradient.values()))
        say(f"Now the {len(x)} images without each of {sum(map(len, gradient.values()))} heads in turn: about "
            f"{seconds / 60:.1f} minutes.")
        ablation = ablate_heads(model, x, labels, batch)
        say(f"The whole model: loss {ablation.loss:.4f}, accuracy {ablation.accuracy:.4f}.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows, offsets, pixels, means = _joined(model, counts, attended, gradient, ablation)
    write_table(rows, out / "heads.csv")
    title = f"Heads of {name}"
    draw_heads(rows, out / "heads.png", f"{title}, {len(x)} images")
    if means is not None:
        draw_clusters_of_heads(means, rows, out / "clusters.png")
    says = f"{len(rows)} heads in {len(counts)} layers, {len(x)} images of {x.shape[2]} x {x.shape[3]} pixels."
    if ablation is not None:
        says += f" The whole model: loss {ablation.loss:.4f}, accuracy {ablation.accuracy:.4f}."
    if not known:
        says += " What it says takes the place of labels, as the classes of the images are none of its own."
    write_head_page(out / "heads.html", title, says, rows, offsets, pixels, means)
    if prune and ablation is not None:
        scores = gradient if by == "gradient" else {
            layer: losses - ablation.loss for layer, losses in ablation.losses.items()}
        _prune(model, scores, prune, x, labels, batch, out)
    return rows


def _read(predictor: Predictor, model: nn.Module, root: str | Path, number: int) -> tuple[Tensor, Tensor, bool]:
    """Images as the model takes them, their labels among the model's, and whether these are the data's."""
    engine: Any = predictor.engine
    kind = guess_data(root, "classification")
    arguments = dict(kind.arguments, image_size=32, in_chans=engine.decoding.channels)  # the size is not made use of
    if hasattr(engine, "task"):
        arguments["class_names"] = predictor.names
    module = getattr(data, kind.module)(**arguments)
    assert isinstance(module, ClassificationData)
    if module.multi_label:
        raise ValueError(f"{root} has several labels for an image, and analyze is for data with one")
    module.setup("validate")
    samples = module.samples["val"]
    if number < len(samples):
        samples = [samples[i * len(samples) // number] for i in range(number)]
    prepared = []
    for file, _ in samples:
        try:
            prepared.append(torch.as_tensor(engine.prepare(opened(Item(str(file), file), engine.decoding))))
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from None
    x = torch.stack(prepared).to(engine.device)
    known = _labels_by_name(model, predictor.names)
    missing = [name for name in module.class_names if name not in known]
    if not missing:
        return x, torch.tensor([known[module.class_names[label]] for _, label in samples], device=x.device), True
    if len(missing) < len(module.class_names):
        raise ValueError(f"{root} has the class {missing[0]}, which the model does not know, and others that it does: "
                         "name all as the model does, or none")
    say("None of the classes is the model's: what it says takes the place of labels. Losses are of the class that it "
        "says, accuracies how often it says the same.")
    with torch.inference_mode():
        says = torch.cat([model(part).argmax(dim=1) for part in x.split(8)])
    return x, says.clone(), False


def _labels_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """The classes by their names and, of ImageNet's, by those of their folders."""
    labels = {name: label for label, name in enumerate(names) if list(names).count(name) == 1}
    classes = getattr(model, "num_classes", 0)
    subset = infer_imagenet_subset(model) if classes == len(names) else None
    if subset is not None:
        labels |= {folder: label for label, folder in enumerate(ImageNetInfo(subset).label_names())}
    return labels


def _counts(model: nn.Module, attended: dict[str, list[Attended]]) -> dict[str, int]:
    """Heads of each layer: those that can be masked, and others whose maps were seen."""
    try:
        counts = {heads.name: heads.count for heads in find_heads(model)}
    except ValueError:
        counts = {}
    for name, groups in attended.items():
        counts.setdefault(name, sum(len(group.entropy) for group in groups))
    return counts


class _Joined(NamedTuple):
    rows: list[HeadRow]
    offsets: dict[str, list[Tensor | None]]
    pixels: dict[tuple[str, int], float]
    means: Tensor | None


def _joined(
        model: nn.Module, counts: dict[str, int], attended: dict[str, list[Attended]], gradient: dict[str, Tensor],
        ablation: Ablation | None) -> _Joined:
    """All that is known of the heads, with the groups of those that look alike."""
    rows: list[HeadRow] = []
    offsets: dict[str, list[Tensor | None]] = {}
    pixels: dict[tuple[str, int], float] = {}
    patterns: dict[int, Tensor] = {}
    for name, count in counts.items():
        groups, kind = attended.get(name, []), type(model.get_submodule(name)).__name__
        why = "" if groups else f"{kind} gives no attention maps"
        if groups and sum(len(group.entropy) for group in groups) != count:
            groups, why = [], f"the maps of {kind} are not one for each of its heads"
        looks = [(group, i) for group in groups for i in range(len(group.entropy))]
        maps = {id(group): (cropped(group.offsets), patterns_of(group.offsets)) for group in groups
                if group.offsets is not None}
        offsets[name] = []
        for head in range(count):
            row, reasons = HeadRow(name, head), [why] if why else []
            if name in gradient and ablation is not None:
                row = row._replace(
                    gradient=gradient[name][head].item(), loss_without=ablation.losses[name][head].item(),
                    accuracy_without=ablation.accuracies[name][head].item())
            else:
                reasons.append(f"{kind} has no heads that can be masked")
            offsets[name].append(None)
            if looks:
                group, i = looks[head]
                row = row._replace(
                    distance=group.distance[i].item(), entropy=group.entropy[i].item(),
                    class_share=group.class_share[i].item(), self_share=group.self_share[i].item())
                reasons += [group.why] if group.why else []
                if id(group) in maps:
                    offsets[name][head] = maps[id(group)][0][i]
                    pixels[name, head] = group.pixels
                    if maps[id(group)][1][i].any():
                        patterns[len(rows)] = maps[id(group)][1][i]
            rows.append(row._replace(why="; ".join(reasons)))
    if not patterns:
        return _Joined(rows, offsets, pixels, None)
    clusters, means = cluster_patterns(torch.stack(list(patterns.values())), CLUSTERS)
    for number, cluster in zip(patterns, clusters, strict=True):
        rows[number] = rows[number]._replace(cluster=cluster)
    return _Joined(rows, offsets, pixels, means)


def _choose(scores: dict[str, Tensor], model: nn.Module, number: int) -> dict[str, list[int]]:
    """The heads of least score of the layers whose heads can be taken apart."""
    whole = inseparable_heads(model)
    apart = {name: score for name, score in scores.items() if name not in whole}
    if not apart:
        name, reason = next(iter(whole.items()))
        raise ValueError(f"no heads of {type(model).__name__} can be taken away, as of {name}: {reason}")
    return least_important(apart, number)


def _prune(
        model: nn.Module, scores: dict[str, Tensor], number: int, x: Tensor, labels: Tensor, batch: int,
        out: Path) -> None:
    """Prunes a copy of a model and shows both side by side."""
    for name, reason in inseparable_heads(model).items():
        say(f"{name} keeps its heads, which cannot be taken apart: {reason}.")
    away = _choose(scores, model, number)
    pruned = prune_heads(copy.deepcopy(model), away)
    save_pruned(pruned, out / "pruned.safetensors")
    say("Taken away: " + "; ".join(f"{name} {', '.join(map(str, heads))}" for name, heads in away.items()) + ".")
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        found = [loss_and_accuracy(one, x, labels, batch) for one in (model, pruned)]
        for _ in range(ROUNDS):
            for one, times in zip((model, pruned), seconds, strict=True):
                began = time.perf_counter()
                one(x[:batch]).sum().item()  # a GPU has finished when it knows
                times.append(time.perf_counter() - began)
    print(f"{'':10}{'heads':>8}{'parameters':>14}{'accuracy':>10}{'loss':>10}{'ms a batch':>12}")
    heads = sum(map(len, scores.values()))
    for title, one, count, (loss, accuracy), times in zip(
            ("before", "after"), (model, pruned), (heads, heads - number), found, seconds, strict=True):
        size = sum(parameter.numel() for parameter in one.parameters())
        print(f"{title:10}{count:>8}{size:>14,}{accuracy:>10.4f}{loss:>10.4f}{statistics.median(times) * 1000:>12.1f}")
