"""Reading checkpoints: what loads, and how files that do not fit end."""
import argparse
import pickle
import re
import sys
import types

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.detection import FCOS, MaskRCNN

from visionattn.heads import Segmenter
from visionattn.tasks import ClassificationTask, DetectionTask, SegmentationTask
from visionattn.tasks.rebuild import create_model
from visionattn.weights import read_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_dinat", num_classes=5)


def _same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dict(model, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    _same(create_model("test_dinat", path, num_classes=5), model)
    with pytest.raises(ValueError, match="say which model"):
        create_model(None, path)


def test_run_checkpoint_knows_its_model(model, tmp_path):
    path = tmp_path / "best.ckpt"
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"backbone": "test_dinat", "num_classes": 5}}, path)
    _same(create_model(None, path), model)
    with pytest.raises(ValueError, match="is of the model test_dinat, not test_biformer"):
        create_model("test_biformer", path)
    with pytest.raises(ValueError, match="has 5 classes, not 7"):
        create_model(None, path, num_classes=7)


TASKS = {
    "classification": lambda: ClassificationTask("test_vit", num_classes=5, in_chans=1, drop_path_rate=0.1),
    "segmentation": lambda: SegmentationTask("test_biformer", num_classes=5, head_channels=32, out_indices=[1, 2, 3]),
    "fcos": lambda: DetectionTask("test_dinat", num_classes=5, detector="fcos", fpn_channels=64, strides=[8, 16]),
    "mask_rcnn": lambda: DetectionTask("resnet10t", num_classes=5, fpn_channels=64, anchor_scale=4, min_size=[64, 96]),
}


@pytest.mark.parametrize(("kind", "module"), [
    ("classification", VisionTransformer), ("segmentation", Segmenter), ("fcos", FCOS), ("mask_rcnn", MaskRCNN)])
def test_a_run_of_any_task_is_rebuilt(kind, module, tmp_path, monkeypatch):
    """From nothing but its checkpoint, though it began with another file's weights."""
    torch.manual_seed(0)
    task, path = TASKS[kind]().eval(), tmp_path / "best.ckpt"
    checkpoint = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    checkpoint["hyper_parameters"] |= {"_class_path": "of.the.command.line", "pretrained": True}
    torch.save(checkpoint, path)
    monkeypatch.setattr("timm.models._builder.load_pretrained", pytest.fail)
    model = create_model(None, path).eval()
    assert type(model) is module
    _same(model, task.model)
    image = torch.rand(1 if kind == "classification" else 3, 160, 160)
    images = [image] if isinstance(task, DetectionTask) else image[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(images), task(images), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("fcos", {"detector": "yolo"}, "detector must be one of fcos"),
    ("fcos", {"detector": "retinanet"}, "best.ckpt: checkpoint .* is not of the model test_dinat|best.ckpt is not of"),
    ("fcos", {"backbone": "test_dina"}, "there is no model 'test_dina'; similar names"),
    ("segmentation", {"colour": "red"}, "best.ckpt is not of this version of visionattn: .*unexpected.*'colour'"),
    ("segmentation", {"num_classes": 7}, "best.ckpt"),
])
def test_a_run_that_cannot_be_rebuilt(kind, change, message, tmp_path):
    task, path = TASKS[kind](), tmp_path / "best.ckpt"
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams) | change}, path)
    with pytest.raises(ValueError, match=message) as caught:
        create_model(None, path)
    assert "\n" not in str(caught.value)


class _Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_do_not_fit(model, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint|not weights"):
        read_checkpoint(path)
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"state_dict": _Code()}))
    with pytest.raises(ValueError, match="not opened"):
        read_checkpoint(path)
    torch.save({"model": _Code()}, path)
    with pytest.raises(ValueError, match="not opened"):
        read_checkpoint(path)
    assert "code ran" not in capsys.readouterr().out
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="holds a Tensor"):
        read_checkpoint(path)


RUN = {"backbone": "test_dinat", "num_classes": 5}


@pytest.mark.parametrize(("content", "words"), [
    ({"hyper_parameters": RUN}, "holds no weights"),
    ({"hyper_parameters": RUN, "state_dict": None}, "holds no weights"),
    ({"hyper_parameters": RUN, "state_dict": {}}, "holds no weights"),
    ({"hyper_parameters": RUN, "state_dict": {"model.head.bias": 3}}, "'model.head.bias' with a int"),
    ({"hyper_parameters": RUN, "state_dict": {3: torch.zeros(1)}}, "3 with a Tensor"),
    ({"hyper_parameters": RUN, "state_dict": {"head.bias": torch.zeros(1)}}, "no weights of a model"),
    ({"hyper_parameters": RUN, "state_dict": {"model.head.bias": torch.zeros(1)}}, "not of the model test_dinat"),
    ({"hyper_parameters": RUN | {"backbone": None}}, "backbone of its hyper_parameters must be of the type str"),
    ({"hyper_parameters": RUN | {"num_classes": "5"}}, "num_classes of its hyper_parameters must be of the type int"),
    ({"hyper_parameters": RUN | {"backbone": "test_dinut"}}, "there is no model 'test_dinut'"),
    ({"hyper_parameters": RUN | {"num_classes": -5}}, "not of the model test_dinat"),
    ({"hyper_parameters": RUN | {"in_chans": "RGB"}}, "its run cannot be rebuilt"),
    ({"hyper_parameters": RUN | {"model_args": 3}}, "its run cannot be rebuilt"),
    ({"hyper_parameters": RUN | {"model_args": {"depth": 3}}}, "'depth'"),
    ({"hyper_parameters": RUN | {"head": "upernet", "losses": 3}}, "not of this version"),
    ({"hyper_parameters": RUN | {"detector": "yolo"}}, "yolo"),
    ({"hyper_parameters": RUN | {"detector": "fcos", "lrr": 1}}, "not of this version"),
    ({"state_dict": {}}, "holds no weights"),
    ({"state_dict": {"head.bias": [3.0]}}, "'head.bias' with a list"),
    ({"epoch": 3}, "'epoch' with a int"),
])
def test_malformed_checkpoints_end_in_one_line(content, words, tmp_path):
    path = tmp_path / "a.ckpt"
    if content.get("hyper_parameters", RUN) != RUN:
        content["state_dict"] = {"model.head.bias": torch.zeros(1)}
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        create_model(None, path)
    assert "\n" not in str(caught.value)
    assert "a.ckpt" in str(caught.value)


def test_a_classifier_starts_from_the_checkpoint_of_a_run_without_in_chans(tmp_path):
    """Detectors and segmenters have no such argument: what is wrong is the model, not a missing key."""
    path = tmp_path / "a.ckpt"
    model = timm.create_model("test_dinat", num_classes=5)
    torch.save({"hyper_parameters": RUN, "state_dict": {f"model.{k}": x for k, x in model.state_dict().items()}}, path)
    _same(ClassificationTask("test_dinat", num_classes=5, checkpoint_path=str(path)).model, model)


def test_options_beside_the_weights_are_no_obstacle(model, tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3)}, path)
    _same(create_model("test_dinat", path, num_classes=5), model)


def test_weights_of_another_model_end_in_one_line(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    for other in ("test_biformer", "test_vit"):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            create_model(other, path, num_classes=5)
        assert "\n" not in str(caught.value)
        assert "weights.pth" in str(caught.value)


class _CfgNode(dict):
    """A node of options as yacs pickles it: a dict with attributes of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__.update({"__immutable__": True, "__deprecated_keys__": {"OLD"}, "__renamed_keys__": {}})

    def __setattr__(self, name, value):
        raise AssertionError("code of the class ran")


@pytest.fixture
def save_with_options(monkeypatch):
    """Saves a file that names ``yacs.config.CfgNode``, a module that is gone when the file is read."""
    def save(content, path, **members):
        module = types.ModuleType("yacs.config")
        names = {"__module__": "yacs.config", "__qualname__": "CfgNode"}
        module.CfgNode = type("CfgNode", (_CfgNode,), names | members)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
            node = module.CfgNode
            config = node({"MODEL": node({"NAME": "agent", "DEPTHS": [2, 2]}), "EMA": 0.9})
            torch.save({**content, "config": config}, path)
    return save


def test_options_of_yacs_are_no_obstacle(model, tmp_path, save_with_options):
    path = tmp_path / "official.pth"
    save_with_options({"model": model.state_dict(), "epoch": 299}, path)
    assert b"yacs.config" in path.read_bytes()  # not compressed
    _same(create_model("test_dinat", path, num_classes=5), model)
    overlay = dict(file=str(path), num_classes=5)
    _same(timm.create_model("test_dinat", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5), model)
    assert not any(name.startswith("yacs") for name in sys.modules)


def test_options_that_carry_code_are_refused(model, tmp_path, save_with_options, capsys):
    path = tmp_path / "official.pth"
    save_with_options({"model": model.state_dict()}, path, __reduce__=lambda self: (print, ("code ran",)))
    with pytest.raises(ValueError, match="pickles objects that are not weights; it was not opened"):
        read_checkpoint(path)
    overlay = dict(file=str(path), num_classes=5)
    with pytest.raises(RuntimeError, match="cannot be read as a checkpoint of tensors") as caught:
        timm.create_model("test_dinat", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_averaged_weights_go_first(model, tmp_path):
    path = tmp_path / "official.pth"
    others = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save({"model": others, "state_dict_ema": model.state_dict()}, path)
    _same(create_model("test_dinat", path, num_classes=5), model)
    for overlay in (dict(file=str(path)), dict(state_dict=torch.load(path))):
        overlay["num_classes"] = 5
        _same(timm.create_model("test_dinat", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5), model)


def test_the_public_name():
    import visionattn.checkpoint

    assert visionattn.checkpoint.create_model is create_model
    assert visionattn.checkpoint.read_checkpoint is read_checkpoint
