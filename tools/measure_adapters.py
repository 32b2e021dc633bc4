"""Tunes one small vision transformer for new classes in every way that there is here, and compares what they cost.

    python tools/measure_adapters.py --out results/adapters.csv --page docs/adapters.md
    nice python tools/measure_adapters.py --out results/adapters.csv --methods onebit_lora linear --seeds 0

The backbone is trained on the digits 0 to 4, then tuned for 5 to 9, of which it has seen none: all of it, a head
alone (linear, efficient probing), nothing (the vote of the nearest neighbours in its features), or an adapter and a
head. Each method takes that of two learning rates (``RATES``) that is better on the validation images, and is measured
on the test images after the last epoch. The time of a step is in those of full fine-tuning, measured in turns with it;
its memory is that of tensors which one step makes, weights and the optimiser's state not among them. Rows that the file
has are left as they are.
"""
import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rows import append_rows, read_rows, when_and_with, write_between
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from visionattn import adapters
from visionattn.bench.timing import peak_memory
from visionattn.data import DigitsData
from visionattn.heads.probing import pool_tokens
from visionattn.layers import auxiliary_losses
from visionattn.tasks.optim import cosine_with_warmup, make_optimizer

__all__ = ["METHODS", "main", "measure", "write_table"]

MODEL = dict(model_name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4)
SEEDS = (0, 1, 2)
RATES = (1e-3, 5e-3)
CLASSES, BATCH, TURNS, NEIGHBORS = 5, 32, 9, 20
OLD, NEW = range(CLASSES), range(CLASSES, 2 * CLASSES)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("everything", {}),
    "linear": ("a linear head", {}),
    "ep": ("efficient probing", {}),
    "knn": (f"{NEIGHBORS} nearest neighbours", {}),
    "lora": ("LoRA", {"adapter": "lora", "rank": 4, "alpha": 16.0}),
    "onebit_adaptformer": ("1-bit, AdaptFormer", {"adapter": "onebit", "dim": 8, "scale": 10.0}),
    "onebit_lora": ("1-bit, LoRA", {"adapter": "onebit", "dim": 4, "scale": 10.0, "shape": "lora"}),
    "mosa": ("MoSA", {"adapter": "mosa", "bottleneck": 8, "scale": 1.0}),
    "tcpa": ("TCPA", {"adapter": "tcpa", "class_pool": 4, "class_topk": 2, "image_pool": 4, "image_topk": 2,
                      "random_epochs": 6}),
}
START, END = "<!-- measured adapters -->", "<!-- end of measured adapters -->"


class _Run(NamedTuple):
    """A model that is tuned, with what makes a step of it."""

    model: Any
    step: Callable[[Tensor, Tensor], None]


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=60, help="of tuning; the backbone is trained for twice as many")
    parser.add_argument("--out", type=Path, default=Path("results/adapters.csv"), help="CSV file; rows are appended")
    parser.add_argument("--page", type=Path, help="write the rows that there are then as a table into this page")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = {(row["method"], row["seed"]) for row in read_rows(args.out)} if args.out.exists() else set()
    for seed in args.seeds:
        wanted = [name for name in args.methods if (name, str(seed)) not in known]
        backbone = _pretrained(seed, 2 * args.epochs) if wanted else None
        for name in wanted:
            row = measure(name, backbone, seed, args.epochs)
            append_rows(args.out, [row])
            print("{method:20} seed {seed}: {accuracy:.4f}, {trained} trained, {bytes} bytes".format(**row), flush=True)
    if args.page:
        write_table(args.out, args.page)
    return 0


def measure(name: str, backbone: Any, seed: int, epochs: int) -> dict[str, Any]:
    """The row of one method on a backbone that was trained on the old classes."""
    data, start = _data(NEW), time.process_time()
    row: dict[str, Any] = {"method": name, "seed": seed}
    if name == "knn":
        accuracy, size = _vote(backbone, data)
        found = {"accuracy": accuracy, "lr": 0, "trained": 0, "kept": 0, "bytes": size, "step": 0, "peak_mib": 0}
    else:
        runs = {lr: _tuned(name, backbone, data, seed, epochs, lr) for lr in RATES}
        lr = max(RATES, key=lambda rate: _accuracy(runs[rate].model, data.val_dataloader()))
        model = runs[lr].model
        kept, size = _kept(name, model)
        found = {
            "accuracy": _accuracy(model, data.test_dataloader()), "lr": lr, "kept": kept, "bytes": size,
            "trained": sum(x.numel() for x in model.parameters() if x.requires_grad)} | _cost(name, backbone, data)
    return row | found | {
        "parameters": sum(x.numel() for x in backbone.parameters()), "epochs": epochs,
        "minutes": round((time.process_time() - start) / 60, 2), **when_and_with()}


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    rows = read_rows(source)
    lines = ["| method | seeds | accuracy, % | least to most | trained | of the model | kept in | a step | memory |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name in [name for name in METHODS if any(row["method"] == name for row in rows)]:
        chosen = [row for row in rows if row["method"] == name]
        shares = [100 * float(row["accuracy"]) for row in chosen]
        first, steps = chosen[0], [float(row["step"]) for row in chosen]
        trained = int(first["trained"])
        cost = [f"{statistics.mean(steps):.2f}", f"{float(first['peak_mib']):.1f} MiB"] if trained else ["-", "-"]
        lines.append("| " + " | ".join([
            METHODS[name][0], str(len(chosen)), f"{statistics.mean(shares):.1f}",
            f"{min(shares):.1f} to {max(shares):.1f}", f"{trained:,}",
            f"{100 * trained / int(first['parameters']):.2f} %", f"{int(first['bytes']):,} bytes", *cost]) + " |")
    write_between(page, START, END, lines)


def _data(classes: range) -> DigitsData:
    """The digits of some classes, whose labels count from 0."""
    data = DigitsData(image_size=32, batch_size=BATCH)
    data.setup("fit")
    for split in ("train", "val", "test"):
        setattr(data, split, [i for i in getattr(data, split) if int(data.labels[i]) in classes])
    data.labels = data.labels - classes.start
    return data


def _pretrained(seed: int, epochs: int) -> Any:
    """The backbone of a seed, trained on the old classes."""
    torch.manual_seed(seed)
    model = timm.create_model(**MODEL, num_classes=CLASSES, drop_path_rate=0.0)
    data = _data(OLD)
    _train(_run(model, 1e-3, epochs * _steps(data)), data, epochs)
    print(f"backbone, seed {seed}: {_accuracy(model, data.test_dataloader()):.4f} on the old classes", flush=True)
    return model


def _prepared(name: str, backbone: Any) -> Any:
    """A copy of the backbone with a fresh head for the new classes, of which what the method trains has gradients."""
    model = copy.deepcopy(backbone)
    model.reset_classifier(0 if name == "ep" else CLASSES)
    if name == "ep":
        pool_tokens(model, "ep", CLASSES)
    options = dict(METHODS[name][1])
    if options:
        adapters.attach(model, options.pop("adapter"), **options)
    elif name != "full":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def _run(model: Any, lr: float, steps: int) -> _Run:
    optimizer = make_optimizer("adamw", model, lr, 0.05)
    schedule = cosine_with_warmup(optimizer, steps, steps // 10)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        adapter = adapters.active_adapter(model)

        def criterion(logits: Tensor) -> Tensor:
            return cross_entropy(logits, labels)

        loss = criterion(model(images)) if adapter is None else adapter.loss(model, images, criterion)
        (loss + sum(auxiliary_losses(model).values())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()

    return _Run(model, step)


def _train(run: _Run, data: DigitsData, epochs: int) -> None:
    for epoch in range(epochs):
        run.model.train()
        for adapter in adapters.adapters_of(run.model).values():
            adapter.begin_epoch(epoch)
        for chosen in torch.tensor(data.train)[torch.randperm(len(data.train))].split(BATCH)[:_steps(data)]:
            run.step(_augmented(data.images[chosen]), data.labels[chosen])


def _steps(data: DigitsData) -> int:
    """Batches of an epoch, which are whole."""
    return len(data.train) // BATCH


def _augmented(images: Tensor) -> Tensor:
    """Each image ``[1, S, S]`` turned, scaled, sheared and shifted a little, in three channels, all at once."""
    turn, shear = (0.17 * torch.rand(2, len(images)) - 0.085).unbind()
    scale, (down, right) = 1 + 0.2 * torch.rand(len(images)) - 0.1, 0.4 * torch.rand(2, len(images)) - 0.2
    rows = [torch.stack(row, dim=-1) for row in (
        (scale, shear - turn, right), (shear + turn, scale, down))]
    grid = nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.expand(-1, 3, -1, -1)


def _tuned(name: str, backbone: Any, data: DigitsData, seed: int, epochs: int, lr: float) -> _Run:
    torch.manual_seed(seed)
    run = _run(_prepared(name, backbone), lr, epochs * _steps(data))
    _train(run, data, epochs)
    return run


@torch.no_grad()
def _accuracy(model: Any, loader: Any) -> float:
    model.eval()
    hits = [(model(images).argmax(dim=1) == labels).float() for images, labels in loader]
    return torch.cat(hits).mean().item()


@torch.no_grad()
def _vote(backbone: Any, data: DigitsData) -> tuple[float, int]:
    """Accuracy of the nearest neighbours' vote by cosine, and the bytes of the features that it keeps."""
    backbone.eval()

    def features(split: list[int]) -> tuple[Tensor, Tensor]:
        images = data.images[split].expand(-1, 3, -1, -1)
        tokens = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        return nn.functional.normalize(tokens, dim=1), data.labels[split]

    known, labels = features(data.train)
    asked, truth = features(data.test)
    near = (asked @ known.T).topk(NEIGHBORS)
    votes = torch.zeros(len(asked), CLASSES).scatter_add_(1, labels[near.indices], (near.values / 0.07).exp())
    return (votes.argmax(dim=1) == truth).float().mean().item(), known.nbytes + labels.to(torch.uint8).nbytes


def _kept(name: str, model: Any) -> tuple[int, int]:
    """How many numbers of the model are kept for these classes, and their bytes: of an adapter those of its file."""
    if not METHODS[name][1]:
        tensors = model.state_dict() if name == "full" else model.get_classifier().state_dict()
        return sum(x.numel() for x in tensors.values()), sum(x.nbytes for x in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        size = adapters.save(model, Path(folder, "adapter.safetensors"))
        shapes = adapters.info(Path(folder, "adapter.safetensors"))["tensors"].values()
    return sum(torch.Size(shape).numel() for shape in shapes), size


def _cost(name: str, backbone: Any, data: DigitsData) -> dict[str, float]:
    """Time of a step in those of full fine-tuning, the median of pairs one after the other, and memory of a step."""
    images, labels = _augmented(data.images[data.train[:BATCH]]), data.labels[data.train[:BATCH]]
    runs = [_run(_prepared(method, backbone).train(), 1e-3, 1000) for method in (name, "full")]
    ratios = []
    for turn in range(TURNS + 2):
        seconds = []
        for run in runs:
            start = time.process_time()
            run.step(images, labels)
            seconds.append(time.process_time() - start)
        if turn > 1:
            ratios.append(seconds[0] / seconds[1])
    peak = peak_memory(lambda: runs[0].step(images, labels), "cpu")
    return {"step": round(statistics.median(ratios), 3), "peak_mib": round(peak, 2)}


if __name__ == "__main__":
    sys.exit(main())
