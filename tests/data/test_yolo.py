"""YoloData: label files and data.yaml of the tools that write them, read right or refused in one line."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from visionattn.cli import main
from visionattn.data import YoloData

from .images import truncate, write_image

BOX = "0 0.25 0.5 0.25 0.25"  # of 40 x 36 pixels: 5 to 15 and 13.5 to 22.5
EDGES = [5.0, 13.5, 15.0, 22.5]
YAML = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: box\n  1: ring\n"


def _write(root, images="images/{}", labels="labels/{}", splits=("train", "val"), text=BOX, count=3, start=0):
    for number, split in enumerate(splits):
        for index in range(start, start + count):
            name = f"{split[0]}{index}"
            write_image(root / images.format(split) / f"{name}.jpg", seed=10 * number + index)
            file = root / labels.format(split) / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
    return root


def _make(root, stage="fit", **kwargs):
    data = YoloData(str(root), **dict(batch_size=4, num_workers=0, hflip=0.0) | kwargs)
    data.setup(stage)
    return data


def _targets(data, split="val"):
    return next(iter(getattr(data, f"{split}_dataloader")()))[1]


def test_boxes(tmp_path):
    (_write(tmp_path) / "data.yaml").write_text(YAML)
    (tmp_path / "labels" / "val" / "v0.txt").write_text(f"{BOX}\n1 0.5 0.5 1 1\n\n")
    data = _make(tmp_path)
    assert (data.class_names, data.category_ids, data.num_classes) == (["box", "ring"], [0, 1], 2)
    targets = _targets(data)
    assert targets[0]["boxes"].tolist() == [EDGES, [0, 0, 40, 36]]
    assert targets[0]["labels"].tolist() == [1, 2]
    assert targets[0]["area"].tolist() == [90, 1440]
    assert [target["file_name"] for target in targets] == [f"images/val/v{index}.jpg" for index in range(3)]
    assert _targets(data, "train")[0]["boxes"].tolist() == [EDGES]


def test_polygons(tmp_path):
    (_write(tmp_path, text="1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75") / "data.yaml").write_text(YAML)
    target = _targets(_make(tmp_path, masks=True))[0]
    assert target["boxes"].tolist() == [[10, 9, 30, 27]]
    expected = torch.zeros(36, 40, dtype=torch.uint8)
    expected[9:27, 10:30] = 1
    assert torch.equal(target["masks"][0], expected)
    assert "masks" not in _targets(_make(tmp_path))[0]
    (tmp_path / "labels" / "train" / "t1.txt").write_text(BOX)
    with pytest.raises(ValueError, match=r"t1.txt, line 1: it has no segmentation, but masks were asked for"):
        _make(tmp_path, masks=True)


def test_key_points_are_not_read(tmp_path):
    _write(tmp_path, text=f"{BOX} 0.2 0.3 2 0.4 0.5 1")
    (tmp_path / "data.yaml").write_text(YAML + "kpt_shape: [2, 3]\n")
    assert _targets(_make(tmp_path))[0]["boxes"].tolist() == [EDGES]


CONFIGS = {
    "list of names": "train: images/train\nval: images/val\nnames: [box, ring]\nnc: 2\n",
    "no path": YAML.replace("path: .\n", ""),
    "path of another machine": YAML.replace("path: .", "path: /content/datasets/mine"),
    "absolute splits of another machine":
        "train: /content/mine/images/train\nval: C:\\mine\\images\\val\nnames: [box]\n",
    "Roboflow's dots": "train: ../images/train\nval: ../images/val\nnames: [box]\n",
    "several folders": "train: [images/train]\nval:\n- images/val\nnames: [box]\n",
    "valid": "train: images/train\nvalid: images/val\nnames: [box]\n",
    "null test": YAML + "test: null\n",
    "an empty test": YAML + "test:\n",
    "a lost test": YAML + "test: ../test/images\n",
    "names that YAML takes for something else": "train: images/train\nval: images/val\nnames: [no, 12]\n",
    "keys as text": "train: images/train\nval: images/val\nnames: {'0': box, '1': ring}\n",
    "a byte order mark": "\ufeff" + YAML,
}


@pytest.mark.parametrize("config", CONFIGS)
def test_data_yaml_as_tools_write_it(tmp_path, config):
    (_write(tmp_path) / "data.yaml").write_text(CONFIGS[config], encoding="utf-8")
    data = _make(tmp_path)
    assert (len(data.records["train"]), len(data.records["val"])) == (3, 3)
    assert _targets(data)[0]["boxes"].tolist() == [EDGES]
    assert data.class_names[0] == ("no" if "something else" in config else "box")


def test_root_may_be_the_yaml_file(tmp_path):
    (_write(tmp_path) / "mine.yaml").write_text(YAML)
    (tmp_path / "other.yaml").write_text(YAML)
    with pytest.raises(ValueError, match=r"several YAML files that could describe it: mine.yaml, other.yaml; name one"):
        _make(tmp_path)
    assert len(_make(tmp_path / "mine.yaml").records["train"]) == 3


def test_path_is_relative_to_the_yaml_file(tmp_path):
    _write(tmp_path / "data" / "set")
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "a.yaml").write_text(YAML.replace("path: .", "path: ../data/set"))
    data = _make(tmp_path / "yaml" / "a.yaml")
    assert _targets(data)[0]["boxes"].tolist() == [EDGES]


def test_lists_of_images(tmp_path):
    _write(tmp_path, "images", "labels", count=2)
    (tmp_path / "train.txt").write_text("./images/t0.jpg\nimages/t1.jpg\n")
    (tmp_path / "val.txt").write_text("/content/set/images/v0.jpg\n\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [box]\n")
    data = _make(tmp_path)
    assert (len(data.records["train"]), len(data.records["val"])) == (2, 1)
    (tmp_path / "val.txt").write_text("images/lost.jpg\n")
    with pytest.raises(ValueError, match=r"lost.jpg: there is no such file"):
        _make(tmp_path)


LAYOUTS = {
    "images, labels": ("images/{}", "labels/{}"), "split first": ("{}/images", "{}/labels"), "beside": ("{}", "{}"),
    "capitals": ("Images/{}", "Labels/{}"), "wrapped": ("mine v2/images/{}", "mine v2/labels/{}"),
}


@pytest.mark.parametrize("spelling", ["train val test", "Train Valid Test", "training validation testing"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_without_data_yaml(tmp_path, layout, spelling):
    _write(tmp_path, *LAYOUTS[layout], splits=spelling.split())
    (tmp_path / ("mine v2" if layout == "wrapped" else ".") / "classes.txt").write_text("box\nring\n")
    data = _make(tmp_path)
    data.setup("test")
    assert {split: len(records) for split, records in data.records.items()} == {"train": 3, "val": 3, "test": 3}
    assert data.class_names == ["box", "ring"]
    assert data.records["test"] is not data.records["val"]
    assert _targets(data, "test")[0]["boxes"].tolist() == [EDGES]


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("", ""), ("obj_train_data", "obj_train_data")])
def test_without_splits_a_fifth_validates(tmp_path, said, images, labels):
    _write(tmp_path, images, labels, count=5)
    (tmp_path / "obj.names").write_text("box\n")
    data = _make(tmp_path)
    assert (len(data.records["train"]), len(data.records["val"])) == (8, 2)
    assert "8 train and 2 validate" in said.text


def test_without_names_classes_are_numbered(tmp_path, said):
    _write(tmp_path)
    (tmp_path / "labels" / "train" / "t0.txt").write_text(BOX.replace("0 ", "3 ", 1))
    data = _make(tmp_path)
    assert (data.class_names, data.category_ids) == (["0", "3"], [0, 3])
    assert "they are called 0, 3" in said.text


def test_images_without_labels_and_labels_without_images_are_counted(tmp_path):
    (_write(tmp_path) / "data.yaml").write_text(YAML)
    (tmp_path / "labels" / "train" / "t0.txt").unlink()
    (tmp_path / "labels" / "train" / "t1.txt").write_text("")
    (tmp_path / "labels" / "train" / "lost.txt").write_text(BOX)
    data = _make(tmp_path)
    targets = sorted(_targets(data, "train"), key=lambda target: target["image_id"])
    assert [len(target["boxes"]) for target in targets] == [0, 0, 1]
    text = data.report.text()
    assert "1 taken as empty: it has no label file" in text
    assert "1 not used: there is no image for it" in text


BAD = {
    "2 0.5 0.5 0.2 0.2": r"its class is not in the list of classes \(class 2",
    "-1 0.5 0.5 0.2 0.2": "its class is not in the list of classes",
    "0.5 0.5 0.5 0.2 0.2": "its class is not in the list of classes",
    "cat 0.5 0.5 0.2 0.2": "its class is not in the list of classes",
    "0,0.5,0.5,0.2,0.2": "its class is not in the list of classes",
    "0 0.5 0.5 0.2": "neither a box .* nor a polygon",
    "0 0.5 0.5 0.2 0.2 0.9": "neither a box .* nor a polygon",
    "0": "neither a box .* nor a polygon",
    "0 0.1 0.1 0.5 0.1 0.5 0.5 0.7": "neither a box .* nor a polygon",
    "0 x 0.5 0.2 0.2": "it holds something else than numbers",
    "0 nan 0.5 0.2 0.2": "it holds something else than numbers",
    "0 inf 0.5 0.2 0.2": "it holds something else than numbers",
    "0 20 18 10 9": "its lengths look like pixels, where shares of the image",
    "0 10 10 20 10 20 20": "its lengths look like pixels, where shares of the image",
    "0 0.5 0.5 1.4 0.2": "its box reaches out of the image",
    "0 1.5 0.5 0.2 0.2": "its box lies outside the image",
    "0 -1.1 0.1 -1.5 0.1 -1.5 1.5": "its segmentation lies outside the image",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_named_or_left_out(tmp_path, line):
    (_write(tmp_path) / "data.yaml").write_text(YAML)
    (tmp_path / "labels" / "val" / "v1.txt").write_text(f"{BOX}\n{line}\n")
    with pytest.raises(ValueError, match=rf"labels/val/v1.txt, line 2: .*{BAD[line]}") as raised:
        _make(tmp_path)
    assert "\n" not in str(raised.value)
    data = _make(tmp_path, on_error="skip")
    assert len(_targets(data)[1]["boxes"]) == (2 if "reaches" in BAD[line] else 1)
    assert len(data.report.splits["val"].left_out) == 1


@pytest.mark.parametrize("line", ["0 0.5 0.5 0 0.2", "0 0.5 0.5 -0.2 0.2", "0 0.5 0.5 0.2 -0.2"])
def test_boxes_without_width_are_counted(tmp_path, line, said):
    (_write(tmp_path) / "data.yaml").write_text(YAML)
    (tmp_path / "labels" / "val" / "v1.txt").write_text(line)
    assert len(_targets(_make(tmp_path))[1]["boxes"]) == 0
    assert "1 boxes without width or height are left out; the first is" in said.text
    assert "v1.txt, line 1" in said.text


def test_tiny_boxes_at_the_corner_are_boxes(tmp_path):
    (_write(tmp_path, text="0 0.01 0.01 0.012 0.013") / "data.yaml").write_text(YAML)
    assert len(_targets(_make(tmp_path))[0]["boxes"]) == 1


def test_repeated_lines_count_once(tmp_path):
    (_write(tmp_path, text=f"{BOX}\n{BOX}") / "data.yaml").write_text(YAML)
    data = _make(tmp_path)
    assert len(_targets(data)[0]["boxes"]) == 1
    assert "3 left out: it is the same as a line before" in data.report.text()


CONFIG_FAULTS = {
    "names: [box, ring]\nnc: 3\ntrain: images/train\n": "nc is 3, but names has 2",
    "names: {a: box}\ntrain: images/train\n": "the keys of names must be the numbers of the classes, got a",
    "names: box\ntrain: images/train\n": "names must be a list of names",
    "names: [[box]]\ntrain: images/train\n": "names has something that is no name",
    "names: [box]\ntrain: images/trian\n": r"images/trian does not exist \(train\)",
    "names: [box]\ntrain: images/train\nval: lost\n": r"lost does not exist \(val\)",
    "names: [box": "is not YAML",
    "- box": "has no keys",
}


@pytest.mark.parametrize("text", CONFIG_FAULTS)
def test_bad_yaml_files_are_refused(tmp_path, text):
    (_write(tmp_path) / "data.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"data.yaml:? .*{CONFIG_FAULTS[text]}") as raised:
        _make(tmp_path)
    assert "\n" not in str(raised.value)


def test_two_classes_of_one_name_are_one(tmp_path, said):
    (_write(tmp_path, text=f"{BOX}\n1 0.5 0.5 0.5 0.5") / "data.yaml").write_text(YAML.replace("ring", "box"))
    data = _make(tmp_path)
    assert data.class_names == ["box"]
    assert _targets(data)[0]["labels"].tolist() == [1, 1]
    assert "two classes are called 'box'" in said.text


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; data.init_args.root must be a folder in YOLO's"):
        YoloData(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no images"):
        YoloData(str(tmp_path))
    for index in range(3):
        write_image(tmp_path / "images" / "train" / f"{index}.jpg")
    (tmp_path / "data.yaml").write_text("names: [box]\n")
    with pytest.raises(ValueError, match=r"no image has a label file; .* labels/train/0.txt for images/train/0.jpg"):
        _make(tmp_path)


def test_shared_images_are_counted(tmp_path, said):
    (_write(tmp_path) / "data.yaml").write_text(YAML.replace("images/val", "images/train"))
    _make(tmp_path)
    assert "3 of 3 val images are training images too" in said.text


def test_system_files_and_loops(tmp_path):
    (_write(tmp_path) / "data.yaml").write_text(YAML)
    (tmp_path / "images" / "train" / "._t0.jpg").write_bytes(bytes(60))
    (tmp_path / "images" / "train" / "Thumbs.db").write_bytes(bytes(60))
    (tmp_path / "labels" / "train" / "._t0.txt").write_bytes(bytes(60))
    (tmp_path / "images" / "train" / "all").symlink_to("..", target_is_directory=True)
    assert len(_make(tmp_path).records["train"]) == 3


@pytest.mark.parametrize("orientation", ["seen", "stored"])
def test_orientation(tmp_path, orientation):
    """Tag 6: stored lying on its side. The white corner is left at the top as stored, right at the top as seen."""
    pixels = np.zeros((24, 40, 3), dtype=np.uint8)
    pixels[:6, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / split / f"{split}.png", exif=exif)
        (tmp_path / "labels" / split).mkdir(parents=True)
        box = "0 0.875 0.125 0.25 0.25" if orientation == "seen" else "0 0.125 0.125 0.25 0.25"
        (tmp_path / "labels" / split / f"{split}.txt").write_text(box)
    (tmp_path / "data.yaml").write_text(YAML)
    data = _make(tmp_path, orientation=orientation)
    images, targets = next(iter(data.val_dataloader()))
    assert images[0].shape == (3, 40, 24)
    assert targets[0]["boxes"].tolist() == [[18, 0, 24, 10]]
    assert images[0][:, :10, 18:].min() == 1
    assert images[0].sum() == 3 * 60


def test_trains_through_the_command_line(tmp_path, monkeypatch):
    """One step from the recipe, with an image that cannot be read; then a prediction."""
    monkeypatch.chdir(tmp_path)
    (_write(tmp_path / "photos") / "data.yaml").write_text(YAML)
    truncate(tmp_path / "photos" / "images" / "train" / "t2.jpg")
    config = Path(visionattn.__file__).parent / "configs" / "detection" / "yolo_finetune.yaml"
    small = ["--model.init_args.backbone", "test_dinat", "--model.init_args.fpn_channels", "64",
             "--model.init_args.min_size", "64", "--model.init_args.max_size", "96", "--trainer.accelerator", "cpu",
             "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1",
             "--data.init_args.batch_size", "2",
             "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(config), "--data.init_args.root", "photos", "--data.init_args.on_error", "skip",
                 "--trainer.max_epochs", "1", *small]) == 0
    run = tmp_path / "runs" / "yolo_finetune"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_classes"]) == (3, 2)
    assert "t2.jpg" in (run / "left_out.csv").read_text()
    inbox = ["--data.init_args.predict_root", "photos/images/val"]
    assert main(["predict", "--config", str(run / "config.yaml"), *inbox]) == 0
    assert len(list((run / "pictures").rglob("*.png"))) == 3


def test_every_class_has_its_share_of_held_out_images(tmp_path):
    """Of 20 images, five have the rare class and five no object."""
    _write(tmp_path, "images", "labels", splits=("a",), count=20)
    for index in range(10):
        (tmp_path / "labels" / f"a{index}.txt").write_text("" if index % 2 else f"{BOX}\n1 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("box\nring\n")
    data = _make(tmp_path)
    assert {split: report.images for split, report in data.report.splits.items()} == {"train": 16, "val": 4}
    assert data.report.splits["val"].counts["ring"] == 1
    assert sum(not record.objects for record in data.records["val"]) == 1


def test_nothing_is_taken_from_another_split(tmp_path):
    """Neither a listed image that is missing, nor a folder of all images, nor labels of one name."""
    _write(tmp_path, splits=("train", "val"))
    (tmp_path / "train.txt").write_text("images/train/v0.jpg\nimages/train/t0.jpg\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [box]\n")
    with pytest.raises(ValueError, match=r"images/train/v0.jpg: there is no such file"):
        _make(tmp_path)
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [box]\n")
    with pytest.raises(FileNotFoundError, match=r"../train/images does not exist \(train\)"):
        _make(tmp_path)


def test_a_label_file_is_of_one_split(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / "images" / split / "0.jpg", seed=len(split))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text(BOX)
    with pytest.raises(ValueError, match=r"its label file is that of an image of another split \(.*labels/0.txt"):
        _make(tmp_path)
