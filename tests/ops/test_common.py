"""What holds for every op and every backend: precision, derivatives, transforms, traces, odd values, empty batches."""
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from visionattn.ops import (
    BackendError,
    agent_attention,
    aggregated_attention,
    combiner_attention,
    factorized_attention,
    flow_attention,
    kmeans_attention,
    neighborhood_attention,
    reversed_attention,
    routed_attention,
    sparsified_attention,
    use_backend,
    varied_window_attention,
)


class Call(NamedTuple):
    """A call of an op: what is differentiated, what is not, and the rest."""

    op: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    tables: dict[str, Tensor]
    options: dict[str, Any]

    def __call__(self, *tensors: Tensor, **more: Any) -> Tensor:
        given = dict(zip(self.tensors, tensors, strict=True)) if tensors else self.tensors
        return self.op(**given, **self.tables, **self.options | more)

    def to(self, dtype: torch.dtype) -> "Call":
        return self._replace(tensors={name: x.to(dtype) for name, x in self.tensors.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        return self._replace(tensors={name: change(x) for name, x in self.tensors.items()},
                             tables={name: change(x) for name, x in self.tables.items()})


def qkv(*shape: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name in "qkv"}


def neighborhood(*size: int, bias: bool = False, dtype: torch.dtype = torch.float64, **options) -> Call:
    tensors = qkv(2, *size, 2, 8, dtype=dtype)
    if bias:
        sides = [2 * options["kernel_size"] - 1] * len(size)
        tensors["bias"] = torch.randn(2, *sides, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Call(neighborhood_attention, tensors, {}, options)


def routed(grid: int, topk: int, weighted: bool = False, dtype: torch.dtype = torch.float64) -> Call:
    generator = torch.Generator().manual_seed(1)
    heads = 1 if weighted else 2
    routes = torch.stack([torch.randperm(grid ** 2, generator=generator)[:topk] for _ in range(2 * heads * grid ** 2)])
    routes = routes.view(2, heads, grid ** 2, topk)
    tensors = qkv(2, 4 * grid, 4 * grid, 2, 8, dtype=dtype)
    if weighted:
        tensors["route_weights"] = torch.randn(routes.shape, generator=generator).to(dtype)
    return Call(routed_attention, tensors, {"routes": routes}, {"region_size": 4})


def kmeans(
        masked: bool = False, memory: bool = False, empty: bool = False, mask_self: bool = False,
        dtype: torch.dtype = torch.float64,
) -> Call:
    generator = torch.Generator().manual_seed(1)
    index = torch.randperm(16, generator=generator).view(1, 1, 4, 4).expand(2, 2, 4, 4)
    tables = {"query_index": index, "key_index": index}
    if masked:
        tables["mask"] = torch.ones(2, 16, dtype=torch.bool).index_fill_(1, index[0, 0, 1], False)
        tables["mask"][0, index[0, 0, 2, 0]] = False  # in the cluster of others
    if empty:
        tables["query_index"] = index.masked_fill(torch.rand(index.shape, generator=generator) < 0.3, -1)
    tensors = qkv(2, 16, 2, 8, dtype=dtype)
    if memory:
        tensors["memory_key"], tensors["memory_value"] = (
            torch.randn(2, 4, 3, 8, generator=generator).to(dtype) for _ in range(2))
    return Call(kmeans_attention, tensors, tables, {"mask_self": mask_self})


def agents(bias: bool = False, dtype: torch.dtype = torch.float64) -> Call:
    tensors = qkv(2, 20, 2, 8, dtype=dtype)
    tensors["agents"] = tensors["q"][:, :4] + 1
    if bias:
        generator = torch.Generator().manual_seed(1)
        tensors["agent_bias"] = torch.randn(2, 4, 20, generator=generator).to(dtype)
        tensors["query_bias"] = torch.randn(2, 20, 4, generator=generator).to(dtype)
    return Call(agent_attention, tensors, {}, {})


def varied(bias: bool = False, dtype: torch.dtype = torch.float64) -> Call:
    tensors = qkv(2, 6, 8, 2, 8, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name in ("offset", "stretch"):
        tensors[name] = torch.randn(2, 2, 2, 2, 2, generator=generator).to(dtype)
    if bias:
        tensors["bias"] = torch.randn(2, 5, 7, generator=generator).to(dtype)
    return Call(varied_window_attention, tensors, {}, {"window_size": (3, 4)})


def reversed_(weighted: bool = False, dtype: torch.dtype = torch.float64) -> Call:
    tensors = qkv(2, 20, 2, 8, dtype=dtype)
    if weighted:
        tensors["weights"] = torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Call(reversed_attention, tensors, {}, {})


def sparsified(size: int, dtype: torch.dtype = torch.float64) -> Call:
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(2, 2, 20 // size, 20, generator=generator).topk(6).indices
    return Call(sparsified_attention, qkv(2, 20, 2, 8, dtype=dtype), {"index": index}, {})


def aggregated(
        height: int, width: int, kernel_size: int = 3, plain: bool = False, dtype: torch.dtype = torch.float64,
) -> Call:
    generator = torch.Generator().manual_seed(1)
    tensors = qkv(2, height, width, 2, 8, dtype=dtype)
    shapes = {"pooled_k": (2, 5, 2, 8), "pooled_v": (2, 5, 2, 8)}
    if not plain:
        places = kernel_size ** 2
        shapes |= {"local_bias": (2, places), "pooled_bias": (2, height * width, 5),
                   "local_weights": (2, height, width, 2, places)}
    tensors |= {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return Call(aggregated_attention, tensors, {}, {"kernel_size": kernel_size})


def flow(keys: int = 20, dtype: torch.dtype = torch.float64, **options) -> Call:
    tensors = qkv(2, 20, 2, 8, dtype=dtype)
    return Call(flow_attention, tensors | {name: tensors[name][:, :keys] for name in "kv"}, {}, options)


def combiner(*size: int, dtype: torch.dtype = torch.float64, **options) -> Call:
    return Call(combiner_attention, qkv(2, *size, 2, 8, dtype=dtype), {}, options)


def factorized(height: int, width: int, dtype: torch.dtype = torch.float64, **options) -> Call:
    return Call(factorized_attention, qkv(2, height, width, 2, 8, dtype=dtype), {}, {"window": 3} | options)


CALLS = {
    "whole map": neighborhood(5, 5, kernel_size=5),
    "whole map, bias": neighborhood(5, 5, kernel_size=5, bias=True),
    "dense classes": neighborhood(9, 10, kernel_size=3, dilation=2),
    "dense classes, bias": neighborhood(9, 10, kernel_size=3, dilation=2, bias=True),
    "slabs": neighborhood(17, 16, kernel_size=3),
    "slabs, bias": neighborhood(16, 19, kernel_size=5, bias=True),
    "strided": neighborhood(16, 15, kernel_size=4, stride=2),
    "one axis": neighborhood(21, kernel_size=5),
    "one axis, bias": neighborhood(21, kernel_size=5, bias=True),
    "three axes": neighborhood(4, 5, 3, kernel_size=3),
    "causal": neighborhood(8, 9, kernel_size=3, is_causal=True),
    "routed densely": routed(2, 2),
    "routed": routed(5, 3),
    "routed, weights": routed(3, 2, weighted=True),
    "clusters": kmeans(),
    "clusters, mask": kmeans(masked=True),
    "clusters, memory, empty places": kmeans(memory=True, empty=True),
    "clusters, mask, not themselves": kmeans(masked=True, mask_self=True),
    "agents": agents(),
    "agents, bias": agents(bias=True),
    "reversed": reversed_(),
    "reversed, weights": reversed_(weighted=True),
    "lists of keys": sparsified(1),
    "lists of keys, shared": sparsified(5),
    "varied windows": varied(),
    "varied windows, bias": varied(bias=True),
    "window and pooled keys": aggregated(5, 4, plain=True),
    "window and pooled keys, bias, weights": aggregated(4, 6, kernel_size=5),
    "merged tiles": factorized(6, 7, dilations=(1, 2)),
    "merged tiles of a small map": factorized(2, 5, window=4, dilations=(3,)),
    "flow": flow(keys=13, eps_of_sums=True),
    "flow, causal": flow(is_causal=True),
    "combined windows": combiner(5, 4, window_size=(2, 3)),
    "combined lines": combiner(3, 4, pattern="mixture"),
}
FAST = {neighborhood_attention: "halo", routed_attention: "gathered", kmeans_attention: "gathered",
        agent_attention: "fused", varied_window_attention: "sampled", aggregated_attention: "shifted",
        flow_attention: "linear", combiner_attention: "blocked", factorized_attention: "merged",
        reversed_attention: "blocked", sparsified_attention: "gathered"}
SHARED = ("bias", "memory")  # what has no batch
WIDE = ("agent_bias", "query_bias", "bias", "local_bias", "pooled_bias", "route_weights", "offset",
        "stretch")  # what autocast leaves as it is
both_backends = pytest.mark.parametrize("backend", ["fast", "naive"])


@pytest.fixture(params=CALLS)
def call(request) -> Call:
    return CALLS[request.param]


def named(call: Call, backend: str) -> str:
    return FAST[call.op] if backend == "fast" else backend


def differentiable(call: Call) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in call.tensors.values()]


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_backends
def test_autocast_rounds_inputs_and_result_only(call, backend, dtype):
    """As in float32 with inputs that were rounded: what is between is not."""
    call = call.to(torch.float32)
    rounded = call._replace(tensors={
        name: x if name in WIDE else x.to(dtype).float()
        for name, x in call.tensors.items()})
    expected = rounded(backend="naive")
    with torch.autocast("cpu", dtype):
        actual = call(backend=named(call, backend))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_backends
def test_half_precision_is_rounded_once(call, backend, dtype):
    call = call.to(dtype)
    actual = call(backend=named(call, backend))
    assert actual.dtype == dtype
    expected = call.to(torch.float32)(backend="naive").to(dtype)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-5)


@both_backends
def test_autocast_leaves_float64(call, backend):
    with torch.autocast("cpu", torch.bfloat16):
        assert call(backend=named(call, backend)).dtype == torch.float64


@both_backends
def test_mixed_dtypes(call, backend):
    """Refused in one line; under autocast the same as of one dtype."""
    call = call.to(torch.float32)
    mixed = call._replace(tensors=call.tensors | {"k": call.tensors["k"].bfloat16()})
    with pytest.raises(ValueError, match=r"k is torch\.bfloat16 on cpu, but q is torch\.float32 on cpu"):
        mixed(backend=named(call, backend))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed(backend=named(call, backend)), call(backend=named(call, backend)))


@both_backends
def test_masked_rows_under_autocast(backend):
    """A query that sees none of its keys gets their mean, whatever the dtype."""
    call = kmeans(masked=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        out = call(backend=named(call, backend))
    cluster = call.tables["query_index"][0, 0, 1]
    mean = call.tensors["v"][:, cluster].mean(dim=1, keepdim=True).expand(-1, 4, -1, -1)
    torch.testing.assert_close(out[:, cluster].float(), mean, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["slabs", "slabs, bias", "routed densely", "routed", "routed, weights"])
def test_backward_within_autocast(name):
    """Our own operators are no less precise there."""
    call = CALLS[name].to(torch.float32)
    results = []
    for enabled in (False, True):
        tensors = differentiable(call)
        out = call(*tensors, backend=FAST[call.op])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(out.sum(), tensors))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


# Derivatives


@both_backends
def test_forward_mode(call, backend):
    """The tangent is that of finite differences, through torch.func and through dual numbers."""
    backend = named(call, backend)
    tensors = list(call.tensors.values())
    tangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(7 + i), dtype=x.dtype)
                for i, x in enumerate(tensors)]
    step = 1e-6
    ahead, behind = (call(*(x + sign * step * t for x, t in zip(tensors, tangents, strict=True)), backend=backend)
                     for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    _, tangent = torch.func.jvp(lambda *xs: call(*xs, backend=backend), tuple(tensors), tuple(tangents))
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(call(*duals, backend=backend)).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-7)


@both_backends
def test_forward_mode_along_one_tensor(call, backend):
    """Whichever it is: the others carry no tangent."""
    tensors = list(call.tensors.values())
    for i, x in enumerate(tensors):
        tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        ahead, behind = (
            call(*tensors[:i], x + sign * 1e-6 * tangent, *tensors[i + 1:], backend=named(call, backend))
            for sign in (1, -1))
        with forward_ad.dual_level():
            out = call(*tensors[:i], forward_ad.make_dual(x, tangent), *tensors[i + 1:], backend=named(call, backend))
            actual = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(actual, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


@both_backends
def test_all_gradients_twice(call, backend):
    """Against finite differences, also of the incoming gradient."""
    def run(*tensors):
        return call(*tensors, backend=named(call, backend))

    assert torch.autograd.gradcheck(run, differentiable(call), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, differentiable(call), fast_mode=True)


@pytest.mark.parametrize("name", ["whole map", "dense classes", "slabs", "routed densely", "routed", "clusters"])
def test_second_derivatives_of_one_tensor_as_several_arguments(name):
    """Queries that are keys and values too, or that these are computed from."""
    call, q = CALLS[name], CALLS[name].tensors["q"]

    def second(backend, key, value):
        x = q.clone().requires_grad_()
        gradient, = torch.autograd.grad(call(x, key(x), value(x), backend=backend).square().sum(), x, create_graph=True)
        return gradient, *torch.autograd.grad(gradient.sin().sum(), x)

    for functions in ((lambda x: x, lambda x: x), (lambda x: x.sin(), lambda x: x * 2)):
        for actual, expected in zip(second(FAST[call.op], *functions), second("naive", *functions), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["whole map", "slabs, bias", "routed densely", "routed", "clusters", "agents"])
def test_jacobians_agree(name):
    call = CALLS[name]
    q, *rest = call.tensors.values()

    def scalar(x):
        return call(q + x, *rest).square().sum(dim=tuple(range(1, q.ndim)))

    x = torch.zeros(q.shape[-1], dtype=q.dtype)
    torch.testing.assert_close(torch.func.jacfwd(scalar)(x), torch.func.jacrev(scalar)(x))


@both_backends
def test_second_derivatives(call, backend):
    """The gradient of a gradient's norm, as finite differences give it."""
    backend = named(call, backend)

    def penalty(tensors):
        out = call(*tensors, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return sum(g.square().sum() for g in grads)

    tensors = differentiable(call)
    grads = torch.autograd.grad(penalty(tensors), tensors)
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
                  for i, x in enumerate(tensors)]
    step = 1e-6
    ahead, behind = (
        penalty([(x + sign * step * d).detach().requires_grad_() for x, d in zip(tensors, directions, strict=True)])
        for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    actual = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)


@both_backends
def test_per_sample_gradients(call, backend):
    """torch.func.vmap of a gradient is a loop of gradients."""
    backend = named(call, backend)
    batched = [name for name in {**call.tensors, **call.tables} if not any(part in name for part in SHARED)]
    everything = {**call.tensors, **call.tables}

    def loss(sample):
        return call.op(**everything | {name: sample[name][None] for name in batched}, **call.options,
                       backend=backend).square().sum()

    def gradient(q, others):
        return torch.func.grad(lambda q: loss({"q": q, **others}))(q)

    others = {name: everything[name] for name in batched if name != "q"}
    actual = torch.func.vmap(gradient)(everything["q"], others)
    expected = torch.stack([
        gradient(everything["q"][i], {name: x[i] for name, x in others.items()}) for i in range(2)])
    torch.testing.assert_close(actual, expected)


@both_backends
@pytest.mark.parametrize("name", ["routed", "routed densely", "clusters", "lists of keys, shared"])
def test_vmap_over_tables(name, backend):
    call = CALLS[name]
    tables = {key: torch.stack([x, x.flip(0)]) for key, x in call.tables.items()}

    def run(tables):
        return call.op(**call.tensors, **tables, **call.options, backend=named(call, backend))

    actual = torch.func.vmap(run)(tables)
    expected = torch.stack([run({key: x[i] for key, x in tables.items()}) for i in range(2)])
    torch.testing.assert_close(actual, expected)


def test_tables_are_checked_under_vmap_too():
    q = torch.randn(1, 4, 4, 2, 8)
    routes = torch.arange(5).view(5, 1, 1, 1, 1).expand(5, 1, 1, 4, 1)
    with pytest.raises(ValueError, match="routes must be region numbers 0 to 3, got 0 to 4"):
        torch.func.vmap(lambda routes: routed_attention(q, q, q, routes, 2))(routes)
    q, index = torch.randn(1, 4, 2, 8), torch.zeros(3, 1, 2, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="key_index must hold 0 to 3, got -1 to -1"):
        torch.func.vmap(lambda index: kmeans_attention(q, q, q, index, index - 1))(index)


# Odd values and sizes


@both_backends
def test_empty_batch(call, backend):
    call = call._replace(
        tensors={name: x if any(part in name for part in SHARED) else x[:0] for name, x in call.tensors.items()},
        tables={name: x[:0] for name, x in call.tables.items()})
    tensors = differentiable(call)
    out = call(*tensors, backend=named(call, backend))
    assert out.shape == (0, *call.tensors["q"].shape[1:])
    for x, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("axis", range(1, 5))
def test_only_the_batch_may_be_empty(call, axis):
    """One line, where a kernel would divide by zero."""
    if axis >= call.tensors["q"].ndim:
        pytest.skip("no such axis")
    empty = {name: x.narrow(axis, 0, 0) for name, x in call.tensors.items() if name in ("q", "k", "v", "agents")}
    with pytest.raises(ValueError, match=r"but|must be") as error:
        call._replace(tensors=call.tensors | empty)()
    assert "\n" not in str(error.value)


def test_biases_of_other_dtypes():
    call = agents(bias=True, dtype=torch.float32)
    biases = {name: x.double() for name, x in call.tensors.items() if "bias" in name}
    for backend in ("fused", "naive"):
        out = call._replace(tensors=call.tensors | biases)(backend=backend)
        torch.testing.assert_close(out, call(backend=backend))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_value_that_is_no_number_stays_where_it_is_seen(call, where, value):
    """In whatever backend, the queries that do not attend to it get what they got without it."""
    if call.options.get("mask_self") and where == "k":
        pytest.skip("a key that is no number is felt by its own token, too")
    if call.op is flow_attention and call.options.get("is_causal"):
        pytest.skip("felt by earlier queries of its chunk")
    call = call.to(torch.float32)
    tensors = call.tensors | {where: call.tensors[where].clone()}
    tensors[where].flatten(1, -3)[0, 3, 1, 2] = value  # image 0, a token, head 1, a channel
    spoilt = call._replace(tensors=tensors)
    actual, expected = (spoilt(backend=named(call, backend)) for backend in ("fast", "naive"))
    torch.testing.assert_close(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(
        actual.where(expected.isfinite(), 0), expected.where(expected.isfinite(), 0), rtol=1e-4, atol=1e-5)
    assert actual[1].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("backend", ["gathered", "naive"])
def test_values_that_are_no_numbers_stay_in_their_regions(backend, which, value):
    """Forward and backward."""
    q, k, v = tensors = [x.requires_grad_() for x in torch.randn(3, 1, 4, 4, 1, 8)]
    routes = torch.tensor([[0, 1], [1, 2], [2, 3], [1, 3]])[None, None]
    with torch.no_grad():
        tensors[which][0, 0, 0] = value  # in region 0, to which only region 0 attends; it attends to region 1 as well
    out = routed_attention(q, k, v, routes, 2, backend=backend)
    touched = ~out.isfinite().flatten(-2).all(-1)
    assert touched[:, :2, :2].any()
    touched[:, :2, :2] = False
    assert not touched.any()
    for i, gradient in enumerate(torch.autograd.grad(out.sum(), tensors)):
        finite = gradient.isfinite().flatten(-2).all(-1)
        assert finite[:, 2:].all()  # regions 2 and 3
        assert i > 0 or finite[:, :, 2:].all()


@pytest.mark.parametrize("backend", ["gathered", "naive"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_no_numbers_stay_in_their_cluster(backend, which):
    tensors = [x.requires_grad_() for x in torch.randn(3, 1, 9, 1, 8)]
    index = torch.arange(9).view(1, 1, 3, 3)
    places = index.clone()
    places[..., 2, 2] = -1  # an empty place, which stands for no token
    with torch.no_grad():
        tensors[which][0, [0, -1][which % 2]] = torch.nan
    out = kmeans_attention(*tensors, places, index, backend=backend)
    own = slice(6, 9) if which % 2 else slice(3)
    others = [i for i in range(9) if i not in range(9)[own]]
    assert out[:, own].isnan().any()
    assert out[:, others].isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert gradient[:, others].isfinite().all()


@pytest.mark.parametrize("backend", ["gathered", "naive"])
@pytest.mark.parametrize("token", [0, 8])
def test_an_empty_place_feels_no_token(backend, token):
    q, k, v = tensors = [x.requires_grad_() for x in torch.randn(3, 1, 9, 1, 8)]
    index = torch.arange(9).view(1, 1, 3, 3)
    with torch.no_grad():
        q[0, token] = torch.nan
    out = kmeans_attention(q, k, v, index.masked_fill(index == 4, -1), index, backend=backend)
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert gradient[:, 3:6].isfinite().all()


def test_gradients_of_values_that_are_no_numbers():
    call = neighborhood(17, 16, kernel_size=3, dtype=torch.float32)
    tensors = call.tensors | {"v": call.tensors["v"].clone()}
    tensors["v"][0, 3, 3] = float("nan")
    grads = {}
    for backend in ("halo", "naive"):
        leaves = differentiable(call._replace(tensors=tensors))
        grads[backend] = torch.autograd.grad(call(*leaves, backend=backend).sum(), leaves)
    for actual, expected in zip(grads["halo"], grads["naive"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@both_backends
def test_strides_do_not_matter(call, backend):
    backend = named(call, backend)
    results = []
    for change in (lambda x: x, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
                   lambda x: torch.stack([x, x], dim=-1)[..., 0]):
        tensors = [change(x).requires_grad_() for x in call.tensors.values()]
        out = call._replace(tables={name: change(x) for name, x in call.tables.items()})(*tensors, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
        assert all(map(torch.equal, tensors, call.tensors.values()))  # what is given is not written to
    for changed in results[1:]:
        for actual, expected in zip(changed, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


# Traces, fake tensors, threads


@both_backends
def test_fake_tensors_give_shapes_and_leave_nothing(call, backend):
    """A pass without values works, and the real calls after it are as if it had not been."""
    backend = named(call, backend)
    expected = call(backend=backend)
    with FakeTensorMode() as mode:
        fake = call.map(mode.from_tensor)(backend=backend)
    assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())
    actual = call(backend=backend)
    assert type(actual) is Tensor
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@both_backends
def test_fake_gradients(call, backend, dtype):
    """What compiled graphs count on: shapes, strides, dtypes and devices of results and gradients."""
    backend, call = named(call, backend), call.to(dtype)

    def results(call):
        tensors = differentiable(call)
        out = call(*tensors, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    with FakeTensorMode() as mode:
        fake = results(call.map(mode.from_tensor))
    for a, b in zip(fake, results(call), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@both_backends
def test_meta_device(call, backend):
    out = call.map(lambda x: x.to("meta"))(backend=named(call, backend))
    expected = call(backend=named(call, backend))
    assert out.device.type == "meta"
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
@pytest.mark.parametrize("gradients", [False, True])
@both_backends
def test_jit_trace(call, backend, gradients):
    """Without a warning, with PyTorch's own check of a second run, and for batches of any size."""
    call = call.to(torch.float32)
    call = call._replace(tensors={
        name: x.detach().requires_grad_(gradients) for name, x in call.tensors.items()})
    names = [*call.tensors, *call.tables]

    def run(*tensors):
        return call.op(**dict(zip(names, tensors, strict=True)), **call.options, backend=named(call, backend))

    inputs = (*call.tensors.values(), *call.tables.values())
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(run, inputs)
        again = [x if any(part in name for part in SHARED) else torch.cat([x, x[:1]])
                 for name, x in zip(names, inputs, strict=True)]
        torch.testing.assert_close(traced(*again), run(*again))


class Module(nn.Module):
    def __init__(self, call: Call, backend: str):
        super().__init__()
        # One by one: Dynamo of PyTorch 2.9 cannot look into a named tuple that holds tensors.
        self.op, self.names, self.tables = call.op, list(call.tensors), call.tables
        self.options = call.options | {"backend": backend}

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.op(**dict(zip(self.names, tensors, strict=True)), **self.tables, **self.options)


@both_backends
def test_traces_hold_standard_operators(call, backend):
    """jit.trace and both kinds of torch.export."""
    call = call.to(torch.float32)
    module, inputs = Module(call, named(call, backend)), tuple(call.tensors.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, inputs)
    assert "visionattn::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs), module(*inputs))
    for strict in (False, True):
        program = torch.export.export(module, inputs, strict=strict)
        assert "visionattn." not in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_compiled_training_step(call):
    torch.compiler.reset()
    module = Module(call, FAST[call.op])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (module, compiled):
        tensors = differentiable(call)
        out = run(*tensors)
        grads.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_threads():
    expected = {name: call() for name, call in CALLS.items()}
    errors = []

    def work():
        try:
            for _ in range(10):
                for name, call in CALLS.items():
                    torch.testing.assert_close(call(), expected[name])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_use_backend_holds_for_its_thread():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with use_backend("tiled"):
            entered.set()
            leave.wait()

    call = CALLS["slabs"]
    naive = call(backend="naive")
    with use_backend("naive"):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        assert torch.equal(call(), naive)
    leave.set()
    thread.join()
    assert torch.equal(call(), call(backend="halo"))


def test_the_old_name_works():
    call = CALLS["slabs"]
    assert torch.equal(call(backend="tiled"), call(backend="halo"))
    with pytest.raises(BackendError, match="it has triton, halo, natten, naive"):
        call(backend="tile")
