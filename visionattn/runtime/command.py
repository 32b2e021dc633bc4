"""``visionattn run FILE.onnx IMAGE|FOLDER|PATTERN|LIST.txt|-|VIDEO|webcam:0 ...``: an exported file, without PyTorch.

It writes the same files as ``visionattn predict`` does for the run that the file was exported of.
"""
import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .inputs import Input, find_inputs
from .pictures import printable
from .predictor import BasePredictor, Runner
from .say import say
from .sources import with_frames
from .video import webcam_of

__all__ = ["add_options", "main", "predict_files", "progress", "report_faults"]


def main(argv: list[str]) -> int:
    """Runs ``visionattn run``.

    Returns:
        0, or 1 if images could not be read.
    """
    parser = argparse.ArgumentParser(
        prog="visionattn run", description="Predicts on any images with a file of visionattn export, by ONNX Runtime: "
        "without PyTorch and without the run.", epilog="Exits with 1 if an image could not be used. docs/runtime.md "
        "has more.")
    parser.add_argument("file", metavar="FILE", help="an .onnx file of visionattn export")
    add_options(parser, "predictions")
    parser.add_argument("--provider", default="cpu", metavar="NAME",
                        help="where it runs: cpu, cuda (cuda:1 of several) or openvino (default: cpu)")
    args = parser.parse_intermixed_args(argv)
    runner = Runner(args.file, args.provider, args.tile, args.threshold, args.batch_size, args.max_pixels)
    return predict_files(runner, args.images, Path(args.out or "predictions"), args.save_crops)


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds what ``run`` and ``predict`` have in common; ``out`` says where results go by default."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=(
        "image files, folders (images at any depth), patterns ('inbox/**/*.jpg'), lists (LIST.txt, a file a line), - "
        "for a list from the standard input, video files, webcam:0"))
    parser.add_argument("--out", metavar="FOLDER", help=f"where results go (default: {out})")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help=(
        "detection: least score of what is written; multi-label classification: of the classes that an image has"))
    parser.add_argument("--tile", type=int, metavar="SIDE", help=(
        "detection and segmentation: look at overlapping square tiles of this side, in pixels, and merge the results"))
    parser.add_argument("--save-crops", action="store_true", help="detection: cut each detection out, by class")
    parser.add_argument("--batch-size", type=int, metavar="N", help=(
        "images, or tiles, at once (default: 8 of a classifier or tiles, else 1)"))
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest image that is decoded")


def predict_files(
        predictor: BasePredictor, images: Sequence[str], out: Path, crops: bool = False,
        run: Path | None = None) -> int:
    """Predicts on the images that a command names and writes the results.

    Args:
        predictor: The model.
        images: Arguments of the command.
        out: Where results go.
        crops: Cut detections out.
        run: The run folder, whose pictures are not read.

    Returns:
        0, or 1 if images could not be read.
    """
    inputs = find_inputs(images, without=_results(out) + _results(run or out))
    results = predictor.open_results(out, crops)
    left_out = out / "left_out_predict.csv"
    left_out.unlink(missing_ok=True)
    faults = []
    number = 0
    try:
        items = with_frames(inputs, predictor.decoding.max_pixels)
        seen = predictor.predicted(items)
        for number, (item, result, fault) in enumerate(progress(seen, inputs), start=1):
            if result is None:
                faults.append((item.file, fault))
            else:
                assert item.named is not None
                results.add(number, item.named, result)
        said = results.close()
    except KeyboardInterrupt:
        if not any(webcam_of(str(one.file)) is not None for one in inputs):  # which has no other end
            results.abandon()
            raise
        said = results.close()
    except BaseException:
        results.abandon()
        raise
    say(said + ".")
    return report_faults(faults, number, left_out)


def report_faults(faults: Sequence[tuple[str, str]], count: int, left_out: Path) -> int:
    """Writes which of ``count`` images were left out and why, and says it; returns the exit code."""
    if not faults:
        return 0
    left_out.parent.mkdir(parents=True, exist_ok=True)
    with left_out.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("what", "why"), *faults])
    first, why = faults[0]
    say(f"{len(faults)} of {count} images cannot be used and were left out, the first is {printable(first)}: "
        f"{why}; {left_out} lists them.")
    return 1


def progress(seen: Iterable[Any], inputs: Sequence[Input]) -> Iterable[Any]:
    """The same with a bar, where tqdm is installed."""
    try:
        bar: Callable[..., Any] = __import__("tqdm").tqdm
    except ModuleNotFoundError:
        return seen
    return bar(seen, total=len(inputs), unit="image", disable=None)


def _results(folder: Path) -> list[Path]:
    """Where images are, in a run folder or that of a prediction, that are nobody's own."""
    charts = folder.glob("*.png") if (folder / "config.yaml").is_file() else ()
    return [*(folder / name for name in ("pictures", "predictions", "crops")), *charts]
