"""Varied-size windows in timm's Swin transformer, and what the layer asks of its arguments."""
import copy

import pytest
import timm
import torch

from visionattn.layers import VariedSizeWindowAttention, vary_windows


def swin(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 2, 2), num_classes=10,
        dtype=torch.float64, **kwargs).eval()


def unshifted(model):
    """The same Swin with windows that are not shifted."""
    model = copy.deepcopy(model)
    for stage in model.layers:
        for block in stage.blocks:
            block.shift_size = (0, 0)
            block.attn_mask = None
    return model


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_swin_starts_as_itself_without_shifts():
    """Logits and gradients of all its weights; the shifted Swin is another function."""
    plain, x = swin(), images(224, 224)
    varied = vary_windows(copy.deepcopy(plain))
    expected = unshifted(plain)
    assert not torch.allclose(expected(x), plain(x))
    torch.testing.assert_close(varied(x), expected(x), rtol=1e-9, atol=1e-9)
    gradients = []
    for model in (varied, expected):
        model(x).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[1].items():
        if key.endswith("relative_position_bias_table"):
            ours = gradients[0][key.replace("relative_position_bias_table", "rpb")]
            gradient, key = gradient.T.reshape(ours.shape), key.replace("relative_position_bias_table", "rpb")
        torch.testing.assert_close(gradients[0][key], gradient, rtol=1e-7, atol=1e-9)
    assert all(g.any() for key, g in gradients[0].items() if "predictor" in key)  # it will not stay what it is


@torch.no_grad()
def test_plain_weights_loaded_later_are_a_start_too():
    """Into a model whose windows vary already: all but the predictors and the tables have timm's names."""
    source = swin()
    varied = vary_windows(swin())
    for parameter in varied.parameters():
        parameter.add_(1)
    result = varied.load_state_dict(vary_windows(copy.deepcopy(source)).state_dict())
    assert not result.missing_keys
    x = images(224, 224)
    torch.testing.assert_close(varied(x), unshifted(source)(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_other_sizes():
    """Windows that do not fill the map: Swin's padded tokens hold the projection's bias, ours are zero."""
    plain, x = swin(strict_img_size=False), images(200, 264)
    varied = vary_windows(copy.deepcopy(plain))
    assert varied(x).isfinite().all()
    for model in (plain, varied):
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.zero_()
    # Without biases of the projection, padded tokens are zero in both.
    torch.testing.assert_close(varied(x), unshifted(plain)(x), rtol=1e-9, atol=1e-9)
    varied.set_input_size((256, 320))
    assert varied(images(256, 320)).isfinite().all()


def test_varied_swin_trains_and_is_copied():
    varied = vary_windows(swin(drop_path_rate=0.1)).train()
    optimizer = torch.optim.SGD(varied.parameters(), 0.1)
    varied(images(224, 224)).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in varied.parameters())
    varied.eval()
    twin = copy.deepcopy(varied)
    with torch.no_grad():
        assert torch.equal(twin(images(224, 224)), varied(images(224, 224)))
    assert vary_windows(torch.nn.Sequential(swin()))[0].layers[0].blocks[0].attn.predictor.weight.dtype == torch.float64


@pytest.mark.parametrize(("model", "message"), [
    (lambda: timm.create_model("resnet10t"), "ResNet has no SwinTransformerBlock"),
    (lambda: vary_windows(swin()), "SwinTransformer has no SwinTransformerBlock"),  # any more
    (lambda: swin(attn_drop_rate=0.1), "varied-size windows have no attn_drop, got 0.1"),
    (lambda: swin(head_dim=16), "the heads must have the width of the block, 24, got 48"),
])
def test_models_that_cannot_vary(model, message):
    with pytest.raises(ValueError, match=message):
        vary_windows(model())


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(dim=10, num_heads=3), "num_heads 3 must divide the width 10"),
    (dict(dim=12, num_heads=3, dim_out=8), "num_heads 3 must divide the width 8"),
    (dict(dim=12, num_heads=3, rules="vsa"), "rules must be one of swin, vitae, vitae_dense, got 'vsa'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VariedSizeWindowAttention(**arguments)


@pytest.mark.parametrize("rules", ["swin", "vitae", "vitae_dense"])
@pytest.mark.parametrize("size", [(1, 1), (3, 20), (7, 7), (9, 13)], ids=str)
@torch.no_grad()
def test_maps_of_any_size(rules, size):
    """Also where no window fits, by which the authors' code divides."""
    layer = VariedSizeWindowAttention(8, 2, 7, rules=rules)
    torch.nn.init.normal_(layer.predictor.weight)
    x = torch.randn(2, *size, 8)
    assert layer(x).shape == x.shape
    assert layer(x).isfinite().all()
    assert layer.windows(x).shape == (2, -(-size[0] // 7), -(-size[1] // 7), 2, 4)


@torch.no_grad()
def test_windows_start_in_their_places():
    layer = VariedSizeWindowAttention(8, 2, (2, 3), rules="vitae_dense")
    torch.nn.init.zeros_(layer.predictor.weight)
    torch.nn.init.zeros_(layer.predictor.bias)
    windows = layer.windows(torch.randn(1, 3, 6, 8))[0, ..., 0, :]  # a row is added, at the end
    assert windows.tolist() == [[[0, 0, 3, 2], [3, 0, 6, 2]], [[0, 2, 3, 4], [3, 2, 6, 4]]]
