"""Kinds of detection files as people have them, from the command line: a trained step, or the line that is right."""
import json
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visionattn
from visionattn.cli import main

CONFIGS = Path(visionattn.__file__).parent / "configs" / "detection"
SMALLER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
           "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1", "--data.init_args.batch_size", "2",
           "--model.init_args.backbone", "test_dinat", "--model.init_args.fpn_channels", "64",
           "--model.init_args.min_size", "64", "--model.init_args.max_size", "96"]
MASKS = ["--data.init_args.masks", "true", "--model.init_args.detector", "mask_rcnn"]


def _scene(path, seed):
    """An image of 64 x 48 with a bright rectangle; returns that as left, top, width, height."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(40, 90, (48, 64, 3), dtype=np.uint8)
    w, h = (int(side) for side in rng.integers(14, 24, 2))
    x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 48 - h))
    pixels[y:y + h, x:x + w] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return x, y, w, h


def _coco(root, image=None, thing=None, categories=None):
    for start, (split, count) in enumerate((("train", 4), ("val", 2))):
        images, things = [], []
        for number in range(1, count + 1):
            x, y, w, h = _scene(root / split / f"{number}.jpg", 10 * start + number)
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48} | (image or {}))
            things.append({"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "iscrowd": 0,
                           "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
            if thing:
                things[-1] |= thing(things[-1])
        content = {"images": images, "annotations": things, "categories": categories or [{"id": 1, "name": "box"}]}
        (root / f"{split}.json").write_text(json.dumps(content))


ROOTS = [{"id": 0, "name": "boxes", "supercategory": "none"}, {"id": 1, "name": "box", "supercategory": "boxes"}]
FAR = [[0, 0, 1e9, 0, 1e9, 1e9, 0, 1e9]]
GOOD = {
    "float sizes": (lambda root: _coco(root, {"width": 64.0, "height": 48.0}), []),
    "a root category": (lambda root: _coco(root, categories=ROOTS), []),
    "crowds as text": (lambda root: _coco(root, thing=lambda thing: {"iscrowd": "0"}), []),
    "ids as text": (lambda root: _coco(root, thing=lambda thing: {"image_id": str(thing["image_id"])}), []),
    "a polygon far outside": (lambda root: _coco(root, thing=lambda thing: {"segmentation": FAR}), MASKS),
    "names that climb out": (lambda root: [
        _coco(root, thing=None), _edit(root / "val.json", lambda image: image.update(
            file_name=f"../val/{image['file_name']}"))], []),
}
BAD = {
    "shares in place of pixels": (
        lambda root: _coco(root, thing=lambda thing: {"bbox": [side / 64 for side in thing["bbox"]]}), [],
        "its box looks like shares of the image"),
    "null in polygons": (
        lambda root: _coco(root, thing=lambda thing: {"segmentation": [[None, 0, 20, 0, 20, 20]]}), MASKS,
        "its segmentation holds something else than numbers"),
    "an absurd mask": (
        lambda root: _coco(root, thing=lambda thing: {"segmentation": {"size": [10 ** 6] * 2, "counts": [10 ** 12]}}),
        MASKS, "its mask has another size than its image"),
}


def _edit(file, change):
    content = json.loads(file.read_text())
    for image in content["images"]:
        change(image)
    file.write_text(json.dumps(content))


def _fit(*options):
    return main(["fit", "--config", str(CONFIGS / "coco_finetune.yaml"), *SMALLER, *options])


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_trains(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, options = GOOD[kind]
    make(tmp_path / "photos")
    before = set(tmp_path.rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _fit(*options) == 0
    run = tmp_path / "runs" / "coco_finetune"
    assert json.loads((run / "test_metrics.json").read_text())["num_classes"] == 1
    assert main(["predict", "--config", str(run / "config.yaml")]) == 0
    assert len(list((run / "pictures").rglob("*.png"))) == 2
    assert all(path.is_relative_to(tmp_path / "runs") for path in set(tmp_path.rglob("*")) - before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2e6  # KiB; a mask of the polygon would take more


@pytest.mark.parametrize("kind", BAD)
def test_is_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    make, options, message = BAD[kind]
    make(tmp_path / "photos")
    assert _fit(*options) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visionattn: error:")]
    assert len(lines) == 1
    assert "annotation 1: " in lines[0]
    assert message in lines[0]
    assert "correct it, or set on_error to skip" in lines[0]
