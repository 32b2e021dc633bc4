"""Runs that go on: ``--resume auto``, and what takes the place of a damaged checkpoint."""
import json
import shutil

import pytest
import torch
import yaml

from visionattn.cli import main
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
