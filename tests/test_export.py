"""Export: the file agrees with eager, uses standard operators, and a wrong file is not handed out."""
import onnx
import pytest
import timm
import torch
from torch import nn

from visionattn import export


@pytest.mark.parametrize("name", ["test_biformer", "test_dinat", "test_efficientvit_cga", "test_vit"])
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
    ("test_biformer", {}), ("test_dinat", {"dilations": [[2]] * 4}), ("test_efficientvit_cga", {"depths": (1, 1, 1)})])
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
