"""Neighborhood attention: goldens, the definition spelled out, and every backend against the naive form."""
import copy
import itertools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from visionattn.ops import BackendError, neighborhood_attention
from visionattn.ops.kept import release_memory, workspace
from visionattn.ops.neighborhood import naive

EXAMPLES = int(os.environ.get("VISIONATTN_HYPOTHESIS_EXAMPLES", 500))
GOLDEN = golden.load("neighborhood_ops")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(
        spatial, kernel_size, dilation=1, stride=1, is_causal=False, bias=False, batch=2, heads=2, kv_heads=None, dim=8,
        value_dim=None, extra=0, dtype=torch.float64, return_lse=False, scale=None):
    """Random tensors (all of them want gradients) and the options of one call."""
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    sizes = (kernel_size,) * len(spatial) if isinstance(kernel_size, int) else kernel_size

    def tensor(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    tensors = {
        "q": tensor(batch, *spatial, heads, dim),
        "k": tensor(batch, *spatial, kv_heads, dim),
        "v": tensor(batch, *spatial, kv_heads, value_dim),
    }
    if bias:
        tensors["bias"] = tensor(heads, *(2 * size - 1 for size in sizes))
    if extra:
        tensors["additional_keys"] = tensor(batch, extra, kv_heads, dim)
        tensors["additional_values"] = tensor(batch, extra, kv_heads, value_dim)
    options = {
        "kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal, "scale": scale,
        "return_lse": return_lse,
    }
    return tensors, options


def outputs_and_gradients(tensors, options, backend):
    """The outputs, and the gradients of a fixed random combination of them, by name."""
    results = neighborhood_attention(**tensors, **options, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in results)
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {**dict(zip(("out", "lse"), results, strict=False)), **dict(zip(tensors, gradients, strict=True))}


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype or expected.dtype == torch.float64
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).square().mean() / expected.square().mean().clamp(min=1e-30)).sqrt().item()


def assert_like_naive(tensors, options, tolerance=1e-12):
    actual = outputs_and_gradients(tensors, options, "halo")
    expected = outputs_and_gradients(tensors, options, "naive")
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


# The definition.

@pytest.mark.parametrize("table", GOLDEN["axis_tables"])
def test_axis_windows_match_golden(table):
    position, _, valid = naive.axis_windows(
        table["L"], table["kernel_size"], table["dilation"], table["stride"], table["causal"])
    keys = [row[ok].tolist() for row, ok in zip(position, valid, strict=True)]
    assert keys == table["keys"]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("backend", ["naive", "halo"])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden(case, backend, return_lse):
    seed, shape, kv_heads, value_dim = case["seed"], case["q_shape"], case["kv_heads"], case["dim_v"]
    batch, *spatial, heads, dim = shape
    tensors = {
        "q": golden.random(seed, shape),
        "k": golden.random(seed + 1, [batch, *spatial, kv_heads, dim]),
        "v": golden.random(seed + 2, [batch, *spatial, kv_heads, value_dim]),
    }
    if case["rpb"]:
        tensors["bias"] = 0.3 * golden.random(seed + 3, [heads, *(2 * size - 1 for size in case["kernel_size"])])
    if case["additional_kv"]:
        tensors["additional_keys"] = golden.random(seed + 5, [batch, case["additional_kv"], kv_heads, dim])
        tensors["additional_values"] = golden.random(seed + 6, [batch, case["additional_kv"], kv_heads, value_dim])
    for x in tensors.values():
        x.requires_grad_()
    options = {name: case[name] for name in ("kernel_size", "dilation", "stride", "is_causal", "scale")}
    result = neighborhood_attention(**tensors, **options, backend=backend, return_lse=return_lse)
    out = result[0] if return_lse else result
    golden.assert_matches(out, case["out"], 1e-11)
    if return_lse:
        golden.assert_matches(result[1], case["lse"], 1e-11)
    if "grad" in case:
        gradients = torch.autograd.grad(out, list(tensors.values()), golden.random(seed + 4, out.shape))
        names = {"q": "dq", "k": "dk", "v": "dv", "bias": "drpb"}
        assert {names[name] for name in tensors} == set(case["grad"])
        for name, gradient in zip(tensors, gradients, strict=True):
            golden.assert_matches(gradient, case["grad"][names[name]], 1e-11)


def loop(q, k, v, kernel_size, dilation, stride, is_causal, bias):
    """The definition as loops over queries and keys, one batch and one head at a time. Slow."""
    def window(x, length, kernel, dil, step, causal):
        residue, index = x % dil, x // dil
        members = len(range(residue, length, dil))
        leader = min(step * (index // step) + (step - 1 if causal else step // 2), members - 1)
        if causal:
            return [j * dil + residue for j in range(max(leader - kernel + 1, 0), index + 1)]
        start = min(max(leader - kernel // 2, 0), members - kernel)
        return [j * dil + residue for j in range(start, start + kernel)]

    spatial = q.shape[1:-2]
    out = torch.empty_like(v)
    for query in itertools.product(*map(range, spatial)):
        axes = zip(query, spatial, kernel_size, dilation, stride, is_causal, strict=True)
        keys = list(itertools.product(*(window(*axis) for axis in axes)))
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[-2])):
            scores = torch.stack([q[(b, *query, h)] @ k[(b, *key, h)] * q.shape[-1] ** -0.5 for key in keys])
            if bias is not None:
                scores = scores + torch.stack([
                    bias[(h, *((key[i] - x) // dilation[i] + kernel_size[i] - 1 for i, x in enumerate(query)))]
                    for key in keys])
            out[(b, *query, h)] = scores.softmax(0) @ torch.stack([v[(b, *key, h)] for key in keys])
    return out


@pytest.mark.parametrize("backend", ["naive", "halo"])
@pytest.mark.parametrize(("spatial", "kernel_size", "dilation", "stride", "is_causal", "bias"), [
    ((11,), (3,), (2,), (1,), (False,), True),
    ((13,), (4,), (2,), (3,), (True,), False),
    ((7, 9), (3, 3), (1, 2), (1, 1), (False, False), True),
    ((8, 7), (4, 5), (2, 1), (3, 2), (False, True), False),
    ((4, 5, 6), (3, 2, 3), (1, 2, 1), (1, 1, 3), (False, True, False), False),
    ((4, 5, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False), True),
])
def test_definition_as_loops(spatial, kernel_size, dilation, stride, is_causal, bias, backend):
    tensors, _ = make(spatial, kernel_size, bias=bias, batch=1, dim=4)
    options = kernel_size, dilation, stride, is_causal
    q, k, v, table = (tensors[name].detach() if name in tensors else None for name in ("q", "k", "v", "bias"))
    expected = loop(q, k, v, *options, table)
    actual = neighborhood_attention(q, k, v, *options, bias=table, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_window_of_the_whole_map_is_attention():
    tensors, options = make((7, 5), (7, 5))
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in tensors.values())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (7, 5))
    torch.testing.assert_close(neighborhood_attention(**tensors, **options), expected, rtol=0, atol=1e-12)


# Tiled against naive.

CASES = {
    "one_dim": dict(spatial=(37,), kernel_size=5, bias=True),
    "one_dim_wide": dict(spatial=(300,), kernel_size=63, batch=1),
    "one_dim_dilated": dict(spatial=(50,), kernel_size=7, dilation=3, bias=True, batch=3),
    "odd_map": dict(spatial=(23, 17), kernel_size=7, bias=True, batch=3),
    "batch_1": dict(spatial=(9, 31), kernel_size=3, batch=1, heads=3),
    "uneven_kernel": dict(spatial=(21, 19), kernel_size=(3, 9), bias=True),
    "kernel_of_an_axis": dict(spatial=(5, 40), kernel_size=5, bias=True),
    "even_kernel": dict(spatial=(19, 22), kernel_size=(4, 6)),
    "dilation_divides": dict(spatial=(24, 30), kernel_size=3, dilation=(4, 5), bias=True),
    "dilation_does_not_divide": dict(spatial=(23, 29), kernel_size=5, dilation=(2, 3), bias=True),
    "window_is_the_class": dict(spatial=(14, 21), kernel_size=7, dilation=(2, 3), bias=True),
    "chunks_of_columns_ragged": dict(spatial=(40, 133), kernel_size=5, heads=1, dim=4, bias=True),
    "chunks_of_columns": dict(spatial=(70, 75), kernel_size=7, batch=1, bias=True),
    "chunks_of_heads": dict(spatial=(40, 41), kernel_size=7, heads=5, bias=True),
    "chunks_of_batch": dict(spatial=(28, 28), kernel_size=7, dilation=2, batch=7, bias=True),
    "grouped_heads": dict(spatial=(15, 18), kernel_size=5, heads=6, kv_heads=2, bias=True),
    "one_kv_head": dict(spatial=(15, 18), kernel_size=5, heads=3, kv_heads=1, stride=2),
    "value_dim": dict(spatial=(15, 18), kernel_size=5, value_dim=12, bias=True),
    "scale": dict(spatial=(12, 12), kernel_size=3, scale=0.7),
    "stride": dict(spatial=(23, 18), kernel_size=(7, 5), stride=(2, 5)),
    "stride_bias": dict(spatial=(23, 18), kernel_size=(7, 5), stride=(3, 2), bias=True),
    "causal": dict(spatial=(23, 18), kernel_size=(6, 5), is_causal=(True, False), dilation=(2, 1)),
    "causal_stride": dict(spatial=(40,), kernel_size=7, is_causal=True, stride=4, dilation=3),
    "lse": dict(spatial=(23, 18), kernel_size=(7, 5), bias=True, return_lse=True, dilation=(2, 3)),
    "extra_keys": dict(spatial=(13, 18), kernel_size=3, extra=5, heads=4, kv_heads=2, value_dim=6, return_lse=True),
    "three_dim": dict(spatial=(6, 9, 7), kernel_size=3, dilation=(2, 1, 1), bias=True),
    "three_dim_causal": dict(
        spatial=(6, 5, 9), kernel_size=(2, 3, 5), is_causal=(True, False, False), stride=(1, 3, 2)),
    "long_axis": dict(spatial=(3, 260), kernel_size=3, bias=True, batch=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_halo_matches_naive(case):
    assert_like_naive(*make(**case))


@pytest.mark.parametrize("case", ["odd_map", "dilation_does_not_divide", "stride_bias", "extra_keys"])
def test_halo_matches_naive_in_float32(case):
    assert_like_naive(*make(**CASES[case], dtype=torch.float32), tolerance=3e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("case", ["odd_map", "dilation_does_not_divide", "stride_bias"])
def test_half_precision_is_rounded_once(case, dtype, tolerance):
    # Inputs and outputs are rounded to the dtype, the computation is not.
    tensors, options = make(**CASES[case], dtype=dtype)
    actual = outputs_and_gradients(tensors, options, "halo")
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    out = neighborhood_attention(**double, **options, backend="naive")
    grad = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = dict(zip(double, torch.autograd.grad(out, list(double.values()), grad.double()), strict=True))
    for name, value in {"out": out, **expected}.items():
        assert actual[name].dtype == dtype
        assert relative_error(actual[name], value) < tolerance, name


def test_float32_bias_beside_bfloat16():
    tensors, options = make((12, 13), 5, bias=True, dtype=torch.bfloat16)
    tensors["bias"] = tensors["bias"].detach().float().requires_grad_()
    actual = outputs_and_gradients(tensors, options, "halo")
    expected = outputs_and_gradients(tensors, options, "naive")
    assert actual["bias"].dtype == torch.float32
    assert relative_error(actual["bias"], expected["bias"]) < 1e-2


@pytest.mark.parametrize("case", ["odd_map", "dilation_does_not_divide", "stride", "one_dim", "three_dim"])
def test_views_of_a_fused_projection(case):
    tensors, options = make(**CASES[case])
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}

    def gradient(backend):
        # [batch, *spatial, 3, heads, dim] inside of a wider tensor: nothing about q, k and v is contiguous.
        qkv = torch.stack([tensors[name].detach() for name in "qkv"], dim=-3)
        wide = torch.cat([qkv, qkv], dim=-1).requires_grad_()
        q, k, v = wide[..., 1:qkv.shape[-1] + 1].unbind(-3)
        out = neighborhood_attention(q, k, v, **bias, **options, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), wide)

    for actual, expected in zip(gradient("halo"), gradient("naive"), strict=True):
        assert relative_error(actual, expected) < 1e-12


def test_batch_and_heads_with_unusual_strides():
    tensors, options = make((16, 11), 5, bias=True)
    expected = neighborhood_attention(**tensors, **options, backend="naive")
    permuted = {name: x.detach().permute(3, 1, 0, 4, 2).contiguous().permute(2, 1, 4, 0, 3)
                for name, x in tensors.items() if name != "bias"}
    actual = neighborhood_attention(**permuted, bias=tensors["bias"], **options, backend="halo")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spatial", [(14, 13), (30, 29)])
def test_views_of_channels_first_maps(spatial):
    tensors, options = make(spatial, 5, bias=True)
    maps = [tensors[name].detach().permute(0, 3, 4, 1, 2).contiguous().requires_grad_() for name in "qkv"]
    weight = torch.randn(maps[0].shape, dtype=torch.float64)

    def gradients(backend, bias):
        views = (x.permute(0, 3, 4, 1, 2) for x in maps)
        out = neighborhood_attention(*views, bias=bias, **options, backend=backend)
        return out, *torch.autograd.grad(out, maps, weight.permute(0, 3, 4, 1, 2))

    for bias in (tensors["bias"], tensors["bias"].detach(), None):
        for actual, expected in zip(gradients("halo", bias), gradients("naive", bias), strict=True):
            assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("case", ["odd_map", "stride"])
def test_expanded_gradient(case):
    tensors, options = make(**CASES[case])
    inputs = list(tensors.values())
    gradients = [
        torch.autograd.grad(neighborhood_attention(**tensors, **options, backend=backend).sum(), inputs)
        for backend in ("halo", "naive")
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_gradient_of_some_inputs_only():
    tensors, options = make(**CASES["odd_map"])
    for name in ("q", "k", "v", "bias"):
        detached = {other: x if other == name else x.detach() for other, x in tensors.items()}
        actual, expected = (
            torch.autograd.grad(
                neighborhood_attention(**detached, **options, backend=backend).square().sum(), tensors[name])[0]
            for backend in ("halo", "naive"))
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("case", [
    dict(spatial=(6, 7), kernel_size=3, bias=True, batch=1, dim=3),
    dict(spatial=(13, 8), kernel_size=3, dilation=(2, 1), bias=True, batch=1, heads=1, dim=2),
    dict(
        spatial=(7, 6), kernel_size=(3, 4), stride=2, is_causal=(True, False), batch=1, dim=2, extra=2,
        return_lse=True),
])
def test_gradcheck(case):
    tensors, options = make(**case)
    names = list(tensors)
    torch.autograd.gradcheck(
        lambda *xs: neighborhood_attention(**dict(zip(names, xs, strict=True)), **options, backend="halo"),
        tuple(tensors.values()))


def test_same_result_twice_and_inputs_untouched():
    tensors, options = make(**CASES["chunks_of_heads"])
    before = {name: x.detach().clone() for name, x in tensors.items()}
    first, second = (outputs_and_gradients(tensors, options, "halo") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], tensors[name]) for name in before)


def test_a_map_of_one_window_returns_a_new_tensor():
    tensors, options = make((3, 3), 3, batch=1, heads=1)
    q, k, v = (x.detach() for x in tensors.values())
    out = neighborhood_attention(q, k, v, **options)
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (q, k, v)}


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    bias = draw(st.booleans())
    plain = draw(st.booleans())
    kernel_size = tuple(draw(st.integers(2, 7 if axes < 3 else 3)) for _ in range(axes))
    if bias:
        kernel_size = tuple(size | 1 for size in kernel_size)
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    most = {1: 90, 2: 26, 3: 4}[axes]
    kv_heads = draw(st.integers(1, 2))
    return dict(
        spatial=tuple(k * d + draw(st.integers(0, most)) for k, d in zip(kernel_size, dilation, strict=True)),
        kernel_size=kernel_size, dilation=dilation, bias=bias, batch=draw(st.integers(1, 3)), kv_heads=kv_heads,
        stride=1 if plain else tuple(draw(st.integers(1, size)) for size in kernel_size),
        is_causal=not (plain or bias) and tuple(draw(st.booleans()) for _ in range(axes)),
        heads=kv_heads * draw(st.integers(1, 2)), dim=draw(st.integers(1, 5)), value_dim=draw(st.integers(1, 5)),
        extra=0 if plain else draw(st.integers(0, 3)), return_lse=not plain and draw(st.booleans()),
    )


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_random_problems(case):
    assert_like_naive(*make(**case), tolerance=1e-11)


# PyTorch's machinery around the op.

class Attention(torch.nn.Module):
    """Neighborhood attention, with a bias table unless causal, on a fused ``[batch, height, width, 3, heads, dim]``."""

    def __init__(self, heads=2, **options):
        super().__init__()
        size = options["kernel_size"]
        bias = torch.nn.Parameter(torch.randn(heads, 2 * size - 1, 2 * size - 1))
        self.bias = None if "is_causal" in options else bias
        self.options = options

    def forward(self, qkv):
        return neighborhood_attention(*qkv.unbind(3), bias=self.bias, **self.options)


def run_and_grad(module, x):
    x = x.detach().requires_grad_()
    out = module(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])


def test_opcheck():
    tensors, _ = make((9, 12), 3, bias=True, dtype=torch.float32)
    op = torch.ops.visionattn.neighborhood_slab.default
    torch.library.opcheck(op, (*tensors.values(), [3, 3], [2, 1], [1, 2], 0.3, False))
    torch.library.opcheck(op, (*list(tensors.values())[:3], None, [3, 3], [2, 1], [1, 2], 0.3, False))
    # What is kept for the backward is never asked for while sizes are symbols.
    torch.library.opcheck(op, (*tensors.values(), [3, 3], [2, 1], [1, 2], 0.3, True), test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"))


@pytest.mark.parametrize("size", [(7, 6), (14, 11), (17, 16)], ids=["one_tile", "two_tiles", "many_tiles"])
def test_probabilities_are_kept_or_computed_again(size, monkeypatch):
    tensors, options = make(size, 5, bias=True)
    assert_like_naive(tensors, options)
    with_kept = outputs_and_gradients(tensors, options, "halo")
    monkeypatch.setattr("visionattn.ops.neighborhood.slab._KEPT_BYTES", 0)
    without = outputs_and_gradients(tensors, options, "halo")
    for name, expected in with_kept.items():
        assert torch.equal(without[name], expected), name


@pytest.mark.parametrize(("options", "dynamic"), [
    (dict(dilation=2), False), (dict(dilation=2), True), (dict(stride=2), False), (dict(is_causal=True), False),
], ids=["slab", "slab_dynamic", "slab_strided", "general"])
def test_compile_without_graph_break(options, dynamic):
    torch.compiler.reset()
    module = Attention(kernel_size=3, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 11, 14), (3, 16, 9)] if dynamic else [(2, 11, 14)]:
        x = torch.randn(*shape, 3, 2, 8)
        for actual, expected in zip(run_and_grad(compiled, x), run_and_grad(module, x), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("options", "axes"), [
    (dict(kernel_size=3, dilation=2), ()),
    (dict(kernel_size=5, dilation=2), (0,)),
    (dict(kernel_size=5, dilation=2), (0, 1, 2)),
    (dict(kernel_size=3, stride=2), (0, 1, 2)),
], ids=["static", "dynamic_batch", "dynamic_map", "dynamic_map_stride"])
def test_onnx_export(options, axes):
    module = Attention(**options).eval()
    dynamic = ({axis: torch.export.Dim.DYNAMIC for axis in axes},) if axes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (torch.randn(2, 14, 17, 3, 2, 8),), dynamo=True, opset_version=20, dynamic_shapes=dynamic,
            verbose=False)
    model = program.model_proto
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {0: [(2, 14, 17)], 1: [(1, 14, 17), (5, 14, 17)], 3: [(1, 14, 17), (3, 10, 33), (1, 57, 41)]}[len(axes)]
    for shape in shapes:
        x = torch.randn(*shape, 3, 2, 8)
        (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(actual, module(x).detach().numpy(), rtol=0, atol=1e-5)


def test_exported_program_has_no_custom_op():
    program = torch.export.export(Attention(kernel_size=3), (torch.randn(2, 14, 17, 3, 2, 8),))
    assert "visionattn" not in program.graph_module.code
    x = torch.randn(2, 14, 17, 3, 2, 8)
    torch.testing.assert_close(program.module()(x), Attention.forward(_with_bias(program), x))


def _with_bias(program):
    module = Attention(kernel_size=3)
    module.load_state_dict(program.state_dict)
    return module


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["slab", "general"])
def test_autocast_casts_the_inputs_and_nothing_inside(options):
    tensors, _ = make((12, 13), 5, dtype=torch.float32)
    module = Attention(kernel_size=5, **options)
    x = torch.stack(list(tensors.values()), dim=3)
    rounded = x.detach().bfloat16().float()
    expected = module(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)  # computed in float32, rounded once
    gradients = torch.autograd.grad(out.float().sum(), [x, *module.parameters()])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    double = x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.double()(double).dtype == torch.float64  # as PyTorch's autocast leaves it


@pytest.mark.parametrize("options", [dict(bias=True), dict(stride=2), dict(is_causal=True)], ids=str)
def test_transforms_of_torch_func(options):
    tensors, options = make((7, 9), 5, **options)
    tensors = {name: x.detach() for name, x in tensors.items()}

    def loss(tensors, backend="halo"):
        return neighborhood_attention(**tensors, **options, backend=backend).sin().sum()

    expected = torch.func.grad(loss)(tensors, "naive")
    for name, gradient in torch.func.grad(loss)(tensors).items():
        torch.testing.assert_close(gradient, expected[name])
    tangents = {name: torch.randn_like(x) for name, x in tensors.items()}
    (_, forward), (_, slow) = (
        torch.func.jvp(lambda x, backend=backend: loss(x, backend), (tensors,), (tangents,))
        for backend in ("halo", "naive"))
    torch.testing.assert_close(forward, slow)
    assert forward.abs() > 0
    samples = {name: x if name == "bias" else x.unsqueeze(1) for name, x in tensors.items()}
    axes = {name: None if name == "bias" else 0 for name in tensors}
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(axes,))(samples)
    torch.testing.assert_close(per_sample["q"].squeeze(1), expected["q"])


@pytest.mark.parametrize("size", [(14, 15), (30, 27)], ids=["dense", "slab"])
@torch.no_grad()
def test_table_of_a_bias_is_never_stale(size):
    """It is kept between calls; whatever changes the parameter must reach the next one."""
    module, x = Attention(kernel_size=5), torch.randn(2, *size, 3, 2, 8)

    def check():
        expected = neighborhood_attention(*x.unbind(3), 5, bias=module.bias, backend="naive")
        for _ in range(2):
            torch.testing.assert_close(module(x), expected)

    check()
    module.bias.mul_(2)
    check()
    module.bias.data.mul_(2)  # version counters do not see this
    check()
    module.load_state_dict({"bias": torch.randn_like(module.bias)})
    check()
    module.half().float()  # may get its old memory back, with rounded values
    check()
    module, x = module.double(), x.double()
    check()
    module = copy.deepcopy(module)
    check()
    module.bias = torch.nn.Parameter(torch.randn_like(module.bias))
    check()
    check_with_new = copy.deepcopy(module)
    check_with_new.bias.zero_()
    check()


def test_what_another_call_left_in_memory_does_not_matter():
    cases = [make(size, 5, dilation=dilation, bias=True, dtype=torch.float32)
             for size, dilation in (((23, 29), 1), ((23, 29), 3), ((64, 40), 1))]
    expected = [outputs_and_gradients(*case, "naive") for case in cases]
    for case, correct in zip(cases, expected, strict=True):
        workspace(4 << 20, torch.float32).fill_(float("nan"))
        for actual, right in zip(outputs_and_gradients(*case, "halo").values(), correct.values(), strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    release_memory()


def test_threads_do_not_share_memory():
    tensors, options = make((37, 41), 7, dtype=torch.float32, bias=True)
    tensors = {name: x.detach() for name, x in tensors.items()}
    expected = neighborhood_attention(**tensors, **options, backend="naive")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: neighborhood_attention(**tensors, **options), range(16)))
    for out in results:
        torch.testing.assert_close(out, expected)


def test_inference_mode_first_then_training():
    # Tables are cached by shape; one made under inference mode must not poison training.
    module, x = Attention(kernel_size=5), torch.randn(1, 27, 33, 3, 2, 8)
    with torch.inference_mode():
        first = module(x)
    out, *gradients = run_and_grad(module, x)
    torch.testing.assert_close(out, first)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_checkpointing_deepcopy_and_double_backward():
    module, x = Attention(kernel_size=5), torch.randn(2, 13, 12, 3, 2, 8)
    expected = run_and_grad(module, x)
    for reentrant in (False, True):
        x_ = x.clone().requires_grad_()
        checkpoint(module, x_, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x_.grad, expected[1])
    torch.testing.assert_close(copy.deepcopy(module)(x), expected[0])
    x_ = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x_).square().sum(), x_, create_graph=True)
    gradient.square().sum().backward()
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        neighborhood_attention(*y.unbind(3), bias=module.bias, **module.options, backend="naive").square().sum(), y,
        create_graph=True)
    expected.square().sum().backward()
    torch.testing.assert_close(x_.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_meta_device_and_flop_count():
    q = torch.empty(2, 14, 15, 3, 8, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = neighborhood_attention(q, q, q, 5)
    assert out.shape == q.shape
    assert out.device.type == "meta"
    assert counter.get_total_flops() == 4 * 2 * 14 * 15 * 3 * 25 * 8


def test_default_device_does_not_reach_the_tables():
    q = torch.randn(1, 15, 11, 2, 8)
    with torch.device("meta"):
        out = neighborhood_attention(q, q, q, 5)
    torch.testing.assert_close(out, neighborhood_attention(q, q, q, 5, backend="naive"))


# NATTEN as a second opinion.

@pytest.mark.parametrize("case", [
    name for name, case in CASES.items() if not case.get("bias") and "value_dim" not in case])
@pytest.mark.filterwarnings("ignore")
def test_natten_agrees(case):
    pytest.importorskip("natten", reason="natten is an optional dependency (pip install visionattn[natten])")
    tensors, options = make(**CASES[case], dtype=torch.float32)
    tensors = {name: x.detach() for name, x in tensors.items()}
    actual = neighborhood_attention(**tensors, **options, backend="halo")
    expected = neighborhood_attention(**tensors, **options, backend="natten")
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)


def test_natten_says_what_it_cannot_do():
    pytest.importorskip("natten", reason="natten is an optional dependency (pip install visionattn[natten])")
    for changes, dtype, message in [
        (dict(bias=True), torch.float32, "no relative position bias"),
        ({}, torch.float64, "not torch.float64"),
        ({}, torch.float32, "no backward pass on cpu"),
        (dict(dim=12), torch.float32, "power of two from 8 to 512, got 12"),
        (dict(value_dim=16), torch.float32, "8 for keys, 16 for values"),
    ]:
        tensors, options = make((9, 9), 3, **changes, dtype=dtype)
        if "backward" not in message:
            tensors = {name: x.detach() for name, x in tensors.items()}
        with pytest.raises(BackendError, match=message):
            neighborhood_attention(**tensors, **options, backend="natten")


# Wrong calls.

def q_(*shape, **kwargs):
    return torch.zeros(shape or (1, 9, 9, 4, 8), **kwargs)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(q=q_(9, 4, 8)), r"q must be \[batch, \*spatial, heads, head_dim\] .* got shape \[9, 4, 8\]"),
    (dict(k=q_(1, 9, 8, 4, 8)), r"k must have q's batch, spatial shape and head_dim: q \[1, 9, 9, 4, 8\], k \[1, 9, 8"),
    (dict(v=q_(1, 9, 9, 2, 8)), r"v must have k's batch, spatial shape and heads"),
    (dict(k=q_(1, 9, 9, 3, 8), v=q_(1, 9, 9, 3, 8)), "the 3 heads of k must divide the 4 heads of q"),
    (dict(kernel_size=5, dilation=2), r"kernel_size \* dilation = 5 \* 2 = 10 exceeds the 9 tokens of spatial axis 0"),
    (dict(kernel_size=1), "kernel_size must be at least 2, got 1 on axis 0"),
    (dict(dilation=0), "dilation must be at least 1, got 0"),
    (dict(kernel_size=3, stride=4), r"stride must be 1 to kernel_size \(3\), got 4"),
    (dict(kernel_size=(3, 3, 3)), "kernel_size has 3 values for 2 spatial axes"),
    (dict(kernel_size=3.0), "kernel_size must be int"),
    (dict(kernel_size=4, bias=q_(4, 7, 7)), r"relative position bias needs odd kernel sizes, got \(4, 4\)"),
    (dict(bias=q_(4, 5, 5), is_causal=True), "relative position bias is not defined for causal axes"),
    (dict(bias=q_(4, 5, 4)), r"bias must be .* = \[4, 5, 5\], got \[4, 5, 4\]"),
    (dict(bias=q_(4, 5, 5, dtype=torch.float64)), "bias is torch.float64 on cpu, but q is torch.float32"),
    (dict(k=q_(dtype=torch.float64)), "k is torch.float64 on cpu, but q is torch.float32 on cpu"),
    (dict(v=q_(device="meta")), "v is torch.float32 on meta, but q is torch.float32 on cpu"),
    (dict(q=q_(dtype=torch.long), k=q_(dtype=torch.long), v=q_(dtype=torch.long)), "must be floating point"),
    (dict(additional_keys=q_(1, 5, 4, 8)), "additional_keys and additional_values go together"),
    (dict(additional_keys=q_(1, 5, 4, 8), additional_values=q_(1, 6, 4, 8)), r"must be \[batch, tokens, kv_heads"),
    (dict(backend="natten", bias=q_(4, 5, 5)), "backend 'natten' of neighborhood_attention cannot do this: natten"),
    (dict(backend="fast"), "neighborhood_attention has no backend 'fast'; it has .*halo, natten, naive"),
])
def test_wrong_call(changes, message):
    arguments = {"q": q_(), "k": q_(), "v": q_(), "kernel_size": 3, **changes}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)
