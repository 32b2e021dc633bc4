"""The commands of docs/predict.md run as they stand, with small runs of each task."""
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.data.images import coco_content, write_classes, write_image, write_mask
from visionattn.cli import main

DOCS = (Path(__file__).parent.parent / "docs" / "predict.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL) for line in block.splitlines()]
FIT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
       "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.limit_test_batches", "0",
       "--data.num_workers", "0", "--data.batch_size", "2"]
RUNS = {
    "photos": ["ClassificationTask", "--model.backbone", "test_biformer", "--data", "ImageFolderData",
               "--data.image_size", "32"],
    "boxes": ["DetectionTask", "--model.backbone", "test_dinat", "--model.detector", "fcos", "--model.fpn_channels",
              "64", "--model.min_size", "64", "--model.max_size", "64", "--data", "CocoData"],
    "masks": ["SegmentationTask", "--model.backbone", "test_dinat", "--model.head", "semantic_fpn",
              "--model.head_channels", "16", "--model.auxiliary_weight", "0", "--data", "SegmentationFolderData",
              "--data.crop_size", "64", "--data.short_side", "64"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the runs and images that the commands name."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_classes(Path("data/photos", split), count=2)
        content = coco_content(Path("data/boxes", split))
        Path("data/boxes", f"{split}.json").write_text(json.dumps(content))
        write_image(Path("data/masks/images", split, "0.png"))
        write_mask(Path("data/masks/masks", split, "0.png"))
    for name, options in RUNS.items():
        assert main(["fit", "--model", *options, "--data.root", f"data/{name}", *FIT,
                     "--trainer.default_root_dir", f"runs/{name}"]) == 0
    shutil.copytree("data/photos", "elsewhere")
    shutil.rmtree("data/photos/train")
    shutil.rmtree("elsewhere/train")
    for name in ("inbox/a.jpg", "inbox/b.png"):
        write_image(Path(name))
    write_image(Path("aerial.png"), (200, 150))
    Path("files.txt").write_text("inbox/a.jpg\n")
    return tmp_path


@pytest.mark.slow
def test_commands(folder, monkeypatch):
    ran = []
    for command in COMMANDS:
        if command.startswith("find "):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"inbox/a.jpg\0")))
            command = command.partition(" | ")[2]
        program, *arguments = shlex.split(command)
        assert program == "visionattn"
        assert main(arguments) == 0, command
        ran.append(arguments[:2])
    assert {run for _, run in ran} >= {"runs/photos", "runs/boxes", "runs/masks"}
    assert ["test", "runs/photos"] in ran
    assert (folder / "runs" / "boxes" / "predictions_coco.json").is_file()
    assert (folder / "seen" / "predictions" / "aerial.png").is_file()
    assert "predictions_coco.json" in (folder / "runs" / "boxes" / "README.txt").read_text()
