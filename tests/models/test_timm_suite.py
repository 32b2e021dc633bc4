"""What timm's own test-suite demands of a model, for every name that is ours.

timm's wheel has no tests; these are the demands of its ``tests/test_models.py`` (Apache-2.0, Ross Wightman), written
anew: a test here has the name of the one there. What needs values runs on small models, one or more of each family;
what does not, on every model on the meta device. timm's demands on pretrained weights are left out, as the authors'
files are not downloaded in tests.
"""
import math

import pytest
import timm
import torch
from timm import set_scriptable
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import visionattn
from tests.models import test_families
from visionattn.layers import auxiliary_losses

NAMES = [name for family in visionattn.models.__all__ for name in timm.list_models(module=family)]
TAGGED = [tagged for name in NAMES for tagged in timm.list_pretrained(f"{name}.*") or [name]]
SMALL = test_families.SMALL


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


def family(name):
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def shape_of_features(model, size):
    """What ``forward_features`` gives for one image whose last map has this height and width."""
    fmt, channels = getattr(model, "output_fmt", "NCHW"), model.num_features
    if fmt == "NLC":
        return 1, model.num_prefix_tokens + size[0] * size[1], channels
    return (1, *size, channels) if fmt == "NHWC" else (1, channels, *size)


def size_of(model, target):
    """The size at which timm runs a model whose size is not fixed: at most the target, at least the smallest."""
    cfg = model.pretrained_cfg
    if cfg.get("fixed_input_size"):
        return cfg["input_size"]
    least = cfg.get("min_input_size") or (3, 0, 0)
    return tuple(max(least[axis], min(cfg["input_size"][axis], 3 if axis == 0 else target)) for axis in range(3))


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **SMALL.get(name, {}) | kwargs)


def test_every_family_has_a_small_model():
    assert set(map(family, SMALL)) == set(visionattn.models.__all__)


@torch.no_grad()
def test_model_forward(name):
    model = create(name).eval()
    x = torch.randn(1, *size_of(model, 384))
    out = model(x)
    assert out.shape[0] == 1
    assert out.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)


def test_model_backward(name):
    model = create(name, num_classes=42).train()
    count = sum(parameter.numel() for parameter in model.parameters())
    out = model(torch.randn(2, *size_of(model, 128)))
    if isinstance(out, tuple):
        out = torch.cat(out)
    (out.mean() + sum(auxiliary_losses(model).values())).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    assert sum(parameter.grad.numel() for parameter in model.parameters()) == count
    assert out.shape[-1] == 42
    assert out.isfinite().all()


@pytest.mark.parametrize("tagged", TAGGED)
@torch.no_grad()
def test_model_default_cfgs(tagged):
    """Sizes, widths and layer names are what the cfg says, at its input size, with and without classifier and pool."""
    with torch.device("meta"):
        model = timm.create_model(tagged).eval()
        bare = timm.create_model(tagged, num_classes=0, global_pool="")
        cfg, keys, width = model.default_cfg, set(model.state_dict()), model.head_hidden_size
        assert model.num_classes == cfg["num_classes"] > 0
        assert model.num_features > 0
        for layers in (cfg["classifier"], cfg["first_conv"]):
            assert {f"{layer}.weight" for layer in ([layers] if isinstance(layers, str) else layers)} <= keys
        assert model.get_classifier() is model.get_submodule(cfg["classifier"])
        features = model.forward_features(torch.randn(1, *cfg["input_size"]))
        expected = shape_of_features(model, cfg["pool_size"])
        assert features.shape == expected
        assert model.forward_head(features).shape == (1, model.num_classes)
        assert model.forward_head(features, pre_logits=True).shape == (1, width)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model.forward_head(features).shape == (1, width)
        model.reset_classifier(0, "")
        assert model.forward_head(features).shape == bare.forward_head(features).shape == expected
        model.reset_classifier(5, "avg")
        assert model.forward_head(features).shape == (1, 5)


def test_model_forward_torchscript(name):
    with set_scriptable(True):
        model = create(name).eval()
    scripted = torch.jit.script(model)
    for x in (torch.randn(2, *size_of(model, 128)), torch.randn(1, 3, 37, 61)):
        out = scripted(x)
        assert out.isfinite().all()
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "getter"], ids=["forward_features", "forward_intermediates_features"])
@torch.no_grad()
def test_model_forward_features(name, kind):
    options = {"feature_cls": kind} if kind else {}
    model = create(name, features_only=True, **options).eval()
    assert len(model.feature_info.channels()) == len(model.feature_info.reduction())
    assert len(model.feature_info) >= 3
    size = size_of(create(name), 96)
    maps = model(torch.randn(1, *size))
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        height, width = x.shape[1:3] if channels_last else x.shape[2:4]
        assert x.shape[3 if channels_last else 1] == channels
        assert x.shape[0] == 1
        assert math.ceil(size[1] / reduction) + 1 >= height
        assert math.ceil(size[2] / reduction) + 1 >= width
        assert x.isfinite().all()


@torch.no_grad()
def test_model_forward_intermediates(name):
    model = create(name).eval()
    info = timm.models.FeatureInfo(model.feature_info, out_indices=len(model.feature_info))
    size = size_of(model, 96)
    x = torch.randn(1, *size)
    final, maps = model.forward_intermediates(x)
    assert len(maps) >= 3
    spatial = size[1:]
    for level, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=False):
        assert level.shape[1] == channels
        assert level.shape[0] == 1
        assert math.ceil(spatial[0] / reduction) + 1 >= level.shape[2]
        assert math.ceil(spatial[1] / reduction) + 1 >= level.shape[3]
    torch.testing.assert_close(final, model.forward_features(x), rtol=1e-4, atol=1e-5)
    only = model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    torch.testing.assert_close(only, maps)
    model.set_grad_checkpointing()
    again, maps_again = model.forward_intermediates(x)
    torch.testing.assert_close(again, final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps_again, maps, rtol=1e-4, atol=1e-5)


def as_graph(model: nn.Module) -> nn.Module:
    """What torchvision's FX tracer makes of a model, as timm has it made; its outputs are called as its last nodes."""
    options = dict(leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions()),
                   param_shapes_constant=True)
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options, suppress_diff_warning=True)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options,
        suppress_diff_warning=True)


@torch.no_grad()
def test_model_forward_fx(name):
    model = create(name).eval()
    x = torch.randn(1, *size_of(model, 128))
    expected = model(x)
    out, = as_graph(model)(x).values()
    assert torch.equal(out, expected)


def test_model_backward_fx(name):
    model = create(name, num_classes=42).train()
    count = sum(parameter.numel() for parameter in model.parameters())
    x = torch.randn(2, *size_of(model, 128))
    graph = as_graph(model)
    out, = graph(x).values()
    (out.mean() + sum(auxiliary_losses(graph).values())).backward()
    assert [key for key, parameter in graph.named_parameters() if parameter.grad is None] == []
    assert sum(parameter.grad.numel() for parameter in graph.parameters()) == count
    assert out.shape[-1] == 42
    assert out.isfinite().all()
