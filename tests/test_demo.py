"""The demos, shortened: their files are there and say what they should."""
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from PIL import Image

from visionattn.cli import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
SHORTER = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.enable_progress_bar", "false"]


def _demo(folder, *arguments):
    done = subprocess.run([sys.executable, "-m", "visionattn", "demo", *arguments, *SHORTER], cwd=folder,
                          env=ENVIRONMENT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_demo(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "mine.txt").write_text("an earlier demo")
    said = _demo(tmp_path)
    run = tmp_path / "runs" / "demo"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["num_images"] == 300
    assert 0 <= metrics["accuracy"] <= metrics["accuracy_top5"] <= 1
    assert onnx.load(run / "model.onnx").graph.output[0].type.tensor_type.shape.dim[1].dim_value == 10
    assert (run / "routes.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "runs" / "demo-1" / "mine.txt").is_file()
    for words in ("$ visionattn fit", "$ visionattn export", "accuracy on 300 digits never trained on", "routes.png"):
        assert words in said


@pytest.mark.slow
@pytest.mark.parametrize(("task", "figure", "predictions"), [
    ("detection", "box_map_50", "predictions.json"), ("segmentation", "miou", "predictions/scene_00011.png"),
])
def test_demo_of_scenes(task, figure, predictions, tmp_path):
    said = _demo(tmp_path, task, "--data.init_args.val_scenes", "8", "--data.init_args.test_scenes", "16")
    run = tmp_path / "runs" / f"demo-{task}"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["num_images"] == 16
    assert 0 <= metrics[figure] <= 1
    assert (run / predictions).is_file()
    with Image.open(run / "sheet.png") as sheet, Image.open(run / "pictures" / "scene_00000.png") as picture:
        width, height = picture.size
        assert sheet.width >= 8 + 4 * (width + 8)
        assert sheet.height >= 8 + 3 * (height + 8)
        assert sheet.crop((8, 8, 8 + width, 8 + height)).tobytes() == picture.tobytes()
    for words in ("$ visionattn fit", "$ visionattn predict", "on 16 scenes of digits never trained on", "sheet.png"):
        assert words in said


def test_unknown_demo(capsys):
    assert main(["demo", "tracking"]) == 2
    assert "no demo of 'tracking'; there are classification, detection, segmentation" in capsys.readouterr().err
