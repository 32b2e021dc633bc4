"""What users' own tools make of our models and files: OpenVINO, onnxruntime's quantisation and float16, onnxslim."""
import numpy as np
import onnx
import pytest
import timm
import torch

from visionattn import export
from visionattn.models import families

# One quick; the others' own ways of writing attention are what the tools could stumble on.
VARIANTS = [pytest.param(name, options, marks=[] if name == "test_efficientvit_cga" else pytest.mark.slow)
            for family in families().values() for name, options in family.small.items()
            if name in ("test_efficientvit_cga", "test_transnext", "test_biformer", "test_routing_vit")]


def answers(model, images):
    import onnxruntime

    content = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_files_go_through_tools(name, options, tmp_path):
    import onnxslim
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    torch.manual_seed(0)
    path = export.export_onnx(timm.create_model(name, num_classes=5, **options), tmp_path / "model.onnx", (64, 64)).path
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    expected = answers(str(path), images)

    def error(model):
        return np.abs(answers(model, images) - expected).max() / np.abs(expected).max()

    assert error(onnxslim.slim(onnx.load(path))) <= 1e-4
    blocked = [*DEFAULT_OP_BLOCK_LIST, "ScatterElements"]
    assert error(convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=blocked)) <= 2e-2
    quantize_dynamic(path, tmp_path / "int8.onnx", per_channel=True)
    assert error(str(tmp_path / "int8.onnx")) <= 0.2


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_openvino_converts_modules(name, options):
    import openvino

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = model(images)
    converted = openvino.convert_model(model, example_input=images[:1])
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    difference = torch.from_numpy(compiled(images.numpy())[0]) - expected
    assert difference.abs().max() <= 1e-4 * expected.abs().max()
