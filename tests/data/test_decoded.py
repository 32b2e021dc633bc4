"""Training images that are kept decoded: the same images, made anew where files change, never half of them."""
import os
import shutil
import tarfile
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data import ImageFolderData, PackedData, classification, decoded

from .images import truncate, write_classes, write_image

SMALL = dict(image_size=32, batch_size=4, num_workers=0)


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / split)
    write_image(tmp_path / "train" / "cat" / "large.png", (150, 100), seed=7)
    return tmp_path


def loaded(photos, workers=0, **options):
    data = ImageFolderData(str(photos), **SMALL | {"num_workers": workers}, **options)
    data.setup("fit")
    return data.train_dataloader()


def test_images_are_those_of_the_files(photos):
    plain, kept = (loaded(photos, cache_dir=folder) for folder in (None, str(photos / "cache")))
    for number, (file, _) in enumerate(kept.dataset.samples):
        image, original = kept.dataset.decoded[number], Image.open(file).convert("RGB")
        if file.name == "large.png":
            assert image.size == (96, 64)
            original = original.resize((96, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(image), np.asarray(original))
    index = next(i for i, (file, _) in enumerate(plain.dataset.samples) if file.name != "large.png")
    torch.manual_seed(0)
    expected = plain.dataset[index][1]
    assert kept.dataset[index][1] == expected
    assert all(images.shape == (4, 3, 32, 32) for images, _ in kept)


def test_files_are_decoded_once(photos, monkeypatch, caplog):
    loaded(photos, cache_dir=str(photos / "cache"))
    assert "Decoding the 13 training images once" in caplog.text
    caplog.clear()
    for module in (classification, decoded):
        monkeypatch.setattr(module, "read_image", lambda *args: pytest.fail("decoded again"))
    assert len(list(loaded(photos, cache_dir=str(photos / "cache")))) == 3
    assert "Decoding" not in caplog.text


@pytest.mark.parametrize("change", ["file", "cut off", "no index"])
def test_what_is_kept_is_never_stale(photos, change):
    before = loaded(photos, cache_dir=str(photos / "cache")).dataset
    file = photos / "train" / "dog" / "0.jpg"
    if change == "file":
        write_image(file, seed=999)
        os.utime(file, ns=(1, 1))
    elif change == "cut off":
        truncate(before.decoded.path)
    else:
        before.decoded.path.with_suffix(".json").write_text("[[3")
    after = loaded(photos, cache_dir=str(photos / "cache")).dataset
    for number, (path, _) in enumerate(after.samples):
        if path.name != "large.png":
            assert np.array_equal(np.asarray(after.decoded[number]), np.asarray(Image.open(path)))
    assert not list((photos / "cache").glob("*.part"))


def test_what_cannot_be_kept(photos, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
        with pytest.raises(OSError, match="no room for the 13 decoded images"):
            loaded(photos, cache_dir=str(photos / "cache"))
    with pytest.raises(ValueError, match="cache_dir keeps images of three channels, and in_chans is 1"):
        loaded(photos, cache_dir=str(photos / "cache"), in_chans=1)
    truncate(photos / "train" / "emu" / "3.jpg")
    with pytest.raises(ValueError, match=r"3\.jpg cannot be read as an image"):
        loaded(photos, cache_dir=str(photos / "cache"))
    assert not list((photos / "cache").glob("*.rgb"))


def test_images_of_tar_files_are_kept_too(photos):
    with tarfile.open(photos / "train.tar", "w") as archive:
        archive.add(photos / "train", "photos")
    data = PackedData(str(photos / "train.tar"), "tar", **SMALL, cache_dir=str(photos / "cache"))
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert len(dataset) == 10  # three of 13 validate
    for number, (member, _) in enumerate(dataset.samples):
        if not member.name.endswith("large.png"):
            assert np.array_equal(np.asarray(dataset.decoded[number]), np.asarray(Image.open(member.open())))


def test_loader_processes_map_the_file(photos):
    batches = list(loaded(photos, workers=1, cache_dir=str(photos / "cache")))
    assert len(batches) == 3
    again = list(loaded(photos, cache_dir=str(photos / "cache")))
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(batches, again, strict=True))
