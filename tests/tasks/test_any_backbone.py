"""Any model of timm's registry in the recipes: a step of each task, and what recipes set that a model does not have."""
import pytest
import torch
import yaml

from visionattn import tasks
from visionattn.export import export_onnx
from visionattn.recipes import RECIPES

MODELS = {  # a model of each family, and arguments that make it small
    "test_dinat": {}, "test_biformer": {}, "test_efficientvit_cga": {}, "test_convnext": {}, "test_vit": {},
    "eca_halonext26ts": {}, "shvit_s1": dict(depth=[1, 1, 1]), "ghostnetv2_100": {}, "regnety_002": {},
    "davit_tiny": dict(depths=[1, 1, 1, 1], embed_dims=[16, 32, 64, 128], num_heads=[1, 2, 4, 8]),
    "mambaout_femto": dict(depths=[1, 1, 1, 1], dims=[16, 32, 64, 128]),
    "swin_tiny_patch4_window7_224": dict(depths=[1, 1, 1, 1], embed_dim=24),
}
WITHOUT_DEPTH = {"test_efficientvit_cga", "shvit_s1", "ghostnetv2_100"}  # stochastic depth
SMALLER = {
    "imagefolder_finetune": {}, "coco_finetune": dict(fpn_channels=64, min_size=96, max_size=128),
    "folder_finetune": dict(head_channels=8),
}
TARGET = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}


def _task(recipe, name, monkeypatch, **args):
    """The task of a recipe with another backbone."""
    model = yaml.safe_load(RECIPES[recipe].read_text())["model"]
    kind = getattr(tasks, model["class_path"])
    for log in ("log", "log_dict"):
        monkeypatch.setattr(kind, log, lambda *args, **kwargs: None)
    return kind(**model["init_args"] | SMALLER[recipe] | dict(backbone=name, num_classes=2) | args)


def _batch(recipe):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 96, 96, generator=generator)
    if recipe == "coco_finetune":
        return [image[:, :90] for image in images], [TARGET, TARGET]
    return images, torch.randint(0, 2, (2, 96, 96), generator=generator)


@pytest.mark.parametrize("recipe", ["coco_finetune", "folder_finetune"])
@pytest.mark.parametrize("name", MODELS)
def test_a_dense_step_reaches_every_parameter(name, recipe, monkeypatch, said):
    torch.manual_seed(0)
    task = _task(recipe, name, monkeypatch, model_args=MODELS[name])
    loss = task.training_step(_batch(recipe))
    loss.backward()
    assert loss.isfinite()
    assert not [key for key, x in task.named_parameters() if x.grad is None or not x.grad.isfinite().all()]
    # Images of odd sizes are seen too.
    image = torch.rand(3, 71, 90)
    with torch.no_grad():
        answer = task.eval()([image] if recipe == "coco_finetune" else image[None])
    if recipe == "folder_finetune":
        assert answer.shape == (1, 2, 71, 90)
    assert ("has no stochastic depth: drop_path_rate (0.1) is left out" in said.text) == (name in WITHOUT_DEPTH)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_convnext", "test_vit"])
def test_a_step_of_classification(name, monkeypatch):
    """The families of the papers behind the zoo have tests of their own (test_timm_families.py)."""
    torch.manual_seed(0)
    side = {"test_vit": 160, "test_convnext": 64}.get(name, 224)
    task = _task("imagefolder_finetune", name, monkeypatch, model_args=MODELS[name])
    task.training_step((torch.rand(2, 3, side, side), torch.tensor([0, 1]))).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in task.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_convnext", "test_vit"])
def test_classifiers_are_exported(name, monkeypatch, tmp_path):
    torch.manual_seed(0)
    task = _task("imagefolder_finetune", name, monkeypatch, model_args=MODELS[name])
    assert export_onnx(task.model, tmp_path / "model.onnx").path.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "shvit_s1", "eca_halonext26ts"])
def test_segmenters_are_exported(name, monkeypatch, tmp_path):
    torch.manual_seed(0)
    task = _task("folder_finetune", name, monkeypatch, model_args=MODELS[name])
    assert export_onnx(task.model, tmp_path / "model.onnx", (64, 96)).path.is_file()


def test_arguments_that_a_user_gave_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"shvit_s1 does not take these model_args: .*'n_win'"):
        _task("imagefolder_finetune", "shvit_s1", monkeypatch, model_args=dict(n_win=8))
    with pytest.raises(ValueError, match=r"swin.* does not take these model_args: .*'n_win'"):
        _task("folder_finetune", "swin_tiny_patch4_window7_224", monkeypatch, model_args=dict(n_win=8))
