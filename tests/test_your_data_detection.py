"""The commands of docs/your-data.md about boxes and masks run, and what it says the tools write is read."""
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.data.images import coco_content, write_image
from visionattn.cli import main
from visionattn.data import CocoData, VocData, YoloData

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "docs" / "your-data.md").read_text().partition("## Boxes and instance masks")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SMALLER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
           "--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1",
           "--model.init_args.backbone", "test_dinat", "--model.init_args.fpn_channels", "64",
           "--model.init_args.min_size", "64", "--model.init_args.max_size", "96"]
LABEL = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"
XML = ("<annotation><filename>{}</filename><size><width>40</width><height>36</height></size><object><name>dog</name>"
       "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>")


def _coco(root, file, images, name="{}"):
    content = coco_content(root / images)
    for image in content["images"]:
        image["file_name"] = name.format(image["file_name"])
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))


def _yolo(root, images, labels, count=4):
    for index in range(count):
        write_image(root / images / f"{index}.jpg", seed=index)
        (root / labels).mkdir(parents=True, exist_ok=True)
        (root / labels / f"{index}.txt").write_text(LABEL)


def _voc(root, images, files, count=4):
    for index in range(count):
        write_image(root / images / f"{index}.jpg", seed=index)
        (root / files).mkdir(parents=True, exist_ok=True)
        (root / files / f"{index}.xml").write_text(XML.format(f"{index}.jpg"))


def _text(root, **files):
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


MADE = {
    "coco": lambda root: [_coco(root, f"{split}.json", split) for split in ("train", "val")],
    "yolo": lambda root: [_yolo(root, "images/train", "labels/train"), _text(root, classes__txt="dog\n")],
    "voc": lambda root: _voc(root, "JPEGImages", "Annotations"),
}


def test_there_is_a_command_for_each_format():
    assert [command[:3] for command in COMMANDS] == [["visionattn", "fit", "--config"]] * 4


@pytest.mark.parametrize("format_", MADE)
def test_check(tmp_path, monkeypatch, format_):
    """The first command of the page, about each of the formats."""
    text = (ROOT / "docs" / "your-data.md").read_text()
    command = shlex.split(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)[0])
    assert command[:2] == ["visionattn", "check-data"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    MADE[format_](tmp_path / "photos")
    assert main(command[1:]) == 0
    assert (tmp_path / "data_check" / "sheet.png").is_file()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[3:]))
def test_commands(tmp_path, monkeypatch, command):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    format_ = Path(command[3]).stem.partition("_")[0]
    (tmp_path / "photos").mkdir()
    MADE[format_](tmp_path / "photos")
    assert main([*command[1:], *SMALLER]) == 0
    metrics = json.loads((tmp_path / "runs" / f"{format_}_finetune" / "test_metrics.json").read_text())
    assert metrics["num_classes"] == {"coco": 2, "yolo": 1, "voc": 1}[format_]
    assert ("mask_map" in metrics) == ("mask_rcnn" in command)


EXPORTS = {
    "CVAT, COCO": (CocoData, lambda root: _coco(root, "annotations/instances_default.json", "images")),
    "CVAT, COCO with subsets": (CocoData, lambda root: [
        _coco(root, f"annotations/instances_{split}.json", f"images/{split}") for split in ("Train", "Validation")]),
    "CVAT, YOLO": (YoloData, lambda root: [
        _yolo(root, "images/train", "labels/train"),
        _text(root, data__yaml="names:\n  0: dog\npath: .\ntrain: train.txt\n",
              train__txt="".join(f"data/images/train/{index}.jpg\n" for index in range(4)))]),
    "CVAT, YOLO 1.1": (YoloData, lambda root: [
        _yolo(root, "obj_train_data", "obj_train_data"),
        _text(root, obj__names="dog\n", obj__data="classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n",
              train__txt="".join(f"data/obj_train_data/{index}.jpg\n" for index in range(4)))]),
    "CVAT, VOC": (VocData, lambda root: [
        _voc(root, "JPEGImages", "Annotations"), _text(root, labelmap__txt="# label:color_rgb:parts\ndog:1,2,3::\n"),
        (root / "ImageSets" / "Main").mkdir(parents=True),
        (root / "ImageSets" / "Main" / "default.txt").write_text("0\n1\n2\n3\n")]),
    "Roboflow, COCO": (CocoData, lambda root: [
        _coco(root, f"{split}/_annotations.coco.json", split) for split in ("train", "valid", "test")]),
    "Roboflow, YOLO": (YoloData, lambda root: [
        *(_yolo(root, f"{split}/images", f"{split}/labels") for split in ("train", "valid", "test")),
        _text(root, data__yaml="train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\n"
                               "names: ['dog']\n\nroboflow:\n  workspace: me\n", README__roboflow__txt="words\n")]),
    "Roboflow, VOC": (VocData, lambda root: [_voc(root, split, split) for split in ("train", "valid")]),
    "Label Studio, COCO": (CocoData, lambda root: _coco(root, "result.json", "images", "images\\{}")),
    "Label Studio, YOLO": (YoloData, lambda root: [
        _yolo(root, "images", "labels"), _text(root, classes__txt="dog\n", notes__json="{}")]),
    "LabelMe, COCO": (CocoData, lambda root: _coco(root, "annotations.json", "JPEGImages", "JPEGImages/{}")),
    "LabelMe, VOC": (VocData, lambda root: [
        _voc(root, "JPEGImages", "Annotations"), _text(root, class_names__txt="dog\n")]),
    "VIA": (CocoData, lambda root: _coco(root, "via_project_coco.json", "")),
    "Supervisely, COCO": (CocoData, lambda root: [
        _coco(root, f"mine/{split}/annotations/instances.json", f"mine/{split}/images") for split in ("train", "val")]),
    "Supervisely, COCO, one data set": (
        CocoData, lambda root: _coco(root, "ds0/annotations/instances.json", "ds0/images")),
    "Supervisely, YOLO": (YoloData, lambda root: [
        *(_yolo(root, f"images/{split}", f"labels/{split}") for split in ("train", "val")),
        _text(root, data_config__yaml="names: [dog]\nnc: 1\ncolors: [[1, 2, 3]]\ntrain: ../mine/images/train\n"
                                      "val: ../mine/images/val\n")]),
    "labelImg, VOC": (VocData, lambda root: _voc(root, "", "")),
    "labelImg, YOLO": (YoloData, lambda root: [_yolo(root, "", ""), _text(root, classes__txt="dog\n")]),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_of_tools(tmp_path, export):
    kind, make = EXPORTS[export]
    make(tmp_path)
    data = kind(str(tmp_path), num_workers=0)
    data.setup("fit")
    assert "dog" in data.class_names
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert sum(len(target["boxes"]) for _, targets in loader for target in targets) > 0
    if {"train", "valid"} <= {path.name for path in tmp_path.iterdir()} or "subsets" in export:
        assert len(data.records["train"]) == len(data.records["val"])
