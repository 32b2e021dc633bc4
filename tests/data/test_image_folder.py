"""ImageFolderData: the layouts it reads, and what it says about those that it cannot."""
import pickle
from collections import Counter

import pytest
import torch
from PIL import Image

from visionattn.data import ImageFolderData

from .images import truncate, write_classes, write_image

SMALL = dict(image_size=32, batch_size=4, num_workers=0)


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / split)
    return tmp_path


def test_batches(photos):
    data = ImageFolderData(str(photos), **SMALL)
    assert (data.num_classes, data.class_names) == (3, ["cat", "dog", "emu"])
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(data.train_dataloader()) == 3


@pytest.mark.parametrize("name", ["val", "validation"])
def test_validation_folder_by_either_name(tmp_path, name):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / name, count=2)
    data = ImageFolderData(str(tmp_path), **SMALL)
    data.setup("fit")
    assert (len(data.samples["train"]), len(data.samples["val"])) == (12, 6)


def test_test_folder(photos, said):
    data = ImageFolderData(str(photos), **SMALL)
    data.setup("test")
    assert data.samples["test"] == data.samples["val"]
    assert "the validation images are used" in said.text
    write_classes(photos / "test", count=1)
    data = ImageFolderData(str(photos), **SMALL)
    data.setup("test")
    assert [file.parts[-3] for file, _ in data.samples["test"]] == ["test"] * 3


@pytest.mark.parametrize("folder", ["", "train"])
def test_hold_out(tmp_path, folder, said):
    write_classes(tmp_path / folder, count=10)

    def split(seed):
        data = ImageFolderData(str(tmp_path), seed=seed, val_fraction=0.3, **SMALL)
        data.setup("fit")
        return data.samples["train"], data.samples["val"]

    train, val = split(seed=0)
    assert (len(train), len(val)) == (21, 9)
    assert not set(train) & set(val)
    assert set(Counter(label for _, label in val).values()) == {3}
    assert split(seed=5) == (train, val)
    assert "21 of them train and 9 validate" in said.text


def test_deeper_folders_and_other_files(photos, said):
    write_image(photos / "train" / "cat" / "holiday" / "x.PNG")
    (photos / "train" / "cat" / "notes.txt").write_text("not an image")
    (photos / "train" / "cat" / "._0.jpg").write_text("a file that some systems leave behind")
    data = ImageFolderData(str(photos), **SMALL)
    data.setup("fit")
    assert len(data.samples["train"]) == 13
    assert "1 files that are not images by their name, such as notes.txt" in said.text


def test_validation_may_lack_a_class_and_says_so(tmp_path, said):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", classes=("dog", "emu"))
    data = ImageFolderData(str(tmp_path), **SMALL)
    data.setup("validate")
    assert {label for _, label in data.samples["val"]} == {1, 2}
    assert "no images of the class 'cat'" in said.text


def test_predict(photos):
    data = ImageFolderData(str(photos), **SMALL)
    data.setup("predict")
    assert len(data.predict_dataloader().dataset) == 12
    inbox = photos / "inbox"
    files = [write_image(inbox / "a" / "b.jpg"), write_image(inbox / "z.png")]
    data = ImageFolderData(str(photos), predict_root=str(inbox), **SMALL)
    data.setup("predict")
    _, names = next(iter(data.predict_dataloader()))
    assert list(names) == [str(file) for file in files]


def test_grey_and_transparent_images_become_rgb(photos):
    Image.new("L", (20, 20)).save(photos / "val" / "cat" / "grey.png")
    Image.new("RGBA", (20, 20)).save(photos / "val" / "cat" / "alpha.png")
    data = ImageFolderData(str(photos), **SMALL)
    data.setup("validate")
    assert all(images.shape[1] == 3 for images, _ in data.val_dataloader())


def _make(root, **kwargs):
    data = ImageFolderData(str(root), **SMALL | kwargs)
    data.setup("fit")
    return data


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        _make(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no class folders"):
        _make(tmp_path)


def test_val_without_train(tmp_path):
    write_classes(tmp_path / "val")
    with pytest.raises(ValueError, match="a folder val but no folder train"):
        _make(tmp_path)


def test_class_without_images(photos):
    (photos / "train" / "fox").mkdir()
    with pytest.raises(ValueError, match=r"train.fox holds no images"):
        _make(photos)


def test_unknown_class_in_val(photos):
    write_image(photos / "val" / "yak" / "0.jpg")
    with pytest.raises(ValueError, match=r"val.yak is a class that .*train does not have; it has cat, dog, emu"):
        _make(photos)


def test_single_image_cannot_be_held_out(tmp_path):
    write_classes(tmp_path / "train", count=3)
    write_image(tmp_path / "train" / "fox" / "0.jpg")
    with pytest.raises(ValueError, match=r"fox holds a single image"):
        _make(tmp_path)


def test_corrupt_image_stops_before_training(photos):
    (photos / "train" / "dog" / "1.jpg").write_bytes(b"this is no JPEG")
    (photos / "val" / "dog" / "2.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dog.1.jpg cannot be read as an image"):
        _make(photos)
    _make(photos, verify=False)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_truncated_image_is_named_when_loaded(photos, num_workers):
    truncate(photos / "val" / "dog" / "1.jpg")
    data = _make(photos, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"dog.1.jpg cannot be read as an image"):
        list(data.val_dataloader())


def test_skipped_images_are_counted_and_named(photos, said):
    truncate(photos / "train" / "dog" / "1.jpg")
    (photos / "train" / "cat" / "0.jpg").write_bytes(b"this is no JPEG")
    data = _make(photos, on_bad_image="skip")
    assert len(data.samples["train"]) == 10
    assert len([images for images, _ in data.train_dataloader()]) == 2
    assert "Left out 2 of 12 files" in said.text
    assert "1.jpg" in said.text


def test_class_of_only_bad_images(photos):
    for index in range(4):
        (photos / "train" / "dog" / f"{index}.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"dog holds no readable image"):
        _make(photos, on_bad_image="skip")


def test_bad_predict_root(photos):
    data = ImageFolderData(str(photos), predict_root=str(photos / "nowhere"), **SMALL)
    data.setup("predict")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.predict_dataloader()
    (photos / "nowhere").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        data.predict_dataloader()


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(val_fraction=0.0), "val_fraction"), (dict(on_bad_image="ignore"), "on_bad_image"),
])
def test_bad_arguments(photos, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderData(str(photos), **SMALL | kwargs)


@pytest.mark.parametrize("policy", [
    "rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m10", "rand-m0", "rand-m1-mstdinf", "original", "originalr", "v0",
    "augmix-m10",
])
def test_augmentation_stays_within_pillows_ranges(photos, policy):
    data = pickle.loads(pickle.dumps(ImageFolderData(str(photos), **SMALL, auto_augment=policy)))
    image = Image.new("RGB", (40, 36), (200, 100, 50))
    operations = [op for step in data.train_transform.transforms
                  for op in [*getattr(step, "ops", ()), *(op for part in getattr(step, "policy", ()) for op in part)]]
    assert any(op.name.startswith("Posterize") for op in operations)
    for op in operations:
        op.prob = 1.0
        for magnitude in (0, 2, 5, 9, 9.6, 10):
            op.magnitude, op.magnitude_std = magnitude, 0
            op(image)
    torch.manual_seed(0)
    assert data.train_transform(image).shape == (3, 32, 32)
