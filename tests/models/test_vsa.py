"""Swin-VSA and ViTAEv2-VSA: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch

import visionattn  # noqa: F401  (registers the zoo in timm)
from tests import golden

VARIANTS = {
    "swin_vsa_tiny": 28_779_274,
    "swin_vsa_small": 50_549_338,
    "swin_vsa_base": 89_243_776,
    "vitaev2_vsa_s": 19_773_300,
    "vitaev2_vsa_widepcm_s": 20_342_442,
    "vitaev2_vsa_widepcm_48m": 51_089_119,
    "vitaev2_vsa_widepcm_b": 93_711_532,
    "vitaev2_vsa_widepcm_b_ws12_384": 93_833_932,
}


def official(name, **options):
    """A model with the weights of a golden file, loaded as a user loads them: tables and counters stand beside them."""
    case = golden.load(name)
    computed = {key: torch.zeros(shape, dtype=torch.int64) for key, shape, kind in case["state_dict"] if kind == "computed"}
    overlay = dict(state_dict={"model": golden.official_state_dict(case) | computed})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("name", ["swin_vsa_tiny", "vitaev2_vsa_s"])
@torch.no_grad()
def test_golden(name):
    """Logits and maps: of the stages, of the final norm, of the cells that shrink a map."""
    model = official(name)
    run, = golden.load(name)["runs"]
    taps = {}
    if name == "vitaev2_vsa_s":
        cells = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
        for stage, cell in enumerate(cells, 1):
            cell.register_forward_hook(lambda module, args, out, key=f"stage{stage}_rc": taps.update({key: out}))
    last, maps = model.forward_intermediates(
        golden.random(run["input"]["seed"], run["input"]["shape"]), output_fmt="NHWC")
    taps |= {f"stage{stage}": x for stage, x in enumerate(maps, 1)}
    if name == "swin_vsa_tiny":
        taps["final_norm"] = last
    logits = model.forward_head(last)
    golden.assert_matches(logits, run["logits_summary"])
    torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert taps.keys() == run["features"].keys()
    for key, x in taps.items():
        golden.assert_matches(x.permute(0, 3, 1, 2), run["features"][key])


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params


@torch.no_grad()
def test_new_windows_are_where_they_are():
    """A new Swin-VSA is a Swin without shifts, behind the convolutions of positions."""
    model = timm.create_model("swin_vsa_tiny", embed_dim=24, depths=(1, 1, 1, 1))
    for stage in model.stages:
        for block in stage.blocks:
            assert not block.attn.predictor.weight.any()
            assert not block.attn.predictor.bias.any()
            assert block.attn.rpb.any()
            assert block.pos.weight.any()


@pytest.mark.parametrize("cpe", [True, False])
@pytest.mark.parametrize("names", ["timm", "authors"])
@torch.no_grad()
def test_weights_of_a_plain_swin(names, cpe):
    """They give what the Swin computes without shifts."""
    args = dict(embed_dim=24, depths=(2, 2, 2, 2), num_classes=10, dtype=torch.float64)
    swin = timm.create_model("swin_tiny_patch4_window7_224", **args).eval()
    weights = swin.state_dict()
    if names == "authors":  # of Swin: the downsampler at the end of a stage, tables beside the weights
        weights = {"layers." + str(int(key[7]) - 1) + key[8:] if ".downsample." in key else key.replace(".fc.", ".")
                   if key.startswith("head") else key: x for key, x in weights.items()}
        weights["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
        weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    model = timm.create_model(
        "swin_vsa_tiny", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights, num_classes=10), cpe=cpe,
        **args).eval()
    for stage in swin.layers:
        for block in stage.blocks:
            block.shift_size, block.attn_mask = (0, 0), None
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(model(x), swin(x), rtol=1e-9, atol=1e-9)


def test_settings_of_each_vitae():
    """Heads, groups and kernels of the authors' table, which a count of parameters does not tell apart."""
    for name, heads, reduction_heads, window in (
            ("vitaev2_vsa_s", [2, 4, 8, 16], [2, 2, 4, 8], 7),
            ("vitaev2_vsa_widepcm_s", [2, 4, 8, 16], [2, 4, 8, 16], 7),
            ("vitaev2_vsa_widepcm_48m", [3, 6, 12, 24], [3, 6, 12, 24], 7),
            ("vitaev2_vsa_widepcm_b", [4, 8, 16, 32], [4, 8, 16, 32], 7),
            ("vitaev2_vsa_widepcm_b_ws12_384", [4, 8, 16, 32], [4, 8, 16, 32], 12)):
        model = timm.create_model(name, device="meta")
        cells = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
        assert [stage.blocks[-1].attn.num_heads for stage in model.stages] == heads
        assert [cell.attn.num_heads for cell in cells] == reduction_heads
        assert {cell.attn.window_size for cell in cells} == {(window, window)}
        assert {block.attn.window_size for stage in model.stages for block in stage.blocks} == {(window, window)}
        assert [stage.blocks[0].pcm[0].groups for stage in model.stages] == [1, 32, 64, 128]
        assert [cell.pcm[0].groups for cell in cells] == [1, 16, 32, 64]
        assert [[conv.padding[0] for conv in cell.prm] for cell in cells] == [[2, 5, 8, 11], [1, 2, 3], [1, 2], [1, 2]]


def test_drop_path_of_vitae_repeats_early_rates():
    model = timm.create_model("vitaev2_vsa_s", drop_path_rate=0.13, device="meta")
    rates = [[getattr(block.drop_path1, "drop_prob", 0.) for block in stage.blocks] for stage in model.stages]
    for actual, expected in zip(rates, ([0, 1], [2, 3], [2, 3, 4, 5, 6, 7, 8, 9], [8, 9]), strict=True):
        assert actual == pytest.approx([0.01 * i for i in expected])


def test_averaged_weights_and_wrappers():
    """The authors' files hold two sets of weights; the averaged one is loaded. New predictors are not zero."""
    source = timm.create_model("test_vitaev2_vsa")
    assert source.patch_embed.attn.predictor.weight.any()
    file = dict(state_dict={key: x + 1 for key, x in source.state_dict().items()}, state_dict_ema=source.state_dict())
    model = timm.create_model("test_vitaev2_vsa", pretrained=True, pretrained_cfg_overlay=dict(state_dict=file))
    for key, x in model.state_dict().items():
        assert torch.equal(x, source.state_dict()[key]), key


@torch.no_grad()
def test_rules_differ_where_windows_do_not_fill_the_map():
    model = timm.create_model("test_vitaev2_vsa").eval()
    dense = timm.create_model("test_vitaev2_vsa", rules="vitae_dense").eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    dense.load_state_dict(model.state_dict())
    for size, same in (((128, 128), True), ((128, 256), False), ((120, 120), False)):
        x = torch.randn(1, 3, *size)
        expected = model(x)
        assert ((dense(x) - expected).norm() < 1e-5 * expected.norm()) == same, size


@pytest.mark.parametrize("side", range(32, 37))
@torch.no_grad()
def test_sides_that_nothing_divides(side):
    """All branches of a cell give maps of one size: a quarter of the image, rounded up."""
    model = timm.create_model("test_vitaev2_vsa", features_only=True).eval()
    for x, reduction in zip(model(torch.randn(1, 3, side, 2 * side + 1)), (4, 8, 16, 32), strict=True):
        assert x.shape[2:] == (-(-side // reduction), -(-(2 * side + 1) // reduction))
