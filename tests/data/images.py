"""Folders of small images to train on, made on the spot."""
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    """A JPEG (or what the name says) of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_classes(folder: Path, classes: tuple[str, ...] = ("cat", "dog", "emu"), count: int = 4) -> Path:
    """``count`` images in a folder for each class."""
    for label, name in enumerate(classes):
        for index in range(count):
            write_image(folder / name / f"{index}.jpg", seed=100 * label + index)
    return folder


def truncate(path: Path) -> Path:
    """Cuts the second half of a file off: its header stays readable."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
