"""``visionattn demo``: the whole way in a few minutes - train, test, export and look at a small BiFormer on digits.

It runs the commands that a user would type, and says so, with everything under ``runs/demo``. Options are handed to
``fit``, for instance ``visionattn demo --trainer.max_epochs 5``.
"""
import json
import shlex
import time
from pathlib import Path

import torch

from . import cli
from .checkpoint import create_model
from .data import DigitsData
from .data.digits import MEAN, STD
from .visualize import draw_routes

__all__ = ["main"]

CONFIG = Path(__file__).parent / "configs" / "classification" / "digits_biformer.yaml"
_DIGITS = 8  # in the picture


def main(argv: list[str]) -> int:
    """Runs the demo; ``argv`` are options for ``fit``."""
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    run = _fresh_folder(Path("runs/demo"))
    checkpoint = run / "checkpoints" / "best.ckpt"
    start = time.monotonic()
    commands = [
        ["fit", "--config", str(CONFIG), "--trainer.default_root_dir", str(run), *argv],
        ["test", "--config", str(run / "config.yaml"), "--ckpt_path", "best"],
        ["export", "--checkpoint", str(checkpoint), "--out", str(run / "model.onnx")],
    ]
    for command in commands:
        if command[0] == "export":
            command += ["--img-size", str(_digits(run).image_size)]
        print(f"\n$ visionattn {shlex.join(command)}", flush=True)
        if code := cli.main(command):
            return code
    _draw(run, checkpoint)
    _summarise(run, checkpoint, time.monotonic() - start)
    return 0


def _fresh_folder(folder: Path) -> Path:
    """An earlier demo is kept under another name."""
    if folder.exists():
        number = 1
        while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(kept)
        print(f"the earlier {folder} is now {kept}")
    return folder


def _digits(run: Path) -> DigitsData:
    """The data module that the run was trained with."""
    import yaml

    return DigitsData(**yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"])


def _draw(run: Path, checkpoint: Path) -> None:
    data = _digits(run)
    data.setup("test")
    model = create_model(None, checkpoint).eval()
    images, labels = next(iter(data.test_dataloader()))
    images, labels = images[:_DIGITS], labels[:_DIGITS]
    with torch.inference_mode():
        chance, predicted = model(images).softmax(dim=1).max(dim=1)
    titles = [f"{data.class_names[guess]} ({share:.0%}), is {data.class_names[truth]}"
              for guess, share, truth in zip(predicted.tolist(), chance.tolist(), labels.tolist(), strict=True)]
    draw_routes(model, images, run / "routes.png", titles, layer=0, mean=MEAN, std=STD)


def _summarise(run: Path, checkpoint: Path, seconds: float) -> None:
    metrics = json.loads((run / "test_metrics.json").read_text())
    rows = {
        "trained, tested, exported in": f"{seconds / 60:.1f} minutes",
        f"accuracy on {metrics['num_images']} digits never trained on": f"{metrics['accuracy']:.1%}",
        "trained weights": checkpoint,
        "test metrics": run / "test_metrics.json",
        "ONNX model, checked against PyTorch": run / "model.onnx",
        "where the model looks": run / "routes.png",
    }
    print()
    for name, value in rows.items():
        print(f"{name:<48}{value}")
