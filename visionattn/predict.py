"""``visionattn predict RUN IMAGE|FOLDER|PATTERN|LIST.txt|- ...``: what a trained model says of images.

RUN is the folder of a training run, of which the best checkpoint is taken, or a checkpoint of one. Nothing but it and
the images is needed. The older form, ``visionattn predict --config RUN/config.yaml``, goes on working.
"""
import argparse
from pathlib import Path

from .predictor import Predictor
from .runtime.command import add_options, predict_files
from .tasks.run_folder import find_run
from .tasks.summary import write_readme

__all__ = ["main"]

OLDER = ("--config", "--model", "--data", "--trainer", "--ckpt_path", "--print_config")  # options of the older form


def main(argv: list[str]) -> int:
    """Runs ``visionattn predict``.

    Returns:
        0, or 1 if images could not be read.
    """
    if any(argument == "-c" or argument.startswith(OLDER) for argument in argv):
        from .tasks.run import main as run_main

        run_main(["predict", *argv])
        return 0
    args = _parser().parse_intermixed_args(argv)
    if args.run.lower().endswith(".onnx"):
        raise ValueError(f"{args.run} is an exported file: visionattn run {args.run} IMAGE ...")
    run = find_run(args.run)
    predictor = Predictor(
        run.checkpoint, args.device, tile=args.tile, threshold=args.threshold, batch_size=args.batch_size,
        max_pixels=args.max_pixels, half=args.half)
    out = Path(args.out) if args.out else run.folder or Path("predictions")
    code = predict_files(predictor, args.images, out, args.save_crops, run.folder)
    if (out / "config.yaml").is_file():
        write_readme(out)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionattn predict", description="Predicts on any images with a trained model. Needs the run, or its "
        "checkpoint, and the images only.", epilog="Exits with 1 if an image could not be used. The older form takes a "
        "configuration: visionattn predict --config RUN/config.yaml --data.init_args.predict_root FOLDER. "
        "docs/predict.md has more.")
    parser.add_argument(
        "run", metavar="RUN", help="folder of a training run (its best checkpoint is taken), or a .ckpt")
    add_options(parser, "the run folder; 'predictions' for a checkpoint without one")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--half", action="store_true", help="half precision: float16 on a GPU, bfloat16 on the CPU")
    return parser
