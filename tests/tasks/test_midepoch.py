"""Runs that are stopped within an epoch, and that end with the weights of one that lived, bit for bit."""
import csv
import os
import signal
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
import yaml

from visionattn.cli import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
EPOCHS, BATCHES = 2, 5
SETTINGS = {  # two batches a step, with a step of one at the end of an epoch
    "model": {"class_path": "ClassificationTask", "init_args": {
        "backbone": "test_biformer", "drop_path_rate": 0.2, "mixup": 0.2, "ema_decay": 0.9, "warmup_epochs": 1}},
    "data": {"class_path": "DigitsData", "init_args": {"image_size": 16, "batch_size": 8}},
    "trainer": {
        "max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 3, "limit_test_batches": 0,
        "accumulate_grad_batches": 2, "accelerator": "cpu", "deterministic": True, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "log_every_n_steps": 1},
}


class Terminates(pl.Callback):
    """Signals the process at a batch of the epoch: before it trains, while it validates, loads, or in a test."""

    def __init__(self, epoch: int, batch: int, where: str, name: str = "SIGTERM"):
        self.epoch, self.batch, self.where, self.signal = epoch, batch, where, signal.Signals[name]

    def _at(self, trainer, batch_idx, where):
        if (trainer.current_epoch, batch_idx, where) == (self.epoch, self.batch, self.where):
            os.kill(os.getpid(), self.signal)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._at(trainer, batch_idx, "test")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._at(trainer, batch_idx, "train")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._at(trainer, batch_idx, "validate")

    def on_train_start(self, trainer, pl_module):
        dataset = trainer.train_dataloader.dataset
        load = type(dataset).__getitems__

        def terminates(dataset, indices):
            self._at(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready, "load")
            return load(dataset, indices)

        dataset.__class__ = type("Terminating", (type(dataset),), {"__getitems__": terminates})


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of SLURM's, as its processes see it; the file that a ``scontrol`` in its path writes what it is told to."""
    told, folder = tmp_path / "told", tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {told}\nexit ${{REFUSED:-0}}\n')
    (folder / "scontrol").chmod(0o755)
    for name, value in {
            "NTASKS": 1, "NTASKS_PER_NODE": 1, "JOB_ID": 123, "JOB_NAME": "run", "PROCID": 0, "LOCALID": 0, "NODEID": 0,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return told


@pytest.fixture
def fit(tmp_path):
    """Runs a fit; ``deterministic`` is taken back afterwards."""
    def run(name, *options, settings=SETTINGS):
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        return main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / name), *options])

    yield run
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("lived")
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert main(["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(folder)]) == 0
    torch.use_deterministic_algorithms(False)
    return folder


def _last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def _assert_equal(one, other, path=""):
    """All tensors, numbers and names but durations and paths."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"seconds", "training_seconds", "callbacks"}:
            _assert_equal(one[key], other[key], f"{path}/{key}")
        for key, state in one.get("callbacks", {}).items():
            if not key.startswith("ModelCheckpoint") and not key.startswith("LatestBest"):
                _assert_equal(state, other["callbacks"][key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            _assert_equal(*pair, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def _rows(run):
    """The rows of ``metrics.csv``, of steps and epochs that were repeated the last."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = {(row["epoch"], row["step"], *(key for key, value in row.items() if value)): row
                for row in csv.DictReader(file)}
    return dict(sorted(rows.items()))


def _signalled(**options):
    return ["--trainer.callbacks+=tests.tasks.test_midepoch.Terminates",
            *(f"--trainer.callbacks.{name}={value}" for name, value in options.items())]


@pytest.mark.parametrize(("epoch", "batch", "where"), [
    pytest.param(0, 1, "train", marks=pytest.mark.slow),  # at a step
    pytest.param(1, 2, "train", marks=pytest.mark.slow),  # within a step
    pytest.param(0, 4, "train", marks=pytest.mark.slow),  # the last of an epoch, after which it validates
    (1, 1, "validate"), pytest.param(0, 2, "validate", marks=pytest.mark.slow),
    (1, 3, "load"), pytest.param(1, 0, "load", marks=pytest.mark.slow),
])
@pytest.mark.parametrize("end", ["epochs", pytest.param("steps", marks=pytest.mark.slow)])
def test_terminated_run_goes_on_where_it_was(epoch, batch, where, end, fit, lived, tmp_path, capfd):
    last = ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(EPOCHS * 3)] if end == "steps" else []
    assert fit("stopped", *last, *_signalled(epoch=epoch, batch=batch, where=where)) == 143
    assert "visionattn: interrupted; go on with: " in capfd.readouterr().err
    halfway = _last(tmp_path / "stopped")
    done = {"train": batch + 1, "load": batch, "validate": BATCHES}[where]
    assert halfway["global_step"] == epoch * 3 + (done // 2 if done < BATCHES else 3)
    assert fit("stopped", *last, "--resume", "auto") == 0
    _assert_equal(_last(tmp_path / "stopped"), _last(lived))
    assert _rows(tmp_path / "stopped") == _rows(lived)


@pytest.mark.parametrize(("batch", "where"), [(1, "load"), pytest.param(2, "train", marks=pytest.mark.slow)])
def test_job_of_slurm_is_saved_queued_again_and_goes_on_where_it_was(batch, where, fit, lived, slurm, tmp_path, caplog):
    assert fit("job", *_signalled(epoch=1, batch=batch, where=where, name="SIGUSR1")) == 143
    assert slurm.read_text() == "requeue 123\n"
    assert "SLURM job 123 is queued again." in caplog.text
    assert not list((tmp_path / "job").glob("hpc*"))
    assert fit("job", "--resume", "auto") == 0
    _assert_equal(_last(tmp_path / "job"), _last(lived))
    assert _rows(tmp_path / "job") == _rows(lived)
    assert slurm.read_text() == "requeue 123\n"


@pytest.mark.slow
def test_job_of_slurm_that_is_not_queued_again(fit, slurm, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("REFUSED", "1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert fit("job", *_signalled(epoch=0, batch=1, where="train", name="SIGUSR1")) == 143
    assert slurm.read_text() == "requeue 100_7\n"
    assert "SLURM job 100_7 could not be queued again (scontrol requeue 100_7: exit code 1)" in caplog.text
    assert _last(tmp_path / "job")["global_step"] == 1


@pytest.mark.slow
def test_job_of_slurm_is_queued_again_in_the_test_at_the_end(fit, slurm, tmp_path):
    last = ["--trainer.max_epochs", "1", "--trainer.limit_test_batches", "2"]
    assert fit("job", *last, *_signalled(epoch=1, batch=1, where="test", name="SIGUSR1")) == 0
    assert slurm.read_text() == "requeue 123\n"
    assert not list((tmp_path / "job").glob("hpc*"))


@pytest.mark.slow
def test_run_that_is_killed_twenty_times_ends_with_the_weights_of_one_that_lived(tmp_path):
    config = tmp_path / "config.yaml"
    callbacks = [{"class_path": "tests.tasks.kills.Killed"},
                 {"class_path": "MidEpochCheckpoint", "init_args": {"minutes": 0.0}}]
    trainer = SETTINGS["trainer"] | {"max_epochs": 3, "limit_train_batches": 60, "callbacks": callbacks,
                                     "limit_test_batches": 2}
    config.write_text(yaml.safe_dump(SETTINGS | {"trainer": trainer}))
    for name, kills in (("killed", 20), ("lived", 0)):
        command = [sys.executable, "-m", "tests.tasks.kills", str(kills), "fit", "--config", str(config),
                   "--trainer.default_root_dir", str(tmp_path / name), "--resume", "auto"]
        done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True)
        codes = done.stdout.splitlines()[-1].removeprefix("exit codes: ").split()
        assert codes == ["-9"] * kills + ["0"], done.stderr[-3000:]
    _assert_equal(_last(tmp_path / "killed"), _last(tmp_path / "lived"))
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "lived")
    tested = [(tmp_path / name / "test_metrics.json").read_text() for name in ("killed", "lived")]
    assert tested[0] == tested[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_all_processes_are_told_to_stop_and_do_within_seconds(processes, tmp_path):
    """As schedulers do it: each process gets SIGTERM, those that load images too."""
    trainer = SETTINGS["trainer"] | {
        "devices": processes, "max_epochs": 1000, "limit_train_batches": 1.0, "limit_val_batches": 1.0,
        "enable_checkpointing": True} | ({"strategy": "ddp"} if processes > 1 else {})
    data = SETTINGS["data"] | {"init_args": SETTINGS["data"]["init_args"] | {"num_workers": 1}}
    config, run, log = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "log"
    config.write_text(yaml.safe_dump(SETTINGS | {"trainer": trainer, "data": data}))
    command = [sys.executable, "-m", "visionattn", "fit", "--config", str(config), "--trainer.default_root_dir",
               str(run), "--resume", "auto"]
    steps = []
    for begun in ("the training begins", "Going on with"):
        with log.open("w") as file:
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        for _ in range(1200):
            if "Training test_biformer" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(4 + len(steps))  # somewhere in training
        os.killpg(process.pid, signal.SIGTERM)
        told = time.time()
        assert process.wait(60) == 143, log.read_text()
        said = log.read_text()
        assert begun in said
        assert "Traceback" not in said
        assert "visionattn: interrupted; go on with: " in said
        assert (run / "checkpoints" / "last.ckpt").stat().st_mtime - told < 10
        steps.append(_last(run)["global_step"])
    assert 0 < steps[0] < steps[1]
