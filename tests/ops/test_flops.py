"""FLOPs as PyTorch counts them: of BiFormer to four digits, of every op against its definition.

The published figures of all backbones are checked where the list of models is.
"""
import importlib
import math

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import visionattn.models  # noqa: F401  registers the models
from visionattn.layers import BiLevelRoutingAttention
from visionattn.ops import neighborhood_attention, reversed_attention, routed_attention
from visionattn.ops.neighborhood import naive

# More digits of some of the published figures, counted by the authors' tool (fvcore) on their code.
COUNTED = {"biformer_tiny": 2.228, "biformer_small": 4.487, "biformer_base": 9.795, "biformer_stl": 4.590,
           "biformer_stl_nchw": 4.593}


def count(work):
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def count_model(name, device, **options):
    with torch.device(device), torch.no_grad():
        model = timm.create_model(name, **options).eval()
        images = torch.zeros(1, *model.pretrained_cfg["input_size"])
        return count(lambda: model(images))[0]


@pytest.mark.parametrize("name", COUNTED)
def test_counted_flops(name):
    # Their tool adds 5 per element of a LayerNorm, 2 per element of a BatchNorm and 1 per pooled element, which only
    # stl_nchw has (the region means of q and k; the other models take them by mean(), which it does not count).
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    weights = {torch.nn.LayerNorm: 5, torch.nn.BatchNorm2d: 2}
    if name == "biformer_stl_nchw":
        weights[BiLevelRoutingAttention] = 2
    extra = 0

    def add(module, inputs, output):
        nonlocal extra
        extra += next(weight for kind, weight in weights.items() if isinstance(module, kind)) * inputs[0].numel()

    for module in model.modules():
        if isinstance(module, tuple(weights)):
            module.register_forward_hook(add)
    with torch.no_grad():
        flops, _ = count(lambda: model(images))
    assert flops / 2e9 + extra / 1e9 == pytest.approx(COUNTED[name], abs=0.0006)


@pytest.mark.parametrize("name", ["test_dinat", "test_biformer"])
def test_real_tensors_count_the_same(name):
    if name == "test_biformer" and torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        pytest.skip("this PyTorch does not count its dense attention on CPU")
    assert count_model(name, "cpu") == count_model(name, "meta")


# The ops. Triton's operators are called on meta tensors: no kernel runs, PyTorch counts by shapes alone.

def pairs_of(spatial, kernel_size, dilation=1, stride=1, is_causal=False):
    """Query-key pairs of one head and image by the definition."""
    axes = [naive.axis_windows(length, kernel_size, dilation, stride, is_causal)[2].sum().item() for length in spatial]
    return math.prod(axes)


def triton_operator(op):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    return importlib.import_module(f"visionattn.ops.{op}.triton_backend").run


def qkv(*shape, device):
    return torch.randn(3, *shape, device=device, requires_grad=True).unbind()


@pytest.mark.parametrize(("backend", "options"), [
    ("halo", dict(kernel_size=3)),
    ("halo", dict(kernel_size=5, dilation=2)),
    ("triton", dict(kernel_size=5, dilation=2)),
    ("triton", dict(kernel_size=5, stride=3)),
    ("triton", dict(kernel_size=5, dilation=2, stride=3, is_causal=True)),
])
def test_neighborhood_op(backend, options):
    batch, height, width, heads, dim = shape = (2, 11, 13, 2, 16)
    pairs = batch * heads * pairs_of((height, width), **options)
    if backend == "triton":
        attention, (q, k, v) = triton_operator("neighborhood"), qkv(*shape, device="meta")
        both_axes = {name: (value, value) for name, value in (
            dict(dilation=1, stride=1, is_causal=False) | options).items()}
        flops, (out, _) = count(lambda: attention(
            q, k, v, **both_axes, bias=None, scale=1., additional_keys=None, additional_values=None, return_lse=False))
    else:
        q, k, v = qkv(*shape, device="cpu")
        flops, out = count(lambda: neighborhood_attention(q, k, v, backend=backend, **options))
    assert flops == 4 * dim * pairs
    # Scores again, then the gradients of values, probabilities, queries and keys.
    assert count(lambda: torch.autograd.grad(out.sum(), (q, k, v)))[0] == 10 * dim * pairs


@pytest.mark.parametrize("backend", ["gathered", "triton"])
def test_routed_op(backend):
    batch, height, width, heads, dim = shape = (2, 6, 8, 2, 16)
    routes, region = torch.rand(batch, 1, 4, 4).topk(3).indices, (3, 4)
    pairs = batch * heads * height * width * 3 * math.prod(region)
    if backend == "triton":
        attention, (q, k, v) = triton_operator("routed"), qkv(*shape, device="meta")
        flops, out = count(lambda: attention(q, k, v, routes.to("meta"), region, region, 1., None))
    else:
        q, k, v = qkv(*shape, device="cpu")
        flops, out = count(lambda: routed_attention(q, k, v, routes, region, backend=backend))
    assert flops == 4 * dim * pairs
    assert count(lambda: torch.autograd.grad(out.sum(), (q, k, v)))[0] == 10 * dim * pairs


def test_reversed_op():
    batch, tokens, heads, dim = shape = (2, 48, 2, 16)
    q, k, v = qkv(*shape, device="cpu")
    for backend in ("blocked", "naive"):
        flops, _ = count(lambda backend=backend: reversed_attention(q, k, v, backend=backend))
        assert flops == 4 * dim * batch * heads * tokens ** 2


def test_a_counter_made_before_the_first_call_knows_all_operators():
    for name in ("neighborhood_slab", "neighborhood_triton", "routed_gathered", "routed_triton", "aggregated_shifted",
                 "aggregated_triton"):
        for direction in ("", "_backward"):
            assert getattr(torch.ops.visionattn, name + direction) in flop_registry
