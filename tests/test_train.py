"""``visionattn train FOLDER`` and ``visionattn.train``: from a folder to results, which the shown fit gives too."""
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import visionattn
from tests.data.images import coco_content, write_classes, write_image, write_mask
from tools.make_photo_folders import make_plates
from visionattn import training
from visionattn.cli import main
from visionattn.data.segmentation_folder import SegmentationFolderData

QUICK = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
         "--data.num_workers", "0", "--data.min_batches", "1", "--data.batch_size", "2"]


@pytest.fixture(autouse=True)
def _away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def exported(monkeypatch):
    """What ``visionattn export`` is asked for, which takes long and has tests of its own."""
    asked = []
    monkeypatch.setattr(training.export, "main", asked.append)
    return asked


def _boxes(root, form):
    """Six images with boxes in a format."""
    if form == "coco":
        for split in ("train", "val"):
            (root / f"{split}.json").parent.mkdir(exist_ok=True)
            (root / f"{split}.json").write_text(json.dumps(coco_content(root / split)))
        return
    for index in range(6):
        write_image(root / "images" / f"{index}.jpg", seed=index)
    for index in range(6):
        if form == "yolo":
            (root / "labels").mkdir(exist_ok=True)
            (root / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
            (root / "classes.txt").write_text("dog\n")
        else:
            (root / "images" / f"{index}.xml").write_text(
                "<annotation><object><name>dog</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax>"
                "</bndbox></object></annotation>")


def _masks(root, values=(0, 255)):
    for index in range(5):
        write_image(root / "images" / f"{index}.jpg", seed=index)
        write_mask(root / "masks" / f"{index}.png", values=values, seed=index)


def _command(out):
    (line,) = [line for line in out.splitlines() if line.strip().startswith("visionattn fit ")]
    return shlex.split(line)[1:]


def test_a_folder_of_classes_ends_with_all_results_and_fit_does_the_same(tmp_path, capfd):
    write_classes(tmp_path / "pets", count=5)
    command = ["train", "pets", "--model", "test_vit", "--data.image_size", "160", *QUICK, "--resume", "auto"]
    assert main(command) == 0
    out, run = capfd.readouterr().out, tmp_path / "runs" / "pets"
    assert "pets: classification, read by ImageFolderData: it holds images without annotations" in out
    assert "it starts from fresh ones" in out
    assert json.loads((run / "test_metrics.json").read_text())["num_images"] == 3
    assert (run / "model.onnx").is_file()
    assert (run / "predictions.csv").is_file()
    assert len(list((run / "pictures").iterdir())) == 3
    # Again it finds all done, and in part what was undone.
    exported, shown = (run / "model.onnx").stat().st_mtime_ns, run / "shown.txt"
    assert main(command) == 0
    assert (run / "model.onnx").stat().st_mtime_ns == exported
    assert not (tmp_path / "runs" / "pets-2").exists()
    shown.unlink()
    assert main(command) == 0
    assert shown.is_file()
    # The command that was shown gives the same weights and figures elsewhere.
    assert main([*_command(out), "--trainer.default_root_dir", "again"]) == 0
    runs = [torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
            for folder in (run, tmp_path / "again")]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())
    assert (run / "test_metrics.json").read_text() == (tmp_path / "again" / "test_metrics.json").read_text()


def test_boxes_from_python(tmp_path, exported):
    """The function gives what the command gives; options have names of Python."""
    _boxes(tmp_path / "street", "coco")
    options = {"trainer__max_epochs": 1, "trainer__accelerator": "cpu", "trainer__enable_progress_bar": False,
               "data__num_workers": 0, "data__min_batches": 1, "model__min_size": 64, "model__max_size": 96,
               "trainer__limit_train_batches": 2, "trainer__default_root_dir": tmp_path / "run"}
    trained = visionattn.train(tmp_path / "street", model="test_dinat", **options)
    assert trained.folder == tmp_path / "run"
    assert trained.checkpoint.is_file()
    assert trained.metrics["num_classes"] == 2
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["min_size"] == 64  # what is asked for goes before what would be chosen
    assert any((tmp_path / "run" / "pictures").iterdir())
    assert trained.exported == tmp_path / "run" / "model.onnx"
    assert exported == [["--checkpoint", str(trained.checkpoint), "--img-size", "64", "64", "--out",
                         str(trained.exported)]]


def test_black_and_white_masks_are_two_classes(tmp_path, capfd, exported):
    _masks(tmp_path / "leaves")
    assert main(["train", "leaves", "--model", "test_dinat", *QUICK, "--data.crop_size", "64",
                 "--data.short_side", "64", "--model.head_channels", "8"]) == 0
    out = capfd.readouterr().out
    assert "each is taken as a class (mask_values [0, 255])" in out
    assert "--data.mask_values '[0, 255]'" in out
    run = tmp_path / "runs" / "leaves"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert (metrics["num_classes"], metrics["num_images"]) == (2, 1)
    assert exported[0][2:5] == ["--img-size", "64", "64"]
    assert len(list((run / "pictures").iterdir())) == 1


@pytest.mark.parametrize(("values", "found"), [
    ((0, 255), {"mask_values": [0, 255]}), ((0, 128, 255), {"mask_values": [0, 128, 255]}),
    ((10, 60, 110, 160), {"mask_values": [10, 60, 110, 160]}), ((0, 1, 2), {}), ((0, 1, 255), {}), ((7,), {}),
])
def test_what_masks_mean(values, found, tmp_path):
    _masks(tmp_path / "photos", values)
    data = SegmentationFolderData(str(tmp_path / "photos"), class_names=["", ""], num_workers=0)
    assert data.found_options()[0] == found


def test_masks_that_lost_their_values_are_taken_to_the_nearest(tmp_path):
    for index in range(4):
        write_image(tmp_path / "images" / f"{index}.jpg", size=(64, 64), seed=index)
        pixels = np.zeros((64, 64), np.uint8)
        pixels[16:48, 10:40] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{index}.jpg", quality=40)
    data = SegmentationFolderData(str(tmp_path), class_names=["", ""], num_workers=0)
    options, found = data.found_options()
    black, white = options["mask_values"]
    assert black < 5
    assert white > 250
    assert found.count("%") == 6  # the most frequent
    data = SegmentationFolderData(str(tmp_path), num_workers=0, **options)
    assert data.num_classes == 2


# What is chosen

def _chosen(monkeypatch, folder, *options, model="test_dinat"):
    """The settings beside the recipe, by name."""
    seen = []
    monkeypatch.setattr(training.run_cli, "launch", seen.append)
    assert main(["train", str(folder), *(["--model", model] if model else []), *options]) == 0
    (argv,) = seen
    return training._named(argv)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_boxes_in_every_format_have_their_recipe(form, tmp_path, monkeypatch):
    _boxes(tmp_path / "street", form)
    assert _chosen(monkeypatch, tmp_path / "street")["config"] == f"{form}_finetune"


def test_sizes_follow_the_images(tmp_path, monkeypatch):
    write_classes(tmp_path / "small", count=2)
    for size, side in (((40, 36), "32"), ((2000, 1500), "160")):
        write_image(tmp_path / "large" / "a" / "0.jpg", size)
        write_image(tmp_path / "large" / "b" / "0.jpg", size)
        monkeypatch.setattr(training.torch.cuda, "is_available", lambda: False)
        assert _chosen(monkeypatch, tmp_path / "large")["data.image_size"] == side
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: True)
    assert _chosen(monkeypatch, tmp_path / "large")["data.image_size"] == "224"
    assert _chosen(monkeypatch, tmp_path / "small", model="vit_tiny_patch16_224")["data.image_size"] == "224"


def test_weights_that_cannot_be_had_are_named_in_one_line(tmp_path, monkeypatch, capfd):
    write_classes(tmp_path / "pets", count=2)
    monkeypatch.setattr(training, "_reachable", lambda url: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def fail(*args, **kwargs):
        raise OSError("no such host\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(training.timm, "create_model", fail)
        assert _chosen(monkeypatch, "pets", model="regnety_002")["model.pretrained"] == "false"
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "regnety_002 cannot" in line]
    assert "(no such host): it starts from fresh ones; expect less" in line
    with monkeypatch.context() as patched:
        patched.setattr(training.timm, "create_model", lambda *args, **kwargs: None)
        chosen = _chosen(monkeypatch, "pets", model="regnety_002")
    assert chosen["model.pretrained"] == "true"
    assert chosen["data.image_size"] == "32"
    assert "model.lr" not in chosen  # the recipe's is for trained weights
    assert _chosen(monkeypatch, "pets", "--model.init_args.pretrained", "false", model="regnety_002")[
        "model.pretrained"] == "false"


def test_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    write_classes(tmp_path / "pets", count=2)
    for name in ("pets", "pets-2"):
        assert _chosen(monkeypatch, "pets")["trainer.default_root_dir"] == f"runs/{name}"
        Path("runs", name).mkdir(parents=True)
    assert _chosen(monkeypatch, "pets", "--trainer.default_root_dir=mine")["trainer.default_root_dir"] == "mine"


@pytest.mark.parametrize(("argv", "expected"), [
    (["nowhere"], "nowhere does not exist"),
    (["--trainer.max_epochs", "3", "pets"], "begins with the folder"),
    (["pets", "--model", "no_such_net"], "there is no model 'no_such_net'"),
    (["pets", "--task", "segmentation"], "holds nothing for segmentation"),
    (["pets", "--trainer.devices", "2"], "train runs on one device"),
    (["pets", "--trainer.max_eboch", "3"], "max_eboch"),
])
def test_mistakes_end_in_one_line(argv, expected, tmp_path, capfd):
    write_classes(tmp_path / "pets", count=2)
    assert main(["train", *argv]) in (1, 2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("visionattn: error")]
    assert expected in line


def test_without_the_extra_for_export_one_line_says_how_to_get_it(tmp_path, monkeypatch, capfd):
    write_classes(tmp_path / "pets", count=5)
    monkeypatch.setitem(sys.modules, "onnx", None)
    trained = visionattn.train("pets", "test_vit", data__image_size=160, trainer__max_epochs=1, data__num_workers=0,
                               trainer__accelerator="cpu", data__min_batches=1, trainer__enable_progress_bar=False)
    assert trained.exported is None
    assert "No ONNX file was written: export needs the package onnx: pip install" in capfd.readouterr().out


@pytest.mark.slow
def test_a_phones_photos_are_told_apart_from_fresh_weights(tmp_path):
    """Sixty photos of house numbers, stored as the sensor lay; a 6 that is read upside down is a 9."""
    trained = visionattn.train(
        make_plates(tmp_path / "plates", test=20), data__image_size=128, trainer__max_epochs=16,
        trainer__accelerator="cpu", trainer__enable_progress_bar=False)
    assert trained.metrics["num_images"] == 60
    assert trained.metrics["accuracy"] > 0.9
