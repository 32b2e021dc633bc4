"""Frozen backbones: what trains in which epoch, that nothing else changes, and that a resumed run does the same."""
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.modules.batchnorm import _BatchNorm

from visionattn.data import DigitScenesData, DigitsData
from visionattn.tasks import ClassificationTask, DetectionTask, SegmentationTask


class _Watch(pl.Callback):
    """Keeps the names of what changed in each epoch, and stops where it is told to."""

    def __init__(self, stop=None):
        self.changed, self.stop = [], stop

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.stop:
            raise RuntimeError("killed")
        self.before = {key: value.clone() for key, value in module.model.state_dict().items()}

    def on_train_epoch_end(self, trainer, module):
        self.modes = [part.training for part in module.model.modules()]
        self.changed.append({key for key, value in module.model.state_dict().items()
                             if not torch.equal(value, self.before[key])})


def _task(backbone="resnet10t", **kwargs):
    torch.manual_seed(0)
    return ClassificationTask(backbone, num_classes=10, warmup_epochs=0, lr=1e-2, frozen=True, **kwargs)


def _fit(task, folder, epochs, *callbacks, ckpt_path=None, data=None, **kwargs):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0,
        callbacks=[*callbacks, ModelCheckpoint(dirpath=folder, filename="last", save_on_train_epoch_end=True,
                                               enable_version_counter=False)], **kwargs)
    trainer.fit(task, data or DigitsData(image_size=32, batch_size=16), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("backbone", ["resnet10t", "test_biformer", "test_vit", "test_efficientvit_cga"])
def test_a_frozen_backbone_keeps_its_weights_and_statistics(backbone, tmp_path):
    task, watch = _task(backbone), _Watch()
    trainer = _fit(task, tmp_path, 1, watch)
    changed, = watch.changed
    names = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert names
    assert names <= changed
    head = {name.rpartition(".")[0] for name in names}
    assert all(key.rpartition(".")[0] in head for key in changed)
    optimised = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert optimised == len(names) < len(list(task.model.parameters()))


def test_layers_are_freed_from_the_head_downwards(tmp_path):
    task, watch = _task(unfreeze_epochs=3, layer_decay=0.8), _Watch()
    _fit(task, tmp_path, 4, watch, gradient_clip_val=1.0, accumulate_grad_batches=2)
    layers = [{key.split(".")[0] for key in changed} for changed in watch.changed]
    assert layers[0] == {"fc"}
    assert layers[1] == {"fc", "layer4"}
    assert layers[2] == {"fc", "layer4", "layer3", "layer2"}
    assert layers[3] == {"fc", "layer4", "layer3", "layer2", "layer1", "conv1", "bn1"}
    assert all(watch.modes)


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_stages_are_freed_from_the_last_downwards(kind, tmp_path):
    torch.manual_seed(0)
    options = dict(backbone="resnet10t", frozen_stages=2, unfreeze_epochs=2, warmup_steps=0, lr=1e-2)
    if kind == "detection":
        task = DetectionTask(num_classes=10, detector="fcos", fpn_channels=64, min_size=64, max_size=64, **options)
        body = "backbone.body.model."
    else:
        task = SegmentationTask(num_classes=11, head="semantic_fpn", head_channels=8, **options)
        body = "backbone.model."
    watch, data = _Watch(), DigitScenesData(task=kind, digit_size=(16, 24), image_size=64, batch_size=2)
    _fit(task, tmp_path, 3, watch, data=data)
    parts = [{key.removeprefix(body).split(".")[0] for key in changed if key.startswith(body)}
             for changed in watch.changed]
    assert parts[0] == {"layer3", "layer4"}
    assert parts[1] == parts[0] | {"layer2"}
    assert parts[2] == parts[1] | {"layer1", "conv1", "bn1"}
    assert all(watch.modes)
    assert all(parameter.requires_grad for parameter in task.model.parameters())


def test_a_resumed_run_frees_the_same_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    options = dict(unfreeze_epochs=2, ema_decay=0.9)
    straight = _task(**options)
    _fit(straight, tmp_path / "straight", 3)
    with pytest.raises(RuntimeError, match="killed"):
        _fit(_task(**options), tmp_path / "resumed", 3, _Watch(stop=1))
    resumed = _task(**options)
    _fit(resumed, tmp_path / "resumed", 3, ckpt_path=tmp_path / "resumed" / "last.ckpt")
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())


def test_modes():
    task = _task(unfreeze_epochs=2)
    task.train()
    norms = {name: module.training for name, module in task.model.named_modules() if isinstance(module, _BatchNorm)}
    assert norms
    assert not any(norms.values())
    task.freezing.set_modes(2)  # changes nothing that trains
    task.model.train()
    task.freezing.set_modes(2)
    assert all(module.training for module in task.model.modules())


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(frozen=False, unfreeze_epochs=3), "unfreeze_epochs"),
    (dict(frozen=True, unfreeze_epochs=0), "unfreeze_epochs"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask("test_dinat", num_classes=10, **kwargs)


@pytest.mark.parametrize("task", [DetectionTask, SegmentationTask])
def test_nothing_frozen_can_be_freed(task):
    with pytest.raises(ValueError, match="unfreeze_epochs must be 1 or more, with frozen_stages at 1 or more, got 3"):
        task("test_dinat", num_classes=10, unfreeze_epochs=3)


def test_class_weights_weigh_the_training_loss(tmp_path):
    task = ClassificationTask(
        "resnet10t", num_classes=10, class_weights="balanced", label_smoothing=0.0, ema_decay=0.9)
    _fit(task, tmp_path, 1)
    counts = torch.tensor(list(task.trainer.datamodule.report.splits["train"].counts.values())).float()
    assert torch.allclose(task.class_weight, counts.sum() / 10 / counts)
    logits, labels = torch.randn(6, 10), torch.tensor([0, 1, 2, 3, 4, 4])
    expected = torch.nn.functional.cross_entropy(logits, labels, task.class_weight)
    assert torch.equal(task._training_loss(logits, labels), expected)


def test_balanced_weights_need_counts(tmp_path):
    task = ClassificationTask("test_dinat", num_classes=10, class_weights="balanced")
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    loader = torch.utils.data.DataLoader([(torch.zeros(3, 32, 32), 1)] * 4, batch_size=2)
    with pytest.raises(ValueError, match="balanced needs data that counts its classes"):
        trainer.fit(task, loader)
