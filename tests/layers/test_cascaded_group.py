"""Cascaded group attention: what it computes, that its kept bias is never stale, that fused layers do the same."""
import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests import golden
from visionattn.layers import CascadedGroupAttention
from visionattn.layers.cascaded_group import expand_bias_table, resize_bias_table
from visionattn.layers.conv_norm import ConvNorm, NormLinear
from visionattn.ops import kept


def fill(module: nn.Module) -> nn.Module:
    """Random values for everything that a state dict holds, the running statistics too."""
    with torch.no_grad():
        for i, (name, x) in enumerate(module.state_dict().items()):
            if x.is_floating_point():
                noise = 0.3 * golden.random(i, x.shape)
                x.copy_(1 + noise.abs() if name.endswith("running_var") else noise)
    return module.eval()


def make(dim: int = 24, num_heads: int = 3, window_size: int = 4, **kwargs) -> CascadedGroupAttention:
    return fill(CascadedGroupAttention(dim, num_heads, window_size, key_dim=4, kernels=(5, 3, 3),
                                       **dict(dtype=torch.float64) | kwargs))


def by_hand(layer: CascadedGroupAttention, x: torch.Tensor) -> torch.Tensor:
    """The definition, for one window and one image, token by token."""
    def conv_norm(module: ConvNorm, y: torch.Tensor) -> torch.Tensor:
        return module.bn(module.conv(y))

    size, previous, outputs = layer.window_size, 0, []
    for i, part in enumerate(x.chunk(layer.num_heads, dim=1)):
        q, k, v = conv_norm(layer.qkvs[i], part + previous).split(layer.widths, dim=1)
        q = conv_norm(layer.convs[i], q)
        out = torch.zeros_like(v)
        for y in range(size):
            for z in range(size):
                scores = torch.empty(size, size, dtype=x.dtype)
                for a in range(size):
                    for b in range(size):
                        scores[a, b] = (q[0, :, y, z] * k[0, :, a, b]).sum() / 2  # the key width is 4
                        scores[a, b] += layer.rpb[i, abs(y - a) * size + abs(z - b)]
                weights = scores.flatten().softmax(0)
                out[0, :, y, z] = (v[0].flatten(1) * weights).sum(1)
        previous = out
        outputs.append(out)
    return conv_norm(layer.proj, torch.cat(outputs, dim=1).relu())


def test_definition():
    layer, x = make(), golden.random(9, (1, 24, 4, 4))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 6), (3, 11), (1, 1), (8, 4)], ids=str)
@torch.no_grad()
def test_larger_and_smaller_maps_are_padded_and_cut_into_windows(size):
    """Zeros at the bottom and on the right; padded tokens take part; windows do not see each other."""
    layer, x = make(), golden.random(9, (2, 24, *size))
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    padded = torch.zeros(2, 24, 4 * rows, 4 * columns, dtype=x.dtype)
    padded[:, :, :size[0], :size[1]] = x
    expected = torch.empty_like(padded)
    for row in range(rows):
        for column in range(columns):
            window = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            for image in range(2):
                expected[image:image + 1][window] = by_hand(layer, padded[image:image + 1][window])
    torch.testing.assert_close(layer(x), expected[:, :, :size[0], :size[1]], rtol=1e-11, atol=1e-11)


def test_gradients():
    layer = make(dim=8, num_heads=2, window_size=2)
    assert layer.widths == (4, 4, 4)
    x = golden.random(9, (1, 8, 3, 2)).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_bad_options():
    with pytest.raises(ValueError, match=r"num_heads \(5\) must divide dim \(24\)"):
        CascadedGroupAttention(24, 5)
    with pytest.raises(ValueError, match=r"a size for each of 3 heads, got \(5, 5\)"):
        CascadedGroupAttention(24, 3, kernels=(5, 5))


def test_bias_table():
    """Entry ``|dy| * size + |dx|``; resizing is bicubic, and exact for a table that is linear inside."""
    table = torch.arange(9.)[None]
    bias = expand_bias_table(table, 3)
    for query in range(9):
        for key in range(9):
            dy, dx = abs(query // 3 - key // 3), abs(query % 3 - key % 3)
            assert bias[0, query, key] == 3 * dy + dx
    table = golden.random(0, (2, 16))
    assert torch.equal(resize_bias_table(table, 4), table)
    for size in (7, 3):
        expected = nn.functional.interpolate(
            table.view(1, 2, 4, 4), size=(size, size), mode="bicubic", align_corners=False)
        assert torch.equal(resize_bias_table(table, size), expected.view(2, size * size))
    half = resize_bias_table(table.half(), 7)
    assert half.dtype == torch.float16


# The kept bias


CHANGES = {
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 0.5 for k, v in layer.state_dict().items()}),
    "assign": lambda layer: layer.load_state_dict(
        {k: v + 0.5 for k, v in layer.state_dict().items()}, assign=True),
    "in place": lambda layer: layer.rpb.mul_(-2),
    "through data": lambda layer: layer.rpb.data.mul_(-2),
    "new data": lambda layer: setattr(layer.rpb, "data", -2 * layer.rpb.data),
    "new parameter": lambda layer: setattr(layer, "rpb", nn.Parameter(-2 * layer.rpb)),
    "one entry": lambda layer: layer.rpb.data[2, 5].add_(1e-9),
    "average": lambda layer: layer.state_dict()["rpb"].lerp_(torch.ones_like(layer.rpb), 0.1),
    "half": lambda layer: layer.half(),
    "float": lambda layer: layer.to(torch.float32),
    "there and back": lambda layer: layer.half().double(),
    "window": lambda layer: layer.resize_window(5),
}


def keeps(owner: object) -> bool:
    return any(key[1] == id(owner) for key in kept._state.entries)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_change_of_the_table_goes_unnoticed(change):
    layer, x = make(), golden.random(9, (1, 24, 4, 4))
    layer(x)
    assert keeps(layer)
    before = layer._bias()
    CHANGES[change](layer)
    bias = layer._bias()
    assert bias.dtype == layer.rpb.dtype
    assert torch.equal(bias, expand_bias_table(layer.rpb, layer.window_size))
    assert bias.shape != before.shape or not torch.equal(bias, before)


def test_an_optimizer_step_and_averaged_weights_are_noticed():
    layer, x = make(), golden.random(9, (1, 24, 4, 4))
    averaged = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(3):
        with torch.no_grad():
            layer(x), averaged(x)
        layer(x).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(layer)
        for module in (layer, averaged.module):
            with torch.no_grad():
                assert torch.equal(module._bias(), expand_bias_table(module.rpb, 4))
    assert not torch.equal(layer.rpb, averaged.module.rpb)


@torch.no_grad()
def test_copies_have_a_bias_of_their_own():
    layer, x = make(), golden.random(9, (1, 24, 4, 4))
    expected = layer(x)
    size = len(pickle.dumps(make()))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not keeps(twin)
        assert torch.equal(twin(x), expected)
        twin.rpb.zero_()
        assert not twin._bias().any()
    assert torch.equal(layer(x), expected)
    assert len(pickle.dumps(layer)) == size
    assert not any("bias" in name for name in vars(layer))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert [name for name in layer.state_dict() if not name.startswith(("qkvs", "convs", "proj"))] == ["rpb"]


def test_kept_in_inference_only():
    layer = make()
    with torch.no_grad():
        first = layer._bias()
        assert layer._bias() is first
    with torch.inference_mode():
        assert layer._bias() is first
    bias = layer._bias()
    assert bias is not first
    bias.sum().backward()
    assert layer.rpb.grad.sum() == 3 * 16 * 16


def test_not_kept_under_transforms_of_parameters():
    """Two models' tables at once: what one call composes is of both, and nothing of it may stay."""
    layers, x = [make(), make()], golden.random(9, (1, 24, 4, 4))
    with torch.no_grad():
        layers[1].rpb.mul_(-1)
        parameters, buffers = torch.func.stack_module_state(layers)
        base = copy.deepcopy(layers[0])
        both = torch.func.vmap(
            lambda p, b: torch.func.functional_call(base, (p, b), x), randomness="error")(parameters, buffers)
        for out, layer in zip(both, layers, strict=True):
            torch.testing.assert_close(out, layer(x), rtol=1e-10, atol=1e-10)
    assert not keeps(base)


@torch.no_grad()
def test_tracing_and_export_keep_the_lookup_in_the_graph():
    layer, x = make(), golden.random(9, (1, 24, 4, 4))
    layer(x)
    traced = torch.jit.trace(layer, x)
    exported = torch.export.export(layer, (x,)).module()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(x)
    layer.rpb.mul_(3)
    dict(exported.named_parameters())["rpb"].copy_(layer.rpb)
    expected = copy.deepcopy(layer)(x)
    for module in (traced, exported, compiled):
        torch.testing.assert_close(module(x), expected)


# Fused layers


@pytest.mark.parametrize("layer", [
    ConvNorm(8, 12, dtype=torch.float64),
    ConvNorm(8, 12, 3, stride=2, dtype=torch.float64),
    ConvNorm(8, 8, 5, groups=8, dtype=torch.float64),
    ConvNorm(8, 8, 3, groups=8, shortcut=True, dtype=torch.float64),
    ConvNorm(8, 8, 3, shortcut=True, dtype=torch.float64),
    ConvNorm(8, 8, shortcut=True, dtype=torch.float64),
], ids=["pointwise", "strided", "depthwise", "depthwise shortcut", "dense shortcut", "pointwise shortcut"])
@torch.no_grad()
def test_fused_convolution(layer):
    layer, x = fill(layer), golden.random(9, (2, 8, 7, 5))
    expected, fused = layer(x), layer.fuse()
    plain = layer.bn(layer.conv(x)) + (x if layer.shortcut else 0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=memory_format)
        torch.testing.assert_close(layer(y), plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fused(y), expected, rtol=1e-12, atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not list(fused.buffers())
    strided = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, 4:12]
    torch.testing.assert_close(fused(strided), layer(strided), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.jit.script(fused)(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_fused_classifier():
    layer, x = fill(NormLinear(8, 5, dtype=torch.float64)), golden.random(9, (3, 8))
    expected = layer(x)
    torch.testing.assert_close(expected, layer.linear(layer.bn(x)))
    assert layer.fuse() is layer
    assert isinstance(layer.bn, nn.Identity)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    weight = layer.linear.weight.clone()
    assert torch.equal(layer.fuse().linear.weight, weight)  # a second time changes nothing


def test_initial_gain():
    assert not ConvNorm(4, 4, gain=0.).bn.weight.any()
    assert (ConvNorm(4, 4).bn.weight == 1).all()
