"""The attention module of NAT: projections, padding of small maps, export with free sizes."""
import pytest
import torch
import torch.nn.functional as F

from tests import golden
from visionattn.layers import NeighborhoodAttention2d
from visionattn.ops import neighborhood_attention


def make(dim: int = 16, num_heads: int = 2, **kwargs) -> NeighborhoodAttention2d:
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(dim, num_heads, **kwargs, dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * golden.random(i, parameter.shape))
    return layer


def test_window_of_the_whole_map_is_full_attention():
    layer, x = make(kernel_size=7), golden.random(9, (2, 7, 7, 16))
    q, k, v = layer.qkv(x).reshape(2, 49, 3, 2, 8).permute(2, 0, 3, 1, 4)
    axis = torch.arange(7)
    offset = axis - axis[:, None] + 6  # key minus query
    bias = layer.rpb[:, offset][..., offset].permute(0, 1, 3, 2, 4).reshape(2, 49, 49)
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(2, 7, 7, 16))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("height", "width"), [(5, 9), (9, 20), (20, 3), (1, 1), (15, 17)])
def test_small_maps_are_padded_with_tokens_that_take_part(height, width):
    """Zeros before the projection: padded keys and values are the projection's bias, and nothing is masked."""
    layer, x = make(kernel_size=5, dilation=3), golden.random(9, (1, height, width, 16))
    padded = torch.zeros(1, max(height, 15), max(width, 15), 16, dtype=x.dtype)
    padded[:, :height, :width] = x
    q, k, v = layer.qkv(padded).reshape(*padded.shape[:3], 3, 2, 8).unbind(3)
    out = neighborhood_attention(q, k, v, 5, 3, bias=layer.rpb, backend="naive")
    expected = layer.proj(out[:, :height, :width].flatten(3))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_without_biases():
    layer, x = make(qkv_bias=False, rpb=False, kernel_size=3), golden.random(9, (1, 6, 5, 16))
    assert [name for name, _ in layer.named_parameters()] == ["qkv.weight", "proj.weight", "proj.bias"]
    q, k, v = layer.qkv(x).reshape(1, 6, 5, 3, 2, 8).unbind(3)
    expected = layer.proj(neighborhood_attention(q, k, v, 3, backend="naive").flatten(3))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_names_and_order_of_the_weights():
    names = [name for name, _ in make().named_parameters()]
    assert names == ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]


@pytest.mark.parametrize("size", [(12, 15), (4, 15)], ids=["whole", "padded"])
def test_gradients(size):
    layer, x = make(dim=4, num_heads=2, kernel_size=3, dilation=2), golden.random(9, (1, *size, 4)).requires_grad_()
    direction, step = golden.random(10, x.shape), 1e-6
    weights = golden.random(11, x.shape)
    (layer(x) * weights).sum().backward()
    with torch.no_grad():
        change = ((layer(x + step * direction) - layer(x - step * direction)) * weights).sum() / (2 * step)
        assert torch.isclose((x.grad * direction).sum(), change, rtol=1e-6)
        table, direction = layer.rpb.clone(), golden.random(12, layer.rpb.shape)
        outputs = []
        for sign in (1, -1):
            layer.rpb.copy_(table + sign * step * direction)
            outputs.append((layer(x) * weights).sum())
        assert torch.isclose((layer.rpb.grad * direction).sum(), (outputs[0] - outputs[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(num_heads=3), r"num_heads \(3\) must divide dim \(16\)"),
    (dict(kernel_size=4), "kernel_size must be odd and at least 3, got 4"),
    (dict(kernel_size=1), "kernel_size must be odd"),
    (dict(dilation=0), "dilation must be at least 1, got 0"),
])
def test_options_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


SIZES = [(5, 9), (14, 14), (40, 33), (61, 20), (3, 70)]


def exported(**kwargs):
    layer = make(**kwargs).float().eval()
    free = {axis: torch.export.Dim(name, min=2, max=4096) for axis, name in ((0, "batch"), (1, "height"), (2, "width"))}
    return layer, (torch.randn(2, 40, 33, 16),), (free,)


@torch.no_grad()
def test_exports_with_free_sizes():
    layer, args, free = exported(kernel_size=7, dilation=2)
    program = torch.export.export(
        layer, args, dynamic_shapes=free, prefer_deferred_runtime_asserts_over_guards=True).module()
    for size in [(40, 33), (61, 20), (18, 71)]:
        x = torch.randn(3, *size, 16)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="PyTorch 2.9 cannot see that a padded side is long enough")
@torch.no_grad()
def test_onnx_with_free_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    layer, args, free = exported(kernel_size=7, dilation=2)
    torch.onnx.export(layer, args, tmp_path / "layer.onnx", dynamo=True, opset_version=20, dynamic_shapes=free)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = torch.randn(3, *size, 16)
        out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), layer(x), rtol=1e-4, atol=1e-5)
