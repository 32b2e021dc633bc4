"""Times a model of every family beside timm's swin_tiny and convnext_tiny: forward, and one training step.

    python tools/benchmark_families.py

The models take turns, each after an untimed run of its own, and the figures are medians, so that a slow phase of the
machine meets all. Outputs, losses and gradients are checked to be finite before anything is timed.
"""
import argparse
import csv
import fnmatch
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark_models import describe_machine, timed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from visionattn.models import families

__all__ = ["Training", "main", "models"]

SIZE = 224  # of images, in pixels
BESIDE = ("swin_tiny_patch4_window7_224", "convnext_tiny")


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", metavar="PATTERN", default="*", help="only ours of this name")
    parser.add_argument("--batch", type=int, default=4, help="images of a step, and of the second forward pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--output", type=Path, default=Path("results/families_cpu.csv"))
    args = parser.parse_args(argv)
    names = [name for name in models() if fnmatch.fnmatch(name, args.models)]
    if not names:
        parser.error(f"no family has a model {args.models!r} here; there are {', '.join(models())}")
    torch.set_num_threads(args.threads)
    machine = describe_machine()
    trained = {name: Training(name, args.batch) for name in (*BESIDE, *names)}
    columns: dict[str, dict[str, float]] = {}
    for title, run in {
        "forward_1": lambda model: model.forward(1),
        f"forward_{args.batch}": lambda model: model.forward(args.batch),
        f"step_{args.batch}": Training.step,
    }.items():
        seconds = timed({name: partial(run, model) for name, model in trained.items()}, args.repeats)
        columns[title] = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = None
        for name, model in trained.items():
            row: dict[str, Any] = {"model": name, "image": SIZE, "parameters": model.count}
            for title, medians in columns.items():
                row[f"{title}_ms"] = round(medians[name], 1)
                row |= {f"{title}_over_{beside.partition('_patch')[0]}": round(medians[name] / medians[beside], 3)
                        for beside in BESIDE}
            row |= {"runs": args.repeats} | machine
            writer = writer or csv.DictWriter(file, fieldnames=list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            print(f"{name:32}" + "".join(f"  {title} {medians[name]:8.1f} ms" for title, medians in columns.items()))
    print(args.output)
    return 0


def models() -> list[str]:
    """Ours of every family: the first that it is compared with others by, else the first that is no test variant."""
    found = []
    for family, record in families().items():
        others = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        found += [record.peers[0].ours] if record.peers else others[:1]
    return found


class Training:
    """A model with all that a training step takes: AdamW, random images and labels.

    Raises:
        RuntimeError: Logits, loss or a gradient are not finite, or a parameter has no gradient.
    """

    def __init__(self, name: str, batch: int):
        torch.manual_seed(0)
        self.model: nn.Module = timm.create_model(name)
        self.count = sum(parameter.numel() for parameter in self.model.parameters())
        self.images, self.labels = torch.randn(batch, 3, SIZE, SIZE), torch.randint(1000, (batch,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        logits = self.forward(batch)
        if logits.shape != (batch, 1000) or not logits.isfinite().all():
            raise RuntimeError(f"{name}: logits of {list(logits.shape)} are not finite or not of 1000 classes")
        if not self.step().isfinite():
            raise RuntimeError(f"{name}: the loss is not finite")
        wrong = [key for key, parameter in self.model.named_parameters()
                 if parameter.grad is None or not parameter.grad.isfinite().all()]
        if wrong:
            raise RuntimeError(f"{name}: no finite gradient of {', '.join(wrong[:3])}")

    def forward(self, batch: int) -> Tensor:
        """Logits of the first images, in evaluation."""
        self.model.eval()
        with torch.inference_mode():
            return self.model(self.images[:batch])

    def step(self) -> Tensor:
        """One step of training; returns the loss."""
        self.model.train()
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


if __name__ == "__main__":
    sys.exit(main())
