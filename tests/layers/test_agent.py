"""The module of agent attention: biases for any size, composed once for inference and never stale."""
import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from visionattn.layers import AgentAttention
from visionattn.layers import agent as layer


def make(size=(6, 5), agents=(3, 3), dtype=torch.float64, **options) -> AgentAttention:
    torch.manual_seed(0)
    module = AgentAttention(12, 3, size, agents, dtype=dtype, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def as_defined(tables, size, agents, grid):
    """The bias by PyTorch's 2-D interpolation: positions first, then agents."""
    def resized(table):
        table = F.interpolate(table, size=size, mode="bilinear")
        over_agents = table.flatten(2).mT.unflatten(2, agents)
        return F.interpolate(over_agents, size=grid, mode="bilinear").flatten(2).mT

    bias = resized(tables.map) + resized(tables.rows + tables.columns)
    if tables.prefix is not None:
        prefix = F.interpolate(tables.prefix.mT.unflatten(2, agents), size=grid, mode="bilinear").flatten(2).mT
        bias = torch.cat([prefix, bias], dim=2)
    return bias


@pytest.mark.parametrize("grid", [(3, 3), (4, 5)])
@pytest.mark.parametrize("size", [(6, 5), (11, 4), (2, 3)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_bias(size, grid, prefix):
    module = make(num_prefix_tokens=prefix)
    for tables, last in ((module.agent_bias, False), (module.query_bias, True)):
        expected = as_defined(tables, size, (3, 3), grid)
        bias = layer.compose_bias(tables, size, (3, 3), grid, torch.float64, agents_last=last)
        torch.testing.assert_close(bias, expected.mT if last else expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_tables():
    module = make(num_prefix_tokens=1)
    for tables in (module.agent_bias, module.query_bias):
        weight = torch.randn(3, 20, 1 + 28, dtype=torch.float64)
        results = [
            torch.autograd.grad((bias * weight).sum(), list(tables.parameters()))
            for bias in (layer.compose_bias(tables, (4, 7), (3, 3), (4, 5), torch.float64),
                         as_defined(tables, (4, 7), (3, 3), (4, 5)))]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("prefix", [0, 1])
def test_inference_is_training_without_gradients(prefix):
    """Which adds the convolution in place, with biases that are kept."""
    module = make(num_prefix_tokens=prefix)
    x = torch.randn(2, prefix + 42, 12, dtype=torch.float64)
    expected = module(x, (7, 6))
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(module(x, (7, 6)), expected, rtol=1e-12, atol=1e-12)
    if not prefix:
        assert torch.equal(module(x.unflatten(1, (7, 6))), expected.unflatten(1, (7, 6)))


@torch.no_grad()
def test_biases_are_composed_once():
    module, x = make(), torch.randn(1, 6, 5, 12, dtype=torch.float64)
    with mock.patch.object(layer, "_interpolation", wraps=layer._interpolation) as composed:
        for expected in (4, 4, 4):  # rows and columns of two biases
            module(x)
            assert composed.call_count == expected
        with torch.enable_grad():
            module(x)
        assert composed.call_count == 8
        with mock.patch.object(layer, "_KEPT_ENTRIES", 3 * 9 * 30 - 1):
            module(x)
        assert composed.call_count == 12


def _assign(module):
    module.agent_bias.rows.data = 2 * module.agent_bias.rows.data


CHANGES = {
    "in place": lambda module: module.query_bias.map.mul_(2),
    "through data": lambda module: module.agent_bias.columns.data.mul_(2),
    "new data": _assign,
    "optimizer": lambda module: _train(module),
    "load": lambda module: module.load_state_dict({k: 2 * x for k, x in module.state_dict().items()}),
    "load by assignment": lambda module: module.load_state_dict(
        {k: 2 * x for k, x in module.state_dict().items()}, assign=True),
    "reset": lambda module: module.agent_bias.reset_parameters(),
    "agent grid": lambda module: module.set_input_size(None, (2, 4)),
}


def _train(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1.)
    with torch.enable_grad():
        module(torch.randn(1, 6, 5, 12, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_kept_biases_are_never_stale(change):
    module, x = make(), torch.randn(2, 6, 5, 12, dtype=torch.float64)
    before = module(x)
    twin = copy.deepcopy(module)
    CHANGES[change](module)
    with torch.enable_grad():  # composes anew
        expected = module(x)
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, before)
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_kept_biases_follow_the_dtype(dtype):
    module, x = make(), torch.randn(2, 6, 5, 12, dtype=torch.float64)
    before = module(x)
    out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out - before).norm() < 0.05 * before.norm()
    assert torch.allclose(module.double()(x), module.double()(x))


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_another_native_size_computes_the_same(prefix):
    module = make(num_prefix_tokens=prefix)
    x = torch.randn(1, prefix + 77, 12, dtype=torch.float64)
    expected = module(x, (11, 7))
    module.agent_bias.rows.requires_grad_(False)
    module.set_input_size((11, 7))
    assert module.agent_bias.rows.shape == (3, 9, 11, 1)
    assert not module.agent_bias.rows.requires_grad
    assert module.query_bias.columns.requires_grad
    torch.testing.assert_close(module(x, (11, 7)), expected, rtol=1e-12, atol=1e-12)


def test_heads_must_divide():
    with pytest.raises(ValueError, match=r"num_heads \(5\) must divide dim \(12\)"):
        AgentAttention(12, 5, (4, 4))
