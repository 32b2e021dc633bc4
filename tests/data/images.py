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


def coco_content(folder: Path, size: tuple[int, int] = (40, 36)) -> dict:
    """Three images in ``folder`` and a COCO file's content: two objects of two classes, a crowd, an empty image."""
    images = [{"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]} for number in (5, 7, 9)]
    for image in images:
        write_image(folder / image["file_name"], size, seed=image["id"])
    return {
        "images": images,
        "categories": [{"id": 30, "name": "dog"}, {"id": 12, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 30, "bbox": [4, 6, 10, 8], "area": 77.5, "iscrowd": 0,
             "segmentation": [[4, 6, 14, 6, 14, 14, 4, 14]]},
            {"id": 2, "image_id": 5, "category_id": 12, "bbox": [20, 10, 12, 20], "iscrowd": 0,
             "segmentation": [[20, 10, 32, 10, 32, 30, 20, 30]]},
            {"id": 3, "image_id": 7, "category_id": 12, "bbox": [0, 0, 3, 36], "area": 108, "iscrowd": 1,
             "segmentation": {"size": [size[1], size[0]], "counts": [0, 108, size[0] * size[1] - 108]}},
            {"id": 4, "image_id": 7, "category_id": 30, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0,
             "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]},
        ],
    }


def write_mask(path: Path, size: tuple[int, int] = (40, 36), values: tuple[int, ...] = (0, 1, 2), mode: str = "L",
               seed: int = 0) -> Path:
    """A PNG of squares of four pixels with random ``values``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).choice(values, (-(-size[1] // 4), -(-size[0] // 4)))
    pixels = np.kron(cells, np.ones((4, 4), dtype=int))[:size[1], :size[0]].astype(np.uint8)
    mask = Image.fromarray(pixels)
    if mode == "P":
        mask.putpalette([value % 256 for value in range(0, 768 * 5, 5)])
    mask.save(path)
    return path
