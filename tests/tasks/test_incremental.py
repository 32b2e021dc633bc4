"""Class-incremental training: formulas against golden numbers, adapters by step, whole runs that resume to the same."""
import copy
import csv
import json

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import linear

from tests import golden
from tests.data.images import write_classes
from visionattn.adapters.mos import StepAdapters, pulled
from visionattn.cli import main
from visionattn.data import DigitsData
from visionattn.heads.incremental import IncrementalClassifier, ensemble, prototype_logits, retrieve
from visionattn.tasks import IncrementalTask
from visionattn.tasks.alignment import ClassGaussians, align, mean_contrast_loss
from visionattn.tasks.incremental import split_classes
from visionattn.tasks.rebuild import create_model, load_task

SMALL = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16}
GOLDEN = golden.load("mos_ops")


class FewDigits(DigitsData):
    """Some images of every digit."""

    def __init__(self, batch_size: int = 8):
        super().__init__(image_size=16, batch_size=batch_size)

    def setup(self, stage):
        super().setup(stage)
        for split, count in (("train", 6), ("val", 2), ("test", 3)):
            labels, kept = self.labels.tolist(), []
            for place in getattr(self, split):
                if sum(labels[other] == labels[place] for other in kept) < count:
                    kept.append(place)
            setattr(self, split, kept)


def _task(**kwargs):
    torch.manual_seed(0)
    return IncrementalTask(**dict(
        backbone="test_vit", model_args=SMALL, num_classes=10, class_names=[str(digit) for digit in range(10)],
        steps=[["3", "0"], ["1", "2"], [4, 5, 6, 7, 8, 9]], bottleneck=4, alignment_epochs=2) | kwargs)


@pytest.fixture
def trainer(tmp_path):
    def make(**kwargs):
        return pl.Trainer(**dict(
            max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0) | kwargs)
    return make


@pytest.mark.parametrize("case", GOLDEN["merge"], ids=lambda case: str(case["seed"]))
def test_merge_and_contrast(case):
    seed, dim = case["seed"], case["dim"]
    earlier = torch.stack([golden.random(seed + step, dim) for step in range(case["earlier"])])
    current = golden.random(seed + 50, dim)
    for step, expected in enumerate(case["adapter_after_each"]):
        current = pulled(current - 0.1 * golden.random(seed + 60 + step, dim), earlier, case["momentum"])
        golden.assert_equals(current, expected)
    loss = mean_contrast_loss(golden.random(seed + 70, (4, dim)), golden.random(seed + 71, (3, dim)))
    golden.assert_equals(loss, case["contrast"])


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("case", GOLDEN["retrieval"], ids=lambda case: str(case["seed"]))
def test_retrieval(case, unrolled):
    seed, steps, classes, dim = (case[key] for key in ("seed", "steps", "classes", "dim"))
    features, head, prototypes = (
        golden.random(seed + place, (rows, dim)) for place, rows in enumerate((steps, classes, classes)))
    step_of = torch.tensor(split_classes(steps, [str(label) for label in range(classes)]))
    path = []

    def logits_under(rows, step):
        path.extend(step.tolist())
        return linear(features[step], head)

    guess = prototype_logits(features[:1], prototypes, case["sigma"])
    logits = retrieve(step_of[guess.argmax(dim=1)], logits_under, step_of, unrolled)
    assert path[:len(case["path"])] == case["path"]
    if not unrolled:
        assert len(path) == len(case["path"])
    shares = ensemble(logits, guess, steps)[0]
    golden.assert_equals(shares, case["outputs"])
    assert shares.argmax().item() == case["predicted"]


def _filled(model, adapters):
    """Gives every step weights of its own, and leaves others in training."""
    generator = torch.Generator().manual_seed(0)
    for step in (*range(adapters.options["steps"]), 0):
        for parameter in adapters.trained():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        if step or adapters.layers[0].down_weight[0].abs().sum() == 0:
            adapters.store(step)
    return model.eval()


@pytest.mark.parametrize(("name", "args", "size"), [
    ("test_vit", SMALL, 16), ("test_biformer", {}, 32), ("swin_tiny_patch4_window7_224", {
        "img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}, 32)])
def test_each_image_has_the_adapter_of_its_step(name, args, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args)
    images = torch.randn(4, 3, size, size)
    bare = model.eval()(images)
    adapters = StepAdapters(3, dim=4)
    adapters.attach(model, "steps")
    torch.testing.assert_close(model.eval()(images), bare, rtol=0, atol=0)  # at first nothing is added
    _filled(model, adapters)
    before = copy.deepcopy(adapters.state_dict())
    with torch.no_grad():
        alone = []
        for step in range(3):
            with adapters.using(step):
                alone.append(model(images))
        with adapters.using(torch.tensor([2, 0, 1, 2])):
            mixed = model(images)
        trained = model(images)
    for place, step in enumerate([2, 0, 1, 2]):
        torch.testing.assert_close(mixed[place], alone[step][place], rtol=1e-4, atol=1e-5)
    assert all((one - trained).abs().max() > 1e-3 for one in (*alone, bare))
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    # A forward merges nothing.
    assert all(torch.equal(value, before[key]) for key, value in adapters.state_dict().items())


def test_what_is_added_is_a_bottleneck_of_the_tokens_before_the_norm():
    model = timm.create_model("test_vit", num_classes=0, **SMALL).eval()
    adapters = StepAdapters(2, dim=4)
    adapters.attach(model, "steps")
    _filled(model, adapters)
    block, layer, x = model.blocks[0], adapters.layers[0], torch.randn(2, 5, 16)
    tokens = x + block.attn(block.norm1(x))
    hidden = (tokens @ layer.down.weight.T + layer.down.bias).clamp_min(0)
    expected = tokens + block.mlp(block.norm2(tokens)) + hidden @ layer.up.weight.T + layer.up.bias
    torch.testing.assert_close(block(x), expected)


def _classifier():
    torch.manual_seed(0)
    model = IncrementalClassifier(timm.create_model("test_vit", num_classes=0, **SMALL), [0, 0, 1, 1, 2, 2], 4, 4.0)
    _filled(model, model.step_adapters)
    with torch.no_grad():
        model.prototypes.copy_(model.features(torch.randn(6, 3, 16, 16), 0))
    nn.init.normal_(model.head.weight)
    model.done.fill_(3)
    return model


def test_an_image_is_classified_as_by_hand():
    model, images = _classifier(), torch.randn(30, 3, 16, 16)
    with torch.no_grad():
        found = model(images)
        visited = set()
        for image, one in zip(images, found, strict=True):
            guess = prototype_logits(model.features(image[None], 0), model.prototypes, 4.0)
            step, logits = int(model.step_of[guess.argmax()]), guess
            for _ in range(4):
                visited.add(step)
                logits = model.head(model.features(image[None], step))
                after = int(model.step_of[logits.argmax()])
                if after == step:
                    break
                step = after
            torch.testing.assert_close(one.exp(), (logits.softmax(1) + (3 * guess).softmax(1))[0] / 2)
        assert visited == {0, 1, 2}
        model.done.fill_(2)
        torch.testing.assert_close(model(images).exp()[:, 4:], torch.zeros(30, 2))
        torch.testing.assert_close(model(images).exp().sum(dim=1), torch.ones(30))


def test_gaussians():
    torch.manual_seed(0)
    classes = torch.tensor([2])
    features = torch.randn(500, 4) @ torch.randn(4, 4) + 3
    for kind in ("full", "variance"):
        gaussians = ClassGaussians(3, 4, kind)
        gaussians.fit(2, features)
        expected = features.T.cov()
        expected = expected + 1e-4 * torch.eye(4) if kind == "full" else expected.diagonal() + 1e-4
        torch.testing.assert_close(gaussians.covariance[2], expected, rtol=1e-5, atol=1e-5)
        drawn = gaussians.draw(classes, gaussians.roots(classes), 20000, torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(drawn.mean(dim=0), features.mean(dim=0), rtol=0, atol=0.1)
        spread = drawn.T.cov() if kind == "full" else drawn.T.cov().diagonal()
        torch.testing.assert_close(spread, expected, rtol=0.05, atol=0.1)
        gaussians.fit(1, features[:1])  # of one image
        assert gaussians.covariance[1].sum() == pytest.approx(4e-4)


def test_alignment_gives_a_forgotten_class_back():
    torch.manual_seed(0)
    means = 3 * torch.eye(3)
    gaussians = ClassGaussians(4, 3)
    for label in range(3):
        gaussians.fit(label, means[label] + 0.3 * torch.randn(50, 3))
    head = nn.Linear(3, 4, bias=False)
    nn.init.zeros_(head.weight)
    head.weight.data[3] = 9.0  # of a class that was never drawn, and stays out of it
    align(head, gaussians, torch.arange(3), 20, 10, 0.05, torch.Generator().manual_seed(0))
    assert head(means)[:, :3].argmax(dim=1).tolist() == [0, 1, 2]
    assert not head.weight.grad


@pytest.mark.parametrize(("steps", "message"), [
    (11, "steps must be 1 to 10, the number of classes, got 11"),
    (0, "steps must be 1 to 10"),
    ([["0", "x"], ["1"]], "step 1 has the class 'x', which the data does not have; it has 0, 1, 2"),
    ([["0", "1"], ["1"]], "the class '1' is in step 1 and in step 2"),
    ([["0", "1"], ["2"]], r"the class '3' is in none of the 2 steps \(and 6 more\)"),
    ([["0"], []], "step 2 has no classes"),
])
def test_steps_that_cannot_be(steps, message):
    with pytest.raises(ValueError, match=message):
        _task(steps=steps)


def test_other_faults_are_said_before_a_step(trainer):
    with pytest.raises(ValueError, match="ResNet has no blocks that an adapter could go into"):
        _task(backbone="test_resnet", model_args=None)
    data = FewDigits()
    data.setup = lambda stage: (DigitsData.setup(data, stage), setattr(
        data, "train", [place for place in data.train if data.labels[place] != 7]))
    with pytest.raises(ValueError, match="the class '7' of step 3 has no training images"):
        trainer().fit(_task(), data)
    with pytest.raises(ValueError, match=r"by trainer\.max_epochs how many epochs a step"):
        trainer(max_epochs=-1).fit(_task(), FewDigits())


def test_a_step_trains_its_adapter_on_its_classes_alone(trainer):
    """The backbone stays, batches are of the step's classes, and an adapter is moved once an optimiser step."""
    task, seen, moved = _task(), [], []
    weights = {key: value.clone() for key, value in task.model.backbone.state_dict().items() if "adapters" not in key}
    step, pull = task.training_step, task.model.step_adapters.pull
    task.training_step = lambda batch: seen.append((task._number, set(batch[1].tolist()))) or step(batch)
    task.model.step_adapters.pull = lambda *args: moved.append(args) or pull(*args)
    trainer(accumulate_grad_batches=2, limit_train_batches=4).fit(task, FewDigits(batch_size=3))
    groups = [{0, 3}, {1, 2}, {4, 5, 6, 7, 8, 9}]
    assert all(labels <= groups[number] for number, labels in seen)
    assert [number for number, _ in seen] == [0] * 8 + [1] * 8 + [2] * 8
    assert moved == [(1, 0.1)] * 4 + [(2, 0.1)] * 4
    after = task.model.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in weights.items())
    stored = task.model.step_adapters.layers[0].up_weight
    assert (stored[0] - stored[1]).abs().max() > 0
    assert int(task.model.done) == 3
    assert task.gaussians.mean.abs().sum(dim=1).min() > 0
    assert task.model.prototypes.abs().sum(dim=1).min() > 0


@pytest.mark.slow
def test_a_run_has_table_curve_baselines_and_can_be_tested_and_predicted_with(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_classes(tmp_path / "pets" / split, ("ant", "cat", "dog", "emu"), 3)
    options = {
        "data": "ImageFolderData", "data.root": "pets", "data.num_workers": "0", "data.batch_size": "4",
        "model.backbone": "test_vit", "model.model_args": "{img_size: 32, patch_size: 16, depth: 1, embed_dim: 16}",
        "model.steps": "2", "model.baselines": "true", "trainer.max_epochs": "1", "trainer.accelerator": "cpu"}
    argv = [part for key, value in options.items() for part in (f"--{key}", value)]
    assert main(["fit", "--config", "incremental", *argv]) == 0
    run = tmp_path / "runs" / "incremental"
    with (run / "incremental.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["classes"]) for row in rows] == [("1", "2"), ("2", "4"), ("average", "")]
    assert (run / "incremental.png").stat().st_size > 1000
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["accuracy"] == float(rows[1]["incremental"])
    for method in ("incremental", "finetune", "joint"):
        values = [float(row[method]) for row in rows]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2, abs=1e-5)
        assert metrics[f"average_{method}"] == pytest.approx(values[2], abs=1e-5)
    assert metrics["accuracy_joint"] == float(rows[1]["joint"])
    assert main(["test", str(run)]) == 0
    assert json.loads((run / "test_metrics.json").read_text()) == metrics
    assert main(["predict", str(run), "pets/val"]) == 0
    assert len((run / "predictions.csv").read_text().splitlines()) == 13
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 9, 12])  # of 14 epochs: two a round
def test_a_run_that_was_stopped_ends_as_one_that_was_not(after, trainer, tmp_path):
    def run(name, **kwargs):
        torch.manual_seed(0)
        task = _task(baselines=True)
        folder = tmp_path / name
        saver = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
        options = {"callbacks": [saver, *kwargs.pop("callbacks", [])], "max_epochs": kwargs.pop("max_epochs", 2)}
        trainer(default_root_dir=folder, enable_checkpointing=True, **options).fit(task, FewDigits(), **kwargs)
        return task, folder

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == after:
                raise RuntimeError("stopped")

    whole, _ = run("whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run("parts", callbacks=[Stops()])
    parts, _ = run("parts", ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    assert parts.accuracies == whole.accuracies
    assert [(key, len(values)) for key, values in whole.accuracies.items()] == [
        ("incremental", 3), ("finetune", 3), ("joint", 3)]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in parts.state_dict().items())
    with pytest.raises(ValueError, match=r"this run has 2 epochs a step, and trainer\.max_epochs is 3"):
        run("others", ckpt_path=str(tmp_path / "parts" / "last.ckpt"), max_epochs=3)


def test_a_checkpoint_is_rebuilt_whole(trainer, tmp_path):
    task, run = _task(covariance="variance"), trainer(max_epochs=1, limit_train_batches=1)
    run.fit(task, FewDigits())
    run.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert content["state_dict"]["gaussians.covariance"].shape == (10, 16)
    assert "mixup" not in content["hyper_parameters"]
    images = torch.randn(3, 3, 16, 16)
    expected = task.eval()(images)
    rebuilt, _ = load_task(tmp_path / "run.ckpt")
    assert type(rebuilt) is IncrementalTask
    for model in (rebuilt, create_model(None, tmp_path / "run.ckpt").eval(),
                  IncrementalTask.load_from_checkpoint(tmp_path / "run.ckpt").eval()):
        torch.testing.assert_close(model(images), expected)
    with pytest.raises(ValueError, match=r"of a run with the steps .*, and here they are 5"):
        trainer().test(_task(steps=5), FewDigits(), ckpt_path=str(tmp_path / "run.ckpt"))
    with pytest.raises(ValueError, match="is of a class-incremental run, whose weights are in adapters"):
        _task(checkpoint_path=str(tmp_path / "run.ckpt"))
