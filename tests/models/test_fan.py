"""FAN and FAN with TAP: the authors' weights give the authors' numbers (what every family is asked for is elsewhere)."""
import pytest
import timm
import torch
from torch import nn

from tests import golden
from visionattn.dense import DenseBackbone
from visionattn.layers import attention_maps

from visionattn.tasks.losses import attention_diversification_loss

VARIANTS = {
    "fan_tiny_12_p16_224": 7_319_920, "fan_small_12_p16_224": 28_345_336, "fan_base_18_p16_224": 54_350_320,
    "fan_large_24_p16_224": 80_574_100, "fan_tiny_8_p4_hybrid": 7_467_240, "fan_small_12_p4_hybrid": 26_117_944,
    "fan_base_16_p4_hybrid": 50_475_048, "fan_large_16_p4_hybrid": 76_855_140,
    "tap_fan_tiny_12_p16_224": 7_404_688, "tap_fan_small_12_p16_224": 28_513_048, "tap_fan_base_18_p16_224": 54_643_360,
    "tap_fan_large_24_p16_224": 80_992_468, "tap_fan_tiny_8_p4_hybrid": 7_523_752,
    "tap_fan_small_12_p4_hybrid": 26_257_704, "tap_fan_base_16_p4_hybrid": 50_735_528,
    "tap_fan_large_16_p4_hybrid": 77_238_644,
}
XLARGE = dict(embed_dims=(24, 32), depths=(2, 1), num_heads=(2, 4))  # in small: two groups of blocks


def official(name: str, state_dict: dict, **options) -> nn.Module:
    """A model with the authors' weights, loaded as a user loads them."""
    overlay = dict(state_dict=state_dict)
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("name", ["fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid", "tap_fan_tiny_12_p16_224"])
@torch.no_grad()
def test_golden(name):
    case = golden.load(name)
    model, taken = official(name, golden.official_state_dict(case)), {}
    for key, module in model.named_modules():
        if key.startswith(("blocks.", "patch_embed.stages.", "cls_attn_blocks.1")):
            module.register_forward_hook(lambda module, args, out, key=key: taken.__setitem__(key, out))
    model.blocks[0].register_forward_pre_hook(lambda module, args: taken.__setitem__("embed", args[0]))
    names = {"embed_pos_tokens": "embed", "cls_blocks_out_tokens": "cls_attn_blocks.1",
             "cnn_stage0": "patch_embed.stages.0", "cnn_stage1": "patch_embed.stages.1"}
    for run in case["runs"]:
        features = model.forward_features(golden.random(run["input"]["seed"], run["input"]["shape"]))
        golden.assert_matches(model.forward_head(features), run["logits_summary"])
        golden.assert_matches(features, run["features"]["final_normed_tokens_cls_first"])
        for key, summary in run["features"].items():
            if key.startswith(("token_pool", "attn", "final", "pre_logits")):
                continue
            x = taken[names.get(key, key.replace("block", "blocks."))]
            if x.ndim == 4:
                x = x.flatten(1, 2) if key == "embed_pos_tokens" else x.permute(0, 3, 1, 2)
            golden.assert_matches(x, summary)


@torch.no_grad()
def test_golden_pooled_attention():
    """Of the first block with TAP: how much of each scale a token takes, and what attends."""
    name = "tap_fan_tiny_12_p16_224"
    case = golden.load(name)
    model, taken = official(name, golden.official_state_dict(case)), {}
    model.blocks[0].pool.predictor.register_forward_hook(
        lambda module, args, out: taken.__setitem__("weights", out.softmax(dim=1)))
    run, = case["runs"]
    with attention_maps(model) as maps:
        model(golden.random(run["input"]["seed"], run["input"]["shape"]))
    golden.assert_matches(maps[0], run["features"]["attn_block0"])
    weights = taken["weights"].permute(0, 2, 3, 1)[:, None]
    golden.assert_matches(weights, run["features"]["token_pool_weights_block0_B1HWK"])


@torch.no_grad()
def test_golden_with_the_unbiased_variance():
    """The norms of the stem as the authors' code computes them on a CPU."""
    case = golden.load("fan_tiny_8_p4_hybrid")
    weights, (run,) = golden.official_state_dict(case), case["alt_runs"]
    x = golden.random(run["input"]["seed"], run["input"]["shape"])[:1]
    expected = torch.tensor(run["logits"], dtype=torch.float64)
    model = official("fan_tiny_8_p4_hybrid", weights, stem_norm="unbiased")
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    kinds = [type(module).__name__ for module in model.patch_embed.modules() if isinstance(module, nn.LayerNorm)]
    assert kinds == ["LayerNorm"] + 7 * ["UnbiasedNorm"]


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


def test_levels_of_the_dense_backbones():
    for name, levels in {
            "fan_base_18_p16_224": ["blocks.4", "blocks.7", "blocks.11", "cls_attn_blocks.1"],
            "fan_large_16_p4_hybrid": ["patch_embed.stages.0", "patch_embed.stages.1", "blocks.18", "cls_attn_blocks.1"],
            "fan_xlarge_16_p4_hybrid": [
                "patch_embed.stages.0", "patch_embed.stages.1", "blocks.19", "cls_attn_blocks.1"]}.items():
        model = timm.create_model(name, features_only=True, device="meta")
        assert [info["module"] for info in model.feature_info.get_dicts()] == levels
    assert model.feature_info.channels() == [128, 256, 528, 768]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@torch.no_grad()
def test_maps_for_dense_tasks(tmp_path):
    """Without the class token they are what they are with it; detection has a map more, which starts anew."""
    torch.manual_seed(0)
    source = timm.create_model("test_tap_fan_hybrid").eval()
    x = torch.randn(1, 3, 64, 96)
    expected = source.forward_intermediates(x, intermediates_only=True)
    torch.save(source.state_dict(), path := tmp_path / "weights.pth")
    plain = DenseBackbone("test_tap_fan_hybrid", "segmentation", out_indices=[0, 1, 2, 3], checkpoint_path=path).eval()
    assert (plain.reductions, plain.channels) == ([4, 8, 16, 16], [8, 16, 24, 24])
    for a, b in zip(plain(x), expected, strict=True):
        torch.testing.assert_close(a, b)
    names = {key for key, _ in plain.named_parameters()}
    assert not [key for key in names if "cls_token" in key or "cls_attn_blocks.0.attn" in key or ".head." in key]
    finer = DenseBackbone("test_tap_fan_hybrid", "detection", checkpoint_path=path).eval()
    assert (finer.reductions, finer.channels) == ([4, 8, 16, 32], [8, 16, 24, 768])
    *maps, coarse = finer(x)
    for a, b in zip(maps, expected, strict=False):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(coarse, finer.model.downsample(expected[-1]))


@torch.no_grad()
def test_names_of_older_checkpoints_and_of_the_largest_model():
    """One projection of queries, keys and values in the class token's blocks, another name of the positions; where the
    authors have the convolution between two groups of blocks.
    """
    torch.manual_seed(0)
    source = timm.create_model("test_tap_fan_hybrid", **XLARGE).eval()
    assert [info["reduction"] for info in source.feature_info] == [4, 8, 16, 32]
    weights = {}
    for key, x in source.state_dict().items():
        if ".attn.k." in key or ".attn.v." in key:
            continue
        if key.startswith("cls_attn_blocks.") and ".attn.q." in key:
            x = torch.cat([source.state_dict()[key.replace(".q.", f".{name}.")] for name in "qkv"])
            key = key.replace(".q.", ".qkv.")
        key = key.replace("blocks.2.downsample", "blocks.1.downsample").replace("pos_embed.", "pos_embeder.")
        weights[f"module.{key}"] = x
    x = torch.randn(1, 3, 64, 96)
    for state_dict in (weights, source.state_dict()):
        model = timm.create_model("test_tap_fan_hybrid", **XLARGE, pretrained=True, pretrained_cfg_overlay=dict(
            state_dict={"state_dict_ema": state_dict})).eval()
        assert torch.equal(model(x), source(x))


def test_what_no_weight_tells():
    """Norms' epsilons, one rate of stochastic depth for all blocks, first weights of the classifier and convolutions."""
    for name, module in timm.create_model("fan_tiny_8_p4_hybrid", device="meta").named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if ".mlp.norm" in name else 1e-6), name
    model = timm.create_model("test_fan", drop_path_rate=0.3, head_init_scale=0.001)
    assert {block.drop_path2.drop_prob for block in model.blocks} == {0.3}
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert model.blocks[0].mlp.conv1.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)


def test_diversification_loss():
    """It sees the blocks of the patches, not the class token's, and reaches what attends."""
    torch.manual_seed(0)
    model = timm.create_model("test_fan").train()
    with attention_maps(model) as maps:
        model(torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == 4 * [(2, 4, 16, 16)] + 2 * [(2, 4, 1, 17)]
    loss = attention_diversification_loss(maps, threshold=0.5)
    assert loss.item() == pytest.approx(attention_diversification_loss(maps[:4], threshold=0.5).item())
    loss.backward()
    assert all(block.attn.qkv.weight.grad.any() for block in model.blocks)
    assert all(block.attn.q.weight.grad is None for block in model.cls_attn_blocks)


@pytest.mark.parametrize(("args", "message"), [
    (dict(stem_norm="unbiased"), "stem_norm is for hybrid models"),
    (dict(stem_norm="batch"), "stem_norm must be biased or unbiased, got 'batch'"),
    (dict(num_heads=(5,)), "num_heads 5 must divide dim 32"),
    (dict(depths=(2, 2)), "must have one entry per group of blocks"),
    (dict(out_block=4), "out_block must be one of blocks 0 to 3, got 4"),
    (dict(num_scales=-1), "num_scales must be 1 or more, got -1"),
])
def test_bad_options(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_fan", **args)
