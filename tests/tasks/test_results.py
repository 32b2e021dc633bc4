"""Where predictions are written: below the run folder whatever a data file says, one an image, none of before."""
import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.images import coco_content, truncate, write_image
from visionattn.data import CocoData, ImageFolderData, SegmentationFolderData
from visionattn.runtime.writers import ResultFolder
from visionattn.tasks import ClassificationTask, DetectionTask, SegmentationTask

NAMES = ["../../up", "/root/up", "C:\\up", "C:up", "..\\..\\up", "\\\\host\\share\\up", "a/../../../up", "..", ".", "",
         "//", "~/up", "a\\..\\..\\up", "./up"]


def picture(value=0):
    return Image.new("L", (2, 2), value)


def predict(task, data, run):
    torch.manual_seed(0)
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=run, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False)
    trainer.predict(task, data, return_predictions=False)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_outside(name, tmp_path):
    folder = tmp_path / "a" / "b" / "pictures"
    path = ResultFolder(folder).save(picture(), name)
    assert path.resolve().is_relative_to(folder.resolve())
    assert ".." not in path.parts
    assert files(tmp_path) == [path.relative_to(tmp_path).as_posix()]


def test_names_of_images_are_those_of_their_results(tmp_path):
    folder = ResultFolder(tmp_path)
    for name in ("a", "a.jpg", "a.png", "sub/a.jpg", "A.jpg", "b..jpg", "a b.jpg"):
        assert folder.save(picture(), name) == tmp_path / f"{name}.png"
    assert folder.save(picture(), "a") == tmp_path / "a.png"  # again the same image
    others = ("./sub/a.jpg", "..a", "a:jpg", "a_jpg", "sub\\a.jpg", "x" * 300, "x" * 301, "ä" * 200, "line\nbreak",
              "quote\"", "\udcff.jpg", "-x")
    written = [folder.save(picture(), name) for name in others]
    assert len(set(written)) == len(others)
    assert all(path.is_file() and path.is_relative_to(tmp_path) for path in written)


def test_tables_of_no_image(tmp_path):
    ClassificationTask("test_dinat", num_classes=2).open_results(tmp_path).close()
    DetectionTask("test_dinat", num_classes=1, fpn_channels=64).open_results(tmp_path).close()
    assert (tmp_path / "predictions.csv").read_text() == "file,class,probability,class_2,probability_2\n"
    assert json.loads((tmp_path / "predictions.json").read_text()) == []
    assert json.loads((tmp_path / "predictions_coco.json").read_text())["images"] == []


def test_classes_of_several_labels(tmp_path):
    """A row for each image, twice in the same folder."""
    task = ClassificationTask("test_dinat", num_classes=3, class_names=["a", "b", "c"], multi_label=True)
    for threshold, labels in ((None, "a"), (0.3, "a|c")):
        results = task.open_results(tmp_path, threshold)
        best = results.best(np.array([0.75, 0.25, 0.4]))
        results.write("\udcff.jpg", best)
        results.draw("x", picture().convert("RGB"), best)
        assert results.close() == f"Predictions of 1 images are in {tmp_path / 'predictions.csv'}"
        assert (tmp_path / "predictions.csv").read_text().splitlines() == [
            "file,labels,a,b,c", f"\\udcff.jpg,{labels},0.750000,0.250000,0.400000"]
    with pytest.raises(ValueError, match="leave threshold out"):
        ClassificationTask("test_dinat", num_classes=3).open_results(tmp_path, 0.5)


def test_what_others_wrote_is_kept(tmp_path):
    for name in ("old", "deep/er/old"):
        ResultFolder(tmp_path).save(picture(), name)
    picture().save(tmp_path / "mine.png")
    picture().save(tmp_path / "deep" / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    ResultFolder(tmp_path).clear()
    assert files(tmp_path) == ["broken.png", "deep/mine.png", "mine.png", "notes.txt"]
    assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "deep" / "er").exists()
    ResultFolder(tmp_path / "nowhere").clear()


def test_pictures_of_a_coco_file_stay_in_the_run(tmp_path):
    """Also of names that lead out of its folder of images, where the images are."""
    content = coco_content(tmp_path / "images")
    names = ["../up.png", str(tmp_path / "whole.png"), "deep/../7.png"]
    (tmp_path / "images" / "deep").mkdir()
    for name, record in zip(names, content["images"], strict=True):
        write_image(tmp_path / "images" / name)
        record["file_name"] = name
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    before = files(tmp_path)
    data = CocoData(str(tmp_path), "images", "train.json", "images", "val.json", num_workers=0)
    run = tmp_path / "runs" / "deep" / "run"
    task = DetectionTask("test_dinat", num_classes=2, fpn_channels=64, min_size=64, max_size=96)
    for _ in range(2):
        predict(task, data, run)
        written = sorted(set(files(tmp_path)) - set(before))
        assert len(written) == 5
        assert all(name.startswith("runs/deep/run/") for name in written)


def test_every_image_has_its_label_map(tmp_path):
    """Images whose names differ by their extension, in folders, and after images that are gone."""
    for split in ("train", "val"):
        write_image(tmp_path / "images" / split / "0.jpg")
        (tmp_path / "masks" / split).mkdir(parents=True)
        Image.new("L", (40, 36), 1).save(tmp_path / "masks" / split / "0.png")
    inbox, run = tmp_path / "inbox", tmp_path / "run"
    images = ["a.jpg", "a.png", "b.jpg", "sub/a.jpg"]
    for seed, name in enumerate(images):
        write_image(inbox / name, seed=seed)
    data = SegmentationFolderData(str(tmp_path), predict_root=str(inbox), class_names=["x", "y"], num_workers=0)
    task = SegmentationTask("test_dinat", num_classes=2, head="semantic_fpn", head_channels=16)
    predict(task, data, run)
    expected = ["a.jpg.png", "a.png.png", "b.png", "sub/a.png"]
    assert files(run / "predictions") == files(run / "pictures") == expected
    picture().save(run / "pictures" / "mine.png")
    for name in images[1:]:
        (inbox / name).unlink()
    predict(task, data, run)
    assert files(run / "predictions") == ["a.png"]
    assert files(run / "pictures") == ["a.png", "mine.png"]


def test_a_prediction_that_fails_leaves_no_earlier_one(tmp_path):
    for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"):
        write_image(tmp_path / "photos" / name)
    inbox, run = tmp_path / "inbox", tmp_path / "run"
    write_image(inbox / "a.jpg")
    data = ImageFolderData(str(tmp_path / "photos"), image_size=32, num_workers=0, predict_root=str(inbox))
    task = ClassificationTask("test_biformer", num_classes=2)
    predict(task, data, run)
    assert "a.jpg" in (run / "predictions.csv").read_text()
    truncate(inbox / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg cannot be read"):
        predict(task, data, run)
    assert not Path(run, "predictions.csv").exists()
