"""Every family in PyTorch's graphs: traced, scripted and exported, with standard operators only."""
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401  (registers the zoo in timm)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")

FAMILIES = [name for name in timm.list_models("test_*")
            if timm.model_entrypoint(name).__module__.startswith("visionattn.")]
# Maps that are no larger than a window, and of sizes that nothing divides.
OTHERS = {
    "dinat_s_tiny": ((96, 96), {}), "vitrpb_small": ((96, 128), {"depth": 2}),
    "dinat_iso_small": ((96, 128), {"depth": 2}),
    "test_dinat": ((75, 100), {}), "test_biformer": ((100, 75), {}), "test_agent_swin": ((100, 75), {}),
    "test_agent_cswin": ((100, 75), {}), "test_agent_pvt": ((64, 96), {}), "test_routing_vit": ((100, 75), {}),
    "test_efficientvit_cga": ((100, 75), {}), "test_agent_deit": ((70, 90), {}),
    "test_smt": ((100, 75), {}), "test_fcaformer": ((100, 75), {}), "test_swin_vsa": ((100, 75), {}),
    "test_vitaev2_vsa": ((100, 75), {}), "test_transnext": ((100, 75), {}),
    "test_moh_transnext": ((75, 100), {}), "test_mobilenetv2_ulsam": ((75, 100), {}), "test_flowformer": ((100, 75), {}),
    "test_dependency_vit_lite": ((60, 90), {}), "test_maformer": ((100, 75), {"downsample": "linear"}),
    "test_favit": ((100, 75), {}), "test_sparsifiner": ((60, 90), {"queries_per_list": 12}),
}


def build(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    return model, model.pretrained_cfg["input_size"][1:]


def trace(model, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes, which a trace is for
        return torch.jit.trace(model, images)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_trace(name, grad):
    """Also without ``no_grad``, where PyTorch compares a graph with gradients with one without."""
    model, size = build(name)
    with torch.set_grad_enabled(grad):
        traced = trace(model, torch.randn(2, 3, *size))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {kind.partition("::")[0] for kind in kinds} <= {"aten", "prim"}
    assert "aten::mT" not in kinds  # for which other tools have no rule
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        same(traced(images), model(images))


@pytest.mark.parametrize("name", OTHERS)
def test_trace_of_other_sizes(name):
    size, options = OTHERS[name]
    model, _ = build(name, **options)
    traced, images = trace(model, torch.randn(1, 3, *size)), torch.randn(2, 3, *size)
    with torch.no_grad():
        same(traced(images), model(images))


def test_trace_of_maps():
    model, _ = build("test_dinat", features_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for actual, expected in zip(traced(images), model(images), strict=True):
            same(actual, expected)


def test_a_trace_does_not_change_later_calls():
    model, size = build("test_agent_swin")
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(images)
        trace(model, images)
        assert torch.equal(model(images), expected)


def test_traced_files_open_without_this_package(tmp_path):
    expected = {}
    for name in ("test_biformer", "test_dinat", "test_swin_vsa"):  # others hold no other operators, see test_trace
        model, size = build(name)
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected[name] = (images, model(images))
        trace(model, images).save(tmp_path / f"{name}.pt")
    torch.save(expected, tmp_path / "expected.pth")
    code = ("import sys, torch\n"
            "for name, (images, logits) in torch.load(sys.argv[1] + '/expected.pth').items():\n"
            "    found = torch.jit.load(f'{sys.argv[1]}/{name}.pt')(images)\n"
            "    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max(), name\n"
            "assert 'visionattn' not in sys.modules and 'timm' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_scripted_models_run_and_say_what_can_be_saved(name, wrapped, tmp_path):
    model, size = build(name, scriptable=True)
    images = torch.randn(2, 3, *size)
    scripted = torch.jit.script(nn.Sequential(model, nn.Softmax(1)) if wrapped else model)
    if not wrapped:
        with torch.no_grad():
            same(scripted(images), model(images))
    try:
        scripted.save(tmp_path / "model.pt")
    except RuntimeError as error:
        message = " ".join(str(error).split()[:20])
    else:
        return same(torch.jit.load(tmp_path / "model.pt")(images), scripted(images))
    assert "use visionattn export, or trace the model" in message


@pytest.mark.parametrize(("name", "strict"), [
    *((name, False) for name in FAMILIES), ("test_dinat", True),
    *(pytest.param(name, True, marks=pytest.mark.slow) for name in FAMILIES if name != "test_dinat")])
def test_export_has_standard_operators(name, strict):
    model, size = build(name)
    program = torch.export.export(model, (torch.randn(2, 3, *size),), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert all(target.startswith("aten.") or "getitem" in target for target in targets), targets
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        same(program.module()(images), model(images))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "test_agent_pvt" else pytest.mark.slow)
                                  for name in FAMILIES])
@pytest.mark.parametrize("grad", [True, False])
def test_torch_onnx_export_called_directly(name, grad, tmp_path):
    import onnxruntime

    model, size = build(name)
    images = torch.randn(2, 3, *size)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = model(images)
    same(torch.from_numpy(found), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_agent_pvt", "test_biformer", "test_dinat", "test_routing_vit"])
def test_openvino_converts_modules(name):
    """As its guide shows: by a trace of the module with an example."""
    openvino = pytest.importorskip("openvino")  # which the oldest versions go without
    model, size = build(name)
    images = torch.randn(1, 3, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=images)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.inference_mode():
        same(torch.from_numpy(next(iter(compiled(images.numpy()).values()))), model(images))
