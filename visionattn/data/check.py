"""``visionattn check-data``: what is wrong with data, and what they look like, without training."""
import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .. import data
from ..runtime.pixels import picture_of
from .dense_transforms import IGNORE
from .detection import DetectionData
from .guess import DataKind, guess_data
from .loading import LoadedData
from .reading import read_image

__all__ = ["check", "contact_sheet", "main"]

SHOWN = 30  # faults that are said one by one; the file has all
TILES, COLUMNS, SIDE, CAPTION = 10, 5, 320, 36  # of the contact sheet; lengths in pixels
PALETTE = [
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (128, 0, 0), (128, 128, 0), (255, 225, 25),
]


def main(argv: list[str]) -> int:
    """Runs ``visionattn check-data``.

    Returns:
        0 if nothing is wrong, 1 if something is left out or mended or the data cannot be used at all.
    """
    parser = argparse.ArgumentParser(
        prog="visionattn check-data", description="Checks a folder of images (or COCO's JSON file, or YOLO's data.yaml)"
        " as a training would: a table of splits and classes, what is wrong by file, and a picture of ten images with"
        " their labels, boxes or masks. Exits with 1 if anything is wrong.")
    parser.add_argument("path", metavar="FOLDER|FILE")
    parser.add_argument("--task", choices=["classification", "detection", "segmentation"],
                        help="what the data are for (guessed if not given)")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help=(
        'further options of the data module, such as \'{"mask_values": [0, 255]}\''))
    parser.add_argument("--out", metavar="FOLDER", default="data_check", help=(
        "where sheet.png and left_out.csv go (default: data_check)"))
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.resolve().is_relative_to(Path(args.path).resolve()):
        raise ValueError(f"{out} lies in {args.path}: its picture would be taken for data; name another folder by "
                         "--out")
    kind = guess_data(args.path, args.task)
    _say(f"{args.path}: {kind.task}, read by {kind.module}: {kind.why}.")
    module, error = check(kind, **args.options)
    if module.report.splits:
        _say(module.report.text())
    faults = _list_faults(module, out)
    if error:
        raise error
    contact_sheet(module).save(out / "sheet.png")
    _say(f"Pictures of the training images are in {out / 'sheet.png'}.")
    return int(bool(faults))


def check(kind: DataKind, **options: Any) -> tuple[LoadedData, Exception | None]:
    """Reads and checks all splits of data; masks of a detection set too, where all its objects have some.

    Args:
        kind: Of the data.
        options: Further arguments of the data module.

    Returns:
        The data module, in whose ``report`` is what is wrong; and why nothing can be trained on the data, or None.

    Raises:
        FileNotFoundError: Data are missing.
        ValueError: The data cannot be told apart; the message says why.
    """
    constructor = getattr(data, kind.module)
    arguments = {"num_workers": 0, "on_error": "skip"} | kind.arguments | options
    module, error = _read(constructor, arguments)
    if isinstance(module, DetectionData) and not error and "masks" not in options and module.outlined[True]:
        if module.outlined[False]:
            module.report.notes.append(f"{module.outlined[True]} of {module.outlined.total()} objects have a mask or "
                                       "polygons: boxes alone are checked.")
        else:
            return _read(constructor, arguments | {"masks": True})
    return module, error


def contact_sheet(module: LoadedData) -> Image.Image:
    """A picture of ten training images, evenly chosen, with their labels, boxes or masks."""
    tiles = [_tile(picture, caption) for picture, caption in _examples(module)]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, max(rows, 1) * (SIDE + CAPTION)), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % COLUMNS * SIDE, index // COLUMNS * (SIDE + CAPTION)))
    return sheet


def _read(constructor: Any, arguments: dict[str, Any]) -> tuple[LoadedData, Exception | None]:
    module, errors = constructor(**arguments), []
    for stage in ("validate", "test", "fit"):
        try:
            module.setup(stage)
        except (ValueError, OSError) as error:
            errors.append(error)
    return module, errors[-1] if errors else None


def _say(text: str) -> None:
    """Prints names of files too that are no text."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _list_faults(module: LoadedData, out: Path) -> int:
    """Says and writes what is left out or mended; returns how much."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("left_out.csv", "sheet.png"):  # of an earlier check
        (out / name).unlink(missing_ok=True)
    faults = [(split, *fault) for split, part in module.report.splits.items() for fault in part.left_out]
    for split, what, why, became in faults[:SHOWN]:
        _say(f"{split}: {what}: {why}: {became}")
    if faults:
        module.report.write(out / "left_out.csv")
        _say(f"{module.report.left_out()} files or records are left out or mended; {out / 'left_out.csv'} lists them.")
    return len(faults)


def _examples(module: Any) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of training images with what is annotated drawn on them, and captions."""
    names = module.class_names
    if hasattr(module, "samples"):
        samples = module.samples["train"]
        for file, label in _spread(samples):
            classes = ", ".join(names[one] for one in label) if module.multi_label else names[label]
            yield read_image(file, "", module.decoding), f"{classes}: {file.name}"
        return
    dataset = copy.copy(module.val_dataloader().dataset)  # without random transforms
    if hasattr(module, "records"):
        dataset.records = module.records["train"]
        for index in _spread(range(len(dataset))):
            image, target = dataset[index]
            yield _with_objects(pil_to_tensor(picture_of(image.numpy())), target, names), target["file_name"]
        return
    dataset.pairs = module.pairs["train"]
    for index in _spread(range(len(dataset))):
        image, labels = dataset[index]
        picture, caption = _with_labels(pil_to_tensor(picture_of(image.numpy())), labels, names)
        yield picture, f"{Path(dataset.pairs[index].image).name}: {caption}"


def _spread(items: Any) -> list[Any]:
    count = min(TILES, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def _with_objects(image: Tensor, target: dict[str, Any], names: list[str]) -> Image.Image:
    labels = target["labels"].tolist()
    if labels:
        colours = [PALETTE[label % len(PALETTE)] for label in labels]
        if "masks" in target:
            image = draw_segmentation_masks(image, target["masks"].bool(), alpha=0.5, colors=colours)
        width = max(1, round(max(image.shape[-2:]) / 200))
        image = draw_bounding_boxes(image, target["boxes"], colors=colours, width=width)
    picture = to_pil_image(image)
    draw, size = ImageDraw.Draw(picture), max(10, round(max(picture.size) / 22))
    for label, (left, top, *_) in zip(labels, target["boxes"].tolist(), strict=True):
        draw.text((left + 2, top), names[label - 1], PALETTE[label % len(PALETTE)], ImageFont.load_default(size),
                  stroke_width=1, stroke_fill="black")
    return picture


def _with_labels(image: Tensor, labels: Tensor, names: list[str]) -> tuple[Image.Image, str]:
    labels = interpolate(labels[None, None].float(), size=image.shape[-2:], mode="nearest")[0, 0].long()
    present = [label for label in labels.unique().tolist() if label != IGNORE]
    if present:
        masks = torch.stack([labels == label for label in present])
        colours = [PALETTE[label % len(PALETTE)] for label in present]
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colours)
    return to_pil_image(image), ", ".join(names[label] for label in present)


def _tile(picture: Image.Image, caption: str) -> Image.Image:
    picture = to_pil_image(pil_to_tensor(picture))
    picture.thumbnail((SIDE - 8, SIDE - 8)) if max(picture.size) > SIDE - 8 else None
    if max(picture.size) < (SIDE - 8) // 2:  # small images are shown larger
        zoom = (SIDE - 8) // max(picture.size)
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    tile = Image.new("RGB", (SIDE, SIDE + CAPTION), "white")
    tile.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    text, font = caption.encode("ascii", "backslashreplace").decode(), ImageFont.load_default(14)
    while font.getlength(text) > SIDE - 8 and len(text) > 4:
        text = text[:-4] + "..."
    ImageDraw.Draw(tile).text((4, SIDE + 6), text, "black", font)
    return tile
