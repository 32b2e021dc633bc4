"""``fit --launcher ray``: two workers of Ray on this machine train together."""
import json
import os
import subprocess
import sys

import pytest

from visionattn.cli import main
from visionattn.tasks.ray_launcher import fit_with_ray

FIT = ["fit", "--model", "ClassificationTask", "--model.backbone", "test_dinat", "--data", "DigitsData",
       "--data.batch_size", "32", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3",
       "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"]


def _run(*options, folder):
    # A process of its own: Ray leaves threads and signal handlers.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{os.getcwd()}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run([sys.executable, "-m", "visionattn", *FIT, *options, "--launcher", "ray", "--workers", "2"],
                          env=environment, cwd=folder, text=True, capture_output=True, timeout=400)


@pytest.mark.slow
def test_two_workers_train_and_test_together(tmp_path):
    pytest.importorskip("ray.train")
    done = _run("--trainer.default_root_dir", "run", folder=tmp_path)  # from the folder that the command is given in
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["devices"], summary["epochs"], summary["steps"]) == (2, 1, 3)
    assert json.loads((tmp_path / "run" / "test_metrics.json").read_text())["num_images"] == 300
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    refused = _run("--trainer.default_root_dir", "run", folder=tmp_path)  # what a worker says comes through
    assert refused.returncode == 1
    assert "already holds a run" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(("options", "message"), [
    (["--launcher", "ray"], "needs a number of processes: --workers N"),
    (["--launcher", "ray", "--workers", "0"], "--workers must be 1 or more, got 0"),
    (["--launcher", "ray", "--workers", "2", "--trainer.devices", "2"], "settles trainer.devices itself"),
    (["--launcher", "slurm", "--workers", "2"], "invalid choice: 'slurm'"),
])
def test_bad_options(options, message, capsys):
    assert main([*FIT, *options]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs Ray: pip install 'visionattn\[ray\]'"):
        fit_with_ray(FIT, 2, main)
