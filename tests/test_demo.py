"""The demo, shortened: its files are there and say what they should."""
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx


def test_demo(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "mine.txt").write_text("an earlier demo")
    options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4"]
    done = subprocess.run([sys.executable, "-m", "visionattn", "demo", *options], cwd=tmp_path, env=environment,
                          text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "demo"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["num_images"] == 300
    assert 0 <= metrics["accuracy"] <= metrics["accuracy_top5"] <= 1
    assert onnx.load(run / "model.onnx").graph.output[0].type.tensor_type.shape.dim[1].dim_value == 10
    assert (run / "routes.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "runs" / "demo-1" / "mine.txt").is_file()
    for word in ("$ visionattn fit", "$ visionattn test", "$ visionattn export", "never trained on", "routes.png"):
        assert word in done.stdout
