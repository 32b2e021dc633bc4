"""Several tasks on one backbone: what a step trains, how sets are drawn, each task's own model, one-line faults."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

from visionattn.cli import main
from visionattn.data import DigitScenesData, DigitsData, MultiTaskData
from visionattn.data.loading import LoadedData
from visionattn.data.multitask import _DrawnLoader
from visionattn.dense import DenseBackbone
from visionattn.tasks import MultiTask
from visionattn.tasks.classification import create_classifier
from visionattn.tasks.losses import UncertaintyWeighting
from visionattn.tasks.rebuild import load_task
from visionattn.tasks.sharing import share_weights

SCENES = dict(image_size=64, digits=[1, 2], digit_size=[16, 32], batch_size=2, train_scenes=4, val_scenes=2,
              test_scenes=2)
CONFIG = {
    "model": {"class_path": "MultiTask", "init_args": {
        "backbone": "test_biformer", "lr": 1e-3, "warmup_steps": 0, "ema_decay": 0.9, "balance": "uncertainty",
        "model_args": {"pretrained_cfg_overlay": {"mean": [0.305] * 3, "std": [0.376] * 3}, "depths": [1, 1, 1, 1]},
        "classification": {}, "detection": {"detector": "fcos", "strides": [8, 16], "fpn_channels": 64, "min_size": 64},
        "segmentation": {"head": "segformer", "head_channels": 8, "auxiliary_weight": 0.0, "lr": 1e-4}}},
    "data": {"class_path": "MultiTaskData", "init_args": {
        "classification": {"class_path": "DigitsData", "init_args": {"image_size": 32, "batch_size": 4}},
        "detection": {"class_path": "DigitScenesData", "init_args": SCENES},
        "segmentation": {"class_path": "DigitScenesData", "init_args": SCENES | {"task": "segmentation"}},
        "weights": {"classification": 1, "detection": 1, "segmentation": 1}, "batches": 3}},
    "trainer": {"max_epochs": 1, "limit_val_batches": 2, "limit_test_batches": 2, "accelerator": "cpu",
                "num_sanity_val_steps": 0, "enable_progress_bar": False, "log_every_n_steps": 1},
}
TASKS = ("classification", "detection", "segmentation")


class Small(LoadedData):
    """Batches of numbers that say which items they are of."""

    def __init__(self, count, batch_size):
        super().__init__(batch_size, 0, 0)
        self.dataset = TensorDataset(torch.arange(count), torch.arange(count))

    def train_dataloader(self):
        return self._train_loader(self.dataset)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small training of three tasks."""
    folder = tmp_path_factory.mktemp("multitask")
    (folder / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["fit", "--config", str(folder / "mine.yaml"), "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder / "run"


def _task(**changes):
    """Three tasks as in the run, with other arguments."""
    args = copy.deepcopy(CONFIG["model"]["init_args"]) | changes
    return MultiTask(**{"num_classes": {"classification": 10, "detection": 10, "segmentation": 11}} | args)


def test_uncertainty_weighting_is_the_papers():
    weighting = UncertaintyWeighting("abc").double()
    with torch.no_grad():
        for scale, value in zip(weighting.scales.values(), (0.9896071500988936, 0.9777607899291151, 1.2083593598168259),
                                strict=True):
            scale.copy_(torch.tensor(value, dtype=torch.float64))
    losses = (0.8838931126173458, 0.1958650220376449, 0.3575365158852867)
    total = weighting({name: torch.tensor(loss, dtype=torch.float64) for name, loss in zip("abc", losses, strict=True)})
    total.backward()
    assert total.item() == pytest.approx(2.930028488507833, rel=1e-12)
    wanted = (0.08791091030246634, 0.7902109623297542, 0.7797099176896544)
    assert [scale.grad.item() for scale in weighting.scales.values()] == pytest.approx(wanted, rel=1e-12)


def test_a_step_trains_the_backbone_and_the_head_of_its_task():
    model = _task()
    model.training_steps = lambda: 10
    logged = {}
    for task in model.tasks().values():
        task.part, task.log = None, lambda name, value, **_: logged.update({name: value})
    model.log = lambda name, value, **_: logged.update({name: value})
    optimizer = model.configure_optimizers()["optimizer"]
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 1e-4}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    target = {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([3])}
    batches = {"classification": (torch.randn(2, 3, 32, 32), torch.tensor([1, 2])),
               "detection": ([torch.rand(3, 64, 64)], [target]),
               "segmentation": (torch.rand(1, 3, 64, 64), torch.randint(0, 11, (1, 64, 64)))}
    backbone = dict(model.detection.model.backbone.body.model.named_parameters())
    for name, batch in batches.items():
        before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
        model.training_step((*batch, name)).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {key for key, weight in model.named_parameters() if not torch.equal(before[key], weight)}
        shared = {key for key in changed if key.removeprefix("classification.model.") in backbone}
        assert len(shared) > len(backbone) / 2
        assert f"balance.scales.{name}" in changed
        owners = {key.split(".")[0] for key in changed - shared if not key.startswith("classification.model.stages")}
        assert owners == {name, "balance"}


def test_a_backbone_of_experts_takes_the_routers_of_each_task():
    names = ["segmentation", "classification"]
    model = _task(
        backbone="test_modular_vit", model_args={"tasks": names}, detection=None, balance="fixed",
        num_classes={"classification": 10, "segmentation": 11})
    router = model.classification.model.blocks[0].attn.router
    assert router is model.segmentation.model.backbone.model.blocks[0].attn.router
    for name, images in {"classification": torch.rand(1, 3, 32, 32), "segmentation": torch.rand(1, 3, 64, 64)}.items():
        model(images, name)
        assert router.tasks[router.task] == name
        assert model._run_of(model.tasks()[name])["model_args"] == {"tasks": names, "task": name}
    with pytest.raises(ValueError, match="the routers know the tasks"):
        _task(backbone="test_modular_vit", model_args={"tasks": ["cats", "dogs"]})


def test_weights_are_shared_where_models_differ_in_what_they_compute():
    first = create_classifier("test_dinat", False, None, {"num_classes": 3})
    dense = DenseBackbone("test_dinat", task="segmentation")
    assert share_weights(first, dense.model, "test_dinat", "segmentation") > 0
    known = dict(first.named_parameters())
    assert all(weight is known[key] for key, weight in dense.model.named_parameters())
    with pytest.raises(ValueError, match="agent_swin has no common weights for detection"):
        share_weights(create_classifier("test_agent_swin", False, None, {"num_classes": 3}),
                      DenseBackbone("test_agent_swin", task="detection").model, "test_agent_swin", "detection")
    first, images = create_classifier("resnet10t", False, None, {"num_classes": 3}), torch.randn(2, 3, 32, 32)
    dense = DenseBackbone("resnet10t", task="detection")
    share_weights(first, dense.model, "resnet10t", "detection")
    first.train()(3 * images)
    assert dense.model.bn1.weight is first.bn1.weight
    assert not torch.equal(dense.model.bn1.running_mean, first.bn1.running_mean)  # each task has statistics of its own
    dense.train()(images)
    first.load_state_dict(dense.model.state_dict(), strict=False)
    assert torch.equal(first.eval().forward_features(images), dense.eval()(images)[-1])


def test_sets_are_drawn_by_their_weights():
    loaders = {"a": [0], "b": [0], "c": [0]}
    loader = _DrawnLoader(loaders, {"a": 1.0, "b": 0.5, "c": 0.1}, 10, 3, lambda: 0)
    counts = np.array([np.bincount(loader.drawn(epoch), minlength=3) for epoch in range(400)])
    share = np.array([1, 0.5, 0.1]) / 1.6 * 10
    assert (abs(counts - share) < 1).all()
    assert abs(counts.mean(axis=0) - share).max() < 0.1
    assert (counts.sum(axis=1) == 10).all()
    assert (loader.drawn(5) == loader.drawn(5)).all()
    assert (loader.drawn(5) != loader.drawn(6)).any()


def test_a_set_goes_on_over_epochs_and_behind_a_resume():
    data = MultiTaskData(classification=Small(6, 2), segmentation=Small(5, 1),
                         weights={"classification": 1, "segmentation": 1}, batches=5)
    loader, seen = data.train_dataloader(), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen += [(images.tolist(), name) for images, _, name in loader]
    assert len(seen) == 15
    for name, count in (("classification", 6), ("segmentation", 5)):
        items = [item for images, which in seen if which == name for item in images]
        assert sorted(items[:count]) == list(range(count))
        assert items[:count] != items[count:2 * count]
    resumed = data.train_dataloader()
    resumed.set_epoch(2)
    resumed.done = lambda: 2
    assert [(images.tolist(), name) for images, _, name in resumed] == seen[12:]
    assert len(MultiTaskData(classification=Small(6, 2), segmentation=Small(5, 1)).train_dataloader()) == 8


@pytest.mark.slow
def test_each_task_leaves_a_run_of_its_own(run, capsys):
    joint = _task(balance="uncertainty").eval()
    joint.load_state_dict(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])
    images = torch.rand(2, 3, 64, 64)
    for name in TASKS:
        task, saved = load_task(run / name / "checkpoints" / "best.ckpt")
        with torch.inference_mode():
            found, wanted = ((model(images) if name != "detection" else model(list(images))[0]["boxes"])
                             for model in (task, joint.tasks()[name]))
        assert torch.equal(found, wanted)
        assert saved["_image_settings" if "_image_settings" in saved else "_mean"]
    assert json.loads((run / "detection" / "test_metrics.json").read_text())["detector"] == "fcos"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["mean"] == pytest.approx(np.mean([metrics[key] for key in (
        "classification/accuracy", "detection/box_map", "segmentation/miou")]), abs=1e-5)
    assert "train/detection/bbox_regression" in (run / "metrics.csv").read_text().splitlines()[0]
    assert main(["test", str(run / "segmentation"), "--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu",
                 "--trainer.enable_progress_bar", "false"]) == 0
    alone = json.loads((run / "segmentation" / "test_metrics.json").read_text())
    assert alone["miou"] == metrics["segmentation/miou"]
    assert main(["predict", str(run), "any.png"]) == 1
    assert f"take the run of one, which their test leaves ({run}/classification, " in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "fault"), [
    ({"detection": None}, "the model has the tasks classification, segmentation, and the data have classific"),
    ({"detection": None, "segmentation": None}, "several tasks are two of classification, detection, segmentation"),
    ({"detection": {"backbone": "test_dinat"}}, r"backbone of detection is that of all tasks: set model\.init_args"),
    ({"detection": {"milestones": [3]}}, "detection has no argument milestones among several tasks; it has detector"),
    ({"segmentation": {"lr": 0.0}}, "lr of segmentation must be positive"),
    ({"loss_weights": {"classification": 1.0}}, "loss_weights are those of balance fixed"),
    ({"balance": "fixed", "loss_weights": {"detection": 1.0}}, "a positive number for each of classification"),
])
def test_wrong_models_are_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        _task(**changes)


@pytest.mark.parametrize(("args", "fault"), [
    ({}, "got those of classification alone"),
    ({"detection": {}, "weights": {"classification": 1}}, "weights must be of the tasks classification, detection"),
    ({"detection": {}, "weights": {"classification": 1, "detection": 0}}, "weights must be positive"),
    ({"detection": {}, "batches": 0}, "batches must be 1 or more"),
    ({"detection": {}, "grey": 1}, r"channels \(classification 1, detection 3\)"),
])
def test_wrong_data_are_refused(args, fault):
    chans = args.pop("grey", 3)
    if "detection" in args:
        args["detection"] = DigitScenesData(**SCENES)
    with pytest.raises(ValueError, match=fault):
        MultiTaskData(classification=DigitsData(in_chans=chans), **args)


def test_normalisation_must_be_one():
    model = _task(model_args=None)
    digits, scenes = DigitsData(), DigitScenesData(**SCENES)
    data = MultiTaskData(classification=digits, detection=scenes, segmentation=scenes)
    model._trainer = SimpleNamespace(datamodule=data)
    with pytest.raises(ValueError, match=r"images of classification are normalised by mean and std \[0\.305"):
        model._check_normalisation()
    digits.normalisation = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    model._check_normalisation()
