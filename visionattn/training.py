"""``visionattn train FOLDER``: from a folder of data to a model that is trained, tested, exported and shown at work.

Task, reader, recipe and sizes are chosen by the data; the ``fit`` command that is the same is printed.
"""
import argparse
import json
import math
import os
import shlex
import statistics
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from huggingface_hub import constants as hub

from . import export, predict
from .data.guess import DataKind, guess_data
from .data.segmentation_folder import SegmentationFolderData
from .runtime.folders import is_image, visible_files
from .runtime.pixels import Decoding
from .tasks import run as run_cli
from .tasks.summary import write_readme
from .weights import check_name

__all__ = ["TrainedRun", "main", "train"]

# Small and quick on a CPU, and they learn something from few images without trained weights, too: the first has the
# better part of its layers at stride 16 and beyond, the other maps of stride 4 to 32.
MODELS = {"classification": "efficientvit_cga_m1", "detection": "regnety_002", "segmentation": "regnety_002"}
RECIPES = {
    "ImageFolderData": "imagefolder_finetune", "CsvData": "csv_finetune", "CocoData": "coco_finetune",
    "YoloData": "yolo_finetune", "VocData": "voc_finetune", "SegmentationFolderData": "folder_finetune",
}
FEWER = "; expect less than with trained ones, above all of few images (take a file by --model.checkpoint_path FILE)"
LOOKED_AT = 200  # images whose size is looked at
SHOWN = 24  # images whose predictions are drawn
SHOWN_LIST = "shown.txt"  # their names, in the run folder
FEW = 2000  # images, below which a run is made to take minutes
STEP = 32  # lengths of images are multiples of it


class TrainedRun(NamedTuple):
    """What a training left.

    Attributes:
        folder: The run folder, in which the other files are.
        metrics: Those of the test images, as in ``test_metrics.json``.
        checkpoint: The best weights.
        exported: The ONNX file; None where there is none.
        command: The ``visionattn fit`` command that is the same.
    """

    folder: Path
    metrics: dict[str, Any]
    checkpoint: Path
    exported: Path | None
    command: str


def main(argv: list[str]) -> int:
    """Runs ``visionattn train``."""
    parser = argparse.ArgumentParser(
        prog="visionattn train", usage="visionattn train FOLDER [--model NAME] [--task TASK] [OPTIONS OF FIT]",
        allow_abbrev=False, description="Trains a model on a folder (or COCO's JSON file, or YOLO's data.yaml), tests "
        "and exports it and draws what it predicts. Says what the folder is taken for, and which fit command is the "
        "same. Further options are those of fit, such as --trainer.max_epochs 10, or --resume auto, which goes on with "
        "the folder's run (visionattn fit --help).")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--model", metavar="NAME", help=(
        f"any model of timm's or ours (default: {', '.join(f'{name} for {task}' for task, name in MODELS.items())})"))
    parser.add_argument("--task", choices=["classification", "detection", "segmentation"],
                        help="what the data are for (guessed if not given)")
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise argparse.ArgumentError(None, f"visionattn train begins with the folder: train FOLDER {argv[0]} ...")
    args, options = parser.parse_known_args(argv)
    _train(args.folder, args.model, args.task, options)
    return 0


def train(folder: str | Path, model: str | None = None, task: str | None = None, **options: Any) -> TrainedRun:
    """Trains a model on a folder as ``visionattn train`` does.

    Args:
        folder: The data, or COCO's JSON file, or YOLO's ``data.yaml``.
        model: Name of any model of timm's or ours; None for a small one.
        task: ``classification``, ``detection`` or ``segmentation``; None: guessed.
        options: Options of ``visionattn fit``; in their names ``__`` stands for the dot: ``trainer__max_epochs=10``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds nothing to train on, something in it is wrong, or there is no such model or option.
    """
    return _train(folder, model, task, _arguments({name.replace("__", "."): x for name, x in options.items()}))


def _train(folder: str | Path, model: str | None, task: Any, options: list[str]) -> TrainedRun:
    kind, given = guess_data(folder, task), _named(options)
    _say(f"{folder}: {kind.task}, read by {kind.module}: {kind.why}.")
    if given.get("trainer.devices", "1") not in ("1", "auto"):
        raise ValueError("train runs on one device: for several run the fit command that it prints without the option")
    offline = hub.HF_HUB_OFFLINE  # which may be set on the way
    try:
        return _train_as(kind, folder, model, given, options)
    finally:
        hub.HF_HUB_OFFLINE = offline


def _train_as(
        kind: DataKind, folder: str | Path, model: str | None, given: dict[str, str], options: list[str]) -> TrainedRun:
    images = _look(Path(kind.arguments["root"]), int(given.get("data.in_chans", 3)))
    resumes = given.get("resume") == "auto"
    run = Path(given.get("trainer.default_root_dir") or _free_folder(Path(folder), resumes or "ckpt_path" in given))
    config = run / "config.yaml"
    if resumes and config.is_file() and any((run / "checkpoints").glob("*.ckpt")):
        # What was chosen at first: the weights that it starts from, for one, may no longer be there to be fetched.
        named = ["--model.backbone", model] if model else []
        argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(run), *named, *options]
    else:
        chosen = _choose(kind, model, given, images) | {"trainer.default_root_dir": str(run), "trainer.devices": 1}
        settings = {name: value for name, value in chosen.items() if name not in given}
        argv = ["fit", "--config", RECIPES[kind.module], *_arguments(settings), *options]
    command = f"visionattn {shlex.join(argv)}"
    _say(f"The same as:\n  {command}\n")
    data = run_cli.launch(argv)

    checkpoint, exported = run / "checkpoints" / "best.ckpt", run / "model.onnx"
    if not checkpoint.is_file():  # as with fast_dev_run
        return TrainedRun(run, {}, checkpoint, None, command)
    written = run / "test_metrics.json"
    metrics = json.loads(written.read_text()) if written.is_file() else {}
    if resumes and _are_in_order(checkpoint, run / SHOWN_LIST, run / "README.txt"):  # which is written at the end
        trained = TrainedRun(run, metrics, checkpoint, exported if exported.is_file() else None, command)
        _summarise(trained)
        return trained
    trained = TrainedRun(run, metrics, checkpoint, _export(kind, images, run, checkpoint), command)
    if metrics:
        data.setup("test")  # which a training that had ended before left out
        _predict(run, data)
    write_readme(run)
    _summarise(trained)
    return trained


def _named(argv: list[str]) -> dict[str, str]:
    """The options of a command line by their names, without the ``init_args`` that may stand in them."""
    given = {}
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            given[name.replace(".init_args.", ".")] = value if equals else following
    return given


def _arguments(settings: dict[str, Any]) -> list[str]:
    """A command line of options."""
    return [part for name, value in settings.items()
            for part in (f"--{name}", str(value) if isinstance(value, (str, Path)) else json.dumps(value))]


def _free_folder(data: Path, taken: bool) -> Path:
    """A run folder named after the data; a number is added unless it may be ``taken``, as by a run to go on with."""
    folder = runs_folder = Path("runs") / (data.resolve().stem if data.is_file() else data.resolve().name)
    number = 1
    while folder.exists() and not taken:
        number += 1
        folder = runs_folder.with_name(f"{runs_folder.name}-{number}")
    return folder


class _Images(NamedTuple):
    """Images as a whole: their number, and the medians of their shorter and longer sides."""

    number: int
    short: int
    long: int
    landscape: bool  # most are wider than high

    def describe(self) -> str:
        """Their number and size."""
        return f"{self.number} image files, in the middle {self.short} x {self.long} pixels"


def _look(root: Path, channels: int) -> _Images:
    """Looks at the images of so many channels below a folder, or beside a file."""
    files = [file for file in visible_files(root if root.is_dir() else root.parent) if is_image(file)]
    looks = [Decoding(channels=channels).look(file) for file in files[::math.ceil(len(files) / LOOKED_AT) or 1]]
    sizes = [look.size for look in looks if not look.fault] or [(512, 512)]
    return _Images(len(files), round(statistics.median(map(min, sizes))), round(statistics.median(map(max, sizes))),
                   2 * sum(width >= height for width, height in sizes) >= len(sizes))


def _choose(kind: DataKind, model: str | None, given: dict[str, str], images: _Images) -> dict[str, Any]:
    """What is set beside the recipe, by the data, the model and the machine; says why."""
    settings: dict[str, Any] = {f"data.{name}": value for name, value in kind.arguments.items()}
    if kind.module == "SegmentationFolderData":
        settings |= _mask_options(kind, given)
    backbone = model or given.get("model.backbone", MODELS[kind.task])
    check_name(backbone)
    settings["model.backbone"] = backbone
    trained = given.get("model.pretrained") == "true" or "model.checkpoint_path" in given
    if not trained and "model.pretrained" not in given:
        trained = settings["model.pretrained"] = _fetch_weights(backbone)
    settings["data.num_workers"] = min(8, (os.cpu_count() or 1) // 2)
    large = torch.cuda.is_available()
    choose = {"classification": _for_classes, "detection": _for_boxes, "segmentation": _for_masks}[kind.task]
    return settings | choose(backbone, images, trained, large)


def _for_classes(backbone: str, images: _Images, trained: bool, large: bool) -> dict[str, Any]:
    """Settings of a classifier; ``trained``: its weights are, ``large``: the machine is made for large models."""
    cfg = timm.get_pretrained_cfg(backbone)
    side = _multiple(min(images.short, 224 if trained or large else 160))
    if cfg is not None and cfg.fixed_input_size:
        side = cfg.input_size[-1]
    _say(f"{images.describe()}: {backbone} sees {side} x {side}.")
    few = images.number < FEW
    settings: dict[str, Any] = {"data.image_size": side, "data.batch_size": 16 if few and not large else 64}
    if few:  # which a strong augmentation keeps from being learned at all
        settings |= {"data.scale": [0.5, 1.0], "data.auto_augment": None, "data.random_erasing": 0.0,
                     "model.mixup": 0.0, "model.cutmix": 0.0}
    return settings | ({} if trained else {"model.lr": 2e-3, "model.layer_decay": None})


def _for_boxes(backbone: str, images: _Images, trained: bool, large: bool) -> dict[str, Any]:
    """The same of a detector."""
    side = _multiple(min(images.short, 640 if large else 256))
    longest = _multiple(side * min(max(images.long / images.short, 1.6), 2.5))
    _say(f"{images.describe()}: {backbone} sees them with a shorter side of {side}.")
    sides = [_multiple(0.75 * side), side + STEP, side]  # evaluation takes the last
    settings: dict[str, Any] = {"model.min_size": sides, "model.max_size": longest}
    if not large:
        settings |= {"model.fpn_channels": 64} | ({"trainer.max_epochs": 20} if images.number < FEW else {})
    return settings | ({} if trained else {"model.lr": 1.5e-3})


def _for_masks(backbone: str, images: _Images, trained: bool, large: bool) -> dict[str, Any]:
    """The same of a segmenter."""
    side = _multiple(min(images.short, 512 if large else 256))
    _say(f"{images.describe()}: {backbone} sees them with a shorter side of {side}.")
    settings: dict[str, Any] = {"data.crop_size": side, "data.short_side": side}
    if not large:
        settings |= {"model.head_channels": 64, "model.auxiliary_weight": 0.0}
        settings |= {"trainer.max_epochs": 16} if images.number < FEW else {}
    return settings | ({} if trained else {"model.lr": 1e-3})


def _multiple(length: float) -> int:
    return max(round(length / STEP), 1) * STEP


def _mask_options(kind: DataKind, given: dict[str, str]) -> dict[str, Any]:
    """Options for masks whose values are not the numbers of classes, unless the user says what they mean."""
    options = ("mask_values", "mask_colors", "mask_nearest", "class_names", "layout")
    if kind.arguments.get("layout") or any(f"data.{name}" in given for name in options):
        return {}
    places: dict[str, Any] = {
        name: given[f"data.{name}"] for name in ("image_folder", "mask_folder", "image_name", "mask_name")
        if f"data.{name}" in given}
    found, values = SegmentationFolderData(
        **kind.arguments, **places, num_workers=0, class_names=["", ""]).found_options()
    if found:
        _say(f"The masks have {values}: each is taken as a class ({', '.join(f'{k} {v}' for k, v in found.items())}).")
    return {f"data.{name}": value for name, value in found.items()}


def _fetch_weights(backbone: str) -> bool:
    """Fetches published weights of a model to where fit finds them; False, and one line, where there are none."""
    cfg = timm.get_pretrained_cfg(backbone)
    if cfg is None or not cfg.has_weights:
        _say(f"{backbone} has no published weights: it starts from fresh ones{FEWER}")
        return False
    if cfg.hf_hub_id and not _reachable(hub.ENDPOINT):
        hub.HF_HUB_OFFLINE = True  # takes what was fetched before, and spares five tries for each file
    try:
        timm.create_model(backbone, pretrained=True)
    except Exception as error:  # whatever a network, a server or a damaged file lead to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason.removeprefix(f"{backbone}: ").partition("; if you have")[0]
        _say(f"The weights of {backbone} cannot be had ({reason}): it starts from fresh ones{FEWER}")
        return False
    return True


def _reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _export(kind: DataKind, images: _Images, run: Path, checkpoint: Path) -> Path | None:
    """Writes the ONNX file for images like those of the data; says why where there is none."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    if kind.task == "classification":
        size = [data["image_size"]]
    else:
        sides = model["min_size"] if kind.task == "detection" else data["short_side"] or images.short
        short = sides[-1] if isinstance(sides, list) else sides
        size = [_multiple(short), _multiple(short * images.long / images.short)]
        size = size if images.landscape else size[::-1]
    exported = run / "model.onnx"
    try:
        _run(export.main, "export", "--checkpoint", checkpoint, "--img-size", *size, "--out", exported)
    except (ImportError, ValueError, RuntimeError) as error:
        _say(f"No ONNX file was written: {' '.join(str(error).split())}")
        return None
    return exported


def _predict(run: Path, data: Any) -> None:
    """Draws predictions of some test images, evenly chosen, whose list stays in the run folder."""
    if hasattr(data, "samples"):
        files = [file for file, _ in data.samples["test"]]
    elif hasattr(data, "records"):
        files = [record.file for record in data.records["test"]]
    else:
        files = [pair.image for pair in data.pairs["test"]]
    shown = files[::math.ceil(len(files) / SHOWN)]
    listing = run / SHOWN_LIST
    listing.write_text("".join(f"{Path(file).resolve()}\n" for file in shown), "utf-8", "surrogateescape")
    _run(predict.main, "predict", run, listing)


def _are_in_order(*files: Path) -> bool:
    """Whether all files are there, and none is older than the one before."""
    times = [file.stat().st_mtime_ns for file in files if file.is_file()]
    return len(times) == len(files) and times == sorted(times)


def _run(command: Callable[[list[str]], Any], *arguments: object) -> None:
    """Shows a command and runs it."""
    argv = [str(argument) for argument in arguments]
    _say(f"\n$ visionattn {shlex.join(argv)}")
    command(argv[1:])


def _summarise(trained: TrainedRun) -> None:
    measured = {name: value for name, value in trained.metrics.items() if isinstance(value, float)}
    rows: dict[str, object] = {f"{name} on {trained.metrics['num_images']} test images": f"{value:.4f}"
                               for name, value in measured.items()}
    rows |= {"best weights": trained.checkpoint, "ONNX model, checked against PyTorch": trained.exported or "none",
             "everything": trained.folder}
    _say("\n" + "\n".join(f"{name:<44}{value}" for name, value in rows.items()))


def _say(text: str) -> None:
    """Prints names of files too that are no text."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
