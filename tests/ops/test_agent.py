"""Agent attention: the authors' numbers, both backends against each other, and what the op asks of its arguments."""
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import golden
from visionattn.layers.agent import BiasTables, compose_bias
from visionattn.ops import BackendError, agent_attention, pool_agents

CASES = {case["name"]: case for case in golden.load("agent_ops")["cases"]}
SCALES = {"q": 1.5, "k": 1.5, "v": 1.0, "dwc.weight": 1 / 3, "dwc.bias": 0.1}


def tensors(case: dict) -> dict[str, torch.Tensor]:
    """The inputs and tables of a golden case."""
    return {
        name: SCALES.get(name, 0.5) * torch.from_numpy(np.random.RandomState(
            zlib.crc32(f"{case['name']}/{name}".encode())).standard_normal(shape))
        for name, shape in case["tensors"].items()}


def biases(case: dict, x: dict[str, torch.Tensor], size, key_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Both biases, composed from the case's tables by the layer's code."""
    agents = tuple(case.get("native_agent_grid", case["agent_grid"]))
    grid = tuple(case["agent_grid"])
    composed = []
    for names, map_size in (("an ah aw ac", key_size), ("na ha wa ca", size)):
        coarse, *others = (x.get(f"{name}_bias") for name in names.split())
        others = [table if table is None else table[0] for table in others]
        if names.startswith("na"):  # the authors put agents last
            others = [table if table is None else table.movedim(-1, 1) for table in others]
        rows, columns, prefix = others
        tables = BiasTables(
            coarse.shape[0], agents, (rows.shape[2], columns.shape[3]), 0 if prefix is None else 1, dtype=torch.float64)
        state = dict(map=coarse, rows=rows, columns=columns) | ({} if prefix is None else {"prefix": prefix})
        tables.load_state_dict(state)
        composed.append(compose_bias(
            tables, map_size, agents, grid, torch.float64, agents_last=names.startswith("na")).detach())
    return composed[0], composed[1]


@pytest.mark.parametrize("backend", ["fused", "naive"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, backend):
    case = CASES[name]
    x, heads, grid = tensors(case), case["heads"], tuple(case["agent_grid"])
    size, prefix = (case["H"], case["W"]), int(case["class_token"])
    key_size = {"pvt_sr2": (3, 3), "stripe": (6, 2)}.get(name, size)
    q, k, v = x["q"], x["k"], x["v"]
    if name == "stripe":  # three stripes, 2 wide, are a batch
        q, k, v = (t.unflatten(1, (6, 3, 2)).movedim(2, 1).flatten(0, 1).flatten(1, 2) for t in (q, k, v))
        size = key_size
    agents = pool_agents(q[:, prefix:].unflatten(1, size), grid)
    torch.testing.assert_close(agents, torch.tensor(case["agent_tokens"], dtype=torch.float64), rtol=0, atol=1e-9)
    agent_bias, query_bias = biases(case, x, size, key_size)
    split = [t.unflatten(-1, (heads, -1)) for t in (q, k, v, agents)]
    scale = split[0].shape[-1] ** -0.5
    if "logits1" in case:
        for left, right, bias, expected in ((3, 1, agent_bias, "logits1"), (0, 3, query_bias, "logits2")):
            logits = scale * split[left].transpose(1, 2) @ split[right].transpose(1, 2).mT + bias
            torch.testing.assert_close(logits, torch.tensor(case[expected], dtype=torch.float64), rtol=0, atol=1e-9)
    out = agent_attention(*split, agent_bias, query_bias, backend=backend).flatten(2)

    values = v[:, prefix:].unflatten(1, key_size).permute(0, 3, 1, 2)
    if key_size != size:
        values = F.interpolate(values, size=size, mode="bilinear")
    local = F.conv2d(values, x["dwc.weight"], x["dwc.bias"], padding=1, groups=values.shape[1]).flatten(2).mT
    out = out + F.pad(local, (0, 0, prefix, 0))
    if name == "stripe":
        out = out.unflatten(1, size).unflatten(0, (1, 3)).movedim(1, 2).flatten(1, 3)
    torch.testing.assert_close(out, torch.tensor(case["out"], dtype=torch.float64), rtol=0, atol=1e-9)


def problem(batch=2, queries=37, keys=29, agents=9, heads=2, dim=8, value_dim=6, dtype=torch.float64, seed=0):
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    generator = torch.Generator().manual_seed(seed)
    return [
        draw(batch, queries, heads, dim), draw(batch, keys, heads, dim), draw(batch, keys, heads, value_dim),
        draw(batch, agents, heads, dim), draw(heads, agents, keys), draw(heads, queries, agents)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 3), heads=st.integers(1, 3),
    with_bias=st.tuples(st.booleans(), st.booleans()),
    scale=st.none() | st.floats(0.1, 2.), seed=st.integers(0, 2 ** 16))
def test_fused_is_naive(sizes, heads, with_bias, scale, seed):
    queries, keys, agents = sizes
    inputs = problem(queries=queries, keys=keys, agents=agents, heads=heads, seed=seed)
    arguments = inputs[:4] + [bias if use else None for bias, use in zip(inputs[4:], with_bias, strict=True)]
    used = [x for x in arguments if x is not None]
    results = []
    for backend in ("fused", "naive"):
        out = agent_attention(*arguments, scale=scale, backend=backend)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, used, direction)])
        with torch.no_grad():  # another kernel than with gradients of the biases
            torch.testing.assert_close(agent_attention(*arguments, scale=scale, backend=backend), out)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["fused", "naive"])
@torch.no_grad()
def test_low_precision(backend, dtype):
    inputs = problem()
    expected = agent_attention(*inputs, backend="naive")
    out = agent_attention(*[x.to(dtype) for x in inputs], backend=backend)
    assert out.dtype == dtype
    assert (out - expected).norm() < (0.02 if dtype == torch.bfloat16 else 0.003) * expected.norm()


class _Allocated(TorchDispatchMode):
    """Keeps the size of the largest storage that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@torch.no_grad()
def test_biases_are_not_repeated_over_the_batch():
    batch = 16
    inputs = [x.detach() for x in problem(batch=batch, queries=196, keys=196, agents=49, heads=2, dim=4, value_dim=4)]
    per_sample = inputs[4].untyped_storage().nbytes()
    with _Allocated() as allocated:
        agent_attention(*inputs)
    assert 0 < allocated.largest < 4 * per_sample < batch * per_sample


@pytest.mark.parametrize(("size", "grid"), [
    ((14, 14), (7, 7)), ((56, 56), (3, 3)), ((14, 14), (9, 9)), ((7, 9), (4, 5)), ((2, 3), (7, 7)), ((1, 1), (3, 3)),
], ids=str)
def test_pooling(size, grid):
    x = torch.randn(2, *size, 15, dtype=torch.float64, requires_grad=True)
    for view in (x, x[..., 5:10]):  # a slice of a projection
        expected = F.adaptive_avg_pool2d(view.permute(0, 3, 1, 2), grid).flatten(2).mT
        out = pool_agents(view, grid)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(out)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, weight)[0] for y in (out, expected)))


def test_pooling_after_inference_mode_can_be_trained():
    x = torch.randn(1, 11, 13, 4)
    with torch.inference_mode():
        pool_agents(x, (3, 4))
    x.requires_grad_()
    pool_agents(x, (3, 4)).sum().backward()
    assert x.grad.sum().item() == pytest.approx(4 * 12, rel=1e-5)


def test_bad_arguments():
    q, k, v, agents, agent_bias, query_bias = (x.detach() for x in problem())
    for arguments, message in (
            ((q[0], k, v, agents), r"must be \[batch, tokens, heads, head_dim\]"),
            ((q, k[:1], v, agents), "k must have q's batch, heads and head_dim"),
            ((q, k, v, agents[:, :, :1]), "agents must have q's batch, heads and head_dim"),
            ((q, k, v[:, 1:], agents), "v must have k's batch, tokens and heads"),
            ((q, k, v.float(), agents), "v is torch.float32 on cpu, but q is torch.float64"),
            ((q, k, v, agents, query_bias), r"agent_bias must be \[heads, agents, keys\] = \[2, 9, 29\], got"),
            ((q, k, v, agents, agent_bias, agent_bias), r"query_bias must be .* = \[2, 37, 9\], got \[2, 9, 29\]"),
            ((q, k, v, agents, agent_bias.int()), "agent_bias must be floating point"),
            ((q.int(), k.int(), v.int(), agents.int()), "must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            agent_attention(*arguments)
    with pytest.raises(BackendError, match="has no backend 'tiled'; it has fused, naive"):
        agent_attention(q, k, v, agents, backend="tiled")
