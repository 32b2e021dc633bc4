"""Adapters in the tasks: what trains, and that checkpoints are rebuilt with them."""
import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from visionattn import adapters
from visionattn.cli import main
from visionattn.data import DigitScenesData, DigitsData
from visionattn.tasks import ClassificationTask, DetectionTask, SegmentationTask
from visionattn.tasks.rebuild import create_model, load_task

OPTIONS = dict(adapter="onebit", adapter_args={"dim": 8, "scale": 10.0}, lr=1e-2)


def fit(task, data, folder, **kwargs):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)], **kwargs)
    trainer.fit(task, data)
    return folder / "last.ckpt"


def frozen(model):
    return {key: x.clone() for key, x in model.state_dict().items() if ".adapters." not in f".{key}"}


def test_a_classifier_trains_adapter_and_head_alone(tmp_path):
    torch.manual_seed(0)
    task = ClassificationTask("test_vit", num_classes=10, warmup_epochs=0, model_args={"img_size": 32}, ema_decay=0.9,
                              grad_checkpointing=True, layer_decay=0.9, **OPTIONS)
    before = frozen(task.model)
    path = fit(task, DigitsData(image_size=32, batch_size=16), tmp_path, accumulate_grad_batches=2)
    assert {key for key, x in frozen(task.model).items() if not torch.equal(x, before[key])} == {
        "head.weight", "head.bias"}
    model = create_model(None, path)
    images = torch.randn(2, 3, 32, 32)
    averaged = torch.load(path, weights_only=True)["state_dict"]
    assert any("adapters.onebit" in key for key in averaged)
    assert all(torch.equal(averaged[f"model.{key}"], x) for key, x in model.state_dict().items())
    rebuilt, run = load_task(path)
    assert (run["adapter"], run["adapter_args"]) == (OPTIONS["adapter"], OPTIONS["adapter_args"])
    torch.testing.assert_close(rebuilt(images), model.eval()(images))

    adapters.save(model, tmp_path / "digits.safetensors")
    plain = timm.create_model("test_vit", img_size=32)
    plain.load_state_dict({key: x for key, x in before.items() if "head" not in key}, strict=False)
    adapters.load(plain, tmp_path / "digits.safetensors")
    torch.testing.assert_close(plain.eval()(images), model(images))
    with pytest.raises(ValueError, match="is of a run with the adapter onebit: start from the weights"):
        ClassificationTask("test_vit", num_classes=10, checkpoint_path=str(path), model_args={"img_size": 32})


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_dense_nets_train_adapter_and_heads_alone(kind, tmp_path):
    torch.manual_seed(0)
    options = OPTIONS | dict(backbone="test_dinat", warmup_steps=0)
    if kind == "detection":
        task = DetectionTask(num_classes=10, detector="fcos", fpn_channels=64, min_size=64, max_size=64, **options)
        body = "backbone.body.model."
    else:
        task = SegmentationTask(num_classes=11, head="semantic_fpn", head_channels=8, **options)
        body = "backbone.model."
    before = frozen(task.model)
    path = fit(task, DigitScenesData(task=kind, digit_size=(16, 24), image_size=64, batch_size=2), tmp_path)
    changed = {key for key, x in frozen(task.model).items() if not torch.equal(x, before[key])}
    assert changed
    assert not any(key.startswith(body) for key in changed)
    trained = {key for key, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert {key for key in trained if key.startswith(body)} == {
        f"{body}adapters.onebit.{key}" for key, _ in adapters.adapters_of(task.model)["onebit"].named_parameters()}
    model = create_model(None, path)
    assert all(torch.equal(x, task.model.state_dict()[key]) for key, x in model.state_dict().items())
    adapters.save(model, tmp_path / "a.safetensors")
    assert not any(key.startswith(f"head.{body}") for key in adapters.info(tmp_path / "a.safetensors")["tensors"])


@pytest.mark.slow
def test_a_run_leaves_the_adapter(tmp_path, caplog):
    run = tmp_path / "run"
    caplog.set_level("INFO")
    assert main(["fit", "--config", "digits_biformer", "--trainer.default_root_dir", str(run),
                 "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
                 "--trainer.limit_test_batches", "1", "--model.backbone", "test_biformer", "--model.model_args", "{}",
                 "--model.adapter", "onebit", "--model.adapter_args", "{dim: 8}"]) == 0
    path = run / "adapter.safetensors"
    assert f"{path} ({path.stat().st_size:,} bytes)" in caplog.text
    assert "random weights" in caplog.text
    assert "adapter.safetensors  " in (run / "README.txt").read_text()
    found = adapters.info(path)
    assert (found["adapter"], found["backbone"], found["num_classes"]) == ("onebit", "test_biformer", 10)


@pytest.mark.parametrize(("task", "kwargs", "message"), [
    (ClassificationTask, {"adapter": "onebit", "frozen": True}, "freezes the whole backbone: leave frozen out"),
    (SegmentationTask, {"adapter": "onebit", "frozen_stages": 1}, "leave frozen_stages out"),
    (DetectionTask, {"adapter_args": {"dim": 8}}, "adapter_args were given without adapter"),
    (ClassificationTask, {"adapter": "twobit"}, "there is no adapter 'twobit'"),
    (ClassificationTask, {"adapter": "onebit", "adapter_args": {"width": 8}}, "has no option width"),
])
def test_bad_arguments(task, kwargs, message):
    with pytest.raises(ValueError, match=message):
        task("test_dinat", num_classes=10, **kwargs)
