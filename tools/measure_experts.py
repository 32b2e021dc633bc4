"""Trains one Modular ViT on two tasks made of digits, and cuts it to each: accuracy, parameters, time.

    python tools/measure_experts.py                                      # a few processor minutes
    python tools/measure_experts.py --page docs/models/modular_vit.md    # the table in the page, no more

The tasks: ``read`` scanned digits; ``count`` the digits of a scene, one to three. A step is a batch of one of them,
in turns; the backbone is one, each task has its routers and a linear classifier. The scans of test images are in no
training image. Parameters are those of the backbone with one task's classifier, before the cut with the routers of
all tasks. Time is that of a processor, the least of some turns that the models take one after the other: of PyTorch,
which sorts tokens by expert, and of the ONNX file in ONNX Runtime, where all experts see all tokens; without a cut
nothing else than the routers depends on the task.
"""
import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from rows import read_rows, write_between, write_rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from visionattn import export
from visionattn.data import DigitScenesData, DigitsData
from visionattn.data.digits import MEAN, STD
from visionattn.layers import auxiliary_losses, cut_to_task
from visionattn.layers.experts import expert_counts

__all__ = ["main", "write_table"]

CLASSES = {"read": 10, "count": 3}
MODEL: dict[str, Any] = dict(
    img_size=32, patch_size=4, attn_experts=8, mlp_experts=8, router_losses=(0., 0.001, 0.1))
BATCH = 32
START, END = "<!-- measured experts -->", "<!-- end of measured experts -->"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of training, for each task")
    parser.add_argument("--thresholds", nargs="+", type=float, default=(0.05, 0.15))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", nargs=3, type=float, default=MODEL["router_losses"],
                        help="weights of balance, z-loss and mutual information")
    parser.add_argument("--out", type=Path, default=Path("results/experts.csv"), help="CSV file, written anew")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    options = MODEL | {"router_losses": tuple(args.losses), "tasks": list(CLASSES)}
    backbone = timm.create_model("test_modular_vit", num_classes=0, **options)
    heads = nn.ModuleDict({task: nn.Linear(backbone.num_features, classes) for task, classes in CLASSES.items()})
    train(backbone, heads, args.steps, args.seed)
    rows: list[dict[str, Any]] = []
    for task in CLASSES:
        rows += [{"seed": args.seed, "steps": args.steps, **row}
                 for row in compare(backbone, heads[task], task, args.thresholds)]
        write_rows(args.out, rows)
    return 0


def train(backbone: Any, heads: nn.ModuleDict, steps: int, seed: int) -> None:
    """Trains on a batch of each task in turn, ``steps`` times."""
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=len(CLASSES) * steps, pct_start=0.15, cycle_momentum=False)
    batches = {task: training_batches(task, seed) for task in CLASSES}
    losses = dict.fromkeys(CLASSES, 0.)
    backbone.train()
    for step in range(steps):
        for task in CLASSES:
            images, labels = next(batches[task])
            backbone.set_task(task)
            optimizer.zero_grad()
            loss = cross_entropy(heads[task](backbone(images)), labels, label_smoothing=0.1)
            losses[task] += loss.item()
            (loss + sum(auxiliary_losses(backbone).values())).backward()
            nn.utils.clip_grad_norm_(parameters, 1.)
            optimizer.step()
            schedule.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"step {step + 1}: " + ", ".join(f"{task} {x / (step % 100 + 1):.3f}" for task, x in losses.items()),
                  flush=True)
            losses = dict.fromkeys(CLASSES, 0.)
    backbone.eval()


def training_batches(task: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end."""
    loader = _data(task, seed).train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            yield _counted(images, labels) if task == "count" else (images, labels)


def test_set(task: str) -> tuple[Tensor, Tensor]:
    """All test images of a task."""
    parts = list(_data(task, 0).test_dataloader())
    if task == "count":
        parts = [_counted(*part) for part in parts]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _data(task: str, seed: int) -> Any:
    if task == "count":
        data: Any = DigitScenesData(
            image_size=32, batch_size=BATCH, seed=seed, digits=(1, CLASSES["count"]), digit_size=(9, 12))
    else:
        data = DigitsData(image_size=32, batch_size=BATCH, seed=seed)
    data.setup("fit")
    return data


def _counted(images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return (torch.stack(images) - MEAN) / STD, torch.tensor([len(target["boxes"]) - 1 for target in targets])


@torch.inference_mode()
def compare(backbone: Any, head: nn.Module, task: str, thresholds: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row for the whole model and for each cut of it."""
    backbone.set_task(task)
    models = {"": backbone} | {str(share): cut_to_task(backbone, task, share) for share in thresholds}
    images, labels = test_set(task)
    whole = 0
    rows, runs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for threshold, model in models.items():
            both = nn.Sequential(model, head).eval()
            parameters = sum(x.numel() for x in both.parameters())
            whole = whole or parameters
            logits = torch.cat([both(part) for part in images.split(100)])
            counts = expert_counts(model)
            rows.append({
                "task": task, "threshold": threshold, "attn_experts": " ".join(map(str, counts["attn"])),
                "mlp_experts": " ".join(map(str, counts["mlp"])), "parameters": parameters,
                "share": round(parameters / whole, 4),
                "accuracy": round((logits.argmax(1) == labels).float().mean().item(), 4)})
            print(rows[-1], flush=True)
            runs[threshold] = [lambda both=both: both(images[:BATCH]), _onnx(model, Path(folder), images[:BATCH])]
        for row, times in zip(rows, _times(list(runs.values())), strict=True):
            row |= {"ms": f"{times[0]:.3g}", "onnx_ms": f"{times[1]:.3g}"}
    return rows


def _onnx(model: Any, folder: Path, images: Tensor) -> Callable[[], Any]:
    """A run of the exported backbone."""
    export.export_onnx(model, folder / "model.onnx", (32, 32))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return lambda: session.run(None, {"images": images.numpy()})


def _times(runs: list[list[Callable[[], Any]]], turns: int = 15) -> list[list[float]]:
    """Milliseconds of the processor of each run."""
    best = [[float("inf")] * len(pair) for pair in runs]
    for _, i, j in itertools.product(range(turns), range(len(runs)), range(len(runs[0]))):
        start = time.process_time()
        runs[i][j]()
        best[i][j] = min(best[i][j], 1e3 * (time.process_time() - start))
    return best


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    rows = read_rows(source)
    lines = ["| task | experts chosen by | attention, perceptron | parameters | accuracy, % | ms, PyTorch | ms, ONNX |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        kept = ", ".join(row[key].replace(" ", "+") for key in ("attn_experts", "mlp_experts"))
        cut = f"{100 * float(row['threshold']):g} % of tokens" if row["threshold"] else "whole model"
        share = f"{int(row['parameters']):,} ({100 * float(row['share']):.0f} %)"
        lines.append(f"| {row['task']} | {cut} | {kept} | {share} | {100 * float(row['accuracy']):.1f} | {row['ms']} | "
                     f"{row['onnx_ms']} |")
    write_between(page, START, END, lines)


if __name__ == "__main__":
    sys.exit(main())
