"""ImageFolderData finds splits and classes in folders as people have them, or asks in one line."""
import csv
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main
from visionattn.data import ImageFolderData

from .images import truncate, write_classes, write_image

SMALL = dict(image_size=32, batch_size=4, num_workers=0)


def _make(root, stage="fit", **kwargs):
    data = ImageFolderData(str(root), **SMALL | kwargs)
    data.setup(stage)
    return data


def _counts(data):
    return {split: len(samples) for split, samples in data.samples.items()}


def _refused(root, **kwargs):
    with pytest.raises(ValueError, match=str(root)) as raised:
        _make(root, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("names", [
    ("Train", "Val", "Test"), ("training", "validation", "testing"), ("TRAIN", "valid", "TEST"), ("trn", "dev", "tst"),
    ("train_set", "val_set", "test_set"), ("train2017", "val2017", "test2017"), ("Train Data", "DevSet", "Testing"),
])
def test_splits_in_usual_spellings(tmp_path, names):
    for name, count in zip(names, (4, 2, 1), strict=True):
        write_classes(tmp_path / name, count=count)
    data = _make(tmp_path)
    data.setup("test")
    assert data.class_names == ["cat", "dog", "emu"]
    assert _counts(data) == {"train": 12, "val": 6, "test": 3}


def test_only_training_and_test_images(tmp_path, said):
    write_classes(tmp_path / "Training", count=5)
    write_classes(tmp_path / "Testing", count=2)
    data = _make(tmp_path)
    data.setup("test")
    assert _counts(data) == {"train": 12, "val": 3, "test": 6}
    assert "12 of them train and 3 validate" in said.text


@pytest.mark.parametrize("around", ["my pets v3", "a/b"])
def test_folders_around_the_data(tmp_path, said, around):
    write_classes(tmp_path / around / "train")
    write_classes(tmp_path / around / "val", count=2)
    (tmp_path / "__MACOSX").mkdir()
    data = _make(tmp_path)
    assert (data.class_names, _counts(data)) == (["cat", "dog", "emu"], {"train": 12, "val": 6})
    assert "holds nothing but the folder" in said.text


def test_folder_around_the_classes(tmp_path):
    write_classes(tmp_path / "pets")
    assert _make(tmp_path).class_names == ["cat", "dog", "emu"]


def test_folders_around_the_classes_of_each_split(tmp_path):
    write_classes(tmp_path / "training_set" / "training_set")
    write_classes(tmp_path / "test_set" / "test_set", count=1)
    data = _make(tmp_path)
    data.setup("test")
    assert data.class_names == ["cat", "dog", "emu"]
    assert _counts(data)["test"] == 3


def test_two_folders_for_one_split(tmp_path):
    for name in ("train", "val", "valid"):
        write_classes(tmp_path / name)
    assert "two folders for the split val: val and valid" in _refused(tmp_path)


def test_split_without_class_folders(tmp_path):
    write_image(tmp_path / "train" / "0.jpg")
    assert "train holds no class folders" in _refused(tmp_path)
    write_classes(tmp_path / "train")
    write_image(tmp_path / "val" / "0.jpg")
    assert "val holds no class folders" in _refused(tmp_path)


def test_test_images_without_labels_are_no_split(tmp_path, said):
    write_classes(tmp_path / "train")
    write_image(tmp_path / "test" / "0.jpg")
    data = _make(tmp_path, "test")
    assert data.samples["test"] == data.samples["val"]
    assert "test holds no class folders" in said.text


@pytest.mark.parametrize("name", ["test", "Val", "training"])
def test_a_split_among_the_classes_is_asked_about(tmp_path, name):
    write_classes(tmp_path / "a" / "train")
    write_image(tmp_path / "a" / "train" / name / "0.jpg")
    assert f"train/{name} looks like a split inside the classes" in _refused(tmp_path / "a")
    write_classes(tmp_path / "b")
    write_image(tmp_path / "b" / name / "0.jpg")
    message = _refused(tmp_path / "b")
    assert "data.init_args.classes" in message
    assert f"b/{name}" in message or f"has a folder {name} but no folder train" in message


def test_splits_inside_each_class_are_asked_about(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_image(tmp_path / name / split / "0.jpg")
    assert "cat/train looks like a split inside the classes" in _refused(tmp_path)


def test_classes_can_be_named(tmp_path):
    for name in ("bus", "train", "test"):
        for index in range(3):
            write_image(tmp_path / name / f"{index}.jpg", seed=index)
    assert "bus" in _refused(tmp_path)
    data = _make(tmp_path, classes=["train", "bus", "test"])
    assert data.class_names == ["train", "bus", "test"]
    assert Counter(label for split in ("train", "val") for _, label in data.samples[split]) == {0: 3, 1: 3, 2: 3}
    write_image(tmp_path / "other" / "0.jpg")
    assert len(_make(tmp_path, classes=["train", "bus"]).samples["train"]) == 4
    with pytest.raises(ValueError, match="none of the folders that classes names: cat"):
        _make(tmp_path / "bus", classes=["cat"])


def test_classes_at_two_depths_are_asked_about(tmp_path, said):
    write_classes(tmp_path, classes=("cat", "dog"))
    write_classes(tmp_path / "more", classes=("emu", "fox"))
    message = _refused(tmp_path)
    assert "at two depths: cat holds images, more only folders (emu, fox)" in message
    data = _make(tmp_path, classes=["cat", "dog", "more/emu", "more/fox"])
    assert data.class_names == ["cat", "dog", "more/emu", "more/fox"]
    assert sum(_counts(data).values()) == 16
    (tmp_path / "cat").rename(tmp_path / "pets" if (tmp_path / "pets").mkdir() else tmp_path / "pets" / "cat")
    (tmp_path / "dog").rename(tmp_path / "pets" / "dog")
    assert _make(tmp_path).class_names == ["more", "pets"]
    assert "such as more/emu" in said.text


@pytest.mark.parametrize("names", [("train_small", "val_small"), ("my train", "test nr 2"), ("train", "val (copy)")])
def test_names_that_speak_of_splits_besides(tmp_path, names, said):
    for name, count in zip(names, (4, 2), strict=True):
        write_classes(tmp_path / name, count=count)
    data = _make(tmp_path)
    data.setup("test")
    assert data.class_names == ["cat", "dog", "emu"]
    assert len(data.samples["test"]) == 6
    assert "is taken as the" in said.text


def test_classes_that_speak_of_splits_are_classes(tmp_path):
    write_classes(tmp_path, classes=("model train", "test tube", "validator"))
    assert _make(tmp_path).class_names == ["model train", "test tube", "validator"]


def test_the_same_folders_in_all_folders_are_asked_about(tmp_path):
    for name in ("batch 1", "batch 2"):
        write_classes(tmp_path / name)
    message = _refused(tmp_path)
    assert "hold the same folders (cat, dog, emu)" in message
    assert _make(tmp_path, classes=["batch 1", "batch 2"]).num_classes == 2


def test_one_class_is_no_task(tmp_path):
    write_classes(tmp_path / "train", classes=("cat",))
    assert "train has one class only, cat: there is nothing to tell apart" in _refused(tmp_path)
    shutil.rmtree(tmp_path / "train")
    write_classes(tmp_path, classes=("cat",))
    assert "has one class only, cat" in _refused(tmp_path)


def test_files_of_operating_systems_are_no_images(tmp_path, said):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", count=2)
    for name in ("._0.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", ".hidden/x.jpg", "@eaDir/x.jpg", "__MACOSX/x.jpg"):
        file = tmp_path / "train" / "cat" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\0\5\26\7" + bytes(60))
    shutil.copytree(tmp_path / "train" / "cat" / "__MACOSX", tmp_path / "train" / "__MACOSX")
    data = _make(tmp_path)
    assert _counts(data) == {"train": 12, "val": 6}
    assert data.class_names == ["cat", "dog", "emu"]
    assert "not images by their name" not in said.text


@pytest.mark.parametrize("target", ["..", "../..", ".", "../dog", "../../val/cat"])
def test_links_end_and_bring_nothing_twice(tmp_path, target):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", count=2)
    (tmp_path / "train" / "cat" / "all").symlink_to(target, target_is_directory=True)
    expected = 14 if target == "../../val/cat" else 12  # another folder: its images are images of this one
    assert _counts(_make(tmp_path)) == {"train": expected, "val": 6}


@pytest.mark.parametrize("place", ["train/all", "all", "val/all"])
@pytest.mark.parametrize("target", ["..", ".", "../.."])
def test_links_among_classes_and_splits_end(tmp_path, place, target):
    root = tmp_path / "a" / "photos"
    write_classes(root / "train")
    write_classes(root / "val", count=2)
    (root / place).symlink_to(target, target_is_directory=True)
    data = _make(root)
    assert (data.class_names, _counts(data)) == (["cat", "dog", "emu"], {"train": 12, "val": 6})


def test_linked_classes_and_images_are_read(tmp_path):
    write_classes(tmp_path / "disk")
    (tmp_path / "root" / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "root" / "train" / name).symlink_to(tmp_path / "disk" / name)
    emu = tmp_path / "root" / "train" / "emu"
    emu.mkdir()
    for index in range(3):
        (emu / f"{index}.jpg").symlink_to(tmp_path / "disk" / "emu" / f"{index}.jpg")
    data = _make(tmp_path / "root")
    assert (data.class_names, sum(_counts(data).values())) == (["cat", "dog", "emu"], 11)


def test_classes_are_the_same_however_they_are_written(tmp_path):
    write_classes(tmp_path / "train", classes=("caf\u00e9", "Dog"))
    write_classes(tmp_path / "val", classes=("cafe\u0301", "dog"), count=2)
    data = _make(tmp_path)
    assert data.class_names == ["Dog", "caf\u00e9"]
    assert Counter(label for _, label in data.samples["val"]) == {0: 2, 1: 2}


def test_empty_class_outside_of_training_is_said(tmp_path, said):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, count=2)
    for split in ("val", "test"):
        shutil.rmtree(tmp_path / split / "emu")
        (tmp_path / split / "emu").mkdir()
    data = _make(tmp_path)
    data.setup("test")
    assert _counts(data) == {"train": 6, "val": 4, "test": 4}
    assert "val has no images of the class 'emu': nothing is measured for it" in said.text
    assert "test has no images of 'emu'" in data.report.text()


def test_images_beside_the_classes_are_said(tmp_path, said):
    write_classes(tmp_path / "train")
    write_image(tmp_path / "train" / "lost.jpg")
    write_classes(tmp_path / "extra")
    data = _make(tmp_path)
    assert sum(_counts(data).values()) == 12
    assert "1 images outside of its class folders, such as lost.jpg" in said.text
    assert "1 left out: it is in no class folder" in data.report.text()
    assert "has the folders extra beside its splits: they are not read" in said.text


def test_shared_images_are_counted(tmp_path, said):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", count=2)
    write_image(tmp_path / "val" / "cat" / "own.jpg", seed=77)
    _make(tmp_path)
    assert "Warning: 6 of 7 val images are training images too" in said.text
    said.clear()
    for index in range(2):
        for label, name in enumerate(("cat", "dog", "emu")):
            write_image(tmp_path / "val" / name / f"{index}.jpg", seed=1000 * label + index + 500)
    _make(tmp_path)
    assert "training images too" not in said.text


def test_table_of_images(tmp_path):
    write_classes(tmp_path / "train", classes=("cat",), count=23)
    write_classes(tmp_path / "train", classes=("dog",), count=2)
    write_classes(tmp_path / "val", classes=("cat", "dog"), count=1)
    (tmp_path / "train" / "cat" / "3.jpg").write_bytes(b"")
    lines = _make(tmp_path, on_error="skip").report.text().splitlines()
    assert lines[1].split() == ["train", "24", "1", "left", "out:", "the", "file", "cannot", "be", "read", "as",
                                "an", "image"]
    assert [line.split() for line in lines[4:6]] == [["cat", "22", "1"], ["dog", "2", "1"]]
    assert "22 images of 'cat' and 2 of 'dog' (11 : 1)" in "\n".join(lines)


def test_deep_images_differ(tmp_path):
    for name, level in (("bright", 50_000), ("dark", 8_000)):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(np.full((32, 32), level + index, np.uint16)).save(tmp_path / name / f"{index}.png")
    data = _make(tmp_path, hflip=0.0)
    means = {label: image.mean().item() for image, label in data.val_dataloader().dataset}
    assert means[0] - means[1] > 2
    for name in ("bright", "dark"):
        for index in range(4):
            Image.fromarray(np.full((32, 32), 1000.0, np.float32)).save(tmp_path / name / f"{index}.tiff")
    message = _refused(tmp_path)
    assert "floating-point numbers from 1000 to 1000: set value_range" in message
    assert _counts(_make(tmp_path, value_range=(0.0, 2000.0)))["train"] == 13
    assert _counts(_make(tmp_path, on_error="skip")) == {"train": 6, "val": 2}


def test_run_says_what_it_reads_and_lists_what_it_left_out(tmp_path, said):
    root, run = tmp_path / "photos", tmp_path / "run"
    for split, count in (("Train", 4), ("valid", 2)):
        write_classes(root / split, count=count)
    truncate(root / "Train" / "cat" / "1.jpg")
    (root / "valid" / "dog" / "0.jpg").write_bytes(b"text")
    common = ["--model", "ClassificationTask", "--model.init_args.backbone", "test_vit", "--data", "ImageFolderData",
              "--data.init_args.root", str(root), "--data.init_args.image_size", "160",
              "--data.init_args.num_workers", "0", "--data.init_args.batch_size", "4", "--trainer.accelerator", "cpu",
              "--data.init_args.on_error", "skip", "--trainer.default_root_dir", str(run),
              "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", *common, "--trainer.max_epochs", "1"]) == 0
    text = said.text
    assert [line.split()[:2] for line in dict.fromkeys(text.splitlines()) if line.startswith(("train ", "val "))] == [
        ["train", "11"], ["val", "5"]]
    assert f"2 files or records were left out or mended: they are listed in {run}/left_out.csv" in text
    with (run / "left_out.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert {(split, what.split(" (")[0].rsplit("/", 3)[-1]) for split, what, *_ in rows} == {
        ("train", "1.jpg"), ("val", "0.jpg")}
    inbox = tmp_path / "inbox"
    write_image(inbox / "a.jpg")
    (inbox / "b.jpg").write_bytes(b"text")
    assert main(["predict", *common, "--data.init_args.predict_root", str(inbox)]) == 0
    assert "b.jpg" in (run / "left_out_predict.csv").read_text()


@pytest.mark.parametrize(("option", "value"), [("num_classes", "7"), ("class_names", "[a, b, c]")])
def test_classes_of_a_configuration_that_are_not_those_of_the_data(tmp_path, capsys, option, value):
    write_classes(tmp_path / "photos", classes=("cat", "dog"))
    common = ["fit", "--model", "ClassificationTask", "--model.init_args.backbone", "test_dinat", "--data",
              "ImageFolderData", "--data.init_args.root", str(tmp_path / "photos"), "--trainer.fast_dev_run", "true",
              "--data.init_args.image_size", "32", "--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu",
              "--trainer.default_root_dir", str(tmp_path / "run"), f"--model.init_args.{option}"]
    assert main([*common, value]) == 1
    assert f"model.init_args.{option} of the configuration is" in capsys.readouterr().err
    assert main([*common, "2" if option == "num_classes" else "[cat, dog]"]) == 0
