"""The Triton kernels against naive: in Triton's interpreter on a CPU, and (``-m gpu``) compiled on a device.

Outputs are poisoned: memory that a kernel leaves unwritten holds NaN.
"""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from visionattn.bench.kernels import compile_kernels
from visionattn.ops import aggregated_attention, neighborhood_attention, routed_attention

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
if not torch.cuda.is_available() and triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("the interpreter of Triton before 3.7 fails on loops with numpy 2.4", allow_module_level=True)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fresh tensors hold NaN instead of whatever was there."""
    torch.utils._device._device_constructors()  # a list that torch makes once: of the real functions, not of ours
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def _guarded(x):
    """``x`` in the middle of a buffer of NaN, so that a read out of bounds shows."""
    buffer = torch.full((x.numel() + 2 * 4096,), torch.nan, dtype=x.dtype, device=x.device)
    buffer[4096:-4096] = x.flatten()
    return buffer[4096:-4096].view(x.shape).detach().requires_grad_()


def _error(actual, expected):
    """Relative root mean square of the difference."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def _compare(op, inputs, tolerance, **options):
    """Compares outputs and all gradients; the upstream gradients are random and, for the output, a strided view."""
    inputs = [None if x is None else _guarded(x) for x in inputs]
    wanted = [x for x in inputs if x is not None]
    results = []
    for backend in ("triton", "naive"):
        outputs = op(*inputs, backend=backend, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(*x.shape[:-1], 2 * x.shape[-1], generator=generator).to(x)[..., ::2] for x in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, wanted, upstream)))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert _error(actual, expected) <= tolerance


def _neighborhood(q, k, v, bias, **options):
    return neighborhood_attention(q, k, v, bias=bias, return_lse=True, **options)


def _neighborhood_inputs(spatial, heads, dim, kernel_size, bias, value_dim=None, batch=2, **to):
    q, k = torch.randn(2, batch, *spatial, heads, dim).to(**to)
    v = torch.randn(batch, *spatial, heads, value_dim or dim).to(**to)
    table = torch.randn(heads, *(2 * size - 1 for size in kernel_size)).to(to.get("device")) if bias else None
    return q, k, v, table


NEIGHBORHOODS = {
    # name: spatial, kernel_size, dilation, stride, is_causal, bias, heads, dim
    "ragged": ((9, 11), (3, 5), 1, 1, False, True, 2, 24),
    "tight": ((14, 14), (7, 7), 2, 1, False, True, 1, 32),
    "one_window": ((7, 7), (7, 7), 1, 1, False, True, 2, 32),
    "dilation_does_not_divide": ((11, 13), (3, 3), (2, 3), 1, False, True, 1, 16),
    "strided": ((13, 10), (5, 3), 1, (2, 3), False, True, 1, 40),
    "blocked": ((9, 13), (4, 5), 1, (4, 5), False, False, 1, 16),
    "even_causal": ((9, 14), (4, 6), (1, 2), (3, 2), (True, False), False, 1, 48),
    "line": ((70,), (7,), 3, 1, False, True, 2, 16),
    "causal_line": ((70,), (7,), 1, 4, True, False, 1, 16),
    "volume": ((5, 6, 7), (3, 3, 3), (1, 2, 1), (1, 1, 2), (False, True, False), False, 1, 16),
    "wide_head": ((8, 9), (3, 3), 1, 1, False, True, 1, 96),
}


@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_neighborhood(name):
    torch.manual_seed(0)
    spatial, kernel_size, dilation, stride, is_causal, bias, heads, dim = NEIGHBORHOODS[name]
    inputs = _neighborhood_inputs(spatial, heads, dim, kernel_size, bias, batch=1)
    _compare(_neighborhood, inputs, 2e-6, kernel_size=kernel_size, dilation=dilation, stride=stride,
             is_causal=is_causal)


def test_neighborhood_half_precision_and_value_dim():
    torch.manual_seed(0)
    inputs = _neighborhood_inputs((9, 10), 2, 16, (3, 3), True, value_dim=24, dtype=torch.float16)
    _compare(_neighborhood, inputs, 2e-3, kernel_size=3)


def test_neighborhood_reads_views_of_a_fused_projection():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 10, 3, 2, 16).unbind(3)
    expected = neighborhood_attention(q, k, v, 3, backend="naive")
    assert _error(neighborhood_attention(q, k, v, 3, backend="triton"), expected) <= 2e-6
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    expected = neighborhood_attention(*turned, 3, backend="naive")
    assert _error(neighborhood_attention(*turned, 3, backend="triton"), expected) <= 2e-6


def test_gradients_are_the_same_from_run_to_run():
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in _neighborhood_inputs((9, 9), 1, 16, (3, 3), True, batch=2)]
    runs = [torch.autograd.grad(neighborhood_attention(*inputs[:3], 3, bias=inputs[3], backend="triton").sum(), inputs)
            for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


ROUTES = {
    # name: height, width, region, topk, heads that share a table, everybody lists region 0, key region
    "square": (8, 12, (4, 4), 2, True, False, None),
    "a_table_for_each_head": (6, 10, (2, 5), 3, False, False, None),
    "all_regions": (6, 6, (2, 2), 9, True, False, None),
    "one_region": (9, 15, (9, 15), 1, True, False, None),
    "hot_region": (12, 12, (2, 2), 2, True, True, None),
    "smaller_keys": (12, 12, (4, 4), 1, True, True, (2, 3)),
}


def _routed_inputs(height, width, region, topk, shared, hot, key_region, heads=2, dim=24, batch=2, **to):
    grid = height // region[0], width // region[1]
    key_region = key_region or region
    wishes = torch.rand(batch, 1 if shared else heads, grid[0] * grid[1], grid[0] * grid[1])
    wishes[..., 0] += hot
    routes = wishes.topk(topk, dim=-1).indices.to(to.get("device"))
    q = torch.randn(batch, height, width, heads, dim)
    k = torch.randn(batch, grid[0] * key_region[0], grid[1] * key_region[1], heads, dim)
    v = torch.randn(*k.shape[:-1], 16)
    return (q.to(**to), k.to(**to), v.to(**to)), routes


@pytest.mark.parametrize("name", ROUTES)
def test_routed(name):
    torch.manual_seed(0)
    inputs, routes = _routed_inputs(*ROUTES[name])
    _compare(routed_attention, inputs, 2e-6, routes=routes, region_size=ROUTES[name][2])


def test_routed_lists_longer_than_a_chunk(monkeypatch):
    """Several chunks for one region, in float16."""
    from visionattn.ops.routed import triton_kernels

    monkeypatch.setattr(triton_kernels, "_CHUNK_QUERIES", 12)
    torch.manual_seed(0)
    inputs, routes = _routed_inputs(8, 8, (2, 2), 2, True, True, None, dtype=torch.float16)
    _compare(routed_attention, inputs, 2e-3, routes=routes, region_size=2)


AGGREGATED = {
    # name: height, width, pooled keys, window, heads, dim, value dim, biases and weights
    "square": (7, 7, 9, 3, 2, 24, 24, True),
    "ragged": (9, 11, 70, 3, 1, 16, 40, True),
    "wide_window": (5, 6, 4, 5, 2, 16, 16, True),
    "plain": (6, 5, 1, 3, 2, 16, 16, False),
    "window_is_larger": (2, 3, 4, 7, 1, 16, 16, True),
}


def _aggregated_inputs(height, width, pooled, window, heads, dim, value_dim, tables, batch=2, **to):
    q, k = torch.randn(2, batch, height, width, heads, dim)
    v = torch.randn(batch, height, width, heads, value_dim)
    inputs = [q, k, v, torch.randn(batch, pooled, heads, dim), torch.randn(batch, pooled, heads, value_dim)]
    if tables:
        inputs.append(torch.randn(batch, height, width, heads, window ** 2))
    biases = (torch.randn(heads, window ** 2), torch.randn(heads, height * width, pooled)) if tables else ()
    return [*(x.to(**to) for x in inputs), *(x.to(to.get("device")) for x in biases)]


def _aggregated(q, k, v, pooled_k, pooled_v, local_weights=None, local_bias=None, pooled_bias=None, **options):
    return aggregated_attention(q, k, v, pooled_k, pooled_v, local_weights=local_weights, local_bias=local_bias,
                                pooled_bias=pooled_bias, **options)


@pytest.mark.parametrize("name", AGGREGATED)
def test_aggregated(name, monkeypatch):
    from visionattn.ops.aggregated import triton_kernels

    monkeypatch.setattr(triton_kernels, "_CHUNK_QUERIES", 64)
    torch.manual_seed(0)
    _compare(_aggregated, _aggregated_inputs(*AGGREGATED[name]), 2e-6, kernel_size=AGGREGATED[name][3])


def test_aggregated_in_half_precision():
    torch.manual_seed(0)
    inputs = _aggregated_inputs(*AGGREGATED["square"], dtype=torch.float16)
    _compare(_aggregated, inputs, 3e-3, kernel_size=3)


def test_aggregated_reads_views_of_a_fused_projection():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 3, 2, 16).unbind(3)
    pooled_k, pooled_v = torch.randn(2, 4, 2, 2, 16).unbind(2)
    for tensors in ((q, k, v), tuple(x.transpose(1, 2) for x in (q, k, v))):
        actual, expected = (aggregated_attention(*tensors, pooled_k, pooled_v, backend=backend)
                            for backend in ("triton", "naive"))
        assert _error(actual, expected) <= 2e-6


@pytest.mark.parametrize("op", ["neighborhood", "routed", "aggregated"])
def test_compiles_without_graph_breaks(op):
    torch.manual_seed(0)
    if op == "neighborhood":
        inputs = _neighborhood_inputs((7, 8), 1, 16, (3, 3), True, batch=1)

        def run(q, k, v, bias):
            return neighborhood_attention(q, k, v, 3, bias=bias, backend="triton")
    elif op == "aggregated":
        inputs = _aggregated_inputs(4, 5, 3, 3, 1, 16, 16, True, batch=1)

        def run(*tensors):
            return _aggregated(*tensors, backend="triton")
    else:
        inputs, routes = _routed_inputs(4, 4, (2, 2), 1, True, False, None, batch=1)

        def run(q, k, v):
            return routed_attention(q, k, v, routes, 2, backend="triton")
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [(out := f(*inputs), *torch.autograd.grad(out.square().sum(), inputs)) for f in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", ["neighborhood", "neighborhood, lse", "routed", "aggregated"])
def test_second_derivatives(op):
    torch.manual_seed(0)
    if op == "routed":
        inputs, routes = _routed_inputs(4, 4, (2, 2), 2, True, False, None, batch=1)
    elif op == "aggregated":
        inputs = _aggregated_inputs(4, 5, 3, 3, 1, 16, 16, True, batch=1)
    else:
        inputs = _neighborhood_inputs((5, 6), 1, 16, (3, 3), True, batch=1)

    def run(*tensors, backend):
        if op == "routed":
            return routed_attention(*tensors, routes, 2, backend=backend)
        if op == "aggregated":
            return _aggregated(*tensors, backend=backend)
        out = neighborhood_attention(*tensors[:3], 3, bias=tensors[3], backend=backend, return_lse="lse" in op)
        return torch.cat([x.flatten() for x in out]) if "lse" in op else out

    results = []
    for backend in ("triton", "naive"):
        tensors = [x.detach().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(run(*tensors, backend=backend).square().sum(), tensors, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)])
    for actual, expected in zip(*results, strict=True):
        assert _error(actual, expected) <= 1e-5


_PRECISION = """
import torch
from visionattn.ops import aggregated_attention, neighborhood_attention, routed_attention
from visionattn.ops.triton_common import constants
{setting}
q = torch.randn(1, 4, 4, 1, 16)
assert neighborhood_attention(q, q, q, 3, backend="triton").isfinite().all()
assert routed_attention(q, q, q, torch.zeros(1, 1, 4, 1, dtype=torch.int64), 2, backend="triton").isfinite().all()
print(constants(q, q)["PRECISION"], constants(q.half(), q.half())["PRECISION"])
"""


@pytest.mark.parametrize(("setting", "expected"), [
    ("", "tf32x3"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    ("torch.set_float32_matmul_precision('high')", "tf32"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32"),
])
def test_precision_by_either_of_pytorchs_settings(setting, expected):
    result = subprocess.run(
        [sys.executable, "-c", _PRECISION.format(setting=setting)], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"})
    assert result.stdout.split() == [expected, "ieee"], result.stderr


def test_chosen_on_a_device_only():
    """The interpreter runs when asked for by name; a CPU call never falls into it by itself."""
    from visionattn.ops.neighborhood import _op

    q = torch.randn(1, 7, 7, 1, 16)
    problems = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_op, "choose", lambda problem, backend: problems.append(problem) or _op.backends["naive"])
        neighborhood_attention(q, q, q, 3)
    assert _op.choose(problems[0]).name == "halo"
    assert _op.choose(problems[0]._replace(device="cuda")).name == "triton"
    assert _op.choose(problems[0]._replace(device="cuda", additional=3)).name == "halo"
    assert not dict((name, ok) for name, ok, _ in _op.explain(problems[0]._replace(dtype=torch.bfloat16)))["triton"]


_COMPILE = """
import torch
from visionattn.bench.kernels import compile_kernels

count = 0
for op, case in (("neighborhood", "28x28_bias"), ("routed", "224_stage3"), ("aggregated", "28x28")):
    for dtype in (torch.bfloat16, torch.float32):
        for row in compile_kernels(f"{op}_attention", case, dtype, "sm_90"):
            assert row["spilled_bytes"] <= 64 and row["blocks_per_sm"] >= 2, row
            count += 1
print(count, "kernels")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu():
    """The real compiler, which needs no GPU, finds registers for every kernel; two blocks fit onto an SM."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _COMPILE], env=environment, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["28", "kernels"]


def test_what_is_interpreted_is_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        compile_kernels("routed_attention", "small", torch.float32, "sm_90")


# --- On a device ------------------------------------------------------------------------------------------------------

_TOLERANCES = [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), _TOLERANCES)
@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_neighborhood_on_device(name, dtype, tolerance):
    torch.manual_seed(0)
    spatial, kernel_size, dilation, stride, is_causal, bias, heads, dim = NEIGHBORHOODS[name]
    spatial = tuple(3 * length + 1 for length in spatial)
    inputs = _neighborhood_inputs(spatial, heads, dim, kernel_size, bias, dtype=dtype, device="cuda")
    _compare(_neighborhood, inputs, tolerance, kernel_size=kernel_size, dilation=dilation, stride=stride,
             is_causal=is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), _TOLERANCES)
@pytest.mark.parametrize("name", ROUTES)
def test_routed_on_device(name, dtype, tolerance):
    torch.manual_seed(0)
    height, width, *rest = ROUTES[name]
    inputs, routes = _routed_inputs(4 * height, 4 * width, *rest, dtype=dtype, device="cuda")
    _compare(routed_attention, inputs, tolerance, routes=routes, region_size=ROUTES[name][2])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), _TOLERANCES)
@pytest.mark.parametrize("name", AGGREGATED)
def test_aggregated_on_device(name, dtype, tolerance):
    torch.manual_seed(0)
    height, width, *rest = AGGREGATED[name]
    inputs = _aggregated_inputs(5 * height, 5 * width, *rest, dtype=dtype, device="cuda")
    _compare(_aggregated, inputs, tolerance, kernel_size=AGGREGATED[name][3])


@pytest.mark.gpu
def test_large_offsets_on_device():
    """More than 2**31 elements between the first and the last token."""
    x = torch.randn(9, 512, 512, 8, 128, dtype=torch.bfloat16, device="cuda")
    out = neighborhood_attention(x, x, x, 3, backend="triton")
    expected = neighborhood_attention(*(x[-1:, -20:, -20:].contiguous(),) * 3, 3, backend="naive")
    assert _error(out[-1, -10:, -10:], expected[0, -10:, -10:]) <= 2e-2
