"""Aggregated attention: the definition by a loop, refusals, FLOPs, rows in several chunks.

What every op is asked for is in test_common.py and test_cases.py.
"""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops import aggregated_attention, cases
from visionattn.ops.aggregated import shifted, triton_backend

SHAPE = (2, 5, 6, 2, 8)


def tensors(shape=SHAPE, pooled=4, kernel_size=3, dtype=torch.float64, device="cpu"):
    batch, height, width, heads, dim = shape
    shapes = dict(
        q=shape, k=shape, v=shape, pooled_k=(batch, pooled, heads, dim), pooled_v=(batch, pooled, heads, dim),
        local_bias=(heads, kernel_size ** 2), pooled_bias=(heads, height * width, pooled),
        local_weights=(*shape[:-1], kernel_size ** 2))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(x, generator=generator, dtype=dtype).to(device) for name, x in shapes.items()}


def one_by_one(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size):
    """The formula for each query by itself."""
    batch, height, width, heads, _ = q.shape
    out = torch.zeros_like(v)
    reach = kernel_size // 2
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                for h in range(heads):
                    scores, values, more = [], [], []
                    for place in range(kernel_size ** 2):
                        i, j = y + place // kernel_size - reach, x + place % kernel_size - reach
                        if 0 <= i < height and 0 <= j < width:
                            scores.append(q[b, y, x, h] @ k[b, i, j, h] + local_bias[h, place])
                            values.append(v[b, i, j, h])
                            more.append(local_weights[b, y, x, h, place])
                    for p in range(pooled_k.shape[1]):
                        scores.append(q[b, y, x, h] @ pooled_k[b, p, h] + pooled_bias[h, y * width + x, p])
                        values.append(pooled_v[b, p, h])
                        more.append(torch.zeros((), dtype=q.dtype))
                    weights = torch.stack(scores).softmax(0) + torch.stack(more)
                    out[b, y, x, h] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("backend", ["naive", "shifted"])
def test_definition(backend, kernel_size):
    given = tensors(kernel_size=kernel_size)
    actual = aggregated_attention(**given, kernel_size=kernel_size, backend=backend)
    torch.testing.assert_close(actual, one_by_one(**given, kernel_size=kernel_size))


@pytest.mark.parametrize("size", [2 ** 9, 2 ** 12, 2 ** 14])
def test_chunks_change_nothing(size, monkeypatch):
    """From one row at a time to several images at a time."""
    given = {name: x.requires_grad_() for name, x in tensors(shape=(5, 4, 3, 2, 8)).items()}
    results = []
    for limit in (2 ** 20, size):
        monkeypatch.setattr(shifted, "_CHUNK_BYTES", limit)
        out = aggregated_attention(**given)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(given.values()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2 ** 10, 2 ** 20])
@pytest.mark.parametrize("kind", ["none", "half", "all", "each head another share", "a head for each image"])
def test_queries_that_are_chosen(kind, size, monkeypatch):
    """By lists, or all of some heads, or none at all."""
    monkeypatch.setattr(shifted, "_LEAST_SAVED", 0)
    monkeypatch.setattr(shifted, "_CHUNK_BYTES", size)
    given = tensors(shape=(3, 4, 5, 4, 8))
    share = {"none": 0., "half": 0.5, "all": 1., "each head another share": torch.tensor([0., 0.2, 0.7, 1.])}
    if kind in share:
        active = torch.rand(given["q"].shape[:-1], generator=torch.Generator().manual_seed(2)) < share[kind]
    else:
        active = torch.zeros(given["q"].shape[:-1], dtype=torch.bool)
        active[[0, 1, 2], :, :, [3, 0, 2]] = True
    for biases in (True, False):
        if not biases:
            given = {name: x for name, x in given.items() if "local_" not in name and "bias" not in name}
        actual, expected = (aggregated_attention(**given, active=active, backend=backend)
                            for backend in ("shifted", "naive"))
        torch.testing.assert_close(actual, expected)
        assert not actual[~active].any()


def test_all_tokens_are_pooled_keys():
    """Without the window's part, it is PyTorch's attention: the window's keys are far below the others."""
    given = tensors(pooled=30, dtype=torch.float32)
    given |= {"local_bias": torch.full((2, 9), -1e4), "local_weights": torch.zeros_like(given["local_weights"])}
    expected = torch.nn.functional.scaled_dot_product_attention(
        given["q"].flatten(1, 2).transpose(1, 2), given["pooled_k"].transpose(1, 2), given["pooled_v"].transpose(1, 2),
        attn_mask=given["pooled_bias"], scale=1.).transpose(1, 2).view_as(given["q"])
    torch.testing.assert_close(aggregated_attention(**given), expected)


@pytest.mark.parametrize("backend", ["shifted", "triton"])
def test_flops(backend):
    batch, height, width, heads, dim = SHAPE
    pairs = batch * heads * ((3 * height - 2) * (3 * width - 2) + height * width * 4)
    given = {name: x.requires_grad_() for name, x in tensors(device="meta").items()}
    module = shifted if backend == "shifted" else triton_backend
    order = ("q", "k", "v", "pooled_k", "pooled_v", "kernel_size", "local_bias", "pooled_bias", "local_weights")
    with FlopCounterMode(display=False) as forward:
        out = module.run(*(given.get(name, 3) for name in order))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), list(given.values()))
    assert forward.get_total_flops() == 4 * dim * pairs
    assert backward.get_total_flops() == 10 * dim * pairs


def test_the_cost_grows_with_the_tokens():
    pairs = {name: cases("aggregated_attention")[name].pairs for name in ("32x32_h4", "128x128")}
    assert math.log(pairs["128x128"] / pairs["32x32_h4"], 16) < 1.01


@pytest.mark.parametrize(("change", "message"), [
    (dict(q=(2, 5, 6, 16)), r"q and k must both be \[batch, height, width, heads, head_dim\]: got q \[2, 5, 6, 16\]"),
    (dict(k=(2, 5, 7, 2, 8)), "q and k must both be"),
    (dict(v=(2, 5, 6, 1, 8)), "v must have k's batch, height, width and heads"),
    (dict(pooled_k=(2, 4, 2, 6)), r"pooled_k and pooled_v must be .*: got pooled_k \[2, 4, 2, 6\]"),
    (dict(pooled_v=(2, 5, 2, 8)), "pooled_k and pooled_v must be"),
    (dict(pooled_k=(2, 0, 2, 8), pooled_v=(2, 0, 2, 8), pooled_bias=None), "only the batch may be empty, but pooled_k"),
    (dict(local_bias=(2, 25)), r"local_bias must be \[2, 9\], got \[2, 25\]"),
    (dict(pooled_bias=(2, 30, 9)), r"pooled_bias must be \[2, 30, 4\], got \[2, 30, 9\]"),
    (dict(local_weights=(2, 30, 2, 9)), r"local_weights must be \[2, 5, 6, 2, 9\], got \[2, 30, 2, 9\]"),
    (dict(active=(2, 5, 6, 2)), r"active must be booleans \[2, 5, 6, 2\], got torch.float64 \[2, 5, 6, 2\]"),
    (dict(kernel_size=4), "kernel_size must be a positive odd int, got 4"),
    (dict(kernel_size=True), "kernel_size must be a positive odd int, got True"),
])
def test_refusals(change, message):
    given = {**tensors(), **{name: torch.zeros(x, dtype=torch.float64) if isinstance(x, tuple) else x
                             for name, x in change.items()}}
    with pytest.raises(ValueError, match=message) as error:
        aggregated_attention(**given)
    assert "\n" not in str(error.value)


def test_refused_dtypes():
    given = tensors()
    with pytest.raises(ValueError, match=r"pooled_v is torch\.float32 on cpu, but q is torch\.float64 on cpu"):
        aggregated_attention(**given | {"pooled_v": given["pooled_v"].float()})
    with pytest.raises(ValueError, match=r"local_bias is torch\.int64 on cpu"):
        aggregated_attention(**given | {"local_bias": given["local_bias"].long()})
