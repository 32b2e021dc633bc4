"""What users' tools make of models and files: OpenVINO, onnxruntime's quantisation and float16, onnxslim, torchao."""
import copy

import numpy as np
import onnx
import pytest
import timm
import torch

from visionattn.export.onnx_file import onnx_model
from visionattn.models import families

VARIANTS = [(name, options) for family in families().values() for name, options in family.small.items()]
# One quick; the others' own ways of writing attention are what a tracer could stumble on.
TRACED = [pytest.param(name, options, marks=[] if name == "test_efficientvit_cga" else pytest.mark.slow)
          for name, options in VARIANTS
          if name in ("test_efficientvit_cga", "test_transnext", "test_biformer", "test_routing_vit")]


def answers(model, images):
    import onnxruntime

    content = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [next(iter(family.small.items())) for family in families().values()])
def test_files_go_through_tools(name, options, tmp_path):
    import onnxslim
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    onnx.save(onnx_model(timm.create_model(name, num_classes=5, **options), (64, 64))[0], path)
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    expected = answers(str(path), images)

    def error(model):
        return np.abs(answers(model, images) - expected).max() / np.abs(expected).max()

    assert error(onnxslim.slim(onnx.load(path))) <= 1e-4
    blocked = [*DEFAULT_OP_BLOCK_LIST, "ScatterElements"]
    assert error(convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=blocked)) <= 2e-2
    quantize_dynamic(path, tmp_path / "int8.onnx", per_channel=True)
    assert error(str(tmp_path / "int8.onnx")) <= 0.2


@pytest.mark.parametrize(("name", "options"), TRACED)
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


@pytest.mark.slow
@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_torchao_quantises_modules(name, options, activations):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8DynamicActivationInt8WeightConfig() if activations
                           else quantization.Int8WeightOnlyConfig())
    linear = [key for key, module in quantized.named_modules()
              if isinstance(module, torch.nn.Linear) and type(module.weight).__name__ == "Int8Tensor"]
    assert linear == [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with torch.inference_mode():
        expected, actual = (x - x.mean(dim=1, keepdim=True) for x in (model(images), quantized(images)))
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt()
    assert 0 < error <= 0.1
