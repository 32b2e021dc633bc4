"""Runs that go on: ``--resume auto``, and what takes the place of a damaged checkpoint."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.data.images import truncate, write_classes
from visionattn.cli import main
from visionattn.tasks.guarding import LossGuard
from visionattn.tasks.resuming import newest_checkpoint

DIGITS = {
    "model": {"class_path": "ClassificationTask", "init_args": {"backbone": "test_biformer"}},
    "data": {"class_path": "DigitsData", "init_args": {"image_size": 16, "batch_size": 8}},
    "trainer": {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 2, "limit_test_batches": 2,
                "accelerator": "cpu", "num_sanity_val_steps": 0, "enable_progress_bar": False},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs that ``--resume auto`` began."""
    folder = tmp_path_factory.mktemp("finished")
    config, run = folder / "config.yaml", folder / "run"
    config.write_text(yaml.safe_dump(DIGITS))
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(run), "--resume", "auto"]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def _again(run, *options):
    return main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(run), "--resume",
                 "auto", *options])


def test_finished_run_is_left_as_it_is(run, said):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert _again(run) == 0
    assert f"{run} is finished (after 2 epochs, 4 steps): nothing is left to do" in said.text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_finished_run_that_was_not_tested_is_tested(run):
    summary = json.loads((run / "summary.json").read_text())
    tested = summary.pop("test")
    (run / "summary.json").write_text(json.dumps(summary))
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert _again(run) == 0
    assert json.loads((run / "summary.json").read_text())["test"] == tested
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_truncated_checkpoint_falls_back_and_is_not_kept_as_the_one_before(run, said):
    last, best, previous = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "best", "previous"))
    last.write_bytes(last.read_bytes()[:-1000])
    best.unlink()
    assert _again(run) == 0
    assert f"{last} cannot be read or gone on with: {previous} is taken (after 1 epochs, 2 steps)." in said.text
    assert [torch.load(path, weights_only=True)["global_step"] for path in (last, previous)] == [4, 2]


def test_lost_block_is_no_weights(run):
    last = run / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 4096] = bytes(4096)
    last.write_bytes(content)
    torch.load(last, weights_only=True)  # it says nothing
    assert newest_checkpoint(run).path == run / "checkpoints" / "best.ckpt"


def test_without_a_whole_checkpoint_all_are_named_and_stay(run, capfd):
    files = sorted((run / "checkpoints").iterdir())
    for file in files:
        file.write_bytes(b"half a checkpoint")
    torch.save({"state_dict": {}}, files[0])
    assert _again(run) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    names = ", ".join(map(str, files))
    assert line.startswith(f"visionattn: error: no checkpoint of {run} can be gone on with: {names}")
    assert all(file.is_file() for file in files)


def test_newest_is_by_steps_and_begins_where_there_is_none(run, tmp_path):
    (run / "checkpoints" / "previous.ckpt").touch()
    assert newest_checkpoint(run)[:3] == (run / "checkpoints" / "last.ckpt", 4, 2)
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(("options", "expected"), [
    (["--resume", "auto"], "a run folder that is the same each time"),
    (["--resume", "auto", "--trainer.default_root_dir", "run", "--ckpt_path", "last"], "leave out it or --ckpt_path"),
    (["--resume", "never"], "resume"),
])
def test_mistakes_are_one_line(options, expected, finished, tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(DIGITS))
    assert main(["fit", "--config", str(config), *options]) in (1, 2)
    lines = capfd.readouterr().err.splitlines()
    assert expected in lines[-1]
    assert lines[-1].startswith("visionattn: error: ")


def test_metrics_that_end_in_half_a_row_lose_that(run):
    path = run / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole + "1,0.00")
    assert _again(run, "--trainer.max_epochs", "3") == 0
    assert path.read_text().startswith(whole)


class Poison(pl.Callback):
    """Makes images of some batches NaN, counted over the epochs from 0 on, or a gradient, or weights."""

    def __init__(self, batches: list[int], where: str = "images"):
        self.batches, self.where = batches, where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == "images" and trainer.fit_loop.total_batch_idx in self.batches:
            batch[0][0] = math.nan

    def on_after_backward(self, trainer, pl_module):
        if self.where == "gradient" and trainer.fit_loop.total_batch_idx in self.batches:
            next(pl_module.parameters()).grad[0] = math.inf

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.where == "weights" and trainer.fit_loop.total_batch_idx in self.batches:
            next(pl_module.parameters()).data[0] = math.nan


def _poisoned(tmp_path, batches, where="images", **guard):
    callbacks = [{"class_path": "tests.tasks.test_surviving.Poison", "init_args": {"batches": batches, "where": where}}]
    if guard:
        callbacks.append({"class_path": "LossGuard", "init_args": guard})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(DIGITS | {"trainer": DIGITS["trainer"] | {"callbacks": callbacks}}))
    return main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("where", ["images", "weights"])
def test_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(where, tmp_path, capfd):
    assert _poisoned(tmp_path, [3], where) == 1
    line, last = capfd.readouterr().err.splitlines()[-1], tmp_path / "run" / "checkpoints" / "last.ckpt"
    said = {"images": "the loss of step 4 (epoch 2) is not finite, at a learning rate of ",
            "weights": "weights are not finite after step 4 (epoch 2) and were not saved; "}[where]
    assert line.startswith(f"visionattn: error: {said}")
    assert f"the last good checkpoint is {last}, after 1 epochs, 2 steps" in line
    for name in ("best", "last"):
        saved = torch.load(last.with_stem(name), weights_only=True)
        assert saved["global_step"] == 2
        assert all(x.isfinite().all() for x in saved["state_dict"].values())


@pytest.mark.parametrize("where", ["images", "gradient"])
def test_step_that_is_left_out_changes_nothing_and_is_counted(where, tmp_path, said):
    assert _poisoned(tmp_path, [2], where, skip=True) == 0
    assert "Epoch 2: 1 of the steps left out: their loss or gradients were not finite." in said.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(x.isfinite().all() for x in last["state_dict"].values())
    assert {int(state["step"]) for state in last["optimizer_states"][0]["state"].values()} == {3}


@pytest.mark.parametrize(("scaler", "skipped"), [(object(), 0), (None, 1)])
def test_steps_that_a_gradient_scaler_leaves_out_are_not_counted(scaler, skipped):
    module, guard = torch.nn.Linear(2, 2), LossGuard(skip=True)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), world_size=1)
    guard.on_train_start(trainer, module)
    guard.on_before_backward(trainer, module, torch.tensor(1.0))
    module.weight.grad = torch.full((2, 2), math.inf)
    guard.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))
    assert guard.skipped == skipped
    assert (module.weight.grad is None) == bool(skipped)


def test_too_many_steps_in_a_row_stop(tmp_path, capfd):
    assert _poisoned(tmp_path, [1, 2, 3], skip=True, in_a_row=1) == 1
    assert "the loss of step 3 (epoch 2) is not finite and so were 1 steps before" in capfd.readouterr().err


class Spoils(pl.Callback):
    """Spoils the training images in the second epoch."""

    def __init__(self, root: str, how: str):
        self.root, self.how = root, how

    def on_train_epoch_start(self, trainer, pl_module):
        for file in Path(self.root, "train").rglob("*.*") if trainer.current_epoch == 1 else ():
            if self.how == "vanished":
                file.unlink()
            else:
                truncate(file)


@pytest.mark.parametrize(("how", "workers", "expected"), [
    pytest.param("vanished", 1, "there is no such file", marks=pytest.mark.slow),
    ("unreadable", 0, "cannot be read as an image")])
def test_image_that_is_spoiled_in_mid_training_is_named_with_how_to_go_on(how, workers, expected, tmp_path, capfd):
    for split in ("train", "val"):
        write_classes(tmp_path / "photos" / split)
    config, last = tmp_path / "config.yaml", tmp_path / "run" / "checkpoints" / "last.ckpt"
    spoils = {"class_path": "tests.tasks.test_surviving.Spoils",
              "init_args": {"root": str(tmp_path / "photos"), "how": how}}
    config.write_text(yaml.safe_dump(DIGITS | {
        "data": {"class_path": "ImageFolderData", "init_args": {
            "root": str(tmp_path / "photos"), "image_size": 32, "batch_size": 2, "num_workers": workers}},
        "trainer": DIGITS["trainer"] | {"callbacks": [spoils]}}))
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("visionattn: error: ")
    assert expected in line
    assert str(tmp_path / "photos" / "train") in line
    assert line.endswith(f"; {last} stays: once that is mended, go on with: visionattn fit --config "
                         f"{tmp_path / 'run' / 'config.yaml'} --ckpt_path last")
    assert torch.load(last, weights_only=True)["global_step"] == 2
