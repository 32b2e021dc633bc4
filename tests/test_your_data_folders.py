"""The commands of docs/your-data.md about class folders and label maps run, on the folders that it draws."""
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.images import write_classes, write_image
from visionattn.cli import main
from visionattn.data import ImageFolderData, SegmentationFolderData
from visionattn.data.guess import guess_data

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "your-data.md").read_text()
SMALLER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
           "--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1",
           "--model.init_args.backbone", "test_dinat"]
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\n"
SIZES = {"imagefolder_finetune": ["--data.init_args.image_size", "32"],
         "folder_finetune": ["--model.init_args.head_channels", "8", "--data.init_args.crop_size", "64",
                             "--data.init_args.short_side", "64"]}


def _commands(heading):
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def _run(command, folder):
    program, *arguments = command
    assert program == "visionattn"
    recipe = Path(arguments[2]).stem
    return main([*arguments, *SMALLER, *SIZES[recipe], "--trainer.default_root_dir", str(folder / "run")])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _pairs(images, masks, name="{}.png", of=lambda label: label):
    for index in range(3):
        write_image(images / f"{index}.jpg", seed=index)
        label = np.zeros((36, 40), np.uint8)
        label[5:25, 4:20] = 1
        masks.mkdir(parents=True, exist_ok=True)
        Image.fromarray(of(label)).save(masks / name.format(index))


@pytest.mark.parametrize("command", _commands("Classes of whole images"), ids=lambda command: command[-2])
def test_class_folders(folder, command):
    for split in ("train", "val"):
        write_classes(folder / "photos" / split, classes=("cat", "dog"), count=2)
    assert _run(command, folder) == 0
    assert (folder / "run" / "test_metrics.json").is_file()


@pytest.mark.parametrize("command", _commands("Label maps"), ids=lambda command: command[-2])
def test_label_maps(folder, command):
    line = " ".join(command)
    colors = np.array([(0, 0, 0), (128, 64, 128)], np.uint8)
    of = (lambda label: label * 255) if "mask_values" in line else (
        lambda label: colors[label]) if "mask_colors" in line else (lambda label: label)
    for split in ("train", "val"):
        _pairs(folder / "photos" / "images" / split, folder / "photos" / "masks" / split, of=of)
    (folder / "photos" / "labelmap.txt").write_text(LABELMAP)
    assert _run(command, folder) == 0
    assert (folder / "run" / "test_metrics.json").is_file()


def test_there_are_commands():
    assert len(_commands("Classes of whole images")) == 2
    assert len(_commands("Label maps")) == 3


@pytest.mark.parametrize("places", [("train", "val"), ("Training", "Testing"), ("",), ("my pets v3",)])
def test_drawn_class_folders(tmp_path, places):
    for place in places:
        write_classes(tmp_path / "photos" / place, classes=("cat", "dog"))
    data = ImageFolderData(str(tmp_path / "photos"))
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    assert ("test" in data.folders) == ("Testing" in places)


@pytest.mark.parametrize(("places", "name"), [
    ([("images/train", "masks/train"), ("images/val", "masks/val")], "{}.png"), ([("images", "masks")], "{}.png"),
    ([("JPEGImages", "SegmentationClass")], "{}.png"),
    ([("train/images", "train/masks"), ("valid/images", "valid/masks")], "{}.png"),
    ([("train", "train"), ("valid", "valid")], "{}_mask.png"),
    ([("train", "train_masks"), ("val", "val_masks")], "{}.png"),
])
def test_drawn_label_maps(tmp_path, places, name):
    for images, masks in places:
        _pairs(tmp_path / images, tmp_path / masks, name)
    data = SegmentationFolderData(str(tmp_path))
    data.setup("fit")
    assert (data.num_classes, len(data.pairs["train"])) == (2, 3 if len(places) > 1 else 2)


@pytest.mark.parametrize("tool", ["CVAT", "Roboflow", "LabelMe", "Supervisely"])
def test_what_tools_write(tmp_path, tool):
    colors, options = np.array([(0, 0, 0), (128, 64, 128)], np.uint8), {}
    if tool == "CVAT":
        for folder in ("SegmentationClass", "SegmentationObject"):
            _pairs(tmp_path / "JPEGImages", tmp_path / folder, of=lambda label: colors[label])
        (tmp_path / "labelmap.txt").write_text(LABELMAP)
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets" / "Segmentation" / "default.txt").write_text("0\n1\n2\n")
        options, names = {"mask_colors": str(tmp_path / "labelmap.txt")}, ["background", "road"]
    elif tool == "Roboflow":
        for split in ("train", "valid"):
            _pairs(tmp_path / split, tmp_path / split, "{}_mask.png")
            (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, road\n")
        names = ["background", "road"]
    elif tool == "LabelMe":
        _pairs(tmp_path / "JPEGImages", tmp_path / "SegmentationClassPNG")
        for folder in ("SegmentationClass", "SegmentationClassVisualization"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "0.npy").write_bytes(b"array")
        names = ["class_0", "class_1"]
    else:
        _pairs(tmp_path / "ds" / "img", tmp_path / "ds" / "masks_machine", "{}.jpg.png", lambda label: label * 200)
        (tmp_path / "ds" / "ann").mkdir()
        (tmp_path / "ds" / "ann" / "0.jpg.json").write_text("{}")
        options, names = {"mask_values": [0, 200]}, ["class_0", "class_1"]
    data = SegmentationFolderData(str(tmp_path / "ds" if tool == "Supervisely" else tmp_path), **options)
    data.setup("fit")
    assert data.class_names == names
    kind = guess_data(data.root)
    assert (kind.module, kind.arguments.get("layout", "plain")) == ("SegmentationFolderData", "plain")
