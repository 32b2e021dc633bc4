"""DenseTasks: targets by hand, both kinds of heads, and a checkpoint that is a segmenter's."""
import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tests.tasks.test_segmentation import CLASSES, _pictures
from visionattn.export import export_onnx
from visionattn.tasks import DenseTasks
from visionattn.tasks.dense_tasks import boundaries_of, distances_of
from visionattn.tasks.rebuild import create_model


def make(**kwargs):
    torch.manual_seed(0)
    return DenseTasks(**dict(backbone="test_dinat", num_classes=CLASSES, head="taskexpert", head_channels=8,
                             auxiliary_weight=0.0, warmup_steps=0, lr=1e-3) | kwargs)


def trainer_of(folder, **kwargs):
    return pl.Trainer(
        **dict(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
               enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0) | kwargs)


def test_boundaries():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 255], [2, 0, 0, 255]]])
    expected = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(boundaries_of(labels)[0], expected)


def test_distances():
    edges = torch.zeros(2, 20, 30, dtype=torch.bool)
    edges[0, 4, 7] = True
    rows, columns = torch.arange(20)[:, None], torch.arange(30)
    expected = torch.maximum((rows - 4).abs(), (columns - 7).abs()).clamp(max=16) / 16
    found = distances_of(edges)
    torch.testing.assert_close(found[0], expected.float())
    assert (found[1] == 1).all()  # there is no boundary


@pytest.mark.parametrize("head", ["taskexpert", "segformer"])
def test_trains_measures_and_is_a_segmenter(head, tmp_path):
    task = make(head=head, auxiliary_weight=0.4)
    trainer = trainer_of(tmp_path)
    loader = DataLoader(_pictures(), batch_size=2)
    before = {name: x.clone() for name, x in task.named_parameters()}
    trainer.fit(task, loader, loader)
    assert [name for name, x in task.named_parameters() if torch.equal(x, before[name])] == []
    for name in ("train/boundary", "train/distance", "val/boundary_f1", "val/distance_error", "val/miou"):
        assert trainer.callback_metrics[name].isfinite(), name
    trainer.test(task, loader, verbose=False)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert 0 <= metrics["boundary_f1"] <= 1
    assert 0 <= metrics["distance_error"] <= 17
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    segmenter = create_model(None, tmp_path / "run.ckpt").eval()
    images = _pictures()[0][0][None]
    task.eval()
    with torch.no_grad():
        assert torch.equal(segmenter(images), task(images))
        assert not task.maps(images)[1]["boundary"].isnan().any()


def test_ignored_pixels_do_not_count():
    task = make().eval()
    labels = torch.stack([labels for _, labels in _pictures(2)])
    others = {name: torch.randn(2, 1, *labels.shape[1:]) for name in task.others}
    losses = task._losses(others, labels)
    changed = {name: torch.where((labels == 255)[:, None], 100.0, x) for name, x in others.items()}
    for name, loss in task._losses(changed, labels).items():
        torch.testing.assert_close(loss, losses[name])
    assert all(loss == 0 for loss in task._losses(others, torch.full_like(labels, 255)).values())


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(dense_tasks={"depth": 1.0}), "positive weights of boundary and distance"),
    (dict(dense_tasks={}), "positive weights"),
    (dict(dense_tasks={"boundary": 0.0}), "positive weights"),
    (dict(adapter="lora"), "leave adapter out"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.slow
def test_exports(tmp_path):
    task = make(dense_tasks={"boundary": 0.5})
    trainer_of(tmp_path, max_steps=1).fit(task, DataLoader(_pictures(), batch_size=2))
    export_onnx(task.model.eval(), tmp_path / "model.onnx", (64, 64))  # which compares it with PyTorch
