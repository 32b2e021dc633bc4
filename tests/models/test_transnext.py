"""TransNeXt: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401  (registers the zoo in timm)
from tests import golden
from visionattn.layers import AggregatedAttention, CosineAttention
from visionattn.models import transnext

VARIANTS = {
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_micro_AAAA_256": 13_114_008,
}


def official(name, **options):
    """A model with the weights of a golden file, loaded as a user loads them."""
    weights = golden.official_state_dict(golden.load(name))
    variant = options.pop("variant", name)
    return timm.create_model(
        variant, pretrained=True, pretrained_cfg_overlay=dict(state_dict={"model": weights}), dtype=torch.float64,
        **options).eval()


def compare(model, run, tolerances=(1e-9, 1e-9, 1e-9, 1e-9)):
    with torch.no_grad():
        last, maps = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
        logits = model.forward_head(last)
    for x, summary, tolerance in zip(maps, run["features"].values(), tolerances, strict=True):
        golden.assert_matches(x, summary, tolerance)
    if "logits_summary" in run:
        golden.assert_matches(logits, run["logits_summary"])
    if "logits" in run:
        torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_golden():
    run, = golden.load("transnext_micro")["runs"]
    compare(official("transnext_micro"), run)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [
    ("transnext_micro_384_pool7", dict(variant="transnext_micro", pool_size=7)),
    ("transnext_micro_AAAA_256", {}),
])
def test_golden_of_other_sizes(name, options):
    """Extrapolation to 384 px with a fixed pool; aggregated attention in all stages."""
    run, = golden.load(name)["runs"]
    compare(official(name, **options), run)


@pytest.mark.slow
def test_golden_of_the_dense_backbone():
    """Biases interpolated from 224 px; ln of the last stage's tokens was computed in float32 there."""
    model = official("transnext_micro", bias_size=224)
    for run in golden.load("transnext_micro_dense_interp")["runs"]:
        compare(model, run, (1e-9, 1e-9, 1e-9, 1e-7))


def module(case):
    """A module of an op's case with the case's weights."""
    config, dd = case["config"], dict(dtype=torch.float64)
    size = config.get("pretrain_size", [7])[0]
    if case["kind"] == "ConvGLU":
        layer = transnext.ConvGLU(config["dim"], config["hidden"], **dd)
    elif case["kind"].startswith("full"):
        layer = CosineAttention(config["dim"], config["num_heads"], size, **dd)
    else:
        layer = AggregatedAttention(
            config["dim"], config["num_heads"], size, config["sr_ratio"], config["window_size"],
            config.get("fixed_pool_size"), config.get("trained", [None])[0], **dd)
    weights = {f".{name}": golden.fill(name, shape) for name, shape in case["params"]}
    weights = {name[1:]: x for name, x in transnext.checkpoint_filter_fn(weights, layer).items()}
    layer.load_state_dict(weights, strict=True)
    return layer.eval()


@pytest.mark.parametrize("case", golden.load("transnext_ops")["cases"], ids=lambda case: case["name"])
def test_golden_modules(case):
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    x = x.unflatten(1, (case["config"]["H"], case["config"]["W"]))
    with torch.no_grad():
        out = module(case)(x).flatten(1, 2)
    expected = torch.tensor(case["out"], dtype=torch.float64)
    # The order of float32 operations in one table is not the authors' where cells are three tokens wide.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-7 if case["name"] == "fixed_pool3_9x9" else 1e-12)


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
