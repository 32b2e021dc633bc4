"""``visionattn probe --model NAME --data FOLDER``: what a model's features are worth, its weights left as they are.

The features of all images are computed once and kept on disk; heads of several kinds are trained on them, a k-nearest-
neighbour vote is taken, and the best head is saved with the backbone as a run, and exported. After "Attention, Please!
Revisiting Attentive Probing Through the Lens of Efficiency" (ICLR 2026, arXiv 2506.10178), section 4.
"""
import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from . import data, export
from .data.classification import ClassificationData
from .data.guess import guess_data
from .features import kept_features, weights_key
from .heads.probing import PooledHead, Pooling
from .runtime.say import say
from .tasks import ClassificationTask
from .tasks.classification import create_classifier
from .weights import check_name, sized_args

__all__ = ["Found", "main", "probe"]

EPOCHS, WARMUP = 90, 10  # as in the paper
BASE_LR = 0.1  # for 256 images a step
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the vote, as DINO (arXiv 2104.14294) has it
CHUNK = 1024  # images whose features are in memory at once where nothing else says how many


class Found(NamedTuple):
    """What a head reached.

    Attributes:
        head: Its kind: one of :data:`visionattn.heads.probing.Pooling`, or ``knn``.
        trained: Numbers that were trained.
        val_accuracy: Share of the validation images that are right, in the best epoch.
        test_accuracy: Share of the test images, then.
        epoch: The best epoch, from 1 on.
        seconds: That training took, features not counted.
    """

    head: str
    trained: int
    val_accuracy: float
    test_accuracy: float
    epoch: int
    seconds: float


class _Split(NamedTuple):
    """Features ``[images, tokens, channels]``, or ``[images, channels]`` pooled, and labels ``[images]``."""

    features: np.ndarray
    labels: Tensor

    def batches(self, order: np.ndarray | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in this order, or in the order of the images; each is read from the file in ascending order."""
        order = np.arange(len(self.labels)) if order is None else order
        for start in range(0, len(order), size):
            chosen = np.sort(order[start:start + size])
            yield torch.from_numpy(np.asarray(self.features[chosen], dtype=np.float32)), self.labels[chosen]


def main(argv: list[str]) -> int:
    """Runs ``visionattn probe``."""
    kinds = [*get_args(Pooling), "knn"]
    parser = argparse.ArgumentParser(
        prog="visionattn probe", description="Trains heads on the features of a frozen model, shows what each reaches, "
        "and saves the best with the backbone. docs/training.md has more.")
    parser.add_argument("--model", required=True, metavar="NAME", help="any model of timm's or ours")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="folders of images by class, or a table")
    parser.add_argument("--checkpoint", metavar="FILE", help="the model's weights, in place of the published ones")
    parser.add_argument("--heads", nargs="+", choices=kinds, metavar="HEAD",
                        help=f"of {', '.join(kinds)} (default: all that the model has)")
    parser.add_argument("--image-size", type=int, metavar="N", help="height and width (default: the model's)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of each head (default: {EPOCHS})")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images a step (default: 256)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)")
    parser.add_argument("--cache", default="runs/features", metavar="DIR", help=(
        "folder that features are kept in (default: runs/features)"))
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/probe-NAME)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    out = Path(args.out or f"runs/probe-{args.model.replace(':', '_').replace('/', '_')}")
    rows = probe(
        args.model, args.data, out, checkpoint=args.checkpoint, heads=args.heads, image_size=args.image_size,
        epochs=args.epochs, batch_size=args.batch_size, workers=args.workers, cache=args.cache, device=args.device,
        seed=args.seed)
    print(f"{'head':12}{'trained':>12}{'val':>9}{'test':>9}{'epoch':>7}{'seconds':>9}")
    for row in rows:
        print(f"{row.head:12}{row.trained:>12,}{row.val_accuracy:>9.4f}{row.test_accuracy:>9.4f}{row.epoch:>7}"
              f"{row.seconds:>9.1f}")
    checkpoint = out / "checkpoints" / "best.ckpt"
    if checkpoint.is_file():
        try:
            export.main(["--checkpoint", str(checkpoint), "--out", str(out / "model.onnx")])
        except (ImportError, ValueError, RuntimeError) as error:
            say(f"No ONNX file was written: {' '.join(str(error).split())}")
    say(f"Everything is in {out}; the best head with its backbone is a run: visionattn predict {out} IMAGES")
    return 0


def probe(
        model: str, root: str | Path, out: Path, *, checkpoint: str | None = None, heads: list[str] | None = None,
        image_size: int | None = None, epochs: int = EPOCHS, batch_size: int = 256, workers: int = 2,
        cache: str | Path = "runs/features", device: str | None = None, seed: int = 0) -> list[Found]:
    """Probes a model as ``visionattn probe`` does, without the export.

    Args:
        model: Name of any model of timm's or ours.
        root: Folder or table of the images.
        out: Run folder: ``probe.csv``, ``test_metrics.json`` and ``checkpoints/best.ckpt``, the best head that was
            trained with the backbone.
        checkpoint: The model's weights, in place of the published ones.
        heads: Kinds of heads; None for all that the model has.
        image_size: Height and width of the images; None for the model's own.
        epochs: Of each head.
        batch_size: Images a step.
        workers: Processes that read images.
        cache: Folder that features are kept in.
        device: Where features are computed; None for the GPU if there is one.
        seed: Of the heads' weights and the order of the images.

    Returns:
        What each head reached, in the order of ``heads``.

    Raises:
        ValueError: The data have several labels an image, or an option does not fit the model.
        FileNotFoundError: There is no such folder or file.
    """
    if ":" not in model:
        check_name(model)
    if epochs < 1 or batch_size < 2:
        raise ValueError(f"epochs must be 1 or more and batch_size 2 or more, got {epochs} and {batch_size}")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model_args = {} if image_size is None else sized_args(model, image_size)
    backbone: Any = create_classifier(model, checkpoint is None, checkpoint, model_args | {"num_classes": 0})
    backbone.eval().to(chosen)
    module = _data(backbone, root, image_size, batch_size, workers)
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    kinds = heads or [kind for kind in (*get_args(Pooling), "knn") if prefix or kind not in ("token", "ep_all")]
    weights, splits = weights_key(backbone), {}
    for split in ("train", "val", "test"):
        files, labels = zip(*module.samples[split], strict=True)
        began = time.perf_counter()
        features = kept_features(
            backbone, weights, module.plain_dataloader(split), files, module.image_settings, Path(cache))
        splits[split] = _Split(features, torch.tensor(labels))
        say(f"{split}: features of {len(files)} images, {features.shape[1]} x {features.shape[2]} numbers each, in "
            f"{time.perf_counter() - began:.1f} s.")
    found, best = [], None
    for kind in kinds:
        if kind == "knn":
            found.append(_vote(splits, prefix))
            continue
        torch.manual_seed(seed)
        head = PooledHead(cast(Pooling, kind), backbone.num_features, module.num_classes, prefix)
        found.append(_train(head, splits, epochs, batch_size, seed))
        if best is None or found[-1].val_accuracy > best[0].val_accuracy:
            best = found[-1], head
    out.mkdir(parents=True, exist_ok=True)
    with (out / "probe.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("model", *Found._fields))
        writer.writerows((model, *row) for row in found)
    if best is not None:
        _save(model, model_args, backbone.cpu(), *best, module, out)
    return found


def _data(backbone: Any, root: str | Path, image_size: int | None, batch_size: int, workers: int) -> Any:
    """The images as the model sees them in evaluation, listed and checked."""
    kind = guess_data(root, "classification")
    config = resolve_model_data_config(backbone)
    chans, height, width = config["input_size"]
    if image_size is None and height != width:
        raise ValueError(f"the model's images are {height} x {width}, and probing has square ones: say --image-size")
    module = getattr(data, kind.module)(
        **kind.arguments, image_size=image_size or height, batch_size=min(batch_size, 64), num_workers=workers,
        mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"], in_chans=chans,
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic")
    assert isinstance(module, ClassificationData)
    if module.multi_label:
        raise ValueError(f"{root} has several labels for an image, and probing is for data with one: train a head by "
                         "fit with model.frozen and model.pooling")
    module.setup("fit")
    module.setup("test")
    return module


def _train(head: PooledHead, splits: dict[str, _Split], epochs: int, batch_size: int, seed: int) -> Found:
    """Trains a head, which is then as it was in its best epoch."""
    began = time.perf_counter()
    run: Callable[[Tensor], Tensor] = head
    if head.kind in ("mean", "token"):  # what is pooled does not change
        splits, run = {name: _gathered(head, split) for name, split in splits.items()}, head.classify
    order, train = np.random.default_rng(seed), splits["train"]
    size = min(batch_size, len(train.labels))
    steps, step = math.ceil(len(train.labels) / size), 0
    warmup = min(WARMUP, epochs // 3) * steps
    lr = BASE_LR * size / 256
    optimizer = create_optimizer_v2(head, opt="lars", lr=lr, weight_decay=0.0, momentum=0.9)
    best, kept = (-1.0, 0), {}
    for epoch in range(1, epochs + 1):
        head.train()
        for features, labels in train.batches(order.permutation(len(train.labels)), size):
            done = (step - warmup) / max(1, epochs * steps - warmup)
            rate = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            step += 1
            if len(labels) == 1:
                continue  # of which there is no batch norm
            optimizer.zero_grad()
            cross_entropy(run(features), labels).backward()
            optimizer.step()
        head.eval()
        accuracy = _accuracy(run, splits["val"])
        if accuracy > best[0]:
            best, kept = (accuracy, epoch), {key: value.clone() for key, value in head.state_dict().items()}
    head.load_state_dict(kept)
    trained = sum(parameter.numel() for parameter in head.parameters())
    return Found(head.kind, trained, best[0], _accuracy(run, splits["test"]), best[1], time.perf_counter() - began)


def _gathered(head: PooledHead, split: _Split) -> _Split:
    """The split with pooled features ``[images, channels]``."""
    rows = [head.gather(tokens).numpy() for tokens, _ in split.batches(None, CHUNK)]
    return _Split(np.concatenate(rows), split.labels)


@torch.inference_mode()
def _accuracy(run: Callable[[Tensor], Tensor], split: _Split) -> float:
    right = sum((run(features).argmax(dim=1) == labels).sum().item() for features, labels in split.batches(None, CHUNK))
    return right / len(split.labels)


def _vote(splits: dict[str, _Split], prefix: int) -> Found:
    """The votes of the nearest training images by the cosine, the nearer the more."""
    began = time.perf_counter()
    rows = {name: np.concatenate([
        normalize(tokens[:, 0] if prefix else tokens.mean(dim=1)).numpy() for tokens, _ in split.batches(None, CHUNK)])
        for name, split in splits.items()}
    labels = splits["train"].labels.numpy()
    voters = KNeighborsClassifier(
        min(NEIGHBOURS, len(labels)), metric="cosine", algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)).fit(rows["train"], labels)
    val, test = (voters.score(rows[name], splits[name].labels.numpy()) for name in ("val", "test"))
    return Found("knn", 0, float(val), float(test), 0, time.perf_counter() - began)


def _save(
        model: str, model_args: dict[str, Any], backbone: Any, found: Found, head: PooledHead, module: Any,
        out: Path) -> None:
    """Writes the backbone with a trained head as the checkpoint of a run that trained it so."""
    task = ClassificationTask(
        model, module.num_classes, module.class_names, model_args=model_args or None, in_chans=module.in_chans,
        frozen=True, pooling=head.kind)
    weights: dict[str, Tensor] = backbone.state_dict()
    task.model.load_state_dict(weights | {f"pooled_head.{key}": value for key, value in head.state_dict().items()})
    mean, std = module.normalisation
    path = out / "checkpoints" / "best.ckpt"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams) | {
            "_image_settings": module.image_settings, "_mean": list(mean), "_std": list(std)},
    }, part)
    part.replace(path)
    (out / "test_metrics.json").write_text(json.dumps({
        "accuracy": found.test_accuracy, "num_images": len(module.samples["test"]), "head": found.head}, indent=2))
