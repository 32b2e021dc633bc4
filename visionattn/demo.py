"""``visionattn demo [TASK] [OPTIONS]``: the whole way in a few minutes, with a small net on scanned digits.

TASK is one of

  classification   train and test a BiFormer, export it and look where it looks (this is done if no TASK is given)
  detection        train and test FCOS over a BiFormer on scenes composed of digits, and draw what it finds
  segmentation     train and test UPerNet over a DiNAT on such scenes, and draw their label maps

It runs the commands that a user would type, and says so, with everything under runs/demo or runs/demo-TASK. OPTIONS
are handed to fit, for instance: visionattn demo detection --trainer.max_epochs 5
"""
import argparse
import json
import shlex
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pad, pil_to_tensor
from torchvision.utils import make_grid

from . import cli
from .analysis import draw_routes
from .data import DigitsData
from .data.digits import MEAN, STD
from .tasks.rebuild import create_model
from .tasks.summary import write_readme

__all__ = ["main"]

_CONFIGS = Path(__file__).parent / "configs"
_DIGITS = 8  # in the picture of the routes
_SCENES, _ACROSS = 12, 4  # pictures on a sheet and in a row of it


class _Demo(NamedTuple):
    config: str
    run: str
    shorter: list[str]  # options that make a demo of the recipe: fewer epochs, and scenes from which it learns sooner
    figures: dict[str, str]  # what to say of the test metrics


_DEMOS = {
    "classification": _Demo(
        "classification/digits_biformer.yaml", "runs/demo", [],
        {"accuracy": "accuracy on {} digits never trained on"}),
    "detection": _Demo(
        "detection/digits_biformer_fcos.yaml", "runs/demo-detection",
        ["--trainer.max_epochs", "16", "--data.init_args.batch_size", "8", "--data.init_args.digits", "[1, 3]",
         "--data.init_args.digit_size", "[32, 52]"],
        {"box_map_50": "box AP50 on {} scenes of digits never trained on", "box_map": "box AP (IoU 0.5 to 0.95)"}),
    "segmentation": _Demo(
        "segmentation/digits_dinat_upernet.yaml", "runs/demo-segmentation",
        ["--trainer.max_epochs", "8", "--data.init_args.digits", "[2, 4]",
         "--model.init_args.class_weights", "[0.1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"],
        {"miou": "mean IoU on {} scenes of digits never trained on", "accuracy": "pixels with the right class"}),
}


def main(argv: list[str]) -> int:
    """Runs a demo; ``argv`` are its task and options for ``fit``."""
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    task, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("classification", argv)
    if task not in _DEMOS:
        raise argparse.ArgumentError(None, f"there is no demo of {task!r}; there are {', '.join(_DEMOS)}")
    demo = _DEMOS[task]
    run = _fresh_folder(Path(demo.run))
    start = time.monotonic()
    # On one device: the processes of further ones would be demos of their own.
    code = _visionattn("fit", "--config", _CONFIGS / demo.config, "--trainer.default_root_dir", run,
                       "--trainer.devices", 1, *demo.shorter, *options)
    results: dict[str, Path] = {}
    if not code and task == "classification":
        code, results = _export_and_draw(run)
    elif not code:
        code, results = _predict_and_draw(run, task)
    if not code:
        write_readme(run)
        _summarise(demo, run, results, time.monotonic() - start)
    return code


def _fresh_folder(folder: Path) -> Path:
    """An earlier demo is kept under another name."""
    if folder.exists():
        number = 1
        while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(kept)
        print(f"the earlier {folder} is now {kept}")
    return folder


def _visionattn(*arguments: object) -> int:
    """Shows a command and runs it."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ visionattn {shlex.join(command)}", flush=True)
    return cli.main(command)


def _export_and_draw(run: Path) -> tuple[int, dict[str, Path]]:
    """The ONNX file and the picture of the routes: the exit code, and where they are."""
    import yaml

    data = DigitsData(**yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"])
    checkpoint, exported, picture = run / "checkpoints" / "best.ckpt", run / "model.onnx", run / "routes.png"
    code = _visionattn("export", "--checkpoint", checkpoint, "--out", exported, "--img-size", data.image_size)
    if code:
        return code, {}
    data.setup("test")
    model = create_model(None, checkpoint).eval()
    images, labels = next(iter(data.test_dataloader()))
    images, labels = images[:_DIGITS], labels[:_DIGITS]
    with torch.inference_mode():
        chance, predicted = model(images).softmax(dim=1).max(dim=1)
    titles = [f"{data.class_names[guess]} ({share:.0%}), is {data.class_names[truth]}"
              for guess, share, truth in zip(predicted.tolist(), chance.tolist(), labels.tolist(), strict=True)]
    draw_routes(model, images, picture, titles, layer=0, mean=MEAN, std=STD)
    return 0, {"ONNX model, checked against PyTorch": exported, "where the model looks": picture}


def _predict_and_draw(run: Path, task: str) -> tuple[int, dict[str, Path]]:
    """Predictions of a few test scenes and their pictures on one sheet: the exit code, and where they are."""
    code = _visionattn("predict", "--config", run / "config.yaml", "--ckpt_path", "best",
                       "--trainer.limit_predict_batches", 2)
    if code:
        return code, {}
    files = sorted((run / "pictures").glob("*.png"))[:_SCENES]
    pictures = [pil_to_tensor(Image.open(file)) for file in files]
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    pictures = [pad(picture, [0, 0, width - picture.shape[2], height - picture.shape[1]], 255) for picture in pictures]
    sheet = make_grid(pictures, nrow=_ACROSS, padding=8, pad_value=255)
    Image.fromarray(sheet.movedim(0, -1).numpy()).save(run / "sheet.png")
    if task == "detection":
        predictions = {"detections, as COCO has results": run / "predictions.json"}
    else:
        predictions = {"label maps": run / "predictions"}
    return 0, predictions | {"pictures of them": run / "pictures", "some on one sheet": run / "sheet.png"}


def _summarise(demo: _Demo, run: Path, results: dict[str, Path], seconds: float) -> None:
    metrics = json.loads((run / "test_metrics.json").read_text())
    rows: dict[str, object] = {"everything took": f"{seconds / 60:.1f} minutes"}
    rows |= {text.format(metrics["num_images"]): f"{metrics[key]:.1%}" for key, text in demo.figures.items()}
    rows |= {"trained weights": run / "checkpoints" / "best.ckpt", "test metrics": run / "test_metrics.json", **results}
    print()
    for name, value in rows.items():
        print(f"{name:<52}{value}")
