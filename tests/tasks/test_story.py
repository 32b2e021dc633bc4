"""What a run says: a line an epoch and nothing that a user can do nothing about; what stops it, and how it goes on."""
import csv
import errno
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from visionattn.cli import main
from visionattn.tasks.story import duration

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
COMMAND = [sys.executable, "-m", "visionattn"]
SMALL = ["--data.init_args.num_workers", "0", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2",
         "--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu"]
DIGITS = ["fit", "--model", "ClassificationTask", "--model.backbone", "test_biformer", "--data", "DigitsData",
          "--data.image_size", "32", "--data.batch_size", "16", *SMALL]
EPOCH = (r"epoch (\d)/2: loss [\d.]+, (val/\w+) ([\d.]+) \((the best so far|best [\d.]+ in epoch 1)\)"
         r"(, val/loss [\d.]+)?, lr [\d.e-]+, [\d,]+ images/s, \d:\d\d left")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "table"), [
    ("digits_biformer", 16), ("digits_biformer_fcos", 0), ("digits_dinat_upernet", 0)])
def test_every_line_of_a_run(recipe, table, tmp_path):
    """Of the real command, in a log without a terminal: no bars, tables of zeros, warnings and advertisements."""
    result = subprocess.run(
        [*COMMAND, "fit", "--config", recipe, "--trainer.default_root_dir", str(tmp_path / "run"),
         "--trainer.max_epochs", "2", *SMALL], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=True)
    lines = result.stdout.splitlines()
    assert [bool(line) for line in lines[:table]] == [True] * table  # of the data
    rest = [line for line in lines[table:] if not line.startswith("The warm-up takes ")]
    assert re.fullmatch(r"Training test_\w+ \([\d,]+ parameters, all trained\) on CPU: 2 epochs of 2 batches", rest[0])
    epochs = [re.fullmatch(EPOCH, line) for line in rest[1:3]]
    assert [epoch and epoch[1] for epoch in epochs] == ["1", "2"], rest
    assert re.fullmatch(r"Trained 2 epochs in \d:\d\d: best val/\w+ [\d.]+ in epoch \d", rest[3])
    assert rest[4].startswith(f"Test of {tmp_path}/run/checkpoints/best.ckpt: ")
    assert rest[5:] == [f"What is in {tmp_path}/run is listed in {tmp_path}/run/README.txt"]


def test_lines_say_what_metrics_has(tmp_path, capfd):
    argv = [*DIGITS, "--trainer.default_root_dir", str(tmp_path), "--model.layer_decay", "0.7", "--model.lr", "0.001",
            "--model.warmup_epochs", "0"]
    assert main([*argv, "--trainer.max_epochs", "2"]) == 0
    assert main([*argv, "--trainer.max_epochs", "3", "--ckpt_path", "last"]) == 0
    said = re.findall(r"epoch (\d)/\d: loss ([\d.]+), val/accuracy ([\d.]+).*, lr ([\d.e-]+),", capfd.readouterr().out)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [key for key in rows[0] if "lr" in key] == ["lr"]  # of many groups one: the head's, which is the highest
    columns = [[float(row[key]) for row in rows if row[key]] for key in ("train/loss_epoch", "val/accuracy", "lr")]
    measured = list(zip(("1", "2", "3"), *columns, strict=True))
    assert len(said) == 3
    for line, truth in zip(said, measured, strict=True):
        assert line[0] == truth[0]
        assert [float(value) for value in line[1:]] == pytest.approx(truth[1:], rel=0.06)
    assert 0.0001 < measured[1][3] < measured[0][3] < 0.001
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    story = next(state for key, state in best["callbacks"].items() if key.startswith("EpochLines"))
    assert story["best_epoch"] == best["epoch"] + 1
    assert story["best"] == pytest.approx(max(columns[1]))


@pytest.mark.parametrize(("sign", "code"), [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_interrupted_run_says_how_to_go_on(sign, code, tmp_path):
    run, log = tmp_path / "my run", tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, *DIGITS, "--trainer.default_root_dir", str(run), "--trainer.max_epochs", "1000"],
            env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT,
            # A shell in the background hands on that interrupts are ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(600):
        if "epoch    2/1000" in log.read_text() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(sign)
    assert process.wait(60) == code, log.read_text()
    before, _, command = log.read_text().splitlines()[-1].partition("; go on with: ")
    assert before == "visionattn: interrupted"
    assert "Traceback" not in log.read_text()
    assert {path.name for path in (run / "checkpoints").iterdir()} - {"previous.ckpt"} == {"best.ckpt", "last.ckpt"}
    # It goes on with the newest, which is the best if it ended between the two.
    kept = max(torch.load(path, weights_only=True)["epoch"] for path in (run / "checkpoints").iterdir())
    name, *argv = shlex.split(command)
    assert name == "visionattn"
    assert main([*argv, "--trainer.max_epochs", str(kept + 2)]) == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == kept + 1


def test_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch, capfd):
    saved, save = [], torch.save

    def fills(checkpoint, *args):
        """The disk is full from the second epoch on."""
        save(checkpoint, *args)
        saved.append(checkpoint["epoch"])
        if saved[-1] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    monkeypatch.setattr(torch, "save", fills)
    try:
        code = main([*DIGITS, "--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.match(rf"visionattn: error: {tmp_path}/checkpoints/(best|last).ckpt cannot be written: File too large; "
                    "free some space, then go on with: visionattn fit --config "
                    rf"{tmp_path}/config.yaml --ckpt_path last", line)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_full_disk_without_a_file_name(tmp_path, monkeypatch, capfd):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning.pytorch.loggers.csv_logs.ExperimentWriter.save", fails)
    assert main([*DIGITS, "--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1"]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"visionattn: error: {tmp_path} cannot be written: No space left on device; free some ")





def test_duration():
    assert [duration(seconds) for seconds in (0.2, 59.7, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
