"""Gaussian adaptive attention: the authors' numbers, and the layer around it."""
import pytest
import torch

from tests import golden
from visionattn.layers import GaussianAdaptiveAttention, gaam

CASES = golden.load("gaam_ops")["cases"]
D = dict(dtype=torch.float64)


def tables(weights, prefix):
    """Offsets and deviations of the heads whose names begin so."""
    names = [key.removesuffix("mean_offsets") for key in weights if key.startswith(prefix) and key.endswith("offsets")]
    return [torch.stack([weights[name + leaf] for name in names]) for leaf in ("mean_offsets", "c")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['x_seed']}")
def test_golden(case):
    weights = golden.filled(case["params"])
    scaled = {key: x * case.get("c_scale", 1) if key.endswith("c") else x for key, x in weights.items()}
    x = golden.random(case["x_seed"], case["shape"])
    if "pad_last" in case:
        x[:, -case["pad_last"]:] = case["padding_value"]
    x.requires_grad_()
    if case["kind"] == "block":
        out = x
        for i, axis in enumerate(case["axes"]):
            gated, gate = gaam(out, *tables(scaled, f"layers.{i}."), axis)
            golden.assert_equals(gate, case["gate"][f"layer_{i}"])
            out = out + gated
    else:
        out, gate = gaam(x, *tables(scaled, ""), case["axis"], case.get("padding_value"))
        golden.assert_equals(gate, case["gate"])
    golden.assert_equals(out, case["out"])
    # The authors' gradients are of deviations before they were scaled in one case.
    wanted = [x, *(scaled[key] if "c_scale" in case else weights[key] for key in case["grads"])]
    found = torch.autograd.grad((out * golden.random(case["grad_seed"], out.shape)).sum(), wanted)
    for grad, expected in zip(found, [case["grad_x"], *case["grads"].values()], strict=True):
        golden.assert_equals(grad, expected)


@pytest.mark.parametrize("axis", ["tokens", "channels"])
@torch.no_grad()
def test_the_layer_is_the_op_on_each_head(axis):
    torch.manual_seed(0)
    layer = GaussianAdaptiveAttention(12, 3, axis=axis, **D)
    for table in (layer.offsets, layer.c):
        table.add_(0.3 * torch.randn_like(table))
    x = torch.randn(2, 5, 4, 12, **D)
    v = layer.value(x).flatten(1, 2)
    if axis == "channels":
        expected = 4 * gaam(v, layer.offsets, layer.c)[0]
    else:
        expected = torch.cat([20 * gaam(part, layer.offsets[i:i + 1], layer.c[i:i + 1], axis=1)[0]
                              for i, part in enumerate(v.split(4, dim=-1))], dim=-1)
    torch.testing.assert_close(layer(x), layer.proj(expected).reshape(x.shape))


@torch.no_grad()
def test_half_precision_and_gates_beyond_its_range():
    x = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)) * 100
    offsets, c = torch.zeros(1, 4), torch.full((1, 4), 0.05)
    out, gate = gaam(x.half(), offsets, c, axis=1)
    assert out.dtype == gate.dtype == torch.float16
    expected, wide = gaam(x.half().double(), offsets.double(), c.double(), axis=1)
    assert wide.sum(dim=1).min() > 0.1
    assert (out - expected).norm() < 0.003 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gaam(x.half().float(), offsets, c, axis=1)[1], wide.float(), rtol=1e-3, atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"two entries a head \(3 heads\) on axis -1, got \[2, 5\]"):
        gaam(torch.zeros(2, 5), torch.zeros(3, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"must both be \[heads, gaussians\], got \[3\] and \[3, 1\]"):
        gaam(torch.zeros(2, 9), torch.zeros(3), torch.ones(3, 1))
    with pytest.raises(ValueError, match="axis must be tokens or channels"):
        GaussianAdaptiveAttention(8, 2, axis="heads")
    with pytest.raises(ValueError, match="at least two tokens"):
        GaussianAdaptiveAttention(8, 2)(torch.zeros(1, 1, 1, 8))
