"""Kinds of class folders and masks as people have them, from the command line: a trained epoch, or the right line."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visionattn
from visionattn.cli import main

CONFIGS = Path(visionattn.__file__).parent / "configs"
COMMON = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
          "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1", "--data.init_args.batch_size", "4",
          "--model.init_args.backbone", "test_dinat"]
SMALLER = {
    "classification/imagefolder_finetune": ["--data.init_args.image_size", "32"],
    "segmentation/folder_finetune": ["--model.init_args.head_channels", "8", "--data.init_args.crop_size", "64",
                                     "--data.init_args.short_side", "64"],
}
COLOURS = {"cat": (200, 60, 60), "dog": (60, 60, 200)}


def _save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _classes(root, places, classes=COLOURS, of=None, ending="jpg", **options):
    """Images of one colour a class in each of the ``places``."""
    for number, place in enumerate(places):
        for name, colour in classes.items():
            for index in range(4 if number == 0 else 2):
                noise = np.random.default_rng(100 * number + index).normal(0, 10, (40, 48, 3))
                pixels = (noise + colour).clip(0, 255).astype(np.uint8)
                _save(root / place / name / f"{index}.{ending}", of(pixels) if of else pixels, **options)


def _system_files(root):
    _classes(root, ["train", "val"])
    for name in ("._0.jpg", "Thumbs.db", ".DS_Store", "__MACOSX/._0.jpg"):
        (root / "train" / "cat" / name).parent.mkdir(exist_ok=True)
        (root / "train" / "cat" / name).write_bytes(b"\0\5\26\7" + bytes(60))


def _loop(root):
    _classes(root, ["train", "val"])
    (root / "train" / "cat" / "all").symlink_to("..", target_is_directory=True)


def _empty_class(root):
    _classes(root, ["train", "val"])
    for file in (root / "val" / "dog").iterdir():
        file.unlink()


def _on_its_side(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    _classes(root, ["train", "val"], of=lambda pixels: np.ascontiguousarray(np.rot90(pixels)), exif=exif)


def _deep(kind, ending):
    def of(pixels):
        grey = pixels[..., 0].astype(kind)
        return grey * 257 if kind == np.uint16 else grey / 255

    return lambda root: _classes(root, ["train", "val"], of=of, ending=ending)


def _masks(root, of=lambda label: label, splits=("train", "val"), ending="png", suffix="", **options):
    """Images with a bright rectangle, and masks of it."""
    for start, split in enumerate(splits):
        for index in range(4 if start == 0 else 2):
            rng = np.random.default_rng(100 * start + index)
            top, left = rng.integers(0, 20, 2)
            label = np.zeros((48, 64), np.uint8)
            label[top:top + 24, left:left + 32] = 1
            pixels = rng.integers(40, 90, (48, 64, 3), dtype=np.uint8)
            pixels[label == 1] = 230
            _save(root / "images" / split / f"{index}.jpg", pixels)
            _save(root / "masks" / split / f"{index}{suffix}.{ending}", of(label), **options)


def _levels(label):
    label = label * np.uint8(255)
    label[:4] = 128
    return label


def _in_colours(label):
    return np.array([(0, 0, 0), (128, 64, 128)], np.uint8)[label]


def _damaged(root):
    _masks(root)
    file = root / "masks" / "train" / "1.png"
    file.write_bytes(file.read_bytes()[:40])


def _black_and_white(root):
    _masks(root, lambda label: label * np.uint8(255))


def _lossy(root):
    _masks(root, lambda label: label * np.uint8(200), ending="jpg")


CLASSES, MASKS = SMALLER
GOOD = {
    "capitals": (CLASSES, lambda root: _classes(root, ["Train", "Val"]), [], 4),
    "training and testing": (CLASSES, lambda root: _classes(root, ["Training", "Testing"]), [], 4),
    "train, valid, test": (CLASSES, lambda root: _classes(root, ["train", "valid", "test"]), [], 4),
    "a folder round all": (CLASSES, lambda root: _classes(root, ["my pets v3/train", "my pets v3/val"]), [], 4),
    "system files": (CLASSES, _system_files, [], 4),
    "a link to its parent": (CLASSES, _loop, [], 4),
    "a class without validation images": (CLASSES, _empty_class, [], 2),
    "photos on their side": (CLASSES, _on_its_side, [], 4),
    "16 bits": (CLASSES, _deep(np.uint16, "png"), [], 4),
    "floating-point numbers": (CLASSES, _deep(np.float32, "tiff"), [], 4),
    "black and white masks": (MASKS, _black_and_white, ["--data.init_args.mask_values", "[0, 255]"], 2),
    "three levels": (MASKS, lambda root: _masks(root, _levels),
                     ["--data.init_args.mask_values", "{0: 0, 128: 255, 255: 1}"], 2),
    "lossy masks": (MASKS, _lossy, ["--data.init_args.mask_values", "[0, 200]"], 2),
    "masks in colours": (MASKS, lambda root: _masks(root, _in_colours),
                         ["--data.init_args.mask_colors", "{ground: [0, 0, 0], road: '#804080'}"], 2),
    "a suffix": (MASKS, lambda root: _masks(root, suffix="_mask"), [], 2),
    "valid for val": (MASKS, lambda root: _masks(root, splits=("train", "valid")), [], 2),
    "one damaged mask": (MASKS, _damaged, ["--data.init_args.on_error", "skip"], 2),
}
BAD = {
    "one class": (CLASSES, lambda root: _classes(root, ["train"], {"cat": (200, 60, 60)}), "has one class only, cat"),
    "black and white masks": (MASKS, _black_and_white, "mask_values to [0, 255]"),
    "three levels": (MASKS, lambda root: _masks(root, _levels), "mask_values to [0, 128, 255]"),
    "lossy masks": (MASKS, _lossy, "probably [0, 200]"),
    "masks in colours": (MASKS, lambda root: _masks(root, _in_colours), "are in colours: (0, 0, 0) ("),
    "one damaged mask": (MASKS, _damaged, "1.png: the mask cannot be read"),
}


def _fit(recipe, *options):
    return main(["fit", "--config", str(CONFIGS / f"{recipe}.yaml"), *COMMON, *SMALLER[recipe], *options])


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_trains(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    recipe, make, options, tested = GOOD[kind]
    make(tmp_path / "photos")
    assert _fit(recipe, *options) == 0
    run = tmp_path / "runs" / Path(recipe).name
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert (metrics["num_classes"], metrics["num_images"]) == (2, tested)
    assert (run / "left_out.csv").exists() == (kind == "one damaged mask")


@pytest.mark.parametrize("kind", BAD)
def test_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    recipe, make, message = BAD[kind]
    make(tmp_path / "photos")
    assert _fit(recipe) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "runs").exists()
