"""MAFormer against its formulas written out, as there is no authors' code; sizes, and the two ways to global tokens."""
import pytest
import timm
import torch
import torch.nn.functional as F

from tests.models.test_families import images, make
from visionattn.layers import LocalGlobalAttention
from visionattn.layers.local_global import _resized

PARAMETERS = {  # counted: with convolutions, with linear maps of the tokens at 224 pixels
    "maformer_s": (20_218_642, 22_826_034), "maformer_b": (43_124_434, 45_731_826),
    "maformer_l": (80_718_724, 84_394_804)}
KINDS = ("conv", "linear")


def layer(kind, size=(6, 5), **kwargs):
    """A layer in float64 with weights that no zero hides."""
    torch.manual_seed(0)
    module = LocalGlobalAttention(
        8, 2, size, window_size=4, reduction=3, downsample=kind, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def tokens(batch=2, height=6, width=5):
    return torch.randn(batch, height, width, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def windows_written_out(module, x):
    """Attention within windows of one map, token by token; zeros beyond the map are keys like others."""
    height, width, dim = x.shape
    size, heads = module.window_size, module.num_heads
    padded = x.new_zeros(height + size, width + size, dim)
    padded[:height, :width] = x
    q, k, v = module.qkv(padded).unflatten(-1, (3, heads, -1)).unbind(-3)
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            places = [(y, z) for y in range(i // size * size, (i // size + 1) * size)
                      for z in range(j // size * size, (j // size + 1) * size)]
            for head in range(heads):
                scores = torch.stack([
                    (q[i, j, head] * k[y, z, head]).sum() * (dim // heads) ** -0.5
                    + module.rpb[head, i - y + size - 1, j - z + size - 1] for y, z in places])
                values = torch.stack([v[y, z, head] for y, z in places])
                share = dim // heads
                out[i, j, head * share:(head + 1) * share] = scores.softmax(0) @ values
    return module.proj(out)


def summary_written_out(module, x):
    """Global tokens of one map."""
    height, width, dim = x.shape
    if module.linear:
        return torch.stack([
            sum(module.weight[m, n] * x[n // width, n % width] for n in range(height * width)) + module.bias[m]
            for m in range(len(module.weight))])
    step = module.reduction
    found = []
    for y in range(0, height, step):
        for z in range(0, width, step):
            cell = module.down.bias.clone()
            for i in range(y, min(y + step, height)):
                for j in range(z, min(z + step, width)):
                    cell = cell + module.down.weight[:, 0, i - y, j - z] * x[i, j]
            found.append(cell)
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layer_is_its_formula(kind):
    """Windows and cells do not divide the map."""
    module, x = layer(kind), tokens()
    expected = []
    for one in x:
        local, summary = windows_written_out(module.local, one), summary_written_out(module, one)
        q, (k, v) = module.q(local), module.kv(summary).chunk(2, dim=-1)
        found = torch.cat([
            ((q[..., part] @ k[:, part].T) / 2).softmax(-1) @ v[:, part] for part in (slice(0, 4), slice(4, 8))], dim=-1)
        expected.append(module.proj(local + found))
    torch.testing.assert_close(module(x), torch.stack(expected), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_block_is_its_formula():
    model = make("test_maformer", dtype=torch.float64)
    block, x = model.stages[0].blocks[0], torch.randn(2, 7, 9, 16, dtype=torch.float64)
    y = x + F.conv2d(x.movedim(-1, 1), block.conv.weight, block.conv.bias, padding=1, groups=16).movedim(1, -1)
    y = y + block.attn(F.layer_norm(y, (16,), block.norm1.weight, block.norm1.bias))
    hidden = F.gelu(block.mlp.fc1(F.layer_norm(y, (16,), block.norm2.weight, block.norm2.bias)))
    torch.testing.assert_close(block(x), y + block.mlp.fc2(hidden), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_later_stages_attend_to_all():
    model = make("test_maformer", dtype=torch.float64)
    attn, x = model.stages[2].blocks[0].attn, torch.randn(2, 3, 4, 48, dtype=torch.float64)
    q, k, v = attn.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, 16)).unbind(2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(4).softmax(-1)
    expected = attn.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)).unflatten(1, (3, 4))
    torch.testing.assert_close(attn(x), expected, rtol=1e-12, atol=1e-12)


# Sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 2), (12, 11)], ids=str)
@torch.no_grad()
def test_maps_of_any_size(kind, size):
    module, x = layer(kind), tokens(2, *size)
    out = module(x)
    assert out.shape == x.shape
    assert out.isfinite().all()
    torch.testing.assert_close(module(x[1:]), out[1:])


@torch.no_grad()
def test_linear_maps_are_interpolated():
    """Over tokens and global tokens, as grids; the sum over an even map stays what it was."""
    module = layer("linear")
    weight, bias = _resized(module.weight, module.bias, (6, 5), (12, 10), 3)
    table = module.weight.reshape(2, 2, 6, 5)
    table = F.interpolate(table.flatten(0, 1)[None], size=(12, 10), mode="bilinear")[0].reshape(2, 2, 120)
    table = F.interpolate(table.movedim(-1, 0)[:, None], size=(4, 4), mode="bilinear")[:, 0].movedim(0, -1)
    torch.testing.assert_close(weight, table.reshape(16, 120) / 4, rtol=1e-12, atol=1e-12)
    assert bias.shape == (16,)
    smooth = LocalGlobalAttention(8, 2, (6, 6), 4, 3, "linear", dtype=torch.float64)
    torch.nn.init.constant_(smooth.weight, 1 / 36)
    for size in ((6, 6), (12, 12), (5, 7), (1, 1)):
        weight, bias = _resized(smooth.weight, smooth.bias, (6, 6), size, 3)
        torch.testing.assert_close(weight.sum(1), torch.ones_like(bias))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_set_input_size_changes_no_result(kind):
    model, x = make("test_maformer", downsample=kind), images(2, 96, 72)
    expected, shapes = model(x), [parameter.shape for parameter in model.parameters()]
    model.set_input_size((96, 72))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert (shapes == [parameter.shape for parameter in model.parameters()]) == (kind == "conv")
    again = timm.create_model("test_maformer", downsample=kind, img_size=(96, 72)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_with_convolutions_nothing_depends_on_the_image_size():
    small, large = (timm.create_model("maformer_s", device="meta", img_size=size) for size in (64, 512))
    assert {key: x.shape for key, x in small.state_dict().items()} == {
        key: x.shape for key, x in large.state_dict().items()}
    maps = timm.create_model("maformer_s", device="meta", features_only=True)(torch.empty(1, 3, 250, 333, device="meta"))
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 63, 84), (128, 32, 42), (256, 16, 21), (512, 8, 11)]


# What is counted and what is refused


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    counts = tuple(
        sum(parameter.numel() for parameter in timm.create_model(name, device="meta", downsample=kind).parameters())
        for kind in KINDS)
    assert counts == PARAMETERS[name]


@pytest.mark.parametrize(("options", "message"), [
    (dict(downsample="pool"), "downsample must be 'conv' or 'linear', got 'pool'"),
    (dict(depths=(1, 1, 1)), r"depths must have one entry per stage, 4, got \(1, 1, 1\)"),
    (dict(reductions=(4,)), r"reductions must have one entry per stage of the first two, 2, got \(4,\)"),
    (dict(num_heads=(3, 2, 3, 4)), "num_heads 3 must divide dim 16"),
    (dict(num_heads=(2, 2, 5, 4)), "num_heads 5 must divide dim 48"),
    (dict(window_size=0), "window_size and reduction must be positive, got 0 and 4"),
])
def test_wrong_arguments_end_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        timm.create_model("test_maformer", **options)
    assert "\n" not in str(caught.value)
