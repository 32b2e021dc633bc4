"""Data as people really have them, a case each, at the command line: a right result, or one clear line."""
import json
import logging
import os
import shutil

import lightning.pytorch  # noqa: F401  (its log would go to whatever a test captures first)
import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main

COLOURS = {"cat": (200, 60, 60), "dog": (60, 60, 200), "fox": (60, 180, 60)}
SIZE = (48, 64)  # height and width of photos; of scenes twice that


def picture(seed, size=SIZE, colour=(70, 70, 70)):
    """An image ``[H, W, 3]`` of smooth noise round a colour."""
    small = np.random.default_rng(seed).normal(0, 18, (6, 8, 3))
    noise = np.kron(small, np.ones((size[0] // 6, size[1] // 8, 1)))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def photos(folder, count, start=0, classes=tuple(COLOURS)):
    for number, name in enumerate(classes):
        for index in range(start, start + count):
            save(folder / name / f"{index:02d}.jpg", picture(1000 * number + index, colour=COLOURS[name]))
    return folder


def scene(seed):
    """An image with one bright rectangle, and its box: left, top, width, height in pixels."""
    rng, (height, width) = np.random.default_rng(seed), (2 * SIZE[0], 2 * SIZE[1])
    image = picture(seed, (height, width))
    w, h = int(rng.integers(24, 48)), int(rng.integers(20, 40))
    x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
    image[y:y + h, x:x + w] = (230, 200, 40)
    return image, (x, y, w, h)


def coco(root, image=lambda record: record, thing=lambda record: record, content=lambda content: content,
         starts=(("train", 0), ("val", 50))):
    """Eight training and four validation scenes in COCO's format; the hooks change the records."""
    for split, start in starts:
        images, things = [], []
        for index in range(8 if split == "train" else 4):
            array, (x, y, w, h) = scene(start + index)
            save(root / split / f"{start + index:03d}.jpg", array, quality=92)
            images.append(image({"id": index + 1, "file_name": f"{start + index:03d}.jpg", "width": 128, "height": 96}))
            things.append(thing({"id": index + 1, "image_id": index + 1, "category_id": 1, "bbox": [x, y, w, h],
                                 "area": w * h, "iscrowd": 0,
                                 "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}))
        (root / f"{split}.json").write_text(json.dumps(content(
            {"images": images, "annotations": things, "categories": [{"id": 1, "name": "box"}]})))
    return root


def masks(root, of=lambda label: label, name="{}.png", val="val"):
    """Eight training and four validation scenes with label maps of 0 and 1, which ``of`` changes."""
    for split, count, start in (("train", 8, 0), (val, 4, 50)):
        for index in range(start, start + count):
            array, (x, y, w, h) = scene(index)
            label = np.zeros(array.shape[:2], np.uint8)
            label[y:y + h, x:x + w] = 1
            save(root / "images" / split / f"{index:03d}.jpg", array, quality=92)
            save(root / "masks" / split / name.format(f"{index:03d}"), of(label))
    return root


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def log(caplog):
    """What was said while a command ran."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def check(root, capfd, log):
    """Runs ``check-data``: what it says, after a look at its exit code."""
    def run(code=0, **options):
        log.clear()
        more = ["--options", json.dumps(options)] if options else []
        assert main(["check-data", str(root), "--out", str(root.parent / "out"), *more]) == code
        return log.text + "".join(capfd.readouterr())
    return run


@pytest.fixture
def sheet(root, check):
    """The first pictures of the contact sheet of ``check-data``, as arrays, with what it says."""
    def look(count, **options):
        said = check(**options)
        with Image.open(root.parent / "out" / "sheet.png") as opened:
            tiles = [np.asarray(opened.convert("RGB"))[:320, 320 * index:320 * (index + 1)] for index in range(count)]
        return said, [tile[np.ix_((tile != 255).any((1, 2)), (tile != 255).any((0, 2)))] for tile in tiles]
    return look


@pytest.fixture
def fit(root, capfd):
    """Runs ``fit`` on the folder: the test metrics, or the one line that it ends with."""
    def run(*more, code=0, task="classification"):
        assert main([*command(task, root, root.parent / "run"), *map(str, more)]) == code
        if code:
            lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("visionattn: error: ")]
            assert len(lines) == 1
            return lines[0]
        return json.loads((root.parent / "run" / "test_metrics.json").read_text())
    return run


def command(task, root, run):
    """A ``fit`` of one epoch with a tiny model."""
    own = {
        "classification": ["ClassificationTask", "ImageFolderData", "--data.image_size", "32"],
        "detection": ["DetectionTask", "CocoData", "--model.detector", "fcos", "--model.fpn_channels", "64",
                      "--model.min_size", "64", "--model.max_size", "96"],
        "segmentation": ["SegmentationTask", "SegmentationFolderData", "--model.head", "semantic_fpn",
                         "--model.head_channels", "8", "--model.auxiliary_weight", "0",
                         "--data.crop_size", "32", "--data.short_side", "32"],
    }[task]
    model, data, *sizes = own
    return ["fit", "--model", model, "--model.backbone", "test_dinat", "--data", data, "--data.root", str(root), *sizes,
            "--data.num_workers", "0", "--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.max_epochs",
            "1", "--trainer.limit_train_batches", "2", "--trainer.enable_progress_bar", "false",
            "--trainer.default_root_dir", str(run)]


def table(said):
    """The number of images of each split in the table that was said."""
    lines = [line.split() for line in said.splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 2 and words[0] in ("train", "val", "test")
            and words[1].isdecimal()}


# Class folders

def test_split_names_capital(root, check):
    photos(root / "Train", 4), photos(root / "Val", 2, start=50)
    assert table(check()) == {"train": 12, "val": 6}


def test_split_names_training_testing(root, check):
    photos(root / "Training", 5), photos(root / "Testing", 2, start=50)
    said = check()
    assert table(said) == {"train": 12, "val": 3, "test": 6}
    assert "There is no val folder" in said
    assert "12 of them train and 3 validate" in said


def test_split_names_train_valid_test(root, check):
    photos(root / "train", 4), photos(root / "valid", 2, start=50), photos(root / "test", 2, start=70)
    assert table(check()) == {"train": 12, "val": 6, "test": 6}


def test_wrapping_folder(root, check):
    photos(root / "my pets v3" / "train", 4), photos(root / "my pets v3" / "val", 2, start=50)
    said = check()
    assert table(said) == {"train": 12, "val": 6}
    assert "holds nothing but the folder my pets v3: its content is read" in said


def _litter(folder, *names):
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", *(f"._{name}" for name in names)):
        (folder / name).write_bytes(b"\0\5\26\7" + bytes(60))
    inner = folder / "__MACOSX"
    inner.mkdir()
    for name in names:
        (inner / f"._{name}").write_bytes(b"\0\5\26\7" + bytes(60))


@pytest.mark.parametrize("kind", ["classes", "coco", "yolo", "voc", "masks"])
def test_system_files(root, check, kind):
    if kind == "classes":
        photos(root / "train", 3, classes=("cat", "dog")), photos(root / "val", 1, 50, ("cat", "dog"))
        _litter(root / "train" / "cat", "00.jpg"), _litter(root, "train.jpg")
    elif kind == "coco":
        coco(root)
        _litter(root / "train", "000.jpg"), _litter(root, "train.json")
    elif kind == "masks":
        masks(root)
        _litter(root / "images" / "train", "000.jpg"), _litter(root / "masks" / "train", "000.png")
    else:
        {"yolo": yolo, "voc": voc}[kind](root)
        for folder in [path for path in root.rglob("*") if path.is_dir()]:
            _litter(folder, "000.jpg", "000.txt", "000.xml")
    assert sum(table(check()).values()) == {"classes": 8, "voc": 8}.get(kind, 12)


def test_link_to_parent(root, check):
    photos(root / "train", 4), photos(root / "val", 2, start=50)
    (root / "train" / "cat" / "all").symlink_to("..", target_is_directory=True)
    said = check()
    assert table(said) == {"train": 12, "val": 6}
    assert "cat             4      2" in said


def test_one_class(root, check):
    photos(root / "train", 4, classes=("cat",))
    assert f"{root}/train has one class only, cat" in check(code=1)


def test_empty_class_in_val(root, check, fit):
    photos(root / "train", 4), photos(root / "val", 2, 50, ("cat", "dog"))
    (root / "val" / "fox").mkdir()
    assert "val has no images of the class 'fox': nothing is measured for it" in check()
    assert fit("--data.auto_augment", "rand-m10-n6-mstd3")["num_images"] == 4  # which goes beyond Pillow's ranges


@pytest.mark.slow
def test_only_twenty_images(root, log):
    """The recipe as it is, with its moving average of the weights."""
    photos(root, 10, classes=("cat", "dog"))
    small = ["--model.backbone", "test_dinat", "--data.image_size", "32", "--data.num_workers", "0",
             "--data.min_batches", "1",
             "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
             "--trainer.default_root_dir", str(root.parent / "run")]
    assert main(["fit", "--config", "configs/classification/imagefolder_finetune.yaml", "--data.root", str(root),
                 *small]) == 0
    assert "16 training images are few" in log.text
    assert json.loads((root.parent / "run" / "test_metrics.json").read_text())["accuracy"] == 1.0


# Pixels

def test_orientation(root, sheet):
    """A phone's photo lies on its side in the file; as it is seen, its upper half is bright."""
    seen = picture(1, (64, 48))
    seen[:32] = 240
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        for index in range(3):
            save(root / "train" / name / f"{index}.jpg", np.rot90(seen).copy(), exif=exif, quality=95)
    _, (first,) = sheet(1)
    height, width = first.shape[:2]
    assert height > width
    assert first[:height // 3].mean() > 200 > 100 > first[-height // 3:].mean()


@pytest.mark.parametrize(("kind", "options"), [("sixteen_bit", {}), ("float_tiff", {}),
                                               ("float_tiff", {"value_range": [0.0, 0.9]})])
def test_deep_pixels(root, sheet, kind, options):
    for name, level in (("bright", 0.8), ("dark", 0.2)):
        for index in range(3):
            shade = np.full((32, 32), level + 0.01 * index, np.float32)
            deep = kind == "sixteen_bit"
            save(root / "train" / name / f"{index}.{'png' if deep else 'tiff'}",
                 (shade * 65535).astype(np.uint16) if deep else shade)
    said, tiles = sheet(4, **options)
    assert table(said) == {"train": 4, "val": 2}
    white = options.get("value_range", [0, 1])[1]
    assert tiles[0].mean() == pytest.approx(255 * 0.81 / white, abs=4)
    assert tiles[3].mean() == pytest.approx(255 * 0.21 / white, abs=4)


# COCO files of other tools

def test_coco_polygon_far_outside(root, check, fit):
    coco(root, thing=lambda record: record | {"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9, 0, 1e9]]})
    assert "8 mended: its segmentation reaches far out of the image" in check(code=1)
    assert fit("--data.masks", "true", task="detection")["num_images"] == 4


def test_coco_polygon_with_null(root, check, fit):
    coco(root, thing=lambda record: record | (
        {"segmentation": [[None, 0, 20, 0, 20, 20, 0, 20]]} if record["id"] == 3 else {}))
    said = check(code=1)
    assert "train: annotation 3 (image 002.jpg of 128 x 96 pixels): its segmentation holds something else" in said
    line = fit("--data.masks", "true", task="detection", code=1)
    assert "train.json: annotation 3: its segmentation holds something else than numbers (image 002.jpg" in line


def test_coco_normalised_boxes(root, check):
    coco(root, thing=lambda record: record | {
        "bbox": [value / side for value, side in zip(record["bbox"], (128, 96) * 2, strict=True)]})
    said = check(code=1)
    assert "its box looks like shares of the image, from 0 to 1, where pixels are expected: multiply left and" in said
    assert f"{root}/train.json has no object to train on" in said


@pytest.mark.parametrize("kind", ["sizes_as_floats", "sizes_missing", "string_ids", "crowd_as_text", "backslashes"])
def test_coco_as_tools_write_it(root, check, kind):
    hooks = {
        "sizes_as_floats": {"image": lambda record: record | {"width": 128.0, "height": 96.0}},
        "sizes_missing": {"image": lambda record: {key: record[key] for key in ("id", "file_name")}},
        "string_ids": {"image": lambda record: record | {"id": str(record["id"])},
                       "thing": lambda record: record | {"image_id": str(record["image_id"])}},
        "crowd_as_text": {"thing": lambda record: record | {"iscrowd": "0"}},
        "backslashes": {"image": lambda record: record | {"file_name": "sub\\" + record["file_name"]}},
    }
    coco(root, **hooks[kind])
    if kind == "backslashes":
        for split in ("train", "val"):
            shutil.move(root / split, root / "sub")
            shutil.move(root / "sub", root / split / "sub")
    said = check()
    assert table(said) == {"train": 8, "val": 4}
    assert "box              8      4" in said


def test_coco_root_category(root, check):
    coco(root, content=lambda content: content | {"categories": [
        {"id": 0, "name": "boxes", "supercategory": "none"}, {"id": 1, "name": "box", "supercategory": "boxes"}]})
    said = check()
    assert "left out of the classes, as they have no object in any split: boxes" in said
    assert "box              8      4" in said


def test_coco_name_climbs_out(root):
    """Nothing is written outside of the run folder, whatever names the data have."""
    coco(root, image=lambda record: record | {"file_name": "../train/000.jpg"} if record["id"] == 1 else record)
    run = root.parent / "deep" / "run"
    assert main(command("detection", root, run)) == 0
    before = {path for path in root.parent.rglob("*") if not path.is_relative_to(run)}
    assert main(["predict", "--config", str(run / "config.yaml")]) == 0  # which takes the names of the data file
    assert {path for path in root.parent.rglob("*") if not path.is_relative_to(run)} == before
    assert len(list((run / "pictures").rglob("*.png"))) == 4


@pytest.mark.parametrize(("change", "words"), [
    (lambda content: content["categories"].append({"id": 2, "name": "box"}), ""),
    (lambda content: content["annotations"][0].update(segmentation={"size": [96, 128], "counts": [-5, 12293]}),
     "annotation 1"),
    (lambda content: content["annotations"][0].update(segmentation={"size": [9, 12], "counts": [50, 58]}),
     "annotation 1"),
])
def test_other_coco_files(root, check, change, words):
    """A category's name twice, run lengths below zero, run lengths of another image."""
    def changed(content):
        change(content)
        return content

    coco(root, content=changed)
    said = check(code=int(bool(words)))
    assert words in said
    assert table(said) == {"train": 8, "val": 4}


def test_a_class_that_training_lacks(root, check):
    coco(root)
    content = json.loads((root / "val.json").read_text())
    content["categories"].append({"id": 2, "name": "bag"})
    content["annotations"][0]["category_id"] = 2
    (root / "val.json").write_text(json.dumps(content))
    assert "have different categories: 'bag' with id 2 is in one of them only" in check(code=1)


def test_images_that_train_and_validate(root, check):
    coco(root, starts=(("train", 0), ("val", 4)))
    assert "Warning: 4 of 4 val images are training images too" in check()


# YOLO and VOC

def yolo(root):
    for split, count, start in (("train", 8, 0), ("val", 4, 50)):
        (root / "labels" / split).mkdir(parents=True)
        for index in range(start, start + count):
            array, (x, y, w, h) = scene(index)
            save(root / "images" / split / f"{index:03d}.jpg", array)
            (root / "labels" / split / f"{index:03d}.txt").write_text(
                f"0 {(x + w / 2) / 128:.6f} {(y + h / 2) / 96:.6f} {w / 128:.6f} {h / 96:.6f}\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: box\n")


def voc(root):
    (root / "Annotations").mkdir(parents=True)
    for index in range(8):
        array, (x, y, w, h) = scene(index)
        save(root / "JPEGImages" / f"{index:03d}.jpg", array)
        (root / "Annotations" / f"{index:03d}.xml").write_text(
            f"<annotation><filename>{index:03d}</filename><size><width>128</width><height>96</height></size><object>"
            f"<name>box</name><bndbox><xmin>{x + 1}.0</xmin><ymin>{y + 1}.0</ymin><xmax>{x + w}.0</xmax>"
            f"<ymax>{y + h}.0</ymax></bndbox></object></annotation>")


def test_yolo(root, check):
    yolo(root)
    said = check()
    assert table(said) == {"train": 8, "val": 4}
    assert "box              8      4" in said


def test_voc(root, check):
    voc(root)
    said = check()
    assert table(said) == {"train": 6, "val": 2}
    assert "There are no validation images: of the 8 images" in said


# Masks

GROUND, ROAD = (0, 0, 0), (128, 64, 128)


def _three_levels(label):
    levels = label * np.uint8(255)
    levels[:8] = 128
    return levels


@pytest.mark.parametrize(("of", "name", "words", "options"), [
    (lambda label: label * np.uint8(255), "{}.png", "found are 0 (89.9 %), 255 (10.1 %); set "
     "data.init_args.mask_values to [0, 255]", {"mask_values": [0, 255]}),
    (_three_levels, "{}.png", "0 (81.5 %), 255 (10.1 %), 128 (8.3 %); set data.init_args.mask_values to [0, 128, 255]",
     {"mask_values": [0, 128, 255]}),
    (lambda label: label * np.uint8(200), "{}.jpg", "are JPEG files, which do not keep values; found are 0 (88.1 %), "
     "200 (7.2 %)", {"mask_values": [0, 200]}),
    (lambda label: np.array([GROUND, ROAD], np.uint8)[label], "{}.png",
     "are in colours: (0, 0, 0) (89.9 %), (128, 64, 128) (10.1 %); set data.init_args.mask_colors",
     {"mask_colors": {"ground": GROUND, "road": ROAD}}),
], ids=["0_255", "0_128_255", "as_jpeg", "in_colours"])
def test_masks_of_other_values(root, check, of, name, words, options):
    masks(root, of, name)
    assert words in check(code=1)
    assert table(check(**options)) == {"train": 8, "val": 4}


@pytest.mark.parametrize(("name", "val"), [("{}_mask.png", "val"), ("{}_seg.png", "val"), ("{}.png", "valid")])
def test_masks_in_usual_places(root, check, name, val):
    masks(root, name=name, val=val)
    assert table(check()) == {"train": 8, "val": 4}


def test_masks_one_damaged(root, check, fit):
    masks(root)
    file = root / "masks" / "train" / "003.png"
    file.write_bytes(file.read_bytes()[:40])
    assert f"{file}: the mask cannot be read" in fit(task="segmentation", code=1)
    assert fit("--data.on_error", "skip", task="segmentation")["num_images"] == 4
    assert str(file) in (root.parent / "run" / "left_out.csv").read_text()
    assert table(check(code=1)) == {"train": 7, "val": 4}


# Tables of labels

def table_of(root, rows, head="image,label"):
    for index in range(12):
        save(root / "images" / f"{index}.jpg", picture(index, colour=tuple(COLOURS.values())[index % 3]))
    (root / "labels.csv").write_text("\n".join([head, *rows]) + "\n")


@pytest.mark.parametrize(("labels", "counts"), [
    (["cat", "dog", "fox"], "cat             3      1"), (["cat|dog", "dog", "fox"], "cat             3      1"),
    (["1,0,0", "0,1,0", "0,0,1"], "cat             3      1"),
])
def test_a_table(root, check, labels, counts):
    head = "image,label" if "," not in labels[0] else "image,cat,dog,fox"
    table_of(root, [f"{index}.jpg,{labels[index % 3]}" for index in range(12)], head)
    said = check()
    assert counts in said
    assert "CsvData: labels.csv lists images and labels" in said


def test_a_table_with_bad_rows(root, check, fit):
    good = [f"{index}.jpg,{'cat' if index % 2 else 'dog'}" for index in range(12)]
    table_of(root, [*good, "99.jpg,cat", "3.jpg,dog"])
    assert "labels.csv, line 14: there is no such file" in fit("--data", "CsvData", "--data.root", root, code=1)
    said = check(code=1)
    assert "1 left out: there is no such file" in said
    assert "1 left out, with the other: the image is listed before, with another label" in said
    assert sum(table(said).values()) == 11


# Runs

def test_same_stem(root):
    """One result for each file, none of an earlier prediction."""
    masks(root)
    run, inbox = root.parent / "run", root.parent / "inbox"
    assert main(command("segmentation", root, run)) == 0
    for count, name in enumerate(("old.jpg", "a.jpg", "a.png", "b/a.jpg")):
        save(inbox / name, picture(count))
    predict = ["predict", str(run), str(inbox)]
    assert main(predict) == 0
    (inbox / "old.jpg").unlink()
    shutil.rmtree(root)  # which is not needed
    assert main(predict) == 0
    found = sorted(str(path.relative_to(run / "predictions")) for path in (run / "predictions").rglob("*.png"))
    assert found == ["a.jpg.png", "a.png.png", os.path.join("b", "a.png")]


def test_another_number_of_classes_than_the_data(root, fit):
    photos(root, 4)
    line = fit("--model.num_classes", "5", code=1)
    assert "num_classes of the configuration is 5, but that of the data is 3: leave it out" in line


def test_a_batch_of_one_with_batch_norm(root, fit):
    """The head pools to one position, of which batch norm has a single value in a channel."""
    masks(root)
    line = fit("--model.backbone", "resnet10t", "--model.head", "upernet", "--data.batch_size", "1",
               task="segmentation", code=1)
    assert "set data.init_args.batch_size to 2 or more" in line
