"""Measures the memory that each loader process of a large COCO file has for itself.

    python tools/measure_loader_memory.py --images 118000 --workers 2 --batches 2000

makes a COCO file of so many small images with objects and polygons as COCO 2017 has them (7 objects of 10 points an
image), reads it with ``CocoData``, draws batches of 16 and prints what each process holds alone (its private pages) and
its share of all (PSS), in MiB, after its first batch and at the end. Linux only; the files go into a temporary folder.
"""
import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visionattn.data import CocoData


def write(root: Path, images: int, objects: int, points: int) -> None:
    """``train.json`` of ``images`` images, which are links to few files, and a small ``val.json``."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(images):
        file, first = (root / "images" / f"{place}.jpg" for place in (number, number // 10_000 * 10_000))
        if number % 10_000:
            os.link(first, file)
        else:
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / "images" / "val.jpg", quality=90)
    for split, count in (("train", images), ("val", 1)):
        with (root / f"{split}.json").open("w") as file:
            file.write('{"categories": [{"id": 1, "name": "thing"}], "images": ')
            names = ["val.jpg"] if split == "val" else [f"{n}.jpg" for n in range(count)]
            json.dump([{"id": n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(names)], file)
            file.write(', "annotations": [')
            for number in range(count * objects):
                outline = (rng.random((points, 2)) * 20 + 10).round(2)
                (left, top), (right, bottom) = outline.min(0).tolist(), outline.max(0).tolist()
                file.write(", " * bool(number) + json.dumps({
                    "id": number, "image_id": number // objects, "category_id": 1, "iscrowd": 0, "area": 100.5,
                    "bbox": [left, top, right - left, bottom - top], "segmentation": [outline.flatten().tolist()]}))
            file.write("]}")


def memory(process: int) -> tuple[float, float]:
    """Private pages and PSS of a process, in MiB."""
    sizes = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        sizes[name] = int(size) / 1024
    return sizes["Private_Clean:"] + sizes["Private_Dirty:"], sizes["Pss:"]


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=7, help="in each image")
    parser.add_argument("--points", type=int, default=10, help="of each polygon")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.images, args.objects, args.points)
        start = time.perf_counter()
        data = CocoData(
            folder, train_images="images", train_annotations="train.json", val_images="images",
            val_annotations="val.json", masks=True, verify=False, batch_size=16, num_workers=args.workers)
        data.setup("fit")
        print(f"read in {time.perf_counter() - start:.0f} s; the main process has {memory(os.getpid())[0]:.0f} MiB")
        batches = iter(data.train_dataloader())
        next(batches)
        children = [child for task in Path("/proc/self/task").iterdir()
                    for child in (task / "children").read_text().split()]
        workers = [int(child) for child in children
                   if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]
        first = [memory(worker) for worker in workers]
        for _ in range(args.batches):
            next(batches)
        last = [memory(worker) for worker in workers]
        for number, ((private, pss), (end, pss_end)) in enumerate(zip(first, last, strict=True), start=1):
            print(f"worker {number}: private {private:.0f} MiB after the first batch, {end:.0f} MiB after "
                  f"{args.batches}; PSS {pss:.0f} and {pss_end:.0f} MiB")


if __name__ == "__main__":
    main()
