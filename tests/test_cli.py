"""The command: what it needs, what it writes, and that every mistake ends in one line."""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from visionattn.cli import main

from .data.images import truncate, write_classes, write_image

CONFIG = """
model:
  class_path: ClassificationTask
  init_args: {backbone: test_biformer, warmup_epochs: 1, drop_path_rate: 0.2, mixup: 0.2, ema_decay: 0.9}
data: {class_path: DigitsData, init_args: {image_size: 32, batch_size: 16}}
trainer:
  max_epochs: 2
  accelerator: cpu
  limit_train_batches: 3
  limit_val_batches: 2
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
"""
COMMAND = [sys.executable, "-m", "visionattn"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A finished run on the digits: ``(configuration file, run folder)``."""
    folder = tmp_path_factory.mktemp("digits")
    config = folder / "config.yaml"
    config.write_text(CONFIG + f"  default_root_dir: {folder / 'run'}\n")
    assert main(["fit", "--config", str(config)]) == 0
    assert (folder / "run" / "test_metrics.json").is_file()
    return config, folder / "run"


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / "photos" / split)
    return tmp_path / "photos"


@pytest.fixture
def fails(capfd):
    """Runs a command that must fail: returns its one line of explanation."""
    def run(*argv, code=1):
        assert main([str(arg) for arg in argv]) == code
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("visionattn: error: ")]
        assert len(lines) == 1
        return lines[0]
    return run


def _arguments(photos, *more):
    return ["fit", "--model", "ClassificationTask", "--model.backbone", "test_biformer", "--data", "ImageFolderData",
            "--data.root", photos, "--data.image_size", "32", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
            "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false",
            "--trainer.default_root_dir", photos.parent / "run", *more]


# The command itself

@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_does_not_import_torch(option):
    code = ("import sys; from importlib.metadata import version; sys.argv = ['visionattn', sys.argv[1]]\n"
            "from visionattn.cli import main\n"
            "code = main(); print('torch' in sys.modules, 'timm' in sys.modules); sys.exit(code)")
    result = subprocess.run(
        [sys.executable, "-c", code, option], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert result.stdout.splitlines()[-1] == "False False"
    assert "visionattn" in result.stdout


def test_module_is_the_command():
    result = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    names = ("fit", "validate", "test", "predict", "export", "demo", "list")
    assert all(f"  {name} " in result.stdout for name in names)


def test_unknown_command(fails):
    assert "unknown command 'fits'; known: " in fails("fits", code=2)


def test_list(capsys):
    assert main(["list", "--family", "biformer"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "13.14 M" in rows["biformer_tiny"]
    assert "224 x 224" in rows["biformer_tiny"]
    assert all(name.removeprefix("test_").startswith("biformer") for name in rows)


def test_list_of_an_unknown_family(fails):
    line = fails("list", "--family", "yolo")
    assert "no family 'yolo'; there are agent_cswin, " in line
    assert "biformer, " in line


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("VISIONATTN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no family"):
        main(["list", "--family", "yolo"])


# A run and what follows it

def test_run_folder(digits):
    _, run = digits
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.ckpt", "last.ckpt", "previous.ckpt"]
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows if row["val/accuracy"]] == ["0", "1"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["backbone"] == "test_biformer"
    assert saved["seed_everything"] == 0
    best, last = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert last["epoch"] == 1
    accuracy = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    assert best["epoch"] == accuracy.index(max(accuracy))


def test_run_folder_tells_its_story(digits):
    _, run = digits
    lines = [line.split()[0] for line in (run / "README.txt").read_text().splitlines()[2:]]
    files = {str(path.relative_to(run)) for path in run.rglob("*.*") if "tensorboard" not in path.parts}
    assert set(lines) - {"tensorboard"} == files - {"README.txt"}
    assert {"curves.png", "confusion.png", "classes.csv", "mistakes.png", "calibration.png"} <= files
    metrics, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("test_metrics", "summary"))
    with (run / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["right"]) for row in rows) / 300 == pytest.approx(metrics["accuracy"], abs=1e-6)
    assert sum(int(row["images"]) for row in rows) == sum(int(row["predicted"]) for row in rows) == 300
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert metrics["temperature"] == pytest.approx(best["hyper_parameters"]["_temperature"], abs=1e-6)
    assert 0 < metrics["ece_calibrated"] < 1
    with (run / "metrics.csv").open(newline="") as file:
        accuracy = max(float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"])
    assert summary["best"] == pytest.approx(accuracy, abs=1e-6)
    assert (summary["best_epoch"], summary["epochs"], summary["steps"]) == (best["epoch"] + 1, 2, 6)
    assert summary["data"]["images"] == {"train": 1197, "val": 300, "test": 300}
    assert summary["test"] == metrics


def test_finished_run_is_not_overwritten(digits, fails):
    config, run = digits
    before = (run / "metrics.csv").read_text()
    assert "already holds a run" in fails("fit", "--config", config)
    assert (run / "metrics.csv").read_text() == before


@pytest.mark.parametrize("which", ["best", "last", "path", None])
def test_test(which, digits):
    _, run = digits
    metrics, config = run / "test_metrics.json", (run / "config.yaml").read_text()
    metrics.unlink(missing_ok=True)
    ckpt_path = str(run / "checkpoints" / "last.ckpt") if which == "path" else which
    argv = ["test", "--config", str(run / "config.yaml"), *(["--ckpt_path", ckpt_path] if which else [])]
    assert main(argv) == 0
    assert 0 < json.loads(metrics.read_text())["accuracy"] < 1
    assert (run / "config.yaml").read_text() == config
    assert (run / "metrics.csv").exists()


def test_validate_and_predict(digits, capfd):
    _, run = digits
    assert main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]) == 0
    assert f"Validation of {run}/checkpoints/best.ckpt: accuracy 0." in capfd.readouterr().out
    assert main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]) == 0
    assert len((run / "predictions.csv").read_text().splitlines()) == 301


def test_what_a_run_started_from_is_not_needed_once_it_has_a_checkpoint(digits):
    assert main(["test", "--config", str(digits[0]), "--model.init_args.checkpoint_path", "gone.pth"]) == 0


def test_test_without_a_run_uses_the_weights_that_the_model_starts_from(digits, tmp_path):
    config, run = digits
    assert main(["test", "--config", str(config), "--ckpt_path", "best"]) == 0
    argv = ["test", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "new"),
            "--model.init_args.checkpoint_path", str(run / "checkpoints" / "best.ckpt")]
    assert main(argv) == 0
    expected, found = (json.loads((folder / "test_metrics.json").read_text()) for folder in (run, tmp_path / "new"))
    assert found == {key: value for key, value in expected.items() if key not in ("ece_calibrated", "temperature")}


def test_resume_goes_on_in_the_same_files(digits, tmp_path):
    _, run = digits
    shutil.copytree(run, tmp_path / "run")
    argv = ["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "run"),
            "--trainer.max_epochs", "3", "--ckpt_path", "last"]
    assert main(argv) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["val/accuracy"]] == ["0", "1", "2"]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["ckpt_path"], saved["trainer"]["max_epochs"]) == (None, 3)


def test_fit_ends_with_a_test_of_the_best_checkpoint(digits, tmp_path, capfd):
    """Also a finished run that is resumed; what is tested is the average of the weights that the file holds."""
    _, run = digits
    shutil.copytree(run, tmp_path / "run")
    best, metrics = tmp_path / "run" / "checkpoints" / "best.ckpt", tmp_path / "run" / "test_metrics.json"
    metrics.unlink()
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    checkpoint = torch.load(best, weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if name.startswith("model.head.fc"):
            value.zero_()
    torch.save(checkpoint, best)
    argv = ["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "run"),
            "--ckpt_path", "last", "--trainer.enable_progress_bar", "true"]
    assert main(argv) == 0
    assert json.loads(metrics.read_text())["loss"] == pytest.approx(math.log(10), abs=1e-5)
    assert (tmp_path / "run" / "metrics.csv").read_text() == rows
    assert re.search(r"Testing DataLoader 0: +100%", capfd.readouterr().out)


@pytest.mark.parametrize("option", [["--trainer.limit_test_batches", "0"], ["--trainer.fast_dev_run", "true"]])
def test_fit_without_a_test(option, digits, tmp_path):
    argv = ["fit", "--config", str(digits[0]), "--trainer.default_root_dir", str(tmp_path / "run"), *option]
    assert main([*argv, "--trainer.max_epochs", "1"]) == 0
    assert not (tmp_path / "run" / "test_metrics.json").exists()


@pytest.mark.slow
def test_two_processes_test_together(digits, tmp_path):
    argv = ["fit", "--config", str(digits[0]), "--trainer.default_root_dir", str(tmp_path / "run"),
            "--trainer.max_epochs", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run([*COMMAND, *argv], env=ENVIRONMENT, check=True, capture_output=True)
    after_fit = json.loads((tmp_path / "run" / "test_metrics.json").read_text())
    assert after_fit["num_images"] == 300
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["devices"], summary["epochs"], summary["test"]) == (2, 1, after_fit)
    found = [(tmp_path / "run" / name).read_text() for name in ("classes.csv", "confusion.csv")]
    (tmp_path / "run" / "mistakes.png").unlink()
    assert main(["test", "--config", str(digits[0]), "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "test_metrics.json").read_text()) == pytest.approx(after_fit, abs=2e-6)
    assert found == [(tmp_path / "run" / name).read_text() for name in ("classes.csv", "confusion.csv")]
    assert (tmp_path / "run" / "mistakes.png").is_file()


def test_image_folder_to_predictions(photos):
    assert main([str(arg) for arg in _arguments(photos)]) == 0
    run, inbox = photos.parent / "run", photos.parent / "inbox"
    write_image(inbox / "what.jpg")
    argv = ["predict", "--config", run / "config.yaml", "--ckpt_path", "best", "--data.init_args.predict_root", inbox]
    assert main([str(arg) for arg in argv]) == 0
    with (run / "predictions.csv").open(newline="") as file:
        row, = csv.DictReader(file)
    assert row["file"] == str(inbox / "what.jpg")
    assert {row["class"], row["class_2"], row["class_3"]} == {"cat", "dog", "emu"}


def test_run_that_died_in_its_first_epoch_can_be_started_again(photos, fails):
    bad = truncate(photos / "train" / "emu" / "2.jpg")
    assert "emu/2.jpg" in fails(*_arguments(photos, "--trainer.log_every_n_steps", "1"))
    assert (photos.parent / "run" / "config.yaml").exists()
    write_image(bad)
    assert main([str(arg) for arg in _arguments(photos)]) == 0
    with (photos.parent / "run" / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["val/accuracy"]] == ["0"]


# Mistakes

@pytest.mark.parametrize(("config", "words"), [
    ("modle: 3", "modle"),
    ("trainer: {max_epoch: 3}", "trainer.max_epoch"),
    ("model: {class_path: ClassificationTask, init_args: {backbon: x}}", "'backbon' is not accepted"),
    ("data: {class_path: DigitsData, init_args: {imagesize: 3}}", "'imagesize' is not accepted"),
    ("data: {class_path: DigitData}", "DigitData"),
    ("model: {class_path: ClassificationTask, init_args: {lr: fast}}", "lr"),
    ("trainer: {max_epochs: many}", "max_epochs: Expected a <class 'int'>, got many"),
    ("trainer: {max_epochs: 3", "config"),
])
def test_wrong_configuration(config, words, digits, tmp_path, fails):
    path = tmp_path / "wrong.yaml"
    path.write_text(config)
    assert words in fails("fit", "--config", digits[0], "--config", path, code=2)


def test_missing_configuration_file(fails):
    assert "nowhere.yaml" in fails("fit", "--config", "nowhere.yaml", code=2)


def test_nothing_to_train(fails):
    assert "model" in fails("fit", code=2)


def test_wrong_values(digits, tmp_path, fails):
    new = ["--trainer.default_root_dir", tmp_path / "new"]
    assert "no model 'biformer_tine'; similar names: " in fails(
        "fit", "--config", digits[0], "--model.backbone", "biformer_tine", *new)
    assert "image_size must be at least" in fails("fit", "--config", digits[0], "--data.image_size", "4", *new)
    assert not (tmp_path / "new").exists()


def test_missing_and_empty_image_folders(photos, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    assert "empty holds no class folders" in fails(*_arguments(photos, "--data.root", tmp_path / "empty"))
    assert "nowhere does not exist" in fails(*_arguments(photos, "--data.root", tmp_path / "nowhere"))
    (photos / "train" / "fox").mkdir()
    assert "holds no images" in fails(*_arguments(photos))


def test_bad_test_images_are_found_before_training(photos, fails):
    write_classes(photos / "test")
    (photos / "test" / "dog" / "1.jpg").write_bytes(b"this is no JPEG")
    assert "1.jpg cannot be read as an image" in fails(*_arguments(photos))
    assert not (photos.parent / "run").exists()


def test_corrupt_image(photos, fails):
    (photos / "train" / "dog" / "1.jpg").write_bytes(b"this is no JPEG")
    assert "1.jpg cannot be read as an image" in fails(*_arguments(photos))


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_truncated_image(num_workers, photos, fails):
    truncate(photos / "train" / "emu" / "2.jpg")
    line = fails(*_arguments(photos, "--data.num_workers", num_workers, "--data.batch_size", "4"))
    assert "emu/2.jpg cannot be read as an image: " in line
    assert "Traceback" not in line


def test_missing_checkpoint(digits, tmp_path, fails):
    config, _ = digits
    elsewhere = ["--trainer.default_root_dir", tmp_path]
    assert "no checkpoint" in fails("fit", "--config", config, "--ckpt_path", "last", *elsewhere)
    assert "no checkpoint" in fails("test", "--config", config, "--ckpt_path", "best", *elsewhere)
    assert "nowhere.ckpt does not exist" in fails("test", "--config", config, "--ckpt_path", "nowhere.ckpt")
    assert "there is nothing to test" in fails("test", "--config", config, *elsewhere)


def test_damaged_checkpoint(digits, tmp_path, fails):
    config, run = digits
    path = tmp_path / "cut.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", path)
    truncate(path)
    assert "cut.ckpt is damaged" in fails("test", "--config", config, "--ckpt_path", path)


def test_checkpoint_of_another_model(digits, photos, fails):
    config, run = digits
    checkpoint = run / "checkpoints" / "best.ckpt"
    line = fails("test", "--config", config, "--ckpt_path", checkpoint, "--model.backbone", "test_dinat")
    assert "is of another model: its backbone is test_biformer, the configuration's is test_dinat" in line
    line = fails(*_arguments(photos, "--ckpt_path", checkpoint))
    assert "its num_classes is 10, the configuration's is 3" in line


def test_weights_alone_are_no_checkpoint(digits, tmp_path, fails):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    line = fails("test", "--config", digits[0], "--ckpt_path", tmp_path / "weights.pth")
    assert "not the checkpoint of a training run" in line


def test_shell_sees_one_line_and_the_exit_code(tmp_path):
    result = subprocess.run(
        [*COMMAND, *map(str, _arguments(tmp_path / "nowhere"))], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("visionattn: error: image folder ")
    assert "Deprecat" not in result.stderr
