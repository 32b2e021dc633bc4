"""A run folder that was moved works where it is, and its old place stays as it was."""
import json
import shlex

import pytest
import torch
import yaml

from visionattn.cli import main

FIT = shlex.split("""
    fit --model ClassificationTask --model.backbone test_biformer --model.ema_decay 0.9
    --data DigitsData --data.batch_size 16 --trainer.accelerator cpu --trainer.max_epochs 1
    --trainer.limit_train_batches 2 --trainer.limit_val_batches 2 --trainer.limit_test_batches 2
    --trainer.num_sanity_val_steps 0 --trainer.enable_progress_bar false --trainer.default_root_dir old/place
    --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.dirpath old/place/checkpoints
    --trainer.callbacks.filename best --trainer.callbacks.monitor val/accuracy --trainer.callbacks.mode max
    --trainer.callbacks.enable_version_counter false""")


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run that was trained in ``old/place`` and lies in ``new``; its paths are relative, and ``old`` is gone."""
    monkeypatch.chdir(tmp_path)
    assert main(FIT) == 0
    (tmp_path / "old" / "place").rename(tmp_path / "new")
    (tmp_path / "old").rmdir()
    return tmp_path / "new"


def test_a_moved_run_is_taken_where_it_is(moved, capfd, caplog):
    (moved / "test_metrics.json").unlink()
    assert main(["test", "--config", "new/config.yaml"]) == 0
    assert "The run of new/config.yaml was at old/place and is taken where it is now" in caplog.text
    assert json.loads((moved / "test_metrics.json").read_text())["num_images"] == 32
    assert main(["validate", "--config", "new/config.yaml", "--trainer.default_root_dir", "third"]) == 1
    assert "there is nothing to validate: third/checkpoints/best.ckpt does not exist" in capfd.readouterr().err

    # The best score goes with it: what is worse does not take the place of the best checkpoint.
    best = moved / "checkpoints" / "best.ckpt"
    state = torch.load(best)
    saver = next(value for value in state["callbacks"].values() if "best_k_models" in value)
    saver["best_model_score"] = saver["kth_value"] = torch.tensor(2.0)
    saver["best_k_models"] = dict.fromkeys(saver["best_k_models"], torch.tensor(2.0))
    torch.save(state, best)
    assert main(["fit", f"--config={moved}/config.yaml", "--ckpt_path", "best", "--trainer.max_epochs", "2"]) == 0
    assert not (moved.parent / "old").exists()
    assert torch.load(best)["epoch"] == 0
    saved = yaml.safe_load((moved / "config.yaml").read_text())["trainer"]
    assert saved["default_root_dir"] == str(moved)
    assert saved["callbacks"][0]["init_args"]["dirpath"] == str(best.parent)
