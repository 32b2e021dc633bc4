"""PackedData: tar files, WebDataset's shards and Hugging Face's data sets are read as folders of images are."""
import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from visionattn.cli import main
from visionattn.data import PackedData

CLASSES = ["cat", "dog"]
PLAIN = dict(image_size=16, batch_size=4, num_workers=0, crop_pct=1.0)


def _image(number):
    """One colour a number, so that an image tells which it is."""
    return Image.new("RGB", (16, 16), (number * 8, 255 - number * 8, number))


def _bytes(number):
    buffer = io.BytesIO()
    _image(number).save(buffer, "png")
    return buffer.getvalue()


def _write(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _tars(folder):
    """Twelve training images in two files, and five to validate."""
    for part in range(2):
        _write(folder / f"train-{part}.tar", {
            f"photos/{CLASSES[number % 2]}/{number}.png": _bytes(number) for number in range(6 * part, 6 * part + 6)})
    _write(folder / "val.tar", {
        f"photos/{CLASSES[number % 2]}/{number}.png": _bytes(number) for number in range(12, 17)})


def _shards(folder, ending="cls"):
    def files(numbers):
        for number in numbers:
            yield f"{number:04d}.png", _bytes(number)
            yield f"{number:04d}.{ending}", (str(number % 2) if ending == "cls" else json.dumps(
                {"label": number % 2})).encode()

    _write(folder / "train" / "0000.tar", dict(files(range(6))))
    _write(folder / "train" / "0001.tar", dict(files(range(6, 12))))
    _write(folder / "val" / "0000.tar", dict(files(range(12, 17))))
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")


def _table(folder, saved=True):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    parts = datasets.DatasetDict({
        split: datasets.Dataset.from_dict(
            {"image": [_image(number) for number in numbers], "label": [number % 2 for number in numbers]}, features)
        for split, numbers in (("train", range(12)), ("validation", range(12, 17)))})
    if saved:
        parts.save_to_disk(folder)
    else:
        folder.mkdir()
        for split, part in parts.items():
            part.to_parquet(folder / f"{split}-00000-of-00001.parquet")


FORMATS = {
    "tar": _tars, "wds": _shards, "hfds": _table, "wds with json": lambda folder: _shards(folder, "json"),
    "hfds of parquet": lambda folder: _table(folder, saved=False),
}


@pytest.fixture(params=FORMATS)
def packed(request, tmp_path, monkeypatch):
    """The data of each format."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    FORMATS[request.param](tmp_path / "data")
    return PackedData(str(tmp_path / "data"), request.param.split()[0], **PLAIN)


def _numbers(loader):
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    blue = images[:, 2].mean(dim=(1, 2)) * 0.225 + 0.406  # ImageNet's normalisation
    return (blue * 255).round().int().tolist(), labels.tolist()


def test_images_labels_and_names_are_those_of_the_files(packed):
    assert packed.class_names == CLASSES
    packed.setup("fit")
    assert _numbers(packed.val_dataloader()) == ([12, 13, 14, 15, 16], [0, 1, 0, 1, 0])
    assert packed.report.splits["train"].counts == {"cat": 6, "dog": 6}
    packed.train_transform = packed.eval_transform
    loader = packed.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        numbers, labels = _numbers(loader)
        assert sorted(numbers) == list(range(12))
        assert labels == [number % 2 for number in numbers]
        epochs.append(numbers)
    assert epochs[0] == epochs[2] != epochs[1]
    packed.setup("predict")
    names = [name for _, names in packed.predict_dataloader() for name in names]
    assert len(names) == len(set(names)) == 5


@pytest.mark.parametrize("format", ["tar", "hfds"])
def test_loader_processes_read_too(format, tmp_path):
    FORMATS[format](tmp_path / "data")
    data = PackedData(str(tmp_path / "data"), format, **PLAIN | {"num_workers": 2, "batch_size": 1})
    data.setup("fit")
    assert _numbers(data.val_dataloader()) == ([12, 13, 14, 15, 16], [0, 1, 0, 1, 0])


def test_a_single_tar_file_is_split(tmp_path, said):
    _write(tmp_path / "photos.tar", {f"{CLASSES[number % 2]}/{number}.png": _bytes(number) for number in range(10)})
    data = PackedData(str(tmp_path / "photos.tar"), "tar", verify=True, **PLAIN)
    data.setup("fit")
    assert [len(data.samples[split]) for split in ("train", "val")] == [8, 2]
    assert "8 of the training images train and 2 validate" in said.text
    data.setup("test")
    assert data.samples["test"] == data.samples["val"]


def test_command_line_trains_and_tests(tmp_path):
    _shards(tmp_path / "data")
    run = tmp_path / "run"
    argv = ["fit", "--model", "ClassificationTask", "--model.backbone", "test_dinat", "--data", "PackedData",
            "--data.root", str(tmp_path / "data"), "--data.format", "wds", "--data.image_size", "32",
            "--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_epochs", "1", "--trainer.accelerator",
            "cpu", "--trainer.default_root_dir", str(run)]
    assert main(argv) == 0
    assert json.loads((run / "test_metrics.json").read_text())["num_images"] == 5


def test_what_is_wrong_is_named(tmp_path, monkeypatch, said):
    def refused(folder, format="wds", kind=ValueError):
        with pytest.raises(kind) as caught:
            read(folder, format)
        return str(caught.value)

    def read(folder, format):
        data = PackedData(str(tmp_path / folder), format, **PLAIN)
        data.setup("fit")
        list(data.val_dataloader())

    assert "does not exist" in refused("nowhere", kind=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "holds no tar files" in refused("empty")
    _write(tmp_path / "packed" / "train.tar.gz", {})
    assert "no plain tar file" in refused("packed")
    (tmp_path / "packed" / "train.tar.gz").rename(tmp_path / "packed" / "train.tar")
    assert "holds no images" in refused("packed")
    (tmp_path / "packed" / "train.tar").write_bytes(b"nothing of this kind" * 100)
    assert "train.tar cannot be read as a tar file" in refused("packed")
    _write(tmp_path / "flat" / "train.tar", {"1.png": _bytes(1)})
    assert "flat/train.tar:1.png lies in no folder of a class" in refused("flat", "tar")
    assert "1 has no class: its .cls must hold a number" in refused("flat")
    _tars(tmp_path / "tars")
    _write(tmp_path / "tars" / "val.tar", {"photos/cat/1.png": b"no image", "photos/bird/2.png": _bytes(2)})
    assert "val.tar:photos/bird/2.png is of the class bird, which the training images do not have" in refused(
        "tars", "tar")
    _write(tmp_path / "tars" / "val.tar", {"photos/cat/1.png": b"no image", "photos/dog/2.png": _bytes(2)})
    assert "val.tar:photos/cat/1.png cannot be read as an image" in refused("tars", "tar")
    data = PackedData(str(tmp_path / "tars"), "tar", on_error="skip", **PLAIN)
    data.setup("fit")
    assert len(data.samples["val"]) == 1
    assert "Left out 1 of 2 files" in said.text
    assert "format must be tar, wds or hfds" in refused("tars", "zip")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in refused("tars", "hfds", ImportError)
