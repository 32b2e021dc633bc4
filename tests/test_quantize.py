"""Quantisation: small files that say what they are, near to float; which layers stay float; what cannot calibrate."""
import json

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

from visionattn import export
from visionattn.export import Calibration, quantize_onnx, quantize_openvino
from visionattn.export.quantizable import layers_of
from visionattn.tasks import SegmentationTask

from .test_export import detection_task, run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 photos in two classes: dark and bright ones."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(24):
        name = ("dark", "bright")[i % 2]
        (folder / name).mkdir(exist_ok=True)
        grid = random.integers(0, 128, (6, 6, 3)) + 127 * (i % 2)
        Image.fromarray(grid.astype(np.uint8)).resize((80, 72), 2).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An exported classifier of dark and bright photos."""
    torch.manual_seed(0)
    model = timm.create_model("test_biformer", num_classes=2, depths=(1, 1, 1, 1))
    model.run = {"class_names": ["bright", "dark"]}
    return export.export_onnx(model, tmp_path_factory.mktemp("classifier") / "float.onnx", (64, 64)).path


def facts(proto):
    return {item.key: item.value for item in proto.metadata_props}


def test_onnx(classifier, photos, tmp_path):
    images = Calibration(classifier, photos)
    report = quantize_onnx(classifier, tmp_path / "sub" / "int8.onnx", images)
    assert (report.calibrated, report.judged, report.float_layers) == (12, 12, [])
    assert report.error <= 0.1
    assert report.agreement >= 0.9
    before, after = report.accuracy
    assert abs(before - after) <= 1 - report.agreement + 1e-9
    before, after = onnx.load(classifier), onnx.load(tmp_path / "sub" / "int8.onnx")
    said = facts(after)
    assert json.loads(said.pop("quantization"))["quantized_layers"] == report.layers == len(layers_of(before))
    assert said == facts(before)
    for old, new in zip((*before.graph.input, *before.graph.output), (*after.graph.input, *after.graph.output),
                        strict=True):
        assert old == new  # names, descriptions, the free batch
    weights = sum(item.dims[0] * item.dims[1] for item in after.graph.initializer if len(item.dims) == 2
                  and item.data_type == onnx.TensorProto.INT8)
    assert weights > 50_000
    assert {node.domain for node in after.graph.node} <= {"", "ai.onnx"}
    # The file alone gives the errors that the report says, also to several images at once.
    judged = np.concatenate(images[images.calibrating:])
    actual, expected = (run(path, torch.from_numpy(judged))["logits"] for path in (
        tmp_path / "sub" / "int8.onnx", classifier))
    actual, expected = (x - x.mean(dim=1, keepdim=True) for x in (actual, expected))
    assert ((actual - expected).square().sum() / expected.square().sum()).sqrt() == pytest.approx(report.error, 0.05)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_onnx(tmp_path / "sub" / "int8.onnx", tmp_path / "twice.onnx", images)


def test_layers_stay_float_where_the_limit_asks_for_it(classifier, photos, tmp_path):
    images = Calibration(classifier, photos)
    whole = quantize_onnx(classifier, tmp_path / "whole.onnx", images)
    report = quantize_onnx(classifier, tmp_path / "int8.onnx", images, whole.error * 0.7)
    assert report.error <= whole.error * 0.7
    assert 0 < len(report.float_layers) < whole.layers
    assert whole.size_ratio < report.size_ratio < 1
    kept = json.loads(facts(onnx.load(tmp_path / "int8.onnx"))["quantization"])["float_layers"]
    assert kept == report.float_layers


def test_openvino(classifier, photos, tmp_path):
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    model, report = quantize_openvino(classifier, Calibration(classifier, photos))
    assert report.error <= 0.1
    assert report.float_layers == []  # depthwise convolutions among them, whose weights nncf stores as float
    openvino.save_model(model, tmp_path / "model.xml")
    again = openvino.Core().read_model(tmp_path / "model.xml")
    assert again.get_rt_info(["visionattn", "task"]).astype(str) == "classification"
    assert json.loads(again.get_rt_info(["visionattn", "quantization"]).astype(str))["method"] == "nncf"
    assert any(op.get_type_name() == "FakeQuantize" for op in again.get_ops())


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["fcos", "mask_rcnn"])
def test_detector(detector, photos, tmp_path):
    """Its network is quantised, its search is not."""
    torch.manual_seed(0)
    model = detection_task(detector, strides=[16, 32]).model
    path = export.export_onnx(model, tmp_path / "float.onnx", (64, 96)).path
    report = quantize_onnx(path, tmp_path / "int8.onnx", Calibration(path, photos))
    assert report.error <= 0.1
    before, after = onnx.load(path).graph, onnx.load(tmp_path / "int8.onnx").graph
    assert [x.name for x in before.output] == [x.name for x in after.output]
    inputs = {value for node in after.node if node.op_type == "QuantizeLinear" for value in node.input}
    assert inputs
    search = {value for node in before.node if not node.name.startswith("network/") for value in node.output}
    assert not inputs & search
    assert report.size_ratio < 0.8


def test_segmenter_of_photos(photos, tmp_path):
    """With the preparation of photos inside."""
    torch.manual_seed(0)
    task = SegmentationTask("resnet10t", num_classes=3, head="semantic_fpn", head_channels=16).eval()
    path = export.export_onnx(task.model, tmp_path / "float.onnx", (64, 96), preprocess=True).path
    images = Calibration(path, photos)
    assert images[0].dtype == np.uint8
    assert images[0].shape == (1, 64, 96, 3)
    report = quantize_onnx(path, tmp_path / "int8.onnx", images)
    assert report.agreement > 0.9
    assert report.size_ratio < 0.35
    before, after = (onnx.load(file).graph.node for file in (path, tmp_path / "int8.onnx"))
    assert "BatchNormalization" in {node.op_type for node in before}
    assert "BatchNormalization" not in {node.op_type for node in after}  # folded into the convolutions
    makers = {value: node.op_type for node in after for value in node.output}
    assert "DequantizeLinear" not in {makers[node.input[0]] for node in after if node.op_type == "Relu"}
    assert "Add" in {makers[node.input[0]] for node in after if node.op_type == "Relu"}  # of no convolution alone


def test_large_constants_cost_no_time(photos, tmp_path):
    """Runtimes compute them once, when they load the file."""
    import onnxruntime

    torch.manual_seed(0)
    model = timm.create_model("vitrpb_small", num_classes=2, embed_dim=24, depth=1)
    path = export.export_onnx(model, tmp_path / "float.onnx", (64, 64)).path
    report = quantize_onnx(path, tmp_path / "int8.onnx", Calibration(path, photos))
    assert report.float_layers == []
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    file, loaded = (onnx.load(tmp_path / name).graph for name in ("int8.onnx", "loaded.onnx"))
    assert max(np.prod(item.dims) for item in file.initializer if item.data_type == onnx.TensorProto.FLOAT) < 1024
    assert any(np.prod(item.dims) >= 1024 for item in loaded.initializer if item.data_type == onnx.TensorProto.FLOAT)
    weights = {item.name for item in loaded.initializer}
    assert not [node for node in loaded.node if node.op_type in ("DequantizeLinear", "Cast")
                and node.input[0] in weights]


def test_folders_that_cannot_calibrate(classifier, photos, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder of images"):
        Calibration(classifier, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds 0 images to calibrate with, 8 are needed"):
        Calibration(classifier, tmp_path)
    for number, file in enumerate(sorted(photos.rglob("*.png"))[:9]):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    (tmp_path / "0.png").write_bytes(b"not an image")
    images = Calibration(classifier, tmp_path)
    assert "8 images are used; 1 cannot be read, the first is" in caplog.text
    assert images.labels is None
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 7 images.*; 2 cannot be read, the first is .*\.png: it is"):
        Calibration(classifier, tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2, in_chans=4)
    path = export.export_onnx(model, tmp_path / "four.onnx").path
    with pytest.raises(ValueError, match=r"holds 0 images.*it has 3 channels, not the 4 of in_chans"):
        Calibration(path, photos)


def test_command_line(photos, tmp_path, capsys):
    out = tmp_path / "int8.onnx"
    export.main(["--model", "test_vit", "--num-classes", "5", "--int8", str(photos), "--int8-images", "10", "--out",
                 str(out)])
    printed = capsys.readouterr().out
    assert "calibrated with 10 images" in printed
    assert "14 other images (limit 0.1)" in printed
    assert "agrees with float" in printed
    assert facts(onnx.load(out))["task"] == "classification"
