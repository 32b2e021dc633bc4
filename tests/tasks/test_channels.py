"""Training, testing and predicting on images of other channels than three, in each task."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionattn.cli import main
from visionattn.dense import DenseBackbone
from visionattn.export.facts import facts
from visionattn.tasks import ClassificationTask
from visionattn.tasks.rebuild import create_model

COMMON = ["--data.num_workers", "0", "--data.batch_size", "2", "--model.backbone", "test_dinat",
          "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]


def _scenes(root, channels, ending):
    """Six images with one bright square, in the layouts of the three tasks, and their command lines."""
    rng = np.random.default_rng(0)
    for index in range(6):
        image = rng.integers(0, 90, (64, 64, channels)).astype(np.uint8)
        x, y = rng.integers(0, 36, 2)
        image[y:y + 24, x:x + 24] = 220
        label = np.zeros((64, 64), np.uint8)
        label[y:y + 24, x:x + 24] = 1
        for folder in ("cat" if index % 2 else "dog", "images"):
            file = root / ("classes" if folder != "images" else "dense") / folder / f"{index}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, image) if ending == "npy" else Image.fromarray(image).save(file)
        for name in ("masks", "labels"):
            (root / "dense" / name).mkdir(exist_ok=True)
        Image.fromarray(label).save(root / "dense" / "masks" / f"{index}.png")
        (root / "dense" / "labels" / f"{index}.txt").write_text(f"0 {(x + 12) / 64} {(y + 12) / 64} 0.375 0.375\n")
    (root / "dense" / "classes.txt").write_text("square\n")


TASKS = {
    "classification": ["--model", "ClassificationTask", "--data", "ImageFolderData", "--data.image_size", "32"],
    "segmentation": ["--model", "SegmentationTask", "--model.head", "semantic_fpn", "--model.head_channels", "8",
                     "--model.auxiliary_weight", "0", "--data", "SegmentationFolderData", "--data.crop_size", "64",
                     "--data.short_side", "64"],
    "detection": ["--model", "DetectionTask", "--model.detector", "fcos", "--model.fpn_channels", "64",
                  "--model.min_size", "64", "--model.max_size", "64", "--data", "YoloData"],
}


@pytest.mark.parametrize(("task", "channels", "ending"), [
    ("classification", 5, "npy"), ("segmentation", 5, "npy"), ("detection", 4, "png"), ("segmentation", 1, "jpg")])
def test_end_to_end(tmp_path, task, channels, ending):
    _scenes(tmp_path, max(channels, 3), ending)
    root = tmp_path / ("classes" if task == "classification" else "dense")
    if task == "detection":
        shutil.rmtree(root / "masks")
    argv = ["fit", *TASKS[task], *COMMON, "--data.root", root, "--data.in_chans", channels,
            "--trainer.default_root_dir", tmp_path / "run"]
    assert main(list(map(str, argv))) == 0
    assert json.loads((tmp_path / "run" / "test_metrics.json").read_text())["num_images"] >= 1
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    inbox = sorted((root / "images").iterdir()) if task != "classification" else sorted((root / "cat").iterdir())
    out = tmp_path / "out"
    tiles = [] if task == "classification" else ["--tile", "48"]
    assert main(["predict", str(checkpoint), *map(str, inbox[:2]), "--out", str(out), *tiles]) == 0
    pictures = sorted((out / "pictures").rglob("*.png"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as opened:
        assert opened.mode == "RGB"
    assert main(["check-data", str(root), "--task", task, "--options", json.dumps({"in_chans": channels}), "--out",
                 str(tmp_path / "check")]) == 0
    model = create_model(None, checkpoint).eval()
    images = torch.rand(1, channels, 64, 64)
    assert model(list(images) if task == "detection" else images) is not None
    if task == "classification":
        found = facts(model, (1, channels, 32, 32))
        assert (found["channels"], found["mean"]) == (channels, [0.5] * channels)


def test_another_number_than_that_of_the_data(tmp_path, capfd):
    _scenes(tmp_path, 3, "png")
    argv = ["fit", *TASKS["classification"], *COMMON, "--data.root",
            str(tmp_path / "classes"), "--trainer.default_root_dir", str(tmp_path / "run"), "--model.in_chans", "4"]
    assert main(argv) == 1
    assert "in_chans of the configuration is 4, but that of the data is 3" in capfd.readouterr().err


@pytest.mark.parametrize("backbone", ["test_dinat", "resnet10t"])
def test_weights_for_colours_start_a_model_of_other_channels(tmp_path, backbone):
    source = timm.create_model(backbone, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    classifier = ClassificationTask(backbone, num_classes=3, in_chans=5, checkpoint_path=str(tmp_path / "source.pth"))
    dense = DenseBackbone(backbone, "segmentation", checkpoint_path=str(tmp_path / "source.pth"),
                          model_args={"in_chans": 5})
    name = timm.get_pretrained_cfg(backbone).first_conv
    expected = timm.models.adapt_input_conv(5, source.state_dict()[f"{name}.weight"])
    for model in (classifier.model, dense.model):
        assert torch.equal(model.state_dict()[f"{name}.weight"], expected)
    assert dense.normalisation == ([0.5] * 5, [0.5] * 5)
