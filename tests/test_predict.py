"""``visionattn predict RUN IMAGE ...``: the predictions of the run, of any image, written so that nothing is lost."""
import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor

from visionattn.cli import main
from visionattn.data import CsvData, ImageFolderData, VocData, YoloData
from visionattn.heads import sliding_window
from visionattn.predictor import Predictor
from visionattn.runtime.inputs import find_inputs
from visionattn.runtime.pictures import Patch, draw_classes, draw_label_map, draw_objects, patches
from visionattn.runtime.prepare import image_size
from visionattn.runtime.rle import area_of, encode
from visionattn.runtime.tiles import detect_in_tiles, label_in_tiles

from .data.images import coco_content, truncate, write_classes, write_image, write_mask

FEW = "{rpn_post_nms_top_n_test: 30, box_batch_size_per_image: 16, box_detections_per_img: 8, box_score_thresh: 0.01}"
RUNS = {
    "classification": """
model:
  class_path: ClassificationTask
  init_args: {backbone: test_biformer}
data: {class_path: ImageFolderData, init_args: {image_size: 40, crop_pct: 0.8, mean: [0.3, 0.4, 0.5], batch_size: 8}}
""", "detection": f"""
model:
  class_path: DetectionTask
  init_args: {{backbone: test_dinat, detector: mask_rcnn, fpn_channels: 64, min_size: 48, max_size: 96,
              picture_score: 0.3, detector_args: {FEW}}}
data: {{class_path: CocoData, init_args: {{masks: true, batch_size: 1}}}}
""", "segmentation": """
model:
  class_path: SegmentationTask
  init_args: {backbone: test_dinat, head: semantic_fpn, head_channels: 16, auxiliary_weight: 0}
data: {class_path: SegmentationFolderData, init_args: {crop_size: 64, short_side: 48, batch_size: 2}}
"""}
TRAINER = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1,
           "num_sanity_val_steps": 0, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
NAMES = ["a.png", "a.jpg", "sub/a.jpg", 'quo"te, comma.png', "line\nbreak.png", "-dash.png", "-.png",
         "y" * 250 + ".png", os.fsdecode(b"\xff\xfe.png"), "no ending"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each task, whose training data are gone, with what the older form of the command said of ``inbox``."""
    top = tmp_path_factory.mktemp("runs")
    inbox = write_inbox(top / "inbox")
    for split in ("train", "val"):
        write_classes(top / "classification" / split, count=2)
        content = coco_content(top / "detection" / split)
        (top / "detection" / f"{split}.json").write_text(json.dumps(content))
        for index in range(2):
            write_image(top / "segmentation" / "images" / split / f"{index}.png", seed=index)
            write_mask(top / "segmentation" / "masks" / split / f"{index}.png", seed=index)
    for task, text in RUNS.items():
        config = yaml.safe_load(text) | {"trainer": TRAINER | {"default_root_dir": str(top / "runs" / task)}}
        config["data"]["init_args"] |= {"root": str(top / task), "num_workers": 0}
        (top / f"{task}.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", str(top / f"{task}.yaml")]) == 0
        assert main(["predict", "--config", str(top / "runs" / task / "config.yaml"), "--data.init_args.predict_root",
                     str(inbox)]) == 0
        shutil.copytree(top / "runs" / task, top / "older" / task)
        shutil.rmtree(top / task)
    return top


def write_inbox(folder: Path) -> Path:
    """Photos of any size, kind and orientation."""
    write_image(folder / "wide.png", (100, 30), seed=1)
    write_image(folder / "grey.png", (40, 60), seed=2)
    Image.open(folder / "grey.png").convert("L").save(folder / "grey.png")
    deep = np.random.default_rng(3).integers(0, 65536, (50, 40)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.open(write_image(folder / "turned.jpg", (64, 40), seed=4)).save(folder / "turned.jpg", exif=exif)
    write_image(folder / "more" / "wide.jpg", (33, 44), seed=5)
    return folder


def rows(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# The same as the older form, without the training data

def test_classes_are_those_of_the_older_form(runs, tmp_path):
    assert main(["predict", str(runs / "runs" / "classification"), str(runs / "inbox"), "--out", str(tmp_path)]) == 0
    older, found = rows(runs / "older" / "classification" / "predictions.csv"), rows(tmp_path / "predictions.csv")
    assert len(older) == len(found) == 5
    for before, now in zip(older, found, strict=True):
        assert now["file"] == before["file"]
        for key in before:
            if key.startswith("probability"):
                assert float(now[key]) == pytest.approx(float(before[key]), abs=2e-6)
    assert [now["class"] for now in found] == [before["class"] for before in older]
    assert set(found[0].values()) >= {"cat", "dog", "emu"}
    assert names(tmp_path / "pictures") == ["deep.png", "grey.png", "more/wide.png", "turned.png", "wide.png"]


@pytest.mark.parametrize("with_settings", [True, False], ids=["by the checkpoint", "by the configuration beside it"])
@pytest.mark.parametrize("task", RUNS)
def test_results_are_those_of_the_older_form(task, with_settings, runs, tmp_path):
    shutil.copytree(runs / "runs" / task, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    if with_settings:
        checkpoint = checkpoint.rename(tmp_path / "alone.ckpt")
        shutil.rmtree(tmp_path / "run")
    else:
        content = torch.load(checkpoint)
        del content["hyper_parameters"]["_image_settings"]
        torch.save(content, checkpoint)
    older = runs / "older" / task
    predictor = Predictor(checkpoint, batch_size=3 if task == "classification" else None)
    inputs = find_inputs([str(runs / "inbox")])
    seen = list(predictor(one.file for one in inputs))
    assert [one.file for one in seen] == [str(one.file) for one in inputs]
    if task == "classification":
        for one, row in zip(seen, rows(older / "predictions.csv"), strict=True):
            assert one.probability == pytest.approx(float(row["probability"]), abs=2e-6)
    elif task == "segmentation":
        for one, named in zip(seen, inputs, strict=True):
            with Image.open(older / "predictions" / f"{named.stem}.png") as label_map:
                assert np.array_equal(np.asarray(label_map), one.labels)
    else:
        records = json.loads((older / "predictions.json").read_text())
        assert len(records) > 10
        found = [(named.name, one, index) for one, named in zip(seen, inputs, strict=True)
                 for index in range(len(one))]
        assert len(found) == len(records)
        for (name, one, index), record in zip(found, records, strict=True):
            left, top, right, bottom = one.boxes[index].tolist()
            assert name == record["file_name"]
            assert [left, top, right - left, bottom - top] == pytest.approx(record["bbox"], abs=1e-3)
            assert one.scores[index].item() == pytest.approx(record["score"], abs=1e-6)
            assert {1: 12, 2: 30}[one.labels[index].item()] == record["category_id"]
            mask = np.zeros(one.image.size[::-1], bool)
            patch = one.masks[index]
            mask[patch.top:, patch.left:][:patch.mask.shape[0], :patch.mask.shape[1]] = patch.mask
            assert np.array_equal(mask, coco_mask.decode(record["segmentation"]))


def test_what_a_checkpoint_does_not_say_is_asked_for(runs, tmp_path, capfd):
    content = torch.load(runs / "runs" / "segmentation" / "checkpoints" / "best.ckpt")
    del content["hyper_parameters"]["_image_settings"]
    torch.save(content, tmp_path / "alone.ckpt")
    assert main(["predict", str(tmp_path / "alone.ckpt"), str(runs / "inbox"), "--out", str(tmp_path)]) == 1
    assert "alone.ckpt does not say how its images are made" in capfd.readouterr().err


@pytest.mark.parametrize("task", RUNS)
def test_test_needs_the_test_images_alone(task, runs, tmp_path, capfd):
    """``visionattn test RUN DATA`` with data that have one split, and the second of the classes first."""
    run, root = tmp_path / "run", tmp_path / "data"
    shutil.copytree(runs / "runs" / task, run)
    (run / "test_metrics.json").unlink()
    if task == "classification":
        write_classes(root / "testing", ("DOG", "emu"), count=2)
    elif task == "detection":
        content = coco_content(root / "val")
        (root / "val.json").write_text(json.dumps(content))
    else:
        write_image(root / "images" / "val" / "0.png")
        write_mask(root / "masks" / "val" / "0.png", values=(0, 1))
    argv = ["test", str(run), str(root), "--trainer.limit_test_batches", "1.0"]
    assert main(argv) == 0
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_classes"]) == {
        "classification": (4, 3), "detection": (3, 2), "segmentation": (1, 3)}[task]
    if task == "classification":
        assert main([*argv[:2], str(root / "testing"), *argv[3:]]) == 0
        write_classes(root / "testing", ("fox",))
    elif task == "detection":
        content["categories"][0]["name"] = "fox"
        (root / "val.json").write_text(json.dumps(content))
    else:
        write_mask(root / "masks" / "val" / "0.png", values=(0, 1, 7))
    capfd.readouterr()
    assert main(argv) == 1
    said, = [line for line in capfd.readouterr().err.splitlines() if line.startswith("visionattn: error")]
    assert ("fox" if task != "segmentation" else "a label without a class") in said or "7" in said


def test_labels_are_those_of_the_checkpoint(tmp_path):
    """Whatever classes the test images have, with each kind of data."""
    write_classes(tmp_path / "folders" / "test", ("dog", "Emu"), count=1)
    data = ImageFolderData(str(tmp_path / "folders"), class_names=["emu", "cat", "dog"], num_workers=0)
    data.setup("test")
    assert {file.parent.name: label for file, label in data.samples["test"]} == {"dog": 2, "Emu": 0}
    with pytest.raises(ValueError, match="has no folder train, whose images are needed"):
        data.setup("fit")
    with pytest.raises(ValueError, match="dog is a class that is not among those that were trained: emu, cat"):
        ImageFolderData(str(tmp_path / "folders"), class_names=["emu", "cat"])

    yolo = tmp_path / "yolo"
    write_image(yolo / "images" / "test" / "a.png")
    (yolo / "labels" / "test").mkdir(parents=True)
    (yolo / "labels" / "test" / "a.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    (yolo / "data.yaml").write_text("{train: images/train, val: images/val, test: images/test, names: [cat, dog]}")
    data = YoloData(str(yolo), class_names=["dog", "cat"], num_workers=0)
    data.setup("test")
    assert data.records["test"][0].objects[0].label == 1
    assert data.category_ids == [1, 0]
    with pytest.raises(ValueError, match=r"data.yaml has the class 'cat', and the classes are dog, fox"):
        YoloData(str(yolo), class_names=["dog", "fox"])

    voc = tmp_path / "voc" / "test"
    write_image(voc / "a.png")
    (voc / "a.xml").write_text("<annotation><object><name>dog</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>9</xmax>"
                               "<ymax>9</ymax></bndbox></object></annotation>")
    data = VocData(str(tmp_path / "voc"), class_names=["cat", "dog"], num_workers=0)
    data.setup("test")
    assert data.records["test"][0].objects[0].label == 2
    with pytest.raises(ValueError, match="has the class 'dog', and the classes are cat, fox"):
        VocData(str(tmp_path / "voc"), class_names=["cat", "fox"])

    write_image(tmp_path / "tables" / "b.png")
    (tmp_path / "tables" / "test.csv").write_text("path,label\nb.png,dog\n")
    data = CsvData(str(tmp_path / "tables"), class_names=["cat", "dog"], multi_label=False, num_workers=0)
    data.setup("test")
    assert data.samples["test"] == [(tmp_path / "tables" / "b.png", 1)]


# Files of any name

@pytest.mark.parametrize("task", RUNS)
def test_files_of_any_name(task, runs, tmp_path, monkeypatch):
    """In a folder that is the current one, twice, with one that cannot be read; then without the first of them."""
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    for seed, name in enumerate(NAMES):
        write_image(inbox / "picture.png", (40, 36), seed=seed)
        (inbox / name).parent.mkdir(exist_ok=True)
        (inbox / "picture.png").rename(inbox / name)
    truncate(write_image(inbox / "broken.jpg"))
    monkeypatch.chdir(inbox)
    run, more = str(runs / "runs" / task), ["--save-crops"] if task == "detection" else []
    argv = ["predict", run, ".", "no ending", "--out", str(out), "--batch-size", "4", *more]
    assert main(argv) == 1
    assert rows(out / "left_out_predict.csv")[0]["what"] == "broken.jpg"
    pictures = names(out / "pictures")
    assert len(pictures) == len(NAMES)
    assert {"a.png.png", "a.jpg.png", "sub/a.png", "-dash.png", "-.png", "no ending.png"} <= set(pictures)
    if task == "classification":
        written = [row["file"] for row in rows(out / "predictions.csv")]
        assert {os.path.normpath(name) for name in NAMES[:8]} <= set(written)
        assert "\\udcff\\udcfe.png" in written
    elif task == "detection":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            coco = COCO(out / "predictions_coco.json")
            coco.loadRes(str(out / "predictions.json"))
        assert {image["file_name"] for image in coco.imgs.values()} == set(NAMES)
        assert len({image["id"] for image in coco.imgs.values()}) == len(NAMES)
        assert {record["category_name"] for record in coco.anns.values()} <= {"cat", "dog"}
        assert {(image["width"], image["height"]) for image in coco.imgs.values()} == {(40, 36)}
        assert len(names(out / "crops")) == len(coco.anns) > 0
        assert not list(out.glob("*.part"))
    else:
        assert names(out / "predictions") == pictures
    (inbox / "a.jpg").unlink()
    (inbox / "broken.jpg").unlink()
    (out / "pictures" / "notes.txt").write_text("mine")
    assert main(["predict", run, "--out", str(out), ".", "no ending"]) == 0
    kept = set(pictures) - {"a.jpg.png", "a.png.png"} | {"a.png"}
    assert set(names(out / "pictures")) == kept | {"notes.txt"}
    assert not (out / "left_out_predict.csv").exists()
    assert not (out / "crops").exists()


def test_inputs(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.jpg", "in/b/a.jpg", "in/c.PNG", "in/[x].png", "other/a.jpg"):
        write_image(Path(name))
    Path("in/notes.md").write_text("no image")

    def found(*arguments, **options):
        return [(str(one.file), one.name, one.stem) for one in find_inputs(arguments, **options)]

    assert found("in/b") == [("in/b/a.jpg", "a.jpg", "a")]
    assert [name for _, name, _ in found("in")] == ["[x].png", "a.jpg", "b/a.jpg", "c.PNG"]
    assert [stem for *_, stem in found("in", "other", "in/a.jpg")] == [
        "in/[x]", "in/a", "in/b/a", "in/c", "other/a"]
    assert "1 images were named twice" in caplog.text
    assert [file for file, *_ in found("in/[x].png")] == ["in/[x].png"]  # a file, before it is a pattern
    assert [file for file, *_ in found("in/**/*.jpg")] == ["in/a.jpg", "in/b/a.jpg"]
    assert [file for file, *_ in found("i*")] == ["in/[x].png", "in/a.jpg", "in/b/a.jpg", "in/c.PNG"]
    Path("in/list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n\r\nother/a.jpg\r\nmissing.jpg\r\n")
    assert [file for file, *_ in found("in/list.txt")] == ["in/a.jpg", "other/a.jpg", "missing.jpg"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/a.jpg\0in/line\nbreak.jpg\0")))
    assert [file for file, *_ in found("-")] == ["in/a.jpg", "in/line\nbreak.jpg"]
    assert len(found(".", without=[Path("in")])) == 1
    for argument, error, words in (
            ("nowhere", FileNotFoundError, "nowhere does not exist"), ("in/*.tif", FileNotFoundError, "no image fits"),
            ("empty", ValueError, "there are no images in empty")):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises(error, match=words):
            find_inputs([argument])
    with pytest.raises(ValueError, match="but those of"):
        find_inputs(["in"], without=[tmp_path / "in"])


def test_results_are_no_images_of_the_next_prediction(runs, tmp_path):
    """Nor do they end in a folder of a user's own table."""
    run = tmp_path / "photos" / "runs" / "x"
    shutil.copytree(runs / "runs" / "classification", run)
    write_image(tmp_path / "photos" / "a.jpg")
    for _ in range(2):
        assert main(["predict", str(run), str(tmp_path / "photos")]) == 0
        assert len(rows(run / "predictions.csv")) == 1
    (run / "predictions.csv").write_text("my own,table\n")
    assert main(["predict", str(run), str(tmp_path / "photos")]) == 1
    assert (run / "predictions.csv").read_text() == "my own,table\n"


@pytest.mark.parametrize(("task", "options", "words"), [
    ("classification", ["--tile", "64"], "a classifier sees an image at once"),
    ("classification", ["--threshold", "0.5"], "leave threshold out"),
    ("segmentation", ["--save-crops"], "leave threshold and crops out"),
    ("detection", ["--tile", "8"], "32 pixels or more"),
])
def test_options_that_do_not_fit(task, options, words, runs, tmp_path, capfd):
    argv = ["predict", str(runs / "runs" / task), str(runs / "inbox"), "--out", str(tmp_path), *options]
    assert main(argv) == 1
    assert words in capfd.readouterr().err


def test_what_is_no_run(tmp_path, capfd):
    (tmp_path / "weights.pth").write_bytes(b"")
    for path, words in ((tmp_path, "has no checkpoints/best.ckpt"),
                        (tmp_path / "nowhere", "no run folder or checkpoint"),
                        (tmp_path / "weights.pth", "is damaged or not a checkpoint")):
        assert main(["predict", str(path), "x.jpg"]) == 1
        assert words in capfd.readouterr().err


def test_images_of_any_shape(runs, tmp_path):
    """A detector cannot bring the thin one to a size that it knows: it is left out, the others are not."""
    for size in ((1, 1), (3, 3000)):
        write_image(tmp_path / "inbox" / f"{size[1]}.png", size)
    for task in RUNS:
        out = tmp_path / task
        argv = ["predict", str(runs / "runs" / task), str(tmp_path / "inbox"), "--out", str(out), "--batch-size", "2"]
        code = main(argv)
        left_out = rows(out / "left_out_predict.csv") if code else []
        assert len(left_out) == (task == "detection")
        assert len(names(out / "pictures")) == 2 - len(left_out)


# Detections

def test_threshold_and_tiles_of_a_detector(runs, tmp_path):
    run, image = runs / "runs" / "detection", write_image(tmp_path / "large.png", (150, 130))
    counts = []
    for options in (["--threshold", "0.6"], ["--tile", "64"], []):
        assert main(["predict", str(run), str(image), "--out", str(tmp_path / "out"), *options]) == 0
        records = json.loads((tmp_path / "out" / "predictions.json").read_text())
        counts.append(len(records))
        assert all(record["score"] >= 0.6 for record in records if "--threshold" in options)
        for record in records:
            left, top, width, height = record["bbox"]
            assert min(left, top) >= 0
            assert left + width <= 150.001
            assert top + height <= 130.001
            assert record["segmentation"]["size"] == [130, 150]
    assert counts[1] > counts[2] > counts[0]


@pytest.mark.parametrize("array", [False, True])
def test_tiles_find_what_is_in_the_image(array):
    """Of an exact detector of squares, each of its own grey: every square once, whole, with its mask."""
    squares = {10: (5, 5, 25), 20: (58, 40, 20), 30: (130, 90, 18), 40: (20, 100, 60)}  # left, top, side
    image = Image.new("L", (200, 170))
    for grey, (left, top, side) in squares.items():
        image.paste(grey, (left, top, left + side, top + side))
    seen = []

    def detect(images):
        found = []
        for one in images:
            seen.append(image_size(one))
            pixels = one[0] if isinstance(one, np.ndarray) else np.asarray(one)
            masks = [pixels == grey for grey in squares if (pixels == grey).sum() > 20]
            parts = patches(np.array(masks).reshape(-1, *pixels.shape))
            boxes = [[part.left, part.top, part.left + part.mask.shape[1], part.top + part.mask.shape[0]]
                     for part in parts]
            found.append({
                "boxes": np.array(boxes, np.float32).reshape(-1, 4),
                "labels": np.ones(len(parts), np.int64), "scores": np.full(len(parts), 0.9, np.float32),
                "masks": parts})
        return found

    if array:  # as of images of other channels than three
        image = np.array(image)[None].repeat(5, 0)
    found = detect_in_tiles(detect, image, 64, 4, (100, 85))
    assert seen.count((64, 64)) == len(seen) - 1  # and all of it, smaller
    expected = sorted([left, top, left + side, top + side] for left, top, side in squares.values())
    assert np.allclose(sorted(found["boxes"].tolist()), expected, atol=2)
    for box, patch in zip(found["boxes"].tolist(), found["masks"], strict=True):
        assert (patch.left, patch.top) == pytest.approx(box[:2], abs=1)
        assert patch.mask.all()
    assert len(detect_in_tiles(detect, image, 200, 4, (100, 85))["labels"]) == 4
    nothing = np.zeros((5, 170, 200), np.uint8) if array else Image.new("L", (200, 170))
    empty = detect_in_tiles(detect, nothing, 64, 4, (100, 85))
    assert (len(empty["boxes"]), empty["masks"]) == (0, [])


@pytest.mark.parametrize("size", [(100, 70), (64, 64), (130, 65), (30, 90)])
def test_tiles_of_label_maps_are_windows(size):
    """The mean of the logits, as of sliding windows over all of the image."""
    pixels = torch.rand(3, *size[::-1], generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((pixels * 255).byte().movedim(0, -1).numpy())

    def logits(images: Tensor) -> Tensor:
        return images - images.mean(dim=(2, 3), keepdim=True)  # depends on the window

    def infer(images):
        return logits(torch.stack([torch.from_numpy(np.array(one)).movedim(-1, 0).float() for one in images])).numpy()

    whole = torch.from_numpy(np.array(image)).movedim(-1, 0).float()[None]
    expected = sliding_window(logits, whole, 64, 48).argmax(dim=1)[0]
    assert np.array_equal(label_in_tiles(infer, image, 64, 3), expected)
    assert np.array_equal(label_in_tiles(
        lambda tiles: logits(torch.from_numpy(np.stack(tiles))).numpy(), whole[0].numpy(), 64, 3), expected)


def test_tiles_of_a_segmenter(runs, tmp_path):
    image = write_image(tmp_path / "large.png", (150, 130))
    argv = ["predict", str(runs / "runs" / "segmentation"), str(image), "--out", str(tmp_path), "--tile", "64"]
    assert main(argv) == 0
    with Image.open(tmp_path / "predictions" / "large.png") as label_map:
        assert label_map.size == (150, 130)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (12, 3), (300, 400)])
def test_masks_are_coded_as_pycocotools_codes_them(shape):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 0.95, 1.0):
        mask = rng.random(shape) < share
        patch, = patches(mask[None])
        code = encode(patch, *shape)
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert code == {"size": list(shape), "counts": expected["counts"].decode()}
        assert area_of(code) == coco_mask.area(expected) == mask.sum()


# Pictures

def test_pictures_can_be_read_at_any_size():
    """Names are not cut off: what is too wide or high makes the picture larger."""
    for size in ((1, 1), (8, 8), (3, 400), (400, 3), (3000, 40)):
        image = Image.new("RGB", size)
        found = {"boxes": np.array([[0., 0., *size]]), "labels": np.array([1]), "scores": np.array([0.5]),
                 "masks": [Patch(np.ones(size[::-1], bool), 0, 0)]}
        drawn = draw_objects(image, found, ["a rather long name of a class\n"])
        label_map = Image.new("L", size)
        label_map.putpalette([0] * 768)
        for picture in (drawn, draw_classes(image, [("a class", 0.5), ("Größe 犬", 0.4)]),
                        draw_label_map(image, label_map, ["the background"])):
            assert max(picture.size) >= 256
            colours = picture.getcolors(1 << 24)
            assert len(colours) > 3  # letters have soft edges
