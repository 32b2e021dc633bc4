"""Two processes learn, measure, average and resume what one does with the same total batch: DDP and FSDP2, each task.

All is in double precision: what is left of the order of sums is far below what an update is. Data that change at random
change by their place in the epoch (the scenes) or not at all (the digits), and stochastic depth is off, as its random
numbers are of each process, and so are those of dropout and the statistics of batch norms, which stay as they are.
"""
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.processes import TIME, free_port, together
from visionattn.data import DigitScenesData, DigitsData
from visionattn.tasks import ClassificationTask, DetectionTask, SegmentationTask
from visionattn.tasks.run_folder import new_run_folder
from visionattn.tasks.sharding import FullySharded

BATCH = 4  # of all processes
# How far weights of the order of 0.1, which move by 2e-3, may lie apart; a segmenter's loss is in single precision.
WEIGHTS = {"classification": 1e-9, "detection": 1e-9, "segmentation": 2e-5}
METRICS = {"classification": 2e-6, "detection": 2e-6, "segmentation": 1e-5}  # torchmetrics sums in single precision
COMMON = dict(lr=1e-3, ema_decay=0.9, drop_path_rate=0.0)
SCENES = dict(image_size=64, digits=(1, 3), digit_size=(16, 32), train_scenes=11, val_scenes=5, test_scenes=5)


class PlainDigits(DigitsData):
    """Few digits that are not changed at random; 11 train in two batches of 4, 5 validate."""

    def setup(self, stage):
        super().setup(stage)
        self.train, self.val = self.train[:11], self.val[:5]

    def train_dataloader(self):
        return self._train_loader(self.val_dataloader().dataset.__class__(self, self.train))


class Losses(pl.Callback):
    """Keeps the loss of every step and the metrics of every epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(trainer.callback_metrics["train/loss_step"].item())

    def on_train_epoch_end(self, trainer, *_):
        self.epochs.append({key: value.item() for key, value in trainer.callback_metrics.items()
                            if key.startswith("val/")})


def _classification(processes):
    task = ClassificationTask("test_dinat", num_classes=10, warmup_epochs=0, **COMMON)
    return task, PlainDigits(image_size=32, batch_size=BATCH // processes)


def _detection(processes):
    # RetinaNet's losses are means over images; those of the others depend on what is in one process's images.
    task = DetectionTask("test_dinat", num_classes=10, detector="retinanet", fpn_channels=32, min_size=64, max_size=64,
                         warmup_steps=1, **COMMON)
    return task, DigitScenesData(batch_size=BATCH // processes, **SCENES)


def _segmentation(processes):
    task = SegmentationTask("test_dinat", num_classes=11, head="semantic_fpn", head_channels=8, warmup_steps=1,
                            **COMMON)
    task.model.head.eval()  # every head has batch norms and dropout
    task.model.auxiliary_head.eval()
    return task, DigitScenesData(task="segmentation", batch_size=BATCH // processes, **SCENES)


TASKS = {"classification": _classification, "detection": _detection, "segmentation": _segmentation}


def fit(kind, processes, strategy, folder, resume=None):
    """Trains two epochs; leaves ``0.ckpt``, ``1.ckpt`` and, in ``story.json``, losses and metrics in ``folder``."""
    pl.seed_everything(0, verbose=False)
    task, data = TASKS[kind](processes)
    if resume:
        task.double()  # Lightning loads weights before it makes them double
    losses = Losses()
    trainer = pl.Trainer(
        devices=processes, strategy=strategy, accelerator="cpu", precision="64-true", max_epochs=2, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        gradient_clip_val=1.0, callbacks=[losses, ModelCheckpoint(
            dirpath=folder, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1,
            save_on_train_epoch_end=True)])
    trainer.fit(task, data, ckpt_path=resume)
    if trainer.is_global_zero:
        (folder / "story.json").write_text(json.dumps([losses.steps, losses.epochs]))


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """The folders of the runs of one process, by task."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            together(1, fit, kind, 1, "auto", folders[kind])
        return folders[kind]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", TASKS)
def test_two_processes_do_what_one_does(kind, strategy, of_one, tmp_path):
    one, two = of_one(kind), tmp_path / "two"
    together(2, fit, kind, 2, strategy, two)
    _compare(kind, one, two)
    steps, epochs = json.loads((one / "story.json").read_text())
    assert len(steps) == 4  # 11 images are two batches of 4 in an epoch, on any number of processes
    assert len(epochs) == 2
    assert len(epochs[0]) > 1
    # What one saved two go on with, and the other way round.
    together(2, fit, kind, 2, strategy, tmp_path / "two after one", one / "0.ckpt")
    _compare(kind, one, tmp_path / "two after one", resumed=True)
    together(1, fit, kind, 1, "auto", tmp_path / "one after two", two / "0.ckpt")
    _compare(kind, one, tmp_path / "one after two", resumed=True)


def _compare(kind, one, other, resumed=False):
    """That the run ``other`` went as the run ``one`` did, or as its second half where it was ``resumed``."""
    steps, epochs = json.loads((one / "story.json").read_text())
    found_steps, found_epochs = json.loads((other / "story.json").read_text())
    assert found_steps == pytest.approx(steps[2:] if resumed else steps, abs=METRICS[kind])
    assert found_epochs == [pytest.approx(metrics, abs=METRICS[kind]) for metrics in epochs[1 if resumed else 0:]]
    start, expected, found = (torch.load(path, weights_only=True) for path in (
        one / "0.ckpt", one / "1.ckpt", other / "1.ckpt"))
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key in ("state_dict", "current_model_state"):
        for name, weight in expected[key].items():
            assert type(found[key][name]) is torch.Tensor
            assert torch.allclose(found[key][name], weight, rtol=0, atol=WEIGHTS[kind]), (key, name)
        assert any(not torch.allclose(start[key][name], weight, rtol=0, atol=1e-4)
                   for name, weight in expected[key].items())
    moments, others = (checkpoint["optimizer_states"][0] for checkpoint in (expected, found))
    assert [group["params"] for group in moments["param_groups"]] == [
        group["params"] for group in others["param_groups"]]
    for place, state in moments["state"].items():
        assert all(torch.allclose(others["state"][place][key], value, rtol=1e-6, atol=WEIGHTS[kind] / 1000)
                   for key, value in state.items())


@pytest.mark.slow
def test_two_nodes_that_torchrun_starts_train_and_test_together(tmp_path):
    """Two agents on the loopback address, each of them a node with one process."""
    port, run = free_port(), tmp_path / "run"
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend",
        "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test", "--local_addr", "127.0.0.1", "-m",
        "visionattn", "fit", "--model", "ClassificationTask", "--model.backbone", "test_dinat", "--data", "DigitsData",
        "--data.batch_size", "32", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3",
        "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu", "--trainer.num_nodes", "2",
        "--trainer.devices", "1", "--trainer.strategy", "ddp", "--trainer.default_root_dir", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    nodes = [subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for _ in range(2)]
    try:
        said = [node.communicate(timeout=TIME)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads((run / "test_metrics.json").read_text())["num_images"] == 300
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["devices"], summary["epochs"], summary["steps"]) == (2, 1, 3)
    assert sum("Training test_dinat" in text for text in said) == 1  # one process speaks


@pytest.mark.parametrize(("variable", "value"), [("TORCHELASTIC_RUN_ID", "1"), ("SLURM_NTASKS", "2")])
def test_processes_that_cannot_agree_on_a_folder_need_one(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=r"give them all the same --trainer.default_root_dir"):
        new_run_folder()


def test_processes_of_one_run_take_the_folder_of_the_first(monkeypatch):
    monkeypatch.setenv("VISIONATTN_NEW_RUN", "runs/of an earlier one")
    first = new_run_folder()
    assert first != "runs/of an earlier one"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(time, "strftime", lambda format: "later")
    assert new_run_folder() == first


def test_what_fsdp2_cannot_do_is_refused():
    strategy = FullySharded()
    strategy.precision_plugin = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ValueError, match=r"fsdp2 does not take trainer.precision 16-mixed: take bf16-mixed"):
        strategy.shard(ClassificationTask("test_dinat", num_classes=10))
    strategy.precision_plugin = SimpleNamespace(precision="32-true")
    for name, value in {"clip_agc": 0.1, "compile": True, "optimizer": "lamb"}.items():
        with pytest.raises(ValueError, match=f"fsdp2 does not take (the )?{name}"):
            strategy.shard(ClassificationTask("test_dinat", num_classes=10, **{name: value}))
