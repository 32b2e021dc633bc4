"""Heads of attention: found in every family and in timm's models, and masked."""
import pytest
import timm
import torch
from timm.models.levit import Attention as LevitAttention
from timm.models.nest import Attention as NestAttention
from torch import nn

from visionattn.analysis import find_heads, masked_heads
from visionattn.models import families, family_of

HEADS = {  # of each layer of a small model
    "test_agent_cswin": [2, 4, 4, 4, 8],
    "test_agent_deit": [3, 3, 3, 3],
    "test_agent_pvt": [1, 2, 3, 3, 4],
    "test_agent_swin": [1, 2, 2, 4, 4, 8, 8],
    "test_biformer": [1, 2, 4, 4, 8],
    "test_datr": [1, 2, 3, 4],
    "test_dependency_vit": [4, 4, 4, 4],
    "test_dhvt": [4, 4, 4, 4],
    "test_dinat": [1, 1, 2, 2, 4, 4, 8, 8],
    "dinat_s_tiny": [3, 3, 6, 6, 12, 12, 24, 24],
    "vitrpb_small": [12, 12, 12, 12],
    "test_efficientvit_cga": [2, 2, 3, 3],
    "test_fan": [4, 4, 4, 4, 4, 4],
    "test_favit": [3, 5, 7, 7, 5],  # one that looks far and two groups of near ones, in the last stage one group
    "test_fcaformer": [3, 3, 3, 4],
    "test_flowformer": [4, 4, 4, 4, 4],
    "test_maformer": [2, 2, 2, 2, 3, 3, 4],  # in windows, then of the map
    "test_mixer_vit": [4, 4, 4],
    "test_moh_transnext": [2, 2, 3, 3, 4],
    "test_routing_vit": [1, 2, 4, 4, 8],
    "test_smt": [2, 4],
    "test_sparsifiner": [3, 3, 3, 3],
    "test_swin_vsa": [1, 2, 4, 4, 8],
    "test_tap_rvt": [2, 2, 4],
    "test_transnext": [1, 2, 3, 3, 4],
    "test_vitaev2_vsa": [1, 1, 1, 2, 2, 2, 2, 4],
    "deit_tiny_patch16_224": [3, 3],
    "vit_dlittle_patch16_reg1_gap_256": [2, 2],
    "swin_tiny_patch4_window7_224": [1, 2, 4],
}
SMALL = {
    "deit_tiny_patch16_224": dict(depth=2, embed_dim=24, num_heads=3, img_size=64),
    "vit_dlittle_patch16_reg1_gap_256": dict(depth=2, embed_dim=16, num_heads=2, img_size=64),  # norms queries and keys
    "swin_tiny_patch4_window7_224": dict(
        depths=(1, 1, 1), embed_dim=8, num_heads=(1, 2, 4), img_size=64, window_size=4),
}


def make(name, **kwargs):
    """A small model in float64, with weights that no zero hides."""
    family = family_of(name)
    arguments = SMALL[name] if family is None else family.small[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments | kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def images():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inputs(layers, model, x):
    """What the projections of layers are given."""
    seen = {}
    handles = [heads.projection.register_forward_pre_hook(lambda module, args: seen.setdefault(module, args[0]))
               for heads in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [seen[heads.projection] for heads in layers]


def test_every_family_is_here():
    listed = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in HEADS}
    for module, family in families().items():
        if module not in listed:  # it has no attention (CNNs), or experts in place of heads
            name, arguments = next(iter(family.small.items()))
            with pytest.raises(ValueError, match="has no attention with heads"):
                find_heads(timm.create_model(name, **arguments))


@pytest.mark.parametrize("name", HEADS)
def test_masks_have_the_right_gradients(name):
    model, x = make(name), images()
    layers = find_heads(model)
    assert [heads.count for heads in layers] == HEADS[name]
    assert all(model.get_submodule(heads.name) is heads.layer for heads in layers)
    masks = {heads.name: torch.ones(heads.count, dtype=torch.float64, requires_grad=True) for heads in layers}
    with torch.no_grad():
        plain = model(x)
    with masked_heads(model, masks):
        logits = model(x)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-13)
    weights = torch.randn_like(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), list(masks.values()))
    assert all((gradient != 0).any() for gradient in gradients)
    directions = [torch.randn_like(mask) for mask in masks.values()]
    step = 1e-5

    def shifted(sign):
        moved = {key: 1 + sign * step * direction for key, direction in zip(masks, directions, strict=True)}
        with torch.no_grad(), masked_heads(model, moved):
            return (model(x) * weights).sum()

    expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    torch.testing.assert_close((shifted(1) - shifted(-1)) / (2 * step), expected, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", ["test_agent_cswin", "test_favit", "test_efficientvit_cga"])
def test_a_mask_takes_the_channels_of_its_head(name):
    """Of tokens ``[..., channels]``, of maps ``[batch, channels, height, width]``, and of heads of several widths."""
    model, x = make(name), images()
    first = find_heads(model)[0]
    axis = 1 if name == "test_efficientvit_cga" else -1
    before, = inputs([first], model, x)
    mask = torch.tensor([1., 0.] + [1.] * (first.count - 2), dtype=torch.float64)
    with masked_heads(model, {first.name: mask}):
        after, = inputs([first], model, x)
    parts = zip(before.split(first.widths, dim=axis), after.split(first.widths, dim=axis), mask, strict=True)
    assert all(torch.equal(x * factor, y) for x, y, factor in parts)
    assert first.widths == {"test_agent_cswin": (8, 8), "test_favit": (2, 7, 7), "test_efficientvit_cga": (8, 8)}[name]


def test_a_mask_is_the_output_of_a_head():
    """timm's attention computed by hand, without its second head."""
    model, x = make("deit_tiny_patch16_224"), torch.randn(1, 6, 24, dtype=torch.float64)
    attn = model.blocks[1].attn
    q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind()
    heads = (q @ k.mT / 8 ** 0.5).softmax(dim=-1) @ v
    heads = heads * torch.tensor([1., 0., 1.], dtype=torch.float64)[:, None, None]
    with masked_heads(model, {"blocks.1.attn": torch.tensor([1., 0., 1.])}):
        out = attn(x)
    torch.testing.assert_close(out, attn.proj(heads.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_a_projection_may_begin_with_an_activation():
    layer = LevitAttention(dim=12, key_dim=4, num_heads=2, resolution=(2, 3), use_conv=True, act_layer=nn.Hardswish)
    layer.eval()
    found, = find_heads(layer)
    assert (found.name, found.count, found.widths) == ("", 2, (16, 16))
    x = torch.randn(1, 12, 2, 3)
    before, = inputs([found], layer, x)
    with masked_heads(layer, {"": torch.tensor([0., 2.])}):
        after, = inputs([found], layer, x)
    assert torch.equal(after, torch.cat([0 * before[:, :16], 2 * before[:, 16:]], dim=1))


def test_bad_models_and_masks_are_named():
    with pytest.raises(ValueError, match="AttentionResNet has no attention with heads"):
        find_heads(timm.create_model("test_resnet_ela"))
    with pytest.raises(ValueError, match="Attention has no attention with heads"):  # its heads lie otherwise
        find_heads(NestAttention(8, num_heads=2))
    model = make("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"no attention layer 'blocks.2.attn' with heads; it has blocks.0.attn, b"), \
            masked_heads(model, {"blocks.2.attn": torch.ones(3)}):
        pass
    with pytest.raises(ValueError, match=r"mask of blocks.0.attn must have a factor for each of 3 heads, \[3\], got"), \
            masked_heads(model, {"blocks.1.attn": torch.ones(3), "blocks.0.attn": torch.ones(4)}):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="RecursiveScriptModule is compiled"):
        find_heads(torch.jit.script(nn.Linear(2, 2)))
