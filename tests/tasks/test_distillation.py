"""Distillation: losses against their formulas, teachers that are left as they are, checkpoints without them."""
import lightning.pytorch as pl
import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.functional import cross_entropy, interpolate

from tests.data.images import write_classes, write_image
from visionattn.cli import main
from visionattn.data import DigitsData, UnlabelledFolderData
from visionattn.dense import DenseBackbone
from visionattn.tasks import ClassificationTask, DistillationTask, FeaturePretrainingTask
from visionattn.tasks.rebuild import load_task


@pytest.fixture
def trainer(tmp_path):
    def make(**kwargs):
        return pl.Trainer(**dict(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, limit_train_batches=2, limit_val_batches=1,
            num_sanity_val_steps=0) | kwargs)
    return make


@pytest.fixture
def teacher(tmp_path):
    """The file of a model of ten classes, and the model: normalised and sized otherwise than the students' data."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=10).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    return tmp_path / "teacher.pth", model


def _task(file, **kwargs):
    torch.manual_seed(0)
    return DistillationTask(**dict(
        teacher="test_vit", teacher_checkpoint=str(file), backbone="test_efficientnet", num_classes=10, warmup_epochs=0,
        drop_path_rate=0.0, label_smoothing=0.0) | kwargs)


def _data():
    return DigitsData(image_size=32, batch_size=16)


def _of_first_batch(task, trainer):
    """Images, labels, the student's logits and the losses of a first step that trains nothing."""
    seen = {}
    step = task.training_step

    def watched(batch):
        torch.manual_seed(0)
        seen["batch"] = batch
        loss = step(batch)
        seen["loss"] = loss.item()
        torch.manual_seed(0)
        with torch.no_grad():
            maps = task.model.forward_features(batch[0])
            seen["logits"] = task.model.forward_head(maps)
            seen["pooled"] = task.model.forward_head(maps, pre_logits=True)
        return loss

    task.training_step = watched
    trainer(limit_train_batches=1, limit_val_batches=0).fit(task, _data())
    return seen


def _taught(model, images, means, stds):
    """What a teacher says of normalised images, shown as it was trained."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (means, stds))
    pixels = interpolate(images * std + mean, (160, 160), mode="bilinear", antialias=True)
    return model((pixels - 0.5) / 0.5)


@pytest.mark.parametrize("kind", ["hard", "soft", "features"])
def test_losses(kind, teacher, trainer):
    file, model = teacher
    task = _task(file, kind=kind, temperature=2.0, weight=0.3, lr=0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = _of_first_batch(task, trainer)
    images, labels = seen["batch"]
    if kind == "features":
        model.reset_classifier(0)
    with torch.no_grad():
        said = _taught(model, images, *_data().normalisation)
        if kind == "hard":
            distance = cross_entropy(seen["logits"], said.argmax(1))
        elif kind == "soft":
            p, q = (said / 2).softmax(1), (seen["logits"] / 2).softmax(1)
            distance = 4 * (p * (p / q).log()).sum(1).mean()
        else:
            features = task.projection(seen["pooled"])
            distance = 1 - ((features / features.norm(dim=1, keepdim=True)) * (
                said / said.norm(dim=1, keepdim=True))).sum(1).mean()
    expected = 0.7 * cross_entropy(seen["logits"], labels) + 0.3 * distance
    assert seen["loss"] == pytest.approx(expected.item(), rel=2e-3)
    kept = task._teacher.model
    assert not kept.training
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())
    assert not any(parameter.requires_grad for parameter in kept.parameters())


def test_a_teacher_is_learned_from(teacher, trainer):
    """Labels do not count with a weight of 1: after some steps the student says what the teacher does."""
    file, model = teacher
    task, images = _task(file, backbone="test_dinat", weight=1.0, lr=5e-3), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        said = _taught(model, images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).softmax(1)
        before = (task.eval()(images).softmax(1) - said).abs().sum(1).mean()
    batches = torch.utils.data.DataLoader([(images, torch.zeros(8, dtype=torch.int64))] * 15, batch_size=None)
    trainer(limit_train_batches=15, limit_val_batches=0).fit(task.train(), batches)
    with torch.no_grad():
        assert (task.eval()(images).softmax(1) - said).abs().sum(1).mean() < 0.5 * before


@pytest.mark.parametrize("kind", ["soft", "features"])
def test_a_checkpoint_is_a_classifiers(kind, teacher, trainer, tmp_path):
    file, _ = teacher
    task = _task(file, kind=kind, ema_decay=0.9)
    run = trainer()
    run.fit(task, _data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    extra = {key for key in content["state_dict"] if not key.startswith(("model.", "val_", "test_"))}
    assert extra == ({"projection.weight", "projection.bias"} if kind == "features" else set())
    file.unlink()
    rebuilt, _ = load_task(tmp_path / "run.ckpt")
    assert type(rebuilt) is ClassificationTask
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(rebuilt(images), task.eval()(images))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"teacher_checkpoint": None}, "set either teacher_pretrained or teacher_checkpoint"),
    ({"teacher": "test_vitt"}, "no model 'test_vitt'; similar names: .*test_vit"),
    ({"weight": 0.0}, "weight must lie between 0 and 1"),
    ({"kind": "logits"}, "kind must be hard, soft or features"),
    ({"kind": "features", "compile": True}, "compile goes with the kinds hard and soft"),
    ({"multi_label": True}, "by kind features alone"),
    ({"attention_diversification": 1.0}, "attention_diversification cannot be used in distillation"),
    ({"mixing": "smmix"}, "mixing smmix cannot be used in distillation"),
])
def test_what_is_wrong_is_said_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        _task("teacher.pth", **arguments)


def test_a_teacher_of_other_classes_or_channels(teacher, trainer, tmp_path):
    file, _ = teacher
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    other = ClassificationTask("test_efficientnet", 10)
    run.fit(other, _data())
    run.save_checkpoint(tmp_path / "other.ckpt")
    three = _task(tmp_path / "other.ckpt", teacher="test_efficientnet", num_classes=3)
    with pytest.raises(ValueError, match="has 10 classes and the data 3: take a teacher"):
        trainer().fit(three, _data())
    with pytest.raises(ValueError, match="takes images of 3 channels, and the data has 1"):
        trainer().fit(_task(file, in_chans=1), _data())


def test_pretraining_on_images_without_labels_is_a_start_for_every_task(teacher, tmp_path, monkeypatch):
    file, _ = teacher
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos" / "some", count=2)
    write_image(tmp_path / "photos" / "alone.jpg")
    options = {
        "model": "FeaturePretrainingTask", "model.backbone": "test_dinat", "model.teacher": "test_vit",
        "model.teacher_checkpoint": file, "model.ema_decay": 0.9, "data": "UnlabelledFolderData", "data.root": "photos",
        "data.image_size": 32, "data.batch_size": 2, "data.num_workers": 0, "trainer.max_epochs": 1,
        "trainer.default_root_dir": "run", "trainer.accelerator": "cpu"}
    assert main(["fit", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]) == 0
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    weights = torch.load(best, weights_only=True)["state_dict"]
    classifier = ClassificationTask("test_dinat", 3, checkpoint_path=str(best)).model
    maps = DenseBackbone("test_dinat", task="segmentation", checkpoint_path=str(best)).model
    for model in (classifier, maps):
        state = model.state_dict()
        kept = [key for key in weights if key.startswith("model.stages")]
        assert kept
        assert all(torch.equal(state[key.removeprefix("model.")], weights[key]) for key in kept)
    with pytest.raises(ValueError, match="is a pretrained backbone, which has no classes"):
        load_task(best)
    assert FeaturePretrainingTask.monitor_mode == "min"


@pytest.mark.slow
def test_from_the_command_line_and_tested_without_the_teacher(teacher, tmp_path, monkeypatch):
    file, _ = teacher
    monkeypatch.chdir(tmp_path)
    options = {
        "model": "DistillationTask", "model.backbone": "test_vit2", "model.model_args": "{img_size: 32}",
        "model.teacher": "test_vit", "model.teacher_checkpoint": file, "model.kind": "features", "data": "DigitsData",
        "data.image_size": 32, "trainer.max_epochs": 1, "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 2, "trainer.limit_test_batches": 2, "trainer.default_root_dir": "run",
        "trainer.accelerator": "cpu"}
    assert main(["fit", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]) == 0
    file.unlink()
    (tmp_path / "run" / "test_metrics.json").unlink()
    assert main(["test", "--config", "run/config.yaml"]) == 0
    assert (tmp_path / "run" / "test_metrics.json").is_file()


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="photos does not exist"):
        UnlabelledFolderData(str(tmp_path / "photos"))
    write_image(tmp_path / "photos" / "deep" / "down" / "alone.jpg")
    data = UnlabelledFolderData(str(tmp_path / "photos"))
    with pytest.raises(ValueError, match="holds 1 images that can be used"):
        data.setup("fit")
    write_image(tmp_path / "photos" / "other.png", seed=1)
    data.setup("fit")
    assert [len(data.samples[split]) for split in ("train", "val")] == [1, 1]
