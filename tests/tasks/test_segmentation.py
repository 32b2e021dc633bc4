"""SegmentationTask: real steps with every family, and that what is measured and written is right."""
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from tests.models.test_families import SMALL
from tests.test_dense import DILATIONS
from visionattn.data import DigitScenesData
from visionattn.layers.auxiliary import AuxiliaryLosses
from visionattn.models import family_of
from visionattn.tasks import DetectionTask, SegmentationTask

CLASSES = 5  # of the random pictures; the last never occurs


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a few batches whose run folder is ``tmp_path``."""
    def make(**kwargs):
        defaults = dict(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0)
        return pl.Trainer(**defaults | kwargs)
    return make


def _task(**kwargs):
    torch.manual_seed(0)
    return SegmentationTask(**dict(
        backbone="test_dinat", num_classes=CLASSES, head_channels=8, warmup_steps=0, lr=1e-3) | kwargs)


def _pictures(count=4, size=(40, 56), label_size=None, seed=0):
    """Random images with blocks of labels that their colours tell, and some pixels to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for _ in range(count):
        blocks = torch.randint(CLASSES - 1, (1, 1, 3, 4), generator=generator).float()
        image = interpolate(blocks, size=size)[0] / CLASSES + 0.1 * torch.rand(3, *size, generator=generator)
        labels = interpolate(blocks, size=label_size or size)[0, 0].long()
        labels[:4, :9] = 255
        pictures.append((image, labels))
    return pictures


def _loader(pictures, batch_size=2):
    return DataLoader(pictures, batch_size=batch_size)


@pytest.mark.parametrize("name", [name for name in SMALL if len(family_of(name).strides(name)) > 1])
def test_every_hierarchical_family_trains(name, trainer):
    task = _task(backbone=name, model_args=SMALL[name] | DILATIONS.get(name, {}))
    before = {key: parameter.detach().clone() for key, parameter in task.named_parameters()}
    trainer(max_steps=1, limit_val_batches=0).fit(task, _loader(_pictures(2, size=(72, 88))))
    still = [key for key, parameter in task.named_parameters()
             if parameter.grad is None or not parameter.isfinite().all()]
    assert not still
    # Behind a norm whose scale starts at zero the first gradients are zero.
    fixed = {key for key, parameter in task.named_parameters() if torch.equal(parameter, before[key])}
    assert len(fixed) < 0.3 * len(before)
    assert not [key for key in fixed if "head" in key]


@pytest.mark.parametrize("kwargs", [
    dict(),
    dict(head="semantic_fpn", auxiliary_weight=0.0, losses={"dice": 1.0, "ohem": 1.0}, schedule="cosine"),
    dict(backbone="test_datr", model_args={"wrap": True}, head="segformer", auxiliary_weight=0.0),
    dict(backbone="resnet10t", out_indices=[2, 3, 4]),
], ids=["upernet", "semantic_fpn", "segformer", "three levels of timm's"])
def test_learns(kwargs, trainer):
    task, batch = _task(lr=1e-2, **kwargs), _loader(_pictures(2))
    images, labels = next(iter(batch))
    before = task.loss(task.eval()(images), labels).item()
    trainer(max_epochs=30, limit_val_batches=0).fit(task.train(), batch)
    assert task.loss(task.eval()(images), labels).item() < 0.7 * before


def test_metrics_are_those_of_a_count_of_pixels(tmp_path, trainer):
    """Labels of the file's size, pixels to be ignored, and a class that occurs nowhere."""
    pictures = _pictures(3, label_size=(61, 47))
    task = _task(class_names=list("abcde")).eval()
    with torch.no_grad():
        task.model.head.classifier.conv.bias[CLASSES - 1] = -100  # never predicted either
        task.model.head.classifier.conv.weight.mul_(100)
        logits = [interpolate(task(image[None]), size=(61, 47), mode="bilinear") for image, _ in pictures]
    trainer().test(task, _loader(pictures, batch_size=2), verbose=False)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())

    predicted = np.stack([x[0].argmax(0).numpy() for x in logits])
    truth = np.stack([labels.numpy() for _, labels in pictures])
    counted = truth != 255
    iou = {}
    for index, name in enumerate("abcd"):
        ours, theirs = (predicted == index) & counted, truth == index
        iou[name] = (ours & theirs).sum() / (ours | theirs).sum()
    assert 0 < sum(iou.values()) < 4
    assert metrics["iou"].pop("e") is None
    assert metrics["iou"] == pytest.approx(iou, abs=1e-6)
    assert metrics["miou"] == pytest.approx(sum(iou.values()) / 4, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx((predicted == truth)[counted].mean(), abs=1e-6)
    losses = [task.loss(x, labels[None]).item() for x, (_, labels) in zip(logits, pictures, strict=True)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    rest = ("num_images", "num_classes", "backbone", "head")
    assert [metrics[key] for key in rest] == [3, CLASSES, "test_dinat", "upernet"]


def test_validation_does_not_depend_on_the_batch_size(trainer):
    task, pictures = _task(losses={"dice": 1.0, "cross_entropy": 1.0}), _pictures(3)
    found = [trainer().validate(task, _loader(pictures, size), verbose=False)[0] for size in (1, 3)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0].keys() == {"val/miou", "val/accuracy", "val/loss"}


@torch.no_grad()
def test_windows_are_for_evaluation_and_scales_for_testing():
    task = _task(window=32, window_stride=20, test_scales=[0.5, 1.0], test_flip=True).eval()
    images, seen = torch.rand(1, 3, 40, 56), []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    assert task.infer(images, (80, 60)).shape == (1, CLASSES, 80, 60)
    assert seen == [(32, 32)] * 6  # two rows of three windows
    seen.clear()
    tested = task.infer(images, (80, 60), testing=True)
    assert seen == [(20, 28)] * 2 + [(32, 32)] * 12
    torch.testing.assert_close(tested.exp().sum(dim=1), torch.ones(1, 80, 60))


def test_default_stride_is_two_thirds_of_the_window():
    task, seen = _task(window=24).eval(), []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        task.infer(torch.rand(1, 3, 24, 57), (24, 57))
    assert len(seen) == 4  # from 0, 16, 32 and, the last, 33


def test_predictions(tmp_path, trainer):
    pictures = [(image, name, torch.tensor([height, width])) for (image, _), name, (height, width) in zip(
        _pictures(3), ("first", "folder/second", "third"), [(33, 44), (40, 56), (90, 20)], strict=True)]
    task = _task().eval()
    with torch.no_grad():
        task.model.head.classifier.conv.weight.mul_(100)
    trainer().predict(task, _loader(pictures, batch_size=3), return_predictions=False)
    colours = set()
    for image, name, size in pictures:
        height, width = size.tolist()
        with torch.no_grad():
            expected = interpolate(task(image[None]), size=(height, width), mode="bilinear")[0].argmax(0)
        with Image.open(tmp_path / "predictions" / f"{name}.png") as label_map:
            assert label_map.mode == "P"
            assert np.array_equal(np.asarray(label_map), expected.numpy())
            coloured = np.asarray(label_map.convert("RGB"))
        colours |= {tuple(colour) for colour in coloured.reshape(-1, 3).tolist()}
        photo = interpolate(image[None], size=(height, width), mode="bilinear")[0].movedim(0, -1).numpy()
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            zoom = -(-256 // max(height, width))  # each pixel is a square, and below is the legend
            over = (127.5 * photo + coloured / 2.0).repeat(zoom, 0).repeat(zoom, 1)
            assert np.abs(np.asarray(picture)[:zoom * height, :zoom * width] - over).max() <= 1
            assert picture.height > zoom * height + 12
    assert len(colours) > 1
    assert colours <= {(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)}  # VOC's


def test_training_with_everything_on(trainer):
    task = _task(
        head="semantic_fpn", losses={"cross_entropy": 1.0, "dice": 0.5}, ema_decay=0.9, layer_decay=0.8,
        drop_path_rate=0.2, warmup_steps=1, frozen_stages=1, frozen_norms=True,
        grad_checkpointing="attention")
    frozen = task.model.backbone.frozen[0]
    before = [parameter.clone() for parameter in frozen.parameters()]
    fit = trainer(max_epochs=2, precision="bf16-mixed", gradient_clip_val=1.0, accumulate_grad_batches=2)
    fit.fit(task, _loader(_pictures(8)), _loader(_pictures(2)))
    assert fit.global_step == 4
    assert not [name for name, value in fit.callback_metrics.items() if not value.isfinite()]
    assert {"train/loss", "train/auxiliary", "val/miou"} <= fit.callback_metrics.keys()
    # An average of equal numbers is rounded.
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, frozen.parameters(), strict=True))


def test_loss_is_the_sum_of_its_parts(monkeypatch):
    class Layer(AuxiliaryLosses, nn.Module):
        pass

    task, logged = _task(auxiliary_weight=0.3), {}
    monkeypatch.setattr(task, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    task.model.backbone.layer = Layer()
    task.model.backbone.layer.keep_auxiliary_loss("commitment", torch.tensor(2.0))
    images, labels = next(iter(_loader(_pictures(2))))
    for layer in task.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    loss = task.training_step((images, labels))
    features = task.model.features(images)
    main, auxiliary = (interpolate(logits, size=(40, 56), mode="bilinear") for logits in (
        task.model.head(features), task.model.auxiliary_head(features[-2])))
    parts = {"segmentation": task.loss(main, labels), "auxiliary": 0.3 * task.loss(auxiliary, labels),
             "commitment": torch.tensor(2.0)}
    assert {key: value.item() for key, value in logged.items()} == pytest.approx(
        {f"train/{key}": value.item() for key, value in parts.items()}, rel=1e-5)
    assert loss.item() == pytest.approx(sum(value.item() for value in parts.values()), rel=1e-5)


@pytest.mark.parametrize(("schedule", "expected"), [
    (dict(schedule="poly", poly_power=2.0), [0.5, 1.0, 1.0, 0.75 ** 2, 0.25, 0.25 ** 2]),
    (dict(schedule="cosine", min_lr=1e-4), [0.5, 1.0, 1.0, 0.1 + 0.9 * (2 + 2 ** 0.5) / 4, 0.55]),
], ids=["poly", "cosine"])
def test_schedule(schedule, expected, trainer):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    task = _task(warmup_steps=2, **schedule)
    trainer(max_steps=6, max_epochs=-1, callbacks=[Watch()]).fit(task, _loader(_pictures(2)))
    assert [min(rate) for rate in rates][:len(expected)] == pytest.approx([1e-3 * factor for factor in expected])
    assert all(len(rate) == 1 for rate in rates)


def test_decay_and_rates_by_layer(trainer):
    run = trainer(max_steps=1, limit_val_batches=0)
    task = _task(layer_decay=0.5, weight_decay=0.05)
    run.fit(task, _loader(_pictures(2)))
    groups = {id(p): group for group in run.optimizers[0].param_groups for p in group["params"]}
    settings = {name: (groups[id(parameter)]["initial_lr"], groups[id(parameter)]["weight_decay"])
                for name, parameter in task.named_parameters()}
    for name, (rate, decay) in settings.items():
        exempt = task.get_parameter(name).ndim <= 1 or name.endswith(".rpb")
        assert decay == (0 if exempt else 0.05), name
        if not name.startswith("model.backbone.model."):
            assert rate == 1e-3, name
    assert settings["model.backbone.norms.0.weight"] == (1e-3, 0)
    rates = [rate for name, (rate, _) in settings.items() if name.startswith("model.backbone.model.")]
    assert min(rates) < 1e-3 / 4


def test_checkpoint_stands_alone_and_starts_another_run(tmp_path, trainer):
    run, task = trainer(limit_val_batches=0), _task()
    run.fit(task, _loader(_pictures(2)))
    run.save_checkpoint(tmp_path / "end.ckpt")
    reloaded = SegmentationTask.load_from_checkpoint(tmp_path / "end.ckpt").eval()
    images = torch.rand(1, 3, 40, 56)
    assert torch.equal(reloaded(images), task.eval()(images))
    finer = _task(num_classes=7, checkpoint_path=str(tmp_path / "end.ckpt"))
    given = task.model.backbone.state_dict()
    assert all(torch.equal(x, given[key]) for key, x in finer.model.backbone.state_dict().items())


def test_average_of_the_weights_is_what_is_kept(tmp_path, trainer):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    task = _task(ema_decay=0.5, lr=1e-2)
    trainer(enable_checkpointing=True, callbacks=[keep], max_epochs=3).fit(
        task, _loader(_pictures(2)), _loader(_pictures(2)))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    key = "model.head.classifier.conv.weight"
    assert not torch.equal(saved["state_dict"][key], saved["current_model_state"][key])


def test_two_processes_measure_what_one_does(tmp_path, trainer):
    """Five scenes do not divide by two: none is counted twice."""
    data = dict(task="segmentation", image_size=48, digits=(1, 3), digit_size=(12, 24), batch_size=2, train_scenes=8,
                val_scenes=5, test_scenes=5)
    found = []
    for name, devices in (("one", {}), ("two", dict(devices=2, strategy="ddp_fork"))):
        task = _task(num_classes=11, losses={"cross_entropy": 1.0, "dice": 1.0})
        run = trainer(default_root_dir=tmp_path / name, **devices)
        run.test(task, DigitScenesData(**data), verbose=False)
        found.append(json.loads((tmp_path / name / "test_metrics.json").read_text()))
    assert found[0]["num_images"] == found[1]["num_images"] == 5
    assert found[1].pop("iou") == pytest.approx(found[0].pop("iou"), abs=2e-6)
    numbers = ("miou", "accuracy", "loss")
    assert [found[1][key] for key in numbers] == pytest.approx([found[0][key] for key in numbers], abs=2e-6)
    two = trainer(default_root_dir=tmp_path / "two", devices=2, strategy="ddp_fork")
    two.fit(_task(num_classes=11), DigitScenesData(**data))
    assert {"val/miou", "val/loss", "train/loss"} <= two.callback_metrics.keys()


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(num_classes=1), "at least 2"),
    (dict(num_classes=256), "255 labels at most"),
    (dict(class_names=["a"]), "1 class names were given for 5"),
    (dict(ema_decay=1.0), "ema_decay"),
    (dict(head="deeplab"), "upernet, semantic_fpn, segformer or taskexpert"),
    (dict(schedule="step"), "poly or cosine"),
    (dict(losses={"focal": 1.0}), "cross_entropy, dice, ohem"),
    (dict(class_weights=[1.0]), "1 class_weights were given for 5"),
    (dict(window_stride=3), "without window"),
    (dict(window=3, window_stride=4), "between 1 and window"),
    (dict(test_scales=[0.0]), "positive"),
    (dict(out_indices=[3]), "a single map here .* set auxiliary_weight to 0"),
    (dict(backbone="test_dinatt"), "no model 'test_dinatt'"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _task(**kwargs)


def test_a_run_without_an_end_is_refused(trainer):
    with pytest.raises(ValueError, match=r"set trainer.max_epochs"):
        trainer(max_epochs=-1).fit(_task(), _loader(_pictures(2)))


@pytest.mark.parametrize(("labels", "prediction", "expected"), [
    ([0, 0, 255], [0, 0, 0], None), ([255, 255, 255], [0, 1, 1], None), ([0, 0, 1], [0, 0, 1], 1.0),
    ([0, 0, 0], [0, 1, 1], (1 / 3 + 0) / 2),
])
def test_mean_iou_of_nothing_is_not_a_number(monkeypatch, labels, prediction, expected):
    task = SegmentationTask(backbone="test_dinat", num_classes=2, head_channels=8)
    logged = {}
    monkeypatch.setattr(task, "log_dict", lambda metrics, **_: logged.update(metrics))
    task.test_matrix.update(torch.tensor([prediction]), torch.tensor([labels]))
    task.test_loss.update(1.0)
    task._log("test", task.test_matrix, task.test_loss)
    assert logged["test/miou"] == pytest.approx(float("nan") if expected is None else expected, nan_ok=True)


def test_data_of_another_task_is_named(trainer):
    scenes = dict(train_scenes=2, val_scenes=2, test_scenes=2, batch_size=2)
    with pytest.raises(ValueError, match=r"the data gives objects: set data.init_args.task to segmentation"):
        trainer(max_epochs=1).fit(_task(num_classes=11), DigitScenesData(**scenes))
    detector = DetectionTask("test_dinat", num_classes=10, detector="fcos", min_size=64)
    with pytest.raises(ValueError, match=r"the data gives label maps: set data.init_args.task to detection"):
        trainer(max_epochs=1).fit(detector, DigitScenesData(task="segmentation", **scenes))
