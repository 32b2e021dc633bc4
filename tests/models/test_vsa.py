"""Swin-VSA: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch

import visionattn  # noqa: F401  (registers the zoo in timm)
from tests import golden

VARIANTS = {
    "swin_vsa_tiny": 28_779_274,
    "swin_vsa_small": 50_549_338,
    "swin_vsa_base": 89_243_776,
}


def official(name, **options):
    """A model with the weights of a golden file, loaded as a user loads them."""
    overlay = dict(state_dict={"model": golden.official_state_dict(golden.load(name))})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("name", ["swin_vsa_tiny"])
@torch.no_grad()
def test_golden(name):
    model = official(name)
    run, = golden.load(name)["runs"]
    last, maps = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
    logits = model.forward_head(last)
    golden.assert_matches(logits, run["logits_summary"])
    torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    for stage, x in enumerate(maps, 1):
        golden.assert_matches(x, run["features"][f"stage{stage}"])
    if name == "swin_vsa_tiny":
        summary = run["features"]["final_norm"]
        golden.assert_matches(last.permute(0, 3, 1, 2), summary)


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
