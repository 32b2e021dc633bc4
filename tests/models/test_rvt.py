"""RVT with and without TAP: its parameters, its masks at any size, its checkpoints."""
import pytest
import timm
import torch

from visionattn.layers import attention_maps
from visionattn.models._tables import resize_pairs
from visionattn.models.rvt import MaskedAttention
from visionattn.tasks.losses import attention_diversification_loss

VARIANTS = {
    "tap_rvt_tiny_plus": 11_049_928, "tap_rvt_small_plus": 23_468_584, "tap_rvt_base_plus": 89_396_872,
    "rvt_tiny_plus": 11_049_928 - 10 * (9 * 192 * 4 + 152) - 2 * (9 * 384 * 4 + 152),
    "rvt_small_plus": 23_468_584 - 12 * (9 * 384 * 4 + 152), "rvt_base_plus": 89_396_872 - 12 * (9 * 768 * 4 + 152),
}


def random(name: str = "test_tap_rvt", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


def test_masked_blocks():
    for name, count in (("rvt_tiny_plus", 10), ("rvt_base_plus", 5)):
        blocks = timm.create_model(name, device="meta").blocks
        assert [type(block.attn) is MaskedAttention for block in blocks] == [i < count for i in range(12)]
    more = timm.create_model("rvt_base_plus", masked_blocks=10, device="meta")
    assert sum(p.numel() for p in more.parameters()) == VARIANTS["rvt_base_plus"] + 5 * 12 * 196 ** 2


@torch.no_grad()
def test_masks_weigh_scores():
    """By the definition; a mask far above zero is none, one far below makes attention even."""
    attn = MaskedAttention(12, 2, (3, 4)).double().eval()
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    attn.mask.normal_()
    with attention_maps(attn) as maps:
        out = attn(x)
    q, k, v = attn.qkv(x).reshape(12, 3, 2, 6).permute(1, 2, 0, 3)
    weights = (q @ k.mT / 6 ** 0.5 * attn.mask.sigmoid()).softmax(dim=-1)
    torch.testing.assert_close(maps[0][0], weights)
    torch.testing.assert_close(out.flatten(0, 2), attn.proj((weights @ v).transpose(0, 1).flatten(1)))
    for value, scores in ((50., q @ k.mT / 6 ** 0.5), (-50., torch.zeros(2, 12, 12, dtype=torch.float64))):
        torch.nn.init.constant_(attn.mask, value)
        with attention_maps(attn) as maps:
            attn(x)
        torch.testing.assert_close(maps[0][0], scores.softmax(dim=-1))


@torch.no_grad()
def test_masks_of_another_size():
    """A table that depends linearly on the places is the same on a finer map, but at its edges; loading fits masks."""
    y, x = torch.meshgrid(torch.arange(4.), torch.arange(4.), indexing="ij")
    query, key = (y + 2 * x).reshape(16, 1), (x - 3 * y).reshape(16)
    inner = (torch.arange(1, 7) + 0.5) / 2 - 0.5
    fine_query, fine_key = inner[:, None] + 2 * inner, inner - 3 * inner[:, None]
    table = resize_pairs((query + key)[None], (4, 4), (8, 8)).reshape(8, 8, 8, 8)[1:-1, 1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(table, fine_query[:, :, None, None] + fine_key)

    model, image = random(), torch.randn(1, 3, 96, 96)
    overlay = dict(state_dict=model.state_dict())
    fine = timm.create_model("test_tap_rvt", img_size=96, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert fine.blocks[0].attn.mask.shape == (2, 36, 36)
    torch.testing.assert_close(fine(image), model(image))


@torch.no_grad()
def test_names_after_pit():
    source = random()
    weights = {}
    for key, x in source.state_dict().items():
        parts = key.split(".")
        if parts[0] == "blocks":
            stage, index = divmod(int(parts[1]), 2)
            key = f"pools.0.{'.'.join(parts[3:])}" if parts[2] == "downsample" else (
                f"transformers.{stage}.blocks.{index}.{'.'.join(parts[2:])}")
        for ours, theirs in ((".pool.predictor.", ".dilation_predictor.proj."), (".attn.mask", ".attn.att_mask"),
                             (".mlp.fc1.", ".mlp.conv1."), (".mlp.fc2.", ".mlp.conv2."), (".mlp.conv.", ".mlp.dwconv."),
                             ("head.norm.", "norm."), ("head.fc.", "head.")):
            key = key.replace(ours, theirs)
        weights[key] = x
    assert not weights.keys() & {key for key in source.state_dict() if "patch_embed" not in key}
    model = timm.create_model("test_tap_rvt", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights)).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))


def test_diversification_loss():
    model = random().train()
    with attention_maps(model) as maps:
        model(torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == [(2, 2, 16, 16), (2, 2, 16, 16), (2, 4, 4, 4)]
    attention_diversification_loss(maps, threshold=0.5).backward()
    assert model.blocks[0].attn.mask.grad.any()
    assert model.head.fc.weight.grad is None


def test_stochastic_depth_ends_below_its_rate():
    model = timm.create_model("test_tap_rvt", drop_path_rate=0.3)
    assert [getattr(block.drop_path2, "drop_prob", 0.) for block in model.blocks] == pytest.approx([0., 0.1, 0.2])


@pytest.mark.parametrize(("args", "message"), [
    (dict(masked_blocks=3), "masked_blocks must be 0 to 2, the blocks of the first stage, got 3"),
    (dict(depths=(2,)), "must have one entry per stage"),
    (dict(num_heads=(5, 4)), "num_heads 5 must divide dim 24"),
    (dict(img_size=14), "img_size must be 15 or more, got 14"),
])
def test_bad_options(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_tap_rvt", **args)
