"""Export: the file agrees with eager, uses standard operators, and a wrong file is not handed out."""
import copy
import json

import lightning.pytorch as pl
import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from visionattn import export
from visionattn.data.classification import evaluation_transform
from visionattn.export import photos
from visionattn.export.check import apart, blocks, judge
from visionattn.export.facts import describe, weights_sha256
from visionattn.export.facts import facts as export_facts
from visionattn.tasks import DetectionTask, SegmentationTask


@pytest.mark.parametrize("name", [
    "test_biformer", "test_dinat", "test_efficientvit_cga", "test_vit",
    pytest.param("test_agent_swin", marks=pytest.mark.slow)])
def test_exported_file_agrees_with_eager(name, tmp_path):
    torch.manual_seed(0)
    report = export.export_onnx(timm.create_model(name, num_classes=7), tmp_path / "sub" / "model.onnx")
    assert report.difference <= 1e-4
    assert report.opset == 20
    proto = onnx.load(report.path)
    assert len(proto.graph.node) == report.nodes
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # the batch is free
    assert not any(node.metadata_props for node in proto.graph.node)


@pytest.mark.parametrize(("name", "options"), [
    pytest.param("test_biformer", {}, marks=pytest.mark.slow),
    pytest.param("test_dinat", {"dilations": [[2]] * 4}, marks=pytest.mark.slow),
    pytest.param("test_datr", {"wrap": True}, marks=pytest.mark.slow),
    pytest.param("test_efficientvit_cga", {"depths": (1, 1, 1)}, marks=pytest.mark.slow)])
def test_dynamic_size(name, options, tmp_path):
    """Sizes other than the traced one are right too, also smaller ones, where the maps have to be padded."""
    import onnxruntime

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **{"depths": (1, 1, 1, 1)} | options).eval()
    report = export.export_onnx(model, tmp_path / "model.onnx", (96, 128), dynamic_size=True)
    session = onnxruntime.InferenceSession(report.path)
    for size in [(96, 128), (64, 64), (160, 224)]:
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = model(images)
        actual = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_fused_file_has_no_norms(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientvit_cga", num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 224, 224)
    expected = model(images)
    report = export.export_onnx(model, tmp_path / "model.onnx", fuse=True)
    assert report.difference <= 1e-4
    graph = onnx.load(report.path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    names = {initializer.name for initializer in graph.initializer}
    assert "patch_embed.0.weight" in names  # patch_embed.0.conv.weight before
    assert not any("conv.weight" in name or ".bn." in name for name in names)
    assert torch.equal(model(images), expected)  # the caller's model is left alone


class _Noisy(nn.Module):
    """A classifier whose eager answers are not what its graph computes."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def __init__(self, error):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.error = error

    def forward(self, x):
        x = self.head(x.mean((2, 3)))
        return x if torch.compiler.is_exporting() else x * (1 + self.error)


def test_a_file_that_differs_is_refused(tmp_path):
    export.export_onnx(_Noisy(0.0), tmp_path / "good.onnx")
    with pytest.raises(RuntimeError, match=r"differs from PyTorch by 1.0e-03 .*\(limit 1e-04\)"):
        export.export_onnx(_Noisy(1e-3), tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()


def test_free_sizes_are_multiples(tmp_path):
    with pytest.raises(ValueError, match="multiples of 32; the example of 100 x 128 is not one"):
        export.export_onnx(timm.create_model("test_vit"), tmp_path / "model.onnx", (100, 128), dynamic_size=True)


def test_command_line(tmp_path, capsys):
    export.main(["--model", "test_vit", "--num-classes", "5", "--img-size", "160", "--out", str(tmp_path / "m.onnx")])
    printed = capsys.readouterr().out
    assert "m.onnx" in printed
    assert "nodes" in printed
    assert "largest difference" in printed
    with pytest.raises(SystemExit):
        export.main(["--out", str(tmp_path / "m.onnx")])


# Runs of the dense tasks


def save(task, path):
    """The checkpoint of a run, as Lightning writes it."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=path.parent)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return path


def detection_task(detector, **kwargs):
    """A task whose detector, though untrained, is sure of some objects and not of others."""
    defaults = dict(backbone="resnet10t", num_classes=4, detector=detector, fpn_channels=64, min_size=64, max_size=96)
    if detector.endswith("rcnn"):
        defaults["detector_args"] = dict(rpn_post_nms_top_n_test=20)
    task = DetectionTask(**defaults | kwargs).eval()
    last = ("cls_logits.weight", "bbox_reg.weight", "cls_score.weight", "bbox_pred.weight")
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if name.endswith(last) and not name.startswith("rpn."):
                parameter.mul_(30)
    return task


def run(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    name, = (x.name for x in session.get_inputs())
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {name: images.numpy()})), strict=True))


def pictures(*shape):
    """Images in [0, 1] with bright rectangles on a dark ground."""
    generator = torch.Generator().manual_seed(1)
    images = 0.2 * torch.rand(*shape, generator=generator)
    for i in range(8):
        y, x = (int(torch.randint(0, side - 8, (), generator=generator)) for side in shape[-2:])
        images[..., y:y + 8 + 4 * i, x:x + 40 - 4 * i] = torch.rand(shape[-3], 1, 1, generator=generator)
    return images


@pytest.mark.parametrize(("backbone", "options", "head"), [
    ("test_biformer", {"depths": [1] * 4}, "semantic_fpn"), ("test_datr", {"wrap": True}, "segformer"),
    ("resnet10t", {}, "upernet")])
def test_segmentation_run(backbone, options, head, tmp_path, capsys):
    torch.manual_seed(0)
    task = SegmentationTask(backbone, num_classes=5, model_args=options, head=head, head_channels=32).eval()
    checkpoint, out = save(task, tmp_path / "best.ckpt"), tmp_path / "model.onnx"
    export.main(["--checkpoint", str(checkpoint), "--image-size", "64", "96", "--out", str(out)])
    assert "of the logits' scale" in capsys.readouterr().out
    images = pictures(3, 3, 64, 96)
    with torch.inference_mode():
        expected = task(images)
    logits, = run(out, images).values()
    assert logits.shape == (3, 5, 64, 96)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("detector", "size", "backbone", "options"), [
    ("fcos", (64, 96), "test_dinat", {"dilations": [[2]] * 4}), ("mask_rcnn", (80, 60), "test_biformer", {})])
def test_detection_run(detector, size, backbone, options, tmp_path, capsys):
    torch.manual_seed(0)
    task = detection_task(detector, backbone=backbone, model_args={"depths": [1] * 4} | options, strides=[8, 16])
    checkpoint, out = save(task, tmp_path / "best.ckpt"), tmp_path / "model.onnx"
    export.main(["--checkpoint", str(checkpoint), "--image-size", *map(str, size), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "detections" in printed
    assert "not checked" not in printed
    assert f"image [3, {size[0]}, {size[1]}]: one image, RGB, channels first, values in [0, 1]" in printed
    found = {key: json.loads(facts(out)[key]) for key in ("score_threshold", "nms_threshold", "most_detections")}
    assert found == {
        "score_threshold": 0.05, "nms_threshold": 0.6 if detector == "fcos" else 0.5, "most_detections": 100}
    assert json.loads(facts(out)["resize"]) == {"inside": True, "shorter_side": 64, "longest_side": 96}
    assert {node.domain for node in onnx.load(out).graph.node} <= {"", "ai.onnx"}
    image = pictures(3, *size)
    with torch.inference_mode():
        expected, = task([image])
    found = run(out, image)
    assert found.keys() == expected.keys()
    assert len(expected["labels"]) >= 3
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-4 * max(size))
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-4)
    if detector == "mask_rcnn":
        assert found["masks"].shape[1:] == (1, *size)
        torch.testing.assert_close(found["masks"], expected["masks"], rtol=0, atol=1e-3)


class _Skewed(nn.Module):
    """A network whose eager maps are not what its graph computes."""

    def __init__(self, network, error):
        super().__init__()
        self.network, self.out_channels, self.error = network, network.out_channels, error

    def forward(self, images):
        maps = self.network(images)
        return maps if torch.compiler.is_exporting() else {key: x * (1 + self.error) for key, x in maps.items()}


@pytest.mark.parametrize("error", [2e-3, 1.0])
def test_a_detector_that_differs_is_refused(error, tmp_path):
    torch.manual_seed(0)
    model = detection_task("faster_rcnn", strides=[16, 32]).model
    model.backbone = _Skewed(model.backbone, error)
    with pytest.raises(RuntimeError, match=r"(differs from PyTorch by|gives other objects).*it was removed"):
        export.export_onnx(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_as_many_objects_of_another_label_are_other_objects():
    boxes, scores = torch.tensor([[0., 0., 8., 8.]]), torch.tensor([0.5])
    difference = apart((boxes, torch.tensor([1]), scores), (boxes, torch.tensor([2]), scores), side=16)
    with pytest.raises(RuntimeError, match="gives other objects than PyTorch"):
        judge(difference.item())


def test_models_of_one_size(tmp_path):
    with pytest.raises(ValueError, match="one image size: leave dynamic_size out"):
        export.export_onnx(detection_task("fcos").model, tmp_path / "model.onnx", dynamic_size=True)


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_segmenter_of_any_size(head, tmp_path):
    torch.manual_seed(0)
    task = SegmentationTask("resnet10t", num_classes=3, head=head, head_channels=16).eval()
    report = export.export_onnx(task.model, tmp_path / "model.onnx", (64, 96), dynamic_size=True)
    images = pictures(2, 3, 160, 64)
    with torch.inference_mode():
        expected = task(images)
    logits, = run(report.path, images).values()
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_detector_that_finds_nothing(tmp_path, capsys):
    """It is exported, and the report says that no box was compared."""
    torch.manual_seed(0)
    model = detection_task("retinanet", strides=[16, 32]).model
    report = export.export_onnx(model, tmp_path / "model.onnx")
    assert report.detections == 0
    export.print_report(report)
    assert "not checked" in capsys.readouterr().out


# Models of other kinds than the default ones


def facts(path):
    """The metadata of a file, as the documentation lists it."""
    return {item.key: item.value for item in onnx.load(path).metadata_props}


def shape(value):
    return [length.dim_value for length in value.type.tensor_type.shape.dim]


@pytest.mark.slow
def test_the_file_has_the_channels_and_the_size_that_the_model_was_made_for(tmp_path):
    torch.manual_seed(0)
    export.export_onnx(timm.create_model("test_efficientvit_cga", in_chans=1), tmp_path / "grey.onnx")
    assert shape(onnx.load(tmp_path / "grey.onnx").graph.input[0])[1] == 1
    for name, options in {"test_agent_swin": dict(img_size=96), "test_vit": dict(img_size=(96, 128))}.items():
        export.export_onnx(timm.create_model(name, **options), tmp_path / "sized.onnx")
        assert shape(onnx.load(tmp_path / "sized.onnx").graph.input[0])[2:] == [
            96, 128 if name == "test_vit" else 96]
        assert json.loads(facts(tmp_path / "sized.onnx")["image_size"])[0] == 96


def test_feature_extractors_give_their_maps(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    model = timm.create_model("test_biformer", features_only=True).eval()
    export.export_onnx(model, tmp_path / "maps.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "maps.onnx")
    assert [output.name for output in session.get_outputs()] == ["map_0", "map_1", "map_2", "map_3"]
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        for found, expected in zip(session.run(None, {"images": images.numpy()}), model(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert facts(tmp_path / "maps.onnx")["task"] == "features"


@pytest.mark.parametrize("opset", [18, 23])
def test_opset(opset, tmp_path):
    torch.manual_seed(0)
    report = export.export_onnx(timm.create_model("test_vit"), tmp_path / "model.onnx", opset=opset)
    assert report.opset == opset
    assert {item.version for item in onnx.load(tmp_path / "model.onnx").opset_import if not item.domain} == {opset}


def test_an_opset_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="opset must be 17 to 23, got 24"):
        export.export_onnx(timm.create_model("test_dinat"), tmp_path / "model.onnx", opset=24)


def test_metadata(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientvit_cga", num_classes=2)
    model.run = {
        "backbone": "test_efficientvit_cga", "class_names": ["cat", "dög"], "_mean": [0.1], "_std": [0.2],
        "_image_settings": dict(image_size=32, interpolation="bilinear", crop_pct=0.9, decoding={"channels": 3})}
    report = export.export_onnx(model, tmp_path / "model.onnx", fuse=True)
    found = facts(tmp_path / "model.onnx")
    assert json.loads(found.pop("class_names")) == ["cat", "dög"]
    assert json.loads(found.pop("resize")) == {
        "interpolation": "bilinear", "centre_crop": [32, 32], "shorter_side": 35}
    assert json.loads(found.pop("decoding")) == {"channels": 3}
    assert found.pop("producer").startswith("visionattn ")
    assert found.pop("weights_sha256") == weights_sha256(model)  # as they are in the checkpoint, not as fused
    assert found == {
        "task": "classification", "model": "test_efficientvit_cga", "license": "mit", "image_size": "[32, 32]",
        "channels": "3", "channel_order": "RGB", "mean": "[0.1]", "std": "[0.2]"}
    assert report.values == [
        "images [batch, 3, 32, 32]: images, RGB, channels first, values in [0, 1] less mean, divided by std",
        "logits [batch, 2]: classes in the order of class_names: softmax makes probabilities"]
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [f"{item.name} {item.doc_string}" for item in (*graph.input, *graph.output)] == [
        f"{line.partition(' ')[0]} {line.partition(': ')[2]}" for line in report.values]


def test_weights_have_one_sum_wherever_they_are():
    model = timm.create_model("resnet10t", num_classes=2)
    same = copy.deepcopy(model)
    assert weights_sha256(model) == weights_sha256(same)
    same.state_dict()["bn1.running_mean"][3] += 1e-6
    assert weights_sha256(model) != weights_sha256(same)
    assert weights_sha256(model.to(torch.bfloat16)) == weights_sha256(model)


def test_a_published_model_says_how_its_images_are_made():
    model = timm.create_model("smt_l_384", device="meta")
    assert export_facts(model, (1, 3, 384, 384))["resize"] == {
        "interpolation": "bicubic", "centre_crop": [384, 384], "sides": [384, 384]}
    found = export_facts(timm.create_model("test_dinat", num_classes=0), (1, 3, 64, 96))
    assert found["task"] == "features"
    assert "without a classifier" in describe(found)["logits"]


def _photo(height, width, seed=0):
    """A photo in Pillow's form."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray((255 * blocks(3, height, width, generator=generator)).byte().movedim(0, -1).numpy())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_classifier_takes_photos(interpolation, tmp_path):
    """Of any size, as the data module makes images of them, but for the rounding of the interpolation."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    settings = dict(image_size=64, interpolation=interpolation, crop_pct=0.9)
    model.run = {"_image_settings": settings, "_mean": [0.4, 0.5, 0.6], "_std": [0.3, 0.2, 0.1]}
    report = export.export_onnx(model, tmp_path / "model.onnx", (64, 64), preprocess=True)
    assert report.values[0] == (
        "images [batch, height, width, 3]: images, RGB, uint8, channels last; resized, cropped and normalised inside")
    found = facts(report.path)
    assert json.loads(found["resize"])["inside"] is True
    assert (found["mean"], found["layout"]) == ("[0.0, 0.0, 0.0]", "uint8, channels last")
    transform = evaluation_transform(64, interpolation, 0.9, [0.4, 0.5, 0.6], [0.3, 0.2, 0.1])
    for size in [(64, 64), (47, 120), (200, 151)]:
        photo = _photo(*size)
        with torch.inference_mode():
            expected = model(transform(photo)[None])
        logits = run(report.path, torch.from_numpy(np.array(photo))[None])["logits"]
        assert (logits - expected).abs().max() <= 0.03 * expected.abs().max()


def test_segmenters_and_detectors_take_photos(tmp_path):
    torch.manual_seed(0)
    photo = torch.from_numpy(np.array(_photo(64, 96)))
    image = photo.movedim(-1, 0) / 255
    task = SegmentationTask("resnet10t", num_classes=3, head="semantic_fpn", head_channels=16).eval()
    report = export.export_onnx(task.model, tmp_path / "masks.onnx", (64, 96), dynamic_size=True, preprocess=True)
    with torch.inference_mode():
        expected = task(image[None])
    logits = run(report.path, photo[None])["logits"]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert "[batch, 32*rows, 32*columns, 3]: images, RGB, uint8, channels last; normalised" in report.values[0]
    task = detection_task("retinanet", strides=[16, 32])
    report = export.export_onnx(task.model, tmp_path / "boxes.onnx", (64, 96), preprocess=True)
    assert "image [64, 96, 3]" in report.values[0]
    with torch.inference_mode():
        expected, = task([image])
    torch.testing.assert_close(run(report.path, photo)["scores"], expected["scores"], rtol=0, atol=1e-4)


def test_photos_that_cannot_be_taken(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="photos have three channels, the model's images 1: leave preprocess out"):
        export.export_onnx(timm.create_model("resnet10t", in_chans=1), tmp_path / "model.onnx", preprocess=True)
    model = timm.create_model("resnet10t", num_classes=5)
    model.run = {"_image_settings": dict(interpolation="lanczos")}
    with pytest.raises(ValueError, match="ONNX has no interpolation lanczos, only bilinear and bicubic"):
        export.export_onnx(model, tmp_path / "model.onnx", (32, 32), preprocess=True)
    monkeypatch.setitem(photos._MODES, "bicubic", dict(mode="linear"))
    with pytest.raises(RuntimeError, match="resizes photos in another way than PyTorch"):
        export.export_onnx(timm.create_model("resnet10t"), tmp_path / "model.onnx", (32, 32), preprocess=True)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_agent_deit", "test_agent_pvt", "test_agent_swin", "test_agent_cswin",
                                  "test_swin_vsa", "test_transnext", "test_sparsifiner"])
def test_dynamic_size_of_models_with_tables(name, tmp_path):
    """Also the size that the tables are for, which needs no interpolation, is free."""
    import onnxruntime

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    export.export_onnx(model, tmp_path / "model.onnx", dynamic_size=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in [(64, 64), (96, 128), (160, 64)]:
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = model(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_weights_are_constants_of_the_file(tmp_path):
    """So that onnxruntime can quantise them channel by channel."""
    from onnxruntime.quantization import quantize_dynamic

    torch.manual_seed(0)
    export.export_onnx(timm.create_model("test_agent_cswin"), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {item.name for item in graph.initializer}
    assert {node.input[1] for node in graph.node if node.op_type == "Conv"} <= constants
    quantize_dynamic(tmp_path / "model.onnx", tmp_path / "small.onnx", per_channel=True)
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size


class _Deep(nn.Module):
    """A classifier whose export fails far inside."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def forward(self, x):
        if torch.compiler.is_exporting():
            raise RuntimeError("the cause itself")
        return x.mean((2, 3))


def test_the_innermost_cause_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="cannot export this model: the cause itself") as caught:
        export.export_onnx(_Deep(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
