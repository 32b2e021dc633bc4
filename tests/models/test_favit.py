"""FaViT: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch

import visionattn  # noqa: F401  (registers the zoo in timm)
from tests import golden
from visionattn.layers import FactorizedAttention

VARIANTS = {"favit_b0": 3_427_704, "favit_b1": 12_958_568, "favit_b2": 24_919_896, "favit_b3": 48_746_440}


@torch.no_grad()
def test_golden():
    """Logits and stage maps at 224 x 224 and at 256 x 320 pixels, loaded as a user loads a checkpoint."""
    case = golden.load("favit_b0")
    model = timm.create_model(
        "favit_b0", pretrained=True, dtype=torch.float64, pretrained_cfg_overlay=dict(
            state_dict={"model": golden.official_state_dict(case)})).eval()
    for run in case["runs"]:
        last, maps = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
        logits = model.forward_head(last)
        golden.assert_matches(logits, run["logits_summary"])
        if "logits" in run:
            expected = torch.tensor(run["logits"], dtype=torch.float64)
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        for x, summary in zip(maps, run["features"].values(), strict=True):
            golden.assert_matches(x, summary)


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params


@torch.no_grad()
def test_merging():
    """Changes no weight, and nothing where a map is one tile."""
    models = [timm.create_model("test_favit", merging=merging).eval() for merging in ("runs", "tiles")]
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(models[0](images), models[1](images), rtol=1e-3)
    runs, tiles = (FactorizedAttention(16, 1, 2, merging=merging).eval() for merging in ("runs", "tiles"))
    tiles.load_state_dict(runs.state_dict(), strict=True)
    x = torch.randn(1, 6, 7, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runs(x), tiles(x))


@pytest.mark.parametrize(("options", "message"), [
    ((24, 1, 2), r"dim \(24\) must be a multiple of 16"), ((32, 3, 2), "divide 7 of 16 parts"),
    ((12, 1, 1), "must be a multiple of 8")])
def test_widths_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FactorizedAttention(*options)


def test_images_below_a_patch_are_refused():
    model = timm.create_model("test_favit")
    with pytest.raises(ValueError, match="at least 29 x 29 pixels"):
        model(torch.zeros(1, 3, 28, 40))
