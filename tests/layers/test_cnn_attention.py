"""Gates for networks of convolutions: the formulas, the references' numbers, and the places that timm has for them."""
import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import visionattn  # noqa: F401  (registers the zoo in timm)
from tests import golden
from visionattn.layers import EfficientLocalAttention, LittleBitAttention, SubspaceAttention, attach_attention

KINDS = {"ela": EfficientLocalAttention, "ulsam": SubspaceAttention, "lba": LittleBitAttention}


def shaken(module):
    """The module in eval mode, with weights that no zero hides."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ELA


def strip_gate(strip, conv, norm):
    """Conv1d, GroupNorm and sigmoid written out, of one image's strip [channels, length]."""
    weight, (channels, length) = conv.weight, strip.shape
    width, kernel = weight.shape[1:]
    padded = F.pad(strip, (kernel // 2, kernel // 2))
    mixed = torch.zeros_like(strip)
    for channel in range(channels):
        first = channel // width * width
        for position in range(length):
            mixed[channel, position] = (weight[channel] * padded[first:first + width, position:position + kernel]).sum()
    groups = mixed.reshape(norm.num_groups, -1)
    groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return torch.sigmoid(groups.reshape(channels, length) * norm.weight[:, None] + norm.bias[:, None])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("variant", ["T", "S"])
@torch.no_grad()
def test_ela_is_its_formula(variant, shared):
    layer = shaken(EfficientLocalAttention(32, variant, shared, dtype=torch.float64))
    x = golden.random(1, (2, 32, 5, 3))
    columns = layer.rows if shared else layer.columns
    expected = torch.stack([
        image * strip_gate(image.mean(2), layer.rows.conv, layer.rows.norm)[:, :, None]
        * strip_gate(image.mean(1), columns.conv, columns.norm)[:, None] for image in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("variant", "a_channel"), [("T", 7), ("B", 9), ("S", 42), ("L", 58)])
def test_parameters_of_ela(variant, a_channel):
    assert parameters(EfficientLocalAttention(64, variant)) == 64 * a_channel
    assert parameters(EfficientLocalAttention(64, variant, shared=False)) == 2 * 64 * a_channel


@pytest.mark.parametrize(("channels", "variant", "conv_groups", "norm_groups"), [
    (24, "T", 24, 8), (40, "B", 40, 8), (8, "S", 1, 8), (12, "L", 3, 4), (7, "S", 7, 1)])
def test_narrow_maps_of_ela(channels, variant, conv_groups, norm_groups):
    layer = EfficientLocalAttention(channels, variant)
    assert (layer.rows.conv.groups, layer.rows.norm.num_groups) == (conv_groups, norm_groups)
    assert layer(torch.randn(1, channels, 1, 1)).isfinite().all()


# ULSAM


@pytest.mark.parametrize("case", golden.load("ulsam_ops")["cases"], ids=lambda case: f"{case['num_splits']} groups")
@torch.no_grad()
def test_ulsam_has_the_authors_numbers(case):
    layer = SubspaceAttention(case["nin"], case["num_splits"], dtype=torch.float64).eval()
    theirs = {key: golden.fill(key, shape) for key, shape, *_ in case["state_dict"]}
    # The authors have a module for each group of channels.
    layer.load_state_dict({
        key: value if value.ndim == 0 else torch.cat(
            [theirs[f"subspaces.{group}.{key}"] for group in range(case["num_splits"])])
        for key, value in layer.state_dict().items()})
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    golden.assert_matches(layer(x), case["out_summary"], 1e-12)
    golden.assert_matches((layer(x) - x) / x, case["attn_gain_summary"], 1e-12)
    assert parameters(layer) == case["num_params"] == 5 * case["nin"] + 3 * case["num_splits"]


def test_ulsams_statistics_are_nearly_the_last_batchs():
    layer, x = SubspaceAttention(8, 2), torch.randn(4, 8, 5, 5)
    layer(x)
    scores = layer.conv_dws(x)
    torch.testing.assert_close(layer.bn_dws.running_mean, 0.9 * scores.mean((0, 2, 3)))
    torch.testing.assert_close(layer.bn_dws.running_var, 0.1 + 0.9 * scores.var((0, 2, 3)))


# LBA


@pytest.mark.parametrize("case", golden.load("lba_ops")["cases"], ids=lambda case: f"reduction {case['reduction']}")
def test_lba_has_the_references_numbers(case):
    layer = LittleBitAttention(case["x_shape"][1], case["reduction"], dtype=torch.float64)
    layer.load_state_dict({key: golden.fill(key, shape) for key, shape in case["params"]})
    x = golden.random(case["x_seed"], case["x_shape"]).requires_grad_()
    out = layer(x)
    (out * golden.random(case["grad_seed"], out.shape)).sum().backward()
    found = {"out": out, "grad_x": x.grad} | {key: parameter.grad for key, parameter in layer.named_parameters()}
    expected = {"out": case["out"], "grad_x": case["grad_x"]} | case["grads"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            golden.assert_matches(found[key], value["summary"], 1e-12)
        else:
            value = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)
    dim, hidden = case["x_shape"][1], max(8, case["x_shape"][1] // case["reduction"])
    assert parameters(layer) == 2 * dim * hidden + hidden + 2 * dim + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_lba_starts_as_nothing(dtype):
    x = (100 * torch.randn(2, 24, 7, 5)).to(dtype)
    assert torch.equal(LittleBitAttention(24, dtype=dtype)(x), x)


# All


@pytest.mark.parametrize(("make", "message"), [
    (lambda: EfficientLocalAttention(8, "M"), "variant of ELA must be one of T, B, S, L, got 'M'"),
    (lambda: SubspaceAttention(10, 4), r"groups \(4\) of ULSAM must be positive and divide its channels \(10\)"),
    (lambda: LittleBitAttention(8, 0), "reduction must be positive, got 0"),
])
def test_wrong_arguments_end_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_sums_in_float32(kind):
    """Of 40,000 values of 100, which float16 cannot hold the sum of; a softmax over them that rounds away nothing."""
    layer = shaken(KINDS[kind](8)).half()
    x = 100 + torch.randn(1, 8, 200, 200)
    expected = copy.deepcopy(layer).float()(x)
    out = layer(x.half())
    assert out.dtype == torch.float16
    assert ((out.float() - expected).norm() / expected.norm()).item() < 5e-3


@pytest.mark.slow
def test_onnx_of_any_size(tmp_path):
    import onnxruntime

    layer, x = shaken(nn.Sequential(*(kind(16) for kind in KINDS.values()))), torch.randn(2, 16, 9, 7)
    program = torch.onnx.export(
        layer, (x,), dynamo=True, verbose=False,
        dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},))
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for shape in ((2, 16, 9, 7), (3, 16, 4, 12)):
        x = torch.randn(shape)
        found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), rtol=1e-5, atol=1e-5)


# Where timm takes them


@pytest.mark.parametrize("kind", KINDS)
def test_timms_hooks(kind):
    """``attn_layer`` of ResNets, ``se_layer`` of EfficientNets and MnasNets; also a partial."""
    for layer in (KINDS[kind], partial(KINDS[kind], **{"ela": {"variant": "T"}}.get(kind, {}))):
        resnet = timm.create_model("test_resnet", block_args=dict(attn_layer=layer))
        blocks = [block for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4) for block in stage]
        assert all(type(block.se) is KINDS[kind] for block in blocks)
        mobilenet = timm.create_model("mnasnet_small", se_layer=layer)
        assert sum(type(module) is KINDS[kind] for module in mobilenet.modules()) == 10
        for model in (resnet, mobilenet):
            model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())


def with_branches(name):
    """A network of timm's whose branches do not start with a norm of zeros, which would hide the layers in them."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model.eval()


@torch.no_grad()
def test_lba_is_nothing_at_first_in_timms_networks():
    """Which draw the weights of their convolutions after all is built."""
    plain = with_branches("test_resnet")
    model = timm.create_model("test_resnet", block_args=dict(attn_layer=LittleBitAttention)).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(".se." in key for key in missing)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(("name", "positions"), [
    ("test_resnet", ["layer2", "layer3"]), ("test_resnet", ["layer2.0", "layer2", "layer4.0.conv2"]),
    ("test_efficientnet", ["blocks.1", "blocks.2.0"]), ("test_convnext", ["stages.1"])])
def test_layers_at_single_positions(name, positions):
    model, x = with_branches(name), torch.randn(2, 3, 64, 64)
    before, weights = copy.deepcopy(model), len(model.state_dict())
    assert attach_attention(model.train(), positions, LittleBitAttention, x) is model
    assert all(module.training for module in model.modules())
    assert all(map(torch.equal, before.buffers(), model.buffers()))
    assert len(model.state_dict()) == weights + 6 * len(positions)
    assert torch.equal(model.eval()(x), before(x))
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, maps, before.forward_intermediates(x, intermediates_only=True)))
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    layers = [module for module in model.modules() if isinstance(module, LittleBitAttention)]
    assert len(layers) == len(positions)
    assert all(layer.fc2.bias.grad.any() for layer in layers)


class Unused(nn.Module):
    """A network with a module that does not run, and one that gives no map."""

    def __init__(self):
        super().__init__()
        self.conv, self.spare, self.flat = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Flatten()

    def forward(self, x):
        return self.flat(self.conv(x))


@pytest.mark.parametrize(("positions", "message"), [
    (["layer9"], "Unused has no module 'layer9'; there are conv, spare, flat and what is in them"),
    (["conv", "conv"], "position 'conv' is named twice"),
    (["spare"], "spare of Unused did not run"),
    (["flat"], r"flat of Unused gives no map \[batch, channels, height, width\] but \[1, 288\]"),
])
def test_wrong_positions_end_in_one_line(positions, message):
    model = Unused()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        attach_attention(model, positions, LittleBitAttention, torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys


def test_channels_last_maps_are_refused():
    with pytest.raises(ValueError, match="has maps with the channels last"):
        attach_attention(timm.create_model("test_dinat"), ["stages.1"], LittleBitAttention, torch.zeros(1, 3, 64, 64))
