"""The table of a run's data, and how names of splits are understood."""
import csv

import pytest

from visionattn.data.report import DataReport, SplitReport
from visionattn.data.splits import split_folders, split_of
from visionattn.runtime.folders import visible_folders


def _report():
    report = DataReport("images")
    report.splits["train"] = SplitReport(35, {"cat": 30, "dog": 2, "emu": 3}, [
        ("a.jpg", "damaged", "left out"), ("b.jpg", "damaged", "left out"), ("c.jpg", "empty", "left out")])
    report.splits["val"] = SplitReport(4, {"cat": 4, "dog": 0, "emu": 0})
    return report


def test_table_names_splits_classes_and_what_was_left_out():
    lines = _report().text().splitlines()
    assert lines[0].split() == ["split", "images", "left", "out", "or", "mended"]
    assert lines[1].split()[:2] == ["train", "35"]
    assert "2 left out: damaged; 1 left out: empty" in lines[1]
    assert [line.split() for line in lines[3:7]] == [
        ["class", "(images)", "train", "val"], ["cat", "30", "4"], ["dog", "2", "0"], ["emu", "3", "0"]]


def test_few_images_are_named():
    assert "35 training images are few" in _report().text()
    report = DataReport()
    report.splits["train"] = SplitReport(100, {"cat": 200})
    assert "few" not in report.text()
    assert report.text().splitlines()[1].split()[:3] == ["train", "100", "200"]


def test_imbalance_and_lacking_classes_are_named():
    text = _report().text()
    assert "training has 30 images of 'cat' and 2 of 'dog' (15 : 1)" in text
    assert "val has no images of 'dog', 'emu': nothing is measured for it" in text
    report = DataReport("images")
    report.splits["train"] = SplitReport(20, {"cat": 10, "dog": 1})
    assert "Imbalance" not in report.text()  # 10 : 1 is not above it
    report.splits["val"] = SplitReport(1, {"yak": 1})
    assert "Training has no images of 'yak', but val has" in report.text()
    report.splits["train"] = SplitReport(20, {"cat": 10, "yak": 0})
    assert "Training has no images of 'yak': nothing is learned of it" in report.text()


def test_many_classes_are_shortened():
    report = DataReport()
    report.splits["train"] = SplitReport(9, {f"class {i}": i + 1 for i in range(50)})
    assert "... and 30 more classes" in report.text()
    assert "class 49" in report.text()  # the frequent ones stay


def test_list_of_what_was_left_out(tmp_path):
    report = _report()
    report.write(tmp_path / "run" / "left_out.csv")
    with (tmp_path / "run" / "left_out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["train", "a.jpg", "damaged", "left out"], ["train", "b.jpg", "damaged", "left out"],
                        ["train", "c.jpg", "empty", "left out"]]
    DataReport().write(tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(("split", "names"), {
    "train": ["train", "Train", "TRAINING", "train_set", "trainset", "train2017", "Train Images", "01_train",
              "train-v2"],
    "val": ["val", "valid", "Validation", "VAL2017", "dev", "validation_set", "valSet", "eval"],
    "test": ["test", "Testing", "TEST", "test-images", "testset"],
}.items())
def test_spellings(split, names):
    assert {split_of(name, alone=True) for name in names} == {split}


def test_names_that_only_hold_such_a_word_are_no_folders_of_a_split():
    for name in ("test tube", "dev board", "steam train", "trainer", "validity", "contest", "cat", ""):
        assert split_of(name, alone=True) is None
    assert split_of("instances_val2017") == "val"
    assert split_of("train_val") is None


def test_folders_of_splits(tmp_path):
    for name in ("Train", "valid", "cats", ".test", "__MACOSX"):
        (tmp_path / name).mkdir()
    assert {split: path.name for split, path in split_folders(tmp_path).items()} == {"train": "Train", "val": "valid"}
    assert [path.name for path in visible_folders(tmp_path)] == ["Train", "cats", "valid"]
    (tmp_path / "Val").mkdir()
    with pytest.raises(ValueError, match="two folders for the split val: Val and valid"):
        split_folders(tmp_path)
