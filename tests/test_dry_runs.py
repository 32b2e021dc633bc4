"""Every shipped recipe goes through one step of training and one of validation, on small pictures made here."""
import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.data.images import coco_content, write_classes, write_image, write_mask
from visionattn.cli import main
from visionattn.recipes import RECIPES

LARGE = {  # one step of which takes long, and what is trained in place of them
    "dinat_large_384": "dinat_mini", "smt_l_384": "smt_t", "smt_l_22k": "smt_t", "agent_swin_b_384": "agent_swin_t",
    "agent_cswin_b_384": "agent_cswin_t", "tap_fan_base_16_p4_hybrid": "test_tap_fan_hybrid",
    "tap_rvt_base_plus": "test_tap_rvt"}
FOLDERS = {"ImageFolderData": "classes", "CsvData": "table", "CocoData": "coco", "YoloData": "yolo", "VocData": "voc"}
FIXED = ("dhvt", "dinat_iso", "vitrpb")  # their images have one size


def _photos(root):
    """Data that every recipe for one's own images reads in its format."""
    for split in ("train", "val"):
        write_classes(root / "classes" / split, ("cat", "dog"), 2)
        for index in range(2):
            name = f"{split}_{index}"
            write_image(root / "table" / f"{name}.jpg")
            write_image(root / "yolo" / "images" / split / f"{name}.jpg")
            label = root / "yolo" / "labels" / split / f"{name}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{index} 0.5 0.5 0.4 0.4\n")
            write_image(root / "voc" / "JPEGImages" / f"{name}.jpg")
            record = root / "voc" / "Annotations" / f"{name}.xml"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(
                f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>36</height></size><object>"
                f"<name>{'cat' if index else 'dog'}</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>25</xmax>"
                "<ymax>25</ymax></bndbox></object></annotation>")
            for part, kind in (("images", "jpg"), ("masks", "png")):
                path = root / "masks" / part / split / f"{name}.{kind}"
                (write_image if part == "images" else write_mask)(path)
            part = {"train": "training", "val": "validation"}[split]
            write_image(root / "ade20k" / "images" / part / f"{name}.jpg")
            write_mask(root / "ade20k" / "annotations" / part / f"{name}.png")
        content = coco_content(root / "coco" / f"{split}2017")
        (root / "coco" / "annotations").mkdir(exist_ok=True)
        (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    (root / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    names = sorted(path.name for path in (root / "table").glob("*.jpg"))
    (root / "table" / "labels.csv").write_text(
        "file,label,split\n" + "".join(f"{name},{name[-5]},{name.split('_')[0]}\n" for name in names))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    _photos(root)
    yield root
    shutil.rmtree(root)


def _smaller(name, photos):
    """Options that leave a recipe as it is but for its data, the size of images and the weights it starts from."""
    recipe = yaml.safe_load(RECIPES[name].read_text())
    model, data = recipe["model"]["init_args"], recipe["data"]
    kind = data["class_path"]
    if kind == "MultiTaskData":
        return _smaller_parts(data["init_args"], photos)
    options = {"data.batch_size": 2}
    if not kind.startswith("Digit"):
        folder = FOLDERS.get(kind) or data["init_args"].get("layout", "masks")
        options |= {"data.root": photos / folder, "data.num_workers": 0}
    for key in ("pretrained", "checkpoint_path"):
        if model.get(key):
            options[f"model.{key}"] = {"pretrained": "false", "checkpoint_path": "null"}[key]
    options["model.backbone"] = LARGE.get(model["backbone"], model["backbone"])
    if kind in ("ImageFolderData", "CsvData") and not model["backbone"].startswith(FIXED):
        options["data.image_size"] = 64
    elif recipe["model"]["class_path"] == "DetectionTask" and not kind.startswith("Digit"):
        options |= {"model.min_size": 64, "model.max_size": 96, "model.fpn_channels": 64}
    elif kind == "SegmentationFolderData":
        options |= {"data.crop_size": 64, "data.short_side": 64, "model.head_channels": 32}
        if "window" in model:
            options |= {"model.window": 64, "model.window_stride": 48}
    return options


def _smaller_parts(parts, photos):
    """The same of several tasks."""
    options = {"model.detection": {"detector": "fcos", "min_size": 64, "max_size": 96, "fpn_channels": 64},
               "model.segmentation": {"head_channels": 32}}
    sizes = {"classification": {"image_size": 64}, "detection": {}, "segmentation": {"crop_size": 64, "short_side": 64}}
    for task, more in sizes.items():
        init_args = {"batch_size": 2}
        if not parts[task]["class_path"].startswith("Digit"):
            init_args |= more | {"root": str(photos / Path(parts[task]["init_args"]["root"]).name), "num_workers": 0}
        options |= {f"data.{task}.init_args.{key}": value for key, value in init_args.items()}
    return options


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_recipe(name, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [part for key, value in _smaller(name, photos).items() for part in (f"--{key}", str(value))]
    assert main(["fit", "--config", name, *options, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu",
                 "--trainer.devices", "1"]) == 0
