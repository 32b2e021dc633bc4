"""ClassificationTask: a few real steps, and that what is kept, measured and written is right."""
import csv
import json

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from visionattn.data import DigitsData
from visionattn.tasks import ClassificationTask

HEAD = timm.get_pretrained_cfg("test_biformer").classifier  # test_dinat's too


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a few batches whose run folder is ``tmp_path``."""
    def make(**kwargs):
        defaults = dict(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, limit_train_batches=3, limit_val_batches=1,
            num_sanity_val_steps=0)
        return pl.Trainer(**defaults | kwargs)
    return make


def _task(**kwargs):
    torch.manual_seed(0)
    return ClassificationTask(**dict(backbone="test_biformer", num_classes=10, warmup_epochs=0) | kwargs)


def _digits(**kwargs):
    return DigitsData(image_size=32, batch_size=16, **kwargs)


def _weights(path, key="state_dict"):
    return torch.load(path, weights_only=True)[key]


@pytest.mark.parametrize("backbone", ["resnet10t", "test_biformer", "test_dinat"])
def test_learns_with_any_timm_backbone(backbone, trainer):
    task = _task(backbone=backbone, lr=3e-3, label_smoothing=0.0)
    data = _digits()
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    batch = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=16)
    before = cross_entropy(task.eval()(images), labels).item()
    trainer(max_epochs=12, limit_val_batches=0).fit(task.train(), batch)
    assert cross_entropy(task(images), labels).item() < 0.8 * before


def test_grad_checkpointing(trainer):
    """Trains to the same weights, and leaves a model that computes nothing twice."""
    trained = []
    for form in (False, True, "attention"):
        task = _task(grad_checkpointing=form)
        block = task.model.stages[0].blocks[0]
        seen = []
        watch = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_, block=block, seen=seen: seen.append(
            (block.grad_checkpointing, "forward" in vars(block.attn))))
        trainer(max_steps=2, limit_val_batches=0, callbacks=[watch]).fit(task, _digits())
        assert seen == [(form is True, form == "attention")] * 2
        assert not block.grad_checkpointing
        assert "forward" not in vars(block.attn)
        trained.append(task.model.state_dict())
    for name, value in trained[0].items():
        for other in trained[1:]:
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize(("form", "said"), [
    ("attention", "ResNet has no attention to compute a second time"),
    ("blocks", "grad_checkpointing must be true, false or attention, got 'blocks'")])
def test_grad_checkpointing_that_cannot_be(form, said, trainer):
    with pytest.raises(ValueError, match=said):
        trainer().fit(_task(backbone="resnet10t", grad_checkpointing=form), _digits())


def test_test_metrics(tmp_path, trainer):
    task, data = _task(), _digits()
    trainer().test(task, data, verbose=False)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    images = torch.stack([image for image, _ in data.test_dataloader().dataset])
    labels = torch.tensor([label for _, label in data.test_dataloader().dataset])
    with torch.no_grad():
        logits = task.eval()(images)
    top5 = (logits.topk(5).indices == labels[:, None]).any(dim=1)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item(), abs=1e-6)
    assert metrics["accuracy_top5"] == pytest.approx(top5.float().mean().item(), abs=1e-6)
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-5)
    assert (metrics["num_images"], metrics["num_classes"], metrics["backbone"]) == (300, 10, "test_biformer")


def test_five_classes_have_no_top5(tmp_path, trainer):
    images = [(torch.randn(3, 32, 32), label) for label in (0, 1, 2)]
    trainer().test(_task(num_classes=5), torch.utils.data.DataLoader(images, batch_size=3), verbose=False)
    assert "accuracy_top5" not in json.loads((tmp_path / "test_metrics.json").read_text())


def test_predictions(tmp_path, trainer):
    task, data = _task(class_names=[f"digit {label}" for label in range(10)]), _digits()
    trainer().predict(task, data, return_predictions=False)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"digit_{index:04d}" for index in data.test]
    image, _ = data.predict_dataloader().dataset[7]
    with torch.no_grad():
        best, classes = task.eval()(image[None]).softmax(dim=1)[0].topk(5)
    row = rows[7]
    columns = [("class", "probability"), *((f"class_{rank}", f"probability_{rank}") for rank in range(2, 6))]
    assert [row[name] for name, _ in columns] == [f"digit {label}" for label in classes.tolist()]
    assert [float(row[value]) for _, value in columns] == pytest.approx(best.tolist(), abs=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing(mixup, cutmix):
    task = _task(mixup=mixup, cutmix=cutmix)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    torch.manual_seed(1)
    mixed, targets = task.mix(images, labels)
    assert targets.shape == (6, 10)
    assert torch.allclose(targets.sum(dim=1), torch.ones(6))
    weight = targets[torch.arange(6), labels]
    assert (targets.count_nonzero(dim=1) == 2).all()
    if not cutmix:  # v2 mixes a batch with itself rolled by one
        expected = weight[:, None, None, None] * images + (1 - weight)[:, None, None, None] * images.roll(1, 0)
        assert torch.allclose(mixed, expected, atol=1e-5)
    if not mixup:
        kept = (mixed == images).all(dim=1).float().mean(dim=(1, 2))
        assert torch.allclose(kept, weight, atol=1e-5)


def test_without_mixing_targets_are_labels():
    assert _task().mix is None


def test_training_with_everything_on(tmp_path, trainer):
    task = _task(mixup=0.2, cutmix=1.0, layer_decay=0.8, ema_decay=0.9, drop_path_rate=0.2, warmup_epochs=0.5)
    fit = trainer(max_epochs=2, gradient_clip_val=1.0, accumulate_grad_batches=2, precision="bf16-mixed")
    fit.fit(task, _digits())
    assert fit.global_step == 4  # three batches an epoch, two to a step
    assert 0 < fit.callback_metrics["val/loss"] < 10
    assert all(parameter.isfinite().all() for parameter in task.parameters())


def test_average_of_the_weights_is_validated_kept_and_reloaded(tmp_path, trainer):
    task, data = _task(ema_decay=0.5, lr=1e-2), _digits()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.model.get_classifier().weight.detach().clone())

        def on_validation_batch_start(self, trainer, module, *_):
            self.validated = module.model.get_classifier().weight.detach().clone()

    watch = Watch()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    trainer(enable_checkpointing=True, callbacks=[watch, keep]).fit(task, data)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    path, key = tmp_path / "last.ckpt", f"model.{HEAD}.weight"
    assert torch.allclose(watch.validated, average, atol=1e-6)
    assert torch.allclose(_weights(path)[key], average, atol=1e-6)
    assert torch.equal(_weights(path, "current_model_state")[key], seen[-1])
    assert not torch.allclose(average, seen[-1], atol=1e-4)
    reloaded = ClassificationTask.load_from_checkpoint(path)
    assert torch.allclose(reloaded.model.get_classifier().weight, average, atol=1e-6)


class _Stop(pl.Callback):
    """Dies at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("killed")


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resumed_run_has_the_weights_of_an_uninterrupted_one(ema_decay, tmp_path, trainer, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def fit(folder, *callbacks, ckpt_path=None):
        keep = ModelCheckpoint(dirpath=folder, filename="last", save_on_train_epoch_end=True,
                               enable_version_counter=False)
        run = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep, *callbacks])
        task = _task(ema_decay=ema_decay, mixup=0.2, cutmix=1.0, drop_path_rate=0.3, warmup_epochs=1)
        run.fit(task, _digits(), ckpt_path=ckpt_path)

    fit(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "resumed", _Stop(epoch=1))
    torch.randn(7)  # whatever the new process has drawn
    fit(tmp_path / "resumed", ckpt_path=tmp_path / "resumed" / "last.ckpt")
    for key in ("state_dict", *(["current_model_state"] if ema_decay else [])):
        straight, resumed = (_weights(tmp_path / name / "last.ckpt", key) for name in ("straight", "resumed"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_checkpoint_stands_alone(tmp_path, trainer):
    start = tmp_path / "start.pth"
    torch.save(timm.create_model("test_biformer", num_classes=1000).state_dict(), start)
    task = _task(checkpoint_path=str(start), model_args=dict(n_win=4), class_names=list("abcdefghij"))
    run = trainer()
    run.fit(task, _digits())
    run.save_checkpoint(tmp_path / "end.ckpt")
    start.unlink()
    reloaded = ClassificationTask.load_from_checkpoint(tmp_path / "end.ckpt").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(reloaded(images), task.eval()(images))
    assert reloaded.hparams.class_names == list("abcdefghij")
    assert reloaded.hparams.model_args == dict(n_win=4)


@pytest.mark.parametrize("num_classes", [10, 4])
def test_fine_tuning_from_a_run(num_classes, tmp_path, trainer):
    source = _task()
    run = trainer()
    run.fit(source, _digits())
    run.save_checkpoint(tmp_path / "source.ckpt")
    task = _task(num_classes=num_classes, checkpoint_path=str(tmp_path / "source.ckpt"))
    weights = task.model.state_dict()
    for name, weight in source.model.state_dict().items():
        if num_classes == 10 or not name.startswith(HEAD):
            assert torch.equal(weights[name], weight), name
    assert task.model.pretrained_cfg["state_dict"] is None


def test_fine_tuning_from_a_state_dict_drops_the_head(tmp_path):
    source = timm.create_model("test_dinat", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    task = _task(backbone="test_dinat", checkpoint_path=str(tmp_path / "source.pth"))
    weights, given = task.model.state_dict(), source.state_dict()
    assert weights[f"{HEAD}.weight"].shape[0] == 10
    assert all(torch.equal(weights[name], given[name]) for name in weights if not name.startswith(HEAD))


def test_checkpoint_of_another_model_is_refused(tmp_path, trainer):
    run = trainer()
    run.fit(_task(), _digits())
    run.save_checkpoint(tmp_path / "source.ckpt")
    with pytest.raises(ValueError, match="is of the model test_biformer, not test_dinat"):
        _task(backbone="test_dinat", checkpoint_path=str(tmp_path / "source.ckpt"))


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(backbone="test_bifomer"), "no model 'test_bifomer'; similar names: .*test_biformer"),
    (dict(num_classes=1), "at least 2"),
    (dict(class_names=["a"]), "1 class names were given for 10"),
    (dict(ema_decay=1.0), "ema_decay"),
    (dict(checkpoint_path="nowhere.ckpt"), "nowhere.ckpt does not exist"),
    (dict(checkpoint_path="x", pretrained=True), "choose one"),
    (dict(model_args=dict(depth=3)), "test_biformer does not take these model_args: .*depth"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _task(**kwargs)


def test_a_run_without_an_end_is_refused(trainer):
    with pytest.raises(ValueError, match=r"set trainer.max_epochs"):
        trainer(max_epochs=-1).fit(_task(), _digits())


@pytest.mark.parametrize("backbone", ["test_biformer", "test_vit"])
def test_weights_of_another_model_end_in_one_line(backbone, tmp_path):
    torch.save(timm.create_model("test_dinat", num_classes=3).state_dict(), tmp_path / "source.pth")
    with pytest.raises(ValueError, match=r"source\.pth") as caught:
        _task(backbone=backbone, num_classes=3, checkpoint_path=str(tmp_path / "source.pth"), model_args=None)
    assert "\n" not in str(caught.value)


def _rates(task, trainer, **kwargs):
    """The learning rate of every step of a run."""
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(callbacks=[Watch()], limit_val_batches=0, **kwargs).fit(task, _digits())
    return rates


def test_learning_rate_is_scaled_by_the_images_of_a_step(trainer, caplog):
    arguments = dict(lr=1e-3, lr_batch=64, warmup_lr=5e-4, warmup_epochs=1, min_lr=1e-4, cooldown_epochs=1)
    with caplog.at_level("INFO"):
        rates = _rates(_task(**arguments), trainer, max_epochs=3, limit_train_batches=2, accumulate_grad_batches=2)
    # 32 images a step, 64 are asked for; the first step is of the warm-up, the last of the cool-down.
    assert rates[::2] == pytest.approx([2.5e-4, 5e-4, 5e-5])
    (line,) = [record.getMessage() for record in caplog.records if "learning rate is" in record.getMessage()]
    assert "0.0005: 0.001 is for 64 images a step, and here they are 32" in line


def test_linear_schedule(trainer):
    rates = _rates(_task(lr=1e-3, schedule="linear", min_lr=0.0), trainer, max_epochs=1, limit_train_batches=4)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_adaptive_clipping_bounds_gradients_by_weights(trainer):
    shares = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, task, *_):
            for name, parameter in task.model.named_parameters():
                if parameter.ndim > 1:
                    gradient, weight = (x.detach().flatten(1).norm(dim=1) for x in (parameter.grad, parameter))
                    shares[name] = (gradient / weight.clamp(min=1e-3)).max().item()

    task = _task(clip_agc=1e-4, lr=0.0)
    trainer(limit_train_batches=1, limit_val_batches=0, callbacks=[Watch()]).fit(task, _digits())
    assert shares.pop(f"{HEAD}.weight") > 1e-3  # which is not clipped
    assert max(shares.values()) == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(ValueError, match="choose one"):
        trainer(gradient_clip_val=1.0).fit(_task(clip_agc=0.01), _digits())


def test_binary_cross_entropy_wants_every_class_of_a_mixed_image():
    task = _task(bce=True, label_smoothing=0.0)
    logits = torch.randn(2, 10)
    mixed = torch.zeros(2, 10)
    mixed[0, [1, 4]], mixed[1, 7] = torch.tensor([0.7, 0.3]), 1.0
    expected = -torch.where(mixed > 0, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
    assert task._training_loss(logits, mixed).item() == pytest.approx(expected.item(), rel=1e-5)
    assert task._training_loss(logits, torch.tensor([1, 7])).item() == pytest.approx(
        task._training_loss(logits, (torch.arange(10) == torch.tensor([[1], [7]])).float()).item())


def test_compiled_and_channels_last_runs_train_the_same_and_keep_their_names(trainer, tmp_path, monkeypatch):
    weights, compiles = [], []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiles.append(1) or compile_(
        *args, backend="eager", **kwargs))
    for arguments in ({}, {"compile": True, "channels_last": True}):
        pl.seed_everything(0)
        task = _task(backbone="test_resnet", **arguments)
        run = trainer(limit_train_batches=1, limit_val_batches=0, enable_checkpointing=False)
        run.fit(task, _digits())
        run.save_checkpoint(tmp_path / "run.ckpt")
        weights.append(_weights(tmp_path / "run.ckpt"))
        conv = task.model.conv1[0].weight
        assert conv.is_contiguous(memory_format=torch.channels_last) == bool(arguments)
    assert len(compiles) == 1
    assert list(weights[0]) == list(weights[1])
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("classes", "kept"), [(7, True), (3, False), (1000, False)])
def test_the_head_of_a_state_dict_is_kept_where_its_classes_are_as_many(classes, kept, tmp_path):
    """1000 classes too, of which a file of ImageNet-22k has more and timm expects as many."""
    source = timm.create_model("test_dinat", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    model = ClassificationTask("test_dinat", classes, checkpoint_path=str(tmp_path / "seven.pth")).model
    weights, given = model.state_dict(), source.state_dict()
    assert all(torch.equal(weights[key], given[key]) for key in given if not key.startswith("head."))
    assert len(weights[f"{HEAD}.weight"]) == classes
    assert torch.equal(weights[f"{HEAD}.weight"][:3], given[f"{HEAD}.weight"][:3]) == kept
