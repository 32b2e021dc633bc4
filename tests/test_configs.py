"""Every shipped configuration is read by the real parser; those on embedded data also train a few batches.

``test_dry_runs.py`` trains a step of the others.
"""
from pathlib import Path

import pytest
import timm
import yaml

from visionattn.cli import main

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*/*.yaml"))
NAMES = [path.stem for path in CONFIGS]


def test_there_are_configurations():
    assert {"digits_biformer", "digits_dinat", "imagefolder_finetune", "imagenet_biformer_tiny"} <= set(NAMES)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_parses(path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), "--print_config"])
    assert exit_.value.code == 0
    full = yaml.safe_load(capsys.readouterr().out)
    assert timm.is_model(full["model"]["init_args"]["backbone"])
    assert full["trainer"]["default_root_dir"] == f"runs/{path.stem}"
    given = yaml.safe_load(path.read_text())
    if given["model"]["init_args"].get("pretrained"):
        assert timm.get_pretrained_cfg(given["model"]["init_args"]["backbone"]).has_weights
    assert given["model"]["init_args"].items() <= full["model"]["init_args"].items()
    assert full["seed_everything"] == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("digits_")])
def test_trains(name, tmp_path):
    path = next(path for path in CONFIGS if path.stem == name)
    argv = ["fit", "--config", str(path), "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
            "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "0", "--trainer.accelerator", "cpu",
            "--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main(argv) == 0
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
