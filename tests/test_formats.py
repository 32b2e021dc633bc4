"""Export to other runtimes: files agree with eager and carry the metadata; what cannot be done is said in a line."""
import json

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from torch import nn

from visionattn import export
from visionattn.dense import DenseBackbone
from visionattn.export import check, formats, tensorrt, weights_sha256
from visionattn.export.constants import with_constants
from visionattn.heads.detector import build_detector


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=5).eval()


def answers(model, images):
    with torch.inference_mode():
        return model(images).numpy()


@pytest.mark.parametrize(("format", "suffix"), [
    ("openvino", ".xml"), ("torch", ".pt2"), ("tensorrt", ".onnx"), ("executorch", ".pte"), ("litert", ".tflite"),
    ("coreml", ".mlpackage"), pytest.param("aoti", ".pt2", marks=pytest.mark.slow)])
def test_format(format, suffix, model, tmp_path, capsys):
    """The file is checked and has the metadata; it gives eager's answers to whoever opens it with the runtime alone."""
    for package in formats.FORMATS[format].packages:
        pytest.importorskip(package)
    out = tmp_path / "inner" / f"model{suffix}"
    report = export.export_model(model, out, format, (64, 96))
    images = torch.randn(1, 3, 64, 96)
    found, logits = _opened(format, out, images)
    assert found["weights_sha256"] == weights_sha256(model)
    assert json.loads(found["image_size"]) == [64, 96]
    export.print_report(report)
    printed = capsys.readouterr().out
    assert "images [" in printed
    assert "softmax makes probabilities" in printed
    if format == "coreml":
        assert "not run: Core ML" in printed
        return
    assert "latency" in printed
    assert report.difference <= 1e-4
    assert np.abs(logits - answers(model, images)).max() <= 1e-4 * np.abs(logits).max()
    if format == "tensorrt":
        assert "trtexec --onnx=model.onnx" in printed


def _opened(format, path, images):
    """The metadata and the logits of a file, with the means of its runtime."""
    if format == "openvino":
        import openvino

        file = openvino.Core().read_model(path)
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert [list(x.names) for x in (*file.inputs, *file.outputs)] == [["images"], ["logits"]]
        return {key: value.value for key, value in file.rt_info["visionattn"].items()}, compiled(images.numpy())[0]
    if format == "torch":
        extra = {"visionattn.json": ""}
        program = torch.export.load(path, extra_files=extra)
        return _text(extra["visionattn.json"]), program.module()(images).detach().numpy()
    if format == "aoti":
        package = torch._inductor.aoti_load_package(str(path))
        return _text(package.get_metadata()["visionattn"]), package(images).numpy()
    if format == "executorch":
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        found, = program.load_method("metadata").execute(())
        return _text(found), program.load_method("forward").execute((images,))[0].numpy()
    if format == "litert":
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_litert.tools import flatbuffer_utils

        file = flatbuffer_utils.read_model(str(path))
        entry, = (item for item in file.metadata if item.name == b"visionattn")
        run = Interpreter(str(path)).get_signature_runner()
        logits, = run(**{next(iter(run.get_input_details())): images.numpy()}).values()
        return _text(bytes(file.buffers[entry.buffer].data)), logits
    if format == "coreml":
        import coremltools

        package = coremltools.models.MLModel(str(path), skip_model_load=True)
        return _text(package.user_defined_metadata["visionattn"]), None
    import onnxruntime

    found = {item.key: item.value for item in onnx.load(path).metadata_props}
    return found, onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]


def _text(content):
    """Metadata from JSON, its values as text."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in json.loads(content).items()}


def test_a_program_of_any_size(model, tmp_path):
    report = export.export_model(model, tmp_path / "model.pt2", "torch", (64, 96), dynamic_size=True)
    assert report.values[0].startswith("images [batch, 3, 32*rows, 32*columns]: ")
    images = torch.randn(4, 3, 160, 32 * 3)
    logits = torch.export.load(report.path).module()(images).detach().numpy()
    assert np.abs(logits - answers(model, images)).max() <= 1e-4 * np.abs(logits).max()


class _Noisy(nn.Module):
    """A classifier whose eager answers are not what is captured of it."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.head(x.mean((2, 3)))
        return x if torch.compiler.is_exporting() else 1.001 * x


@pytest.mark.parametrize(("format", "suffix"), [("openvino", ".xml"), ("torch", ".pt2"), ("tensorrt", ".onnx")])
def test_a_file_that_differs_is_removed(format, suffix, tmp_path):
    with pytest.raises(RuntimeError, match=r"differs from PyTorch by 1.0e-03 .* it was removed"):
        export.export_model(_Noisy(), tmp_path / f"model{suffix}", format)
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_have(model, tmp_path, monkeypatch):
    detector = build_detector("fcos", DenseBackbone("resnet10t", "detection"), 2, channels=64, min_size=64)
    for message, subject, format, suffix, options in [
            ("format must be one of onnx, openvino, torch", model, "tflite", ".tflite", {}),
            ("a file of format openvino ends in .xml, model.onnx does not", model, "openvino", ".onnx", {}),
            ("format torch has no detectors: take onnx, openvino or tensorrt", detector, "torch", ".pt2", {}),
            ("preprocess is for files that are made from the ONNX", model, "torch", ".pt2", dict(preprocess=True)),
            ("lose too much in float16: leave fp16 out", detector, "onnx", ".onnx", dict(fp16=True))]:
        with pytest.raises(ValueError, match=message):
            export.export_model(subject, tmp_path / f"model{suffix}", format, **options)
    with pytest.raises(RuntimeError, match=r"TensorRT 10.15 lacks .*no antialiased Resize; no cubic Resize"):
        export.export_model(model, tmp_path / "model.onnx", "tensorrt", (64, 64), preprocess=True)
    monkeypatch.setitem(formats.FORMATS, "litert", formats.FORMATS["litert"]._replace(packages=["no_such_package"]))
    with pytest.raises(ModuleNotFoundError, match=r"format litert needs the package no_such_package: pip install"):
        export.export_model(model, tmp_path / "model.tflite", "litert")
    monkeypatch.setitem(formats.FORMATS, "executorch", formats.FORMATS["executorch"]._replace(packages=[]))
    with pytest.raises(ValueError, match="has one image size: leave dynamic_size out"):
        export.export_model(model, tmp_path / "model.pte", "executorch", dynamic_size=True)


@pytest.mark.slow
def test_simplified_and_in_float16(model, tmp_path, capsys):
    """Metadata and descriptions survive, answers too; the weights take half the room."""
    import onnxruntime

    plain = export.export_model(model, tmp_path / "plain.onnx", image_size=(64, 64))
    export.main(["--model", "resnet10t", "--num-classes", "5", "--img-size", "64", "--simplify", "--fp16", "--out",
                 str(tmp_path / "cli.onnx")])
    printed = capsys.readouterr().out
    assert "(limit 2e-02)" in printed
    assert "same class          100.0%" in printed
    report = export.export_model(model, tmp_path / "small.onnx", image_size=(64, 64), simplify=True, fp16=True)
    assert 1e-5 < report.difference <= 2e-2
    assert report.nodes < plain.nodes + 5
    assert report.megabytes < 0.55 * plain.megabytes
    assert report.values == plain.values
    first, second = ({item.key: item.value for item in onnx.load(path).metadata_props}
                     for path in (plain.path, report.path))
    assert first == second
    session = onnxruntime.InferenceSession(report.path)
    assert [x.type for x in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2


class Counted(nn.Module):
    """Adds numbers that depend on the images' shape alone, some of them made by writing in place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        count = torch.arange(x.shape[-1], dtype=x.dtype) // 2 + torch.eye(x.shape[-1]).sum(0)
        count += torch.ones_like(x[0, 0, 0]) + x.new_full((1,), 2.0)
        total = x.new_zeros(x.shape[-1])
        total[1:].add_(x.sum((0, 1, 2))[1:])
        return x * self.weight + count + total


def test_what_depends_on_no_input_becomes_constants():
    model, images = Counted(), torch.randn(1, 3, 5, 4)
    program = torch.export.export(model, (images,))
    folded = with_constants(program)
    again = torch.export.export(folded, (images,))
    names = {node.target._opname for node in again.graph.nodes if node.op == "call_function"}
    assert names.isdisjoint({"arange", "eye", "floor_divide", "ones_like", "new_full", "new_zeros"})
    for x in (images, torch.randn(1, 3, 5, 4), images):  # what was computed before has no part in it
        assert torch.equal(folded(x), model(x))
    model.weight.data.zero_()
    assert torch.equal(folded(images), model(images))  # weights are no constants


class Squared(nn.Module):
    """Squares and Euclidean norms, and powers that are neither."""

    def forward(self, x):
        units = nn.functional.normalize(x, dim=-1) + torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return units + x.square() + x ** 2 + x.abs() ** 1.5 + torch.linalg.vector_norm(x, 1, -1, keepdim=True)


def test_squares_become_products():
    model, images = Squared(), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    folded = with_constants(torch.export.export(model, (images,)))
    powers = [node.args[1] for node in folded.graph.nodes if getattr(node.target, "_opname", "") == "pow"]
    assert powers == [1.5]
    torch.testing.assert_close(folded(images), model(images), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_opset_17(model, tmp_path):
    """Reductions and splits are written as that opset writes them."""
    torch.manual_seed(0)
    split = timm.create_model("test_efficientvit_cga", num_classes=5)
    report = export.export_model(split, tmp_path / "model.onnx", image_size=(64, 64), opset=17)
    assert report.opset == 17
    nodes = onnx.load(report.path).graph.node
    assert "Split" in {node.op_type for node in nodes}
    assert not any(item.name in ("num_outputs", "noop_with_empty_axes") for node in nodes for item in node.attribute)
    with pytest.raises(RuntimeError, match="this model has no file of opset 17: Unrecognized attribute: antialias"):
        export.export_model(model, tmp_path / "photos.onnx", image_size=(64, 64), opset=17, preprocess=True)


def test_what_tensorrt_lacks():
    def node(kind, outputs=1, **attributes):
        return helper.make_node(kind, ["x"], [f"y{i}" for i in range(outputs)], **attributes)

    fine = [node("Conv"), node("Resize", mode="linear"), node("ScatterND"), node("TopK"),
            node("MaxPool", dilations=[1, 1])]
    assert tensorrt.lacking(fine) == []
    assert tensorrt.lacking([node("Det"), node("Unique"), node("Det")]) == ["no operator Det", "no operator Unique"]
    assert tensorrt.lacking([
        node("Resize", mode="cubic", antialias=1), node("ScatterND", reduction="add"), node("TopK", sorted=0),
        node("MaxPool", outputs=2), node("AveragePool", dilations=[2, 2])]) == [
            "no antialiased Resize", "no cubic Resize", "no ScatterND that adds", "no unsorted TopK",
            "no dilated MaxPool or one that gives indices", "no dilated AveragePool or one that gives indices"]


def test_photographs():
    """Of any channels, in [0, 1], the same from the same generator, and no two alike."""
    images, again = (check.photographs(4, 4, 40, 60, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert images.shape == (4, 4, 40, 60)
    assert torch.equal(images, again)
    assert 0 <= images.min() < 0.2
    assert 0.8 < images.max() <= 1
    assert all(image.std() > 0.05 for image in images)
    assert torch.equal(images[:, 0], images[:, 3])
    assert len({image.sum().item() for image in images}) == 4
