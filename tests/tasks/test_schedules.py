"""What the recipes amount to on few and on many images: steps, warm-up, and the span of averaged weights."""
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from visionattn import tasks
from visionattn.data import DigitsData
from visionattn.data.loading import LoadedData

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ["classification/imagefolder_finetune", "detection/coco_finetune", "segmentation/folder_finetune"]
TINY = {
    "ClassificationTask": dict(num_classes=2), "DetectionTask": dict(num_classes=1, fpn_channels=64),
    "SegmentationTask": dict(num_classes=2, head_channels=8),
}


def _rates(recipe, images, **trainer):
    """The learning rate of every optimiser step of a recipe on so many training images, as shares of the peak."""
    config = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    name = config["model"]["class_path"]
    task = getattr(tasks, name)(**config["model"]["init_args"] | {"backbone": "test_dinat", "layer_decay": None}
                                | TINY[name])
    data = config["data"]["init_args"]
    loaded = LoadedData(data["batch_size"], 0, 0, data["min_batches"])
    epoch = len(loaded._train_loader(range(images)))
    steps = epoch * (config["trainer"] | trainer)["max_epochs"]
    task._trainer = SimpleNamespace(
        estimated_stepping_batches=steps, num_training_batches=epoch, accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(setup_data=lambda: None))
    schedule = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    return torch.tensor([schedule.lr_lambdas[0](step) for step in range(steps)]), epoch


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("images", [20, 200_000])
def test_recipes_reach_their_peak_and_come_down(recipe, images):
    rates, epoch = _rates(recipe, images)
    assert rates.max() > 0.9
    assert rates.argmax() < len(rates) / 3  # the warm-up takes no more
    assert rates[-1] < 0.1
    assert rates.mean() > 0.35  # most of the run is trained at a rate that moves something
    if images > 1000:
        assert rates.argmax() < 4 * epoch
    # Few images are seen often enough to learn something, and many as often as the epochs say.
    assert len(rates) >= 600
    assert (len(rates) < 1500) == (images < 1000)


def test_epochs_that_a_user_asks_for_are_the_epochs_that_there_are():
    rates, epoch = _rates(RECIPES[0], 20, max_epochs=2)
    assert (len(rates), epoch) == (40, 20)
    assert rates.max() == 1
    assert rates[-1] < 0.1


def _shares(steps):
    """Share of the weights after each step in the average at the end, oldest first."""
    task = tasks.ClassificationTask(backbone="test_vit", num_classes=2, ema_decay=0.998)
    task._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    (callback,) = task.configure_callbacks()
    model = nn.Linear(1, 1, bias=False).double().requires_grad_(False)
    average = torch.optim.swa_utils.AveragedModel(model, **callback._kwargs)
    shares = torch.ones(1, dtype=torch.float64)
    average.update_parameters(model.apply(lambda layer: layer.weight.zero_()))
    for _ in range(steps - 1):
        average.module.weight.zero_()
        average.update_parameters(model.apply(lambda layer: layer.weight.fill_(1.0)))
        share = average.module.weight.item()
        shares = torch.cat([shares * (1 - share), torch.tensor([share])])
    return shares


@pytest.mark.parametrize("steps", [10, 30, 300, 6000])
def test_averaged_weights_of_a_short_run_are_its_last(steps):
    shares = _shares(steps)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[:steps // 2].sum() < 0.05  # of the first half hardly anything is left
    if steps == 6000:
        assert shares.max().item() == pytest.approx(0.002)  # and a long one has the decay that was asked for


def test_short_runs_are_validated_with_weights_that_learned(tmp_path):
    torch.manual_seed(0)
    data = DigitsData(image_size=32, batch_size=16)
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=16)
    task = tasks.ClassificationTask(
        backbone="test_biformer", num_classes=10, warmup_epochs=0, lr=3e-3, label_smoothing=0.0, ema_decay=0.998)
    before = nn.functional.cross_entropy(task.eval()(images), labels).item()
    pl.Trainer(max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
               enable_model_summary=False, default_root_dir=tmp_path).fit(task.train(), loader)
    assert nn.functional.cross_entropy(task.eval()(images), labels).item() < 0.8 * before
