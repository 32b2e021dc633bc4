"""A run of each task that was killed in an epoch and resumed ends with the weights of one that lived, bit for bit."""
import csv
import json
import os
import signal
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml

from visionattn.cli import main

FEW = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}  # regions
COMMON = {"backbone": "test_biformer", "drop_path_rate": 0.2, "ema_decay": 0.9, "lr": 1e-3}
SCENES = {"image_size": 64, "digits": [1, 3], "digit_size": [16, 32], "batch_size": 2, "train_scenes": 6,
          "val_scenes": 3, "test_scenes": 3, "num_workers": 1}
RUNS = {  # with everything random that a task has, and loader processes that draw random numbers too
    "classification": ("ClassificationTask", COMMON | {"warmup_epochs": 1, "mixup": 0.2},
                       "DigitsData", {"image_size": 32, "batch_size": 16, "num_workers": 1}),
    "detection": ("DetectionTask", COMMON | {
        "detector": "mask_rcnn", "fpn_channels": 32, "min_size": [48, 64], "max_size": 96, "warmup_steps": 2,
        "milestones": [1], "detector_args": FEW}, "DigitScenesData", SCENES | {"masks": True}),
    "segmentation": ("SegmentationTask", COMMON | {"head_channels": 8, "warmup_steps": 2},
                     "DigitScenesData", SCENES | {"task": "segmentation"}),
    "multitask": (
        "MultiTask", COMMON | {
            "classification": {"mixup": 0.2}, "segmentation": {"head_channels": 8}, "balance": "uncertainty",
            "model_args": {"pretrained_cfg_overlay": {"mean": [0.305] * 3, "std": [0.376] * 3}}, "warmup_steps": 2},
        "MultiTaskData", {
            "classification": {"class_path": "DigitsData", "init_args": {"image_size": 32, "batch_size": 16}},
            "segmentation": {"class_path": "DigitScenesData", "init_args": SCENES | {"task": "segmentation"}},
            "weights": {"classification": 1, "segmentation": 2}, "batches": 3}),
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
TRAINER = {
    "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 2, "accelerator": "cpu",
    "deterministic": True, "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False,
    "log_every_n_steps": 1,
}


class KillsItself(pl.Callback):
    """Kills the process after the second batch of the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def fast_operators_again():
    """Takes back what ``deterministic`` sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_operators_again")
@pytest.mark.parametrize("task", RUNS)
def test_killed_run_resumes_to_the_weights_of_one_that_lived(task, tmp_path):
    model, model_args, data, data_args = RUNS[task]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({
        "model": {"class_path": model, "init_args": model_args},
        "data": {"class_path": data, "init_args": data_args},
        "trainer": TRAINER,
    }))

    def fit(name):
        return ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / name)]

    killer = ["--trainer.callbacks", "tests.tasks.test_resume.KillsItself", "--trainer.callbacks+=MidEpochCheckpoint",
              "--trainer.callbacks.minutes=0"]
    killed = subprocess.run([sys.executable, "-m", "visionattn", *fit("killed"), *killer], env=ENVIRONMENT, text=True,
                            capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    halfway = torch.load(last, weights_only=True)
    assert halfway["global_step"] == 4  # within the second epoch
    assert not (tmp_path / "killed" / "test_metrics.json").exists()
    assert main([*fit("killed"), "--ckpt_path", "last"]) == 0
    assert main(fit("lived")) == 0

    killed, lived = (torch.load(path, weights_only=True) for path in
                     (last, tmp_path / "lived" / "checkpoints" / "last.ckpt"))
    assert killed["epoch"] == lived["epoch"] == 1
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(killed[key][name], lived[key][name]) for name in lived[key])
        assert not all(torch.equal(halfway[key][name], lived[key][name]) for name in lived[key])
    metrics = [json.loads((tmp_path / name / "test_metrics.json").read_text()) for name in ("killed", "lived")]
    assert metrics[0] == metrics[1]
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "lived")


def _losses(run):
    """The last loss of every step in the run's ``metrics.csv``, which has the steps that were repeated twice."""
    with (run / "metrics.csv").open(newline="") as file:
        losses = {row["step"]: row["train/loss_step"] for row in csv.DictReader(file) if row["train/loss_step"]}
    assert len(losses) == 6
    return losses
