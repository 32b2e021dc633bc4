"""MoH-ViT: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch

import visionattn  # noqa: F401  (registers the zoo in timm)
from tests import golden
from visionattn.layers import AggregatedAttention, CosineAttention, HeadGates, auxiliary_losses
from visionattn.models import moh_transnext

VARIANTS = {
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
}


@pytest.mark.slow
def test_golden():
    """Logits, maps and, in training, the auxiliary loss."""
    case = golden.load("moh_transnext_small_75")
    weights = golden.official_state_dict(case)
    model = timm.create_model(
        "moh_transnext_small_75", pretrained=True, pretrained_cfg_overlay=dict(state_dict={"model": weights}),
        dtype=torch.float64).eval()
    run, = case["runs"]
    x = golden.random(run["input"]["seed"], run["input"]["shape"])
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        golden.assert_matches(model.forward_head(last), run["logits_summary"])
        for actual, summary in zip(maps, run["features"].values(), strict=True):
            golden.assert_matches(actual, summary)
        assert not auxiliary_losses(model)
        model.train()(x)
    losses = auxiliary_losses(model)
    assert list(losses) == ["head_balance"]
    assert losses["head_balance"].item() == pytest.approx(case["extra"]["aux_train"]["moh_loss"], rel=1e-6)


@pytest.mark.parametrize("case", golden.load("moh_ops")["cases"], ids=lambda case: case["name"])
def test_golden_modules(case):
    config, dd = case["config"], dict(dtype=torch.float64)
    dim, heads = config["dim"], config["num_heads"]
    size = config["H"], config["W"]
    gate = HeadGates(dim, heads, config["shared_head"], config["routed_head"], loss_weight=1., **dd)
    if "sr_ratio" in config:
        layer = AggregatedAttention(dim, heads, size, config["sr_ratio"], config["window_size"], gate=gate, **dd)
    else:
        layer = CosineAttention(dim, heads, size, gate=gate, **dd)
    weights = {f".attn.{name}": golden.fill(name, shape) for name, shape in case["params"]}
    renamed = moh_transnext.checkpoint_filter_fn(weights, layer)
    layer.load_state_dict({name.removeprefix(".attn."): x for name, x in renamed.items()}, strict=True)
    x = golden.random(case["x"]["seed"], case["x"]["shape"]).unflatten(1, size)
    expected = torch.tensor(case["out"], dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            out = layer.train(training)(x).flatten(1, 2)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        losses = auxiliary_losses(layer)
        assert bool(losses) == (training and config["routed_head"] > 0)
        if losses:
            assert losses["head_balance"].item() == pytest.approx(case["aux_loss"][0], rel=1e-6)
    gates = torch.tensor(case["gates"], dtype=torch.float64)
    torch.testing.assert_close(gate(x).flatten(0, 2), gates, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(("name", "share"), [
    ("moh_transnext_small_80", 0.8), ("moh_transnext_small_75", 0.753), ("moh_transnext_base_75", 0.75),
    ("moh_transnext_base_50", 0.5)])
def test_share_of_the_heads(name, share):
    attentions = [block.attn for stage in timm.create_model(name, device="meta").stages for block in stage.blocks]
    active = sum(attn.gate.shared_heads + attn.gate.topk for attn in attentions)
    assert active / sum(attn.num_heads for attn in attentions) == pytest.approx(share, abs=5e-4)


def test_indifferent_routers_that_choose_all_change_nothing():
    torch.manual_seed(0)
    plain = timm.create_model("test_transnext", num_heads=(2, 2, 3, 4)).eval()
    model = timm.create_model("test_moh_transnext", shared_heads=(2, 0, 1, 2), routed_heads=(0, 2, 2, 2)).eval()
    gates = {name: torch.zeros_like(x) for name, x in model.state_dict().items() if ".gate." in name}
    model.load_state_dict(plain.state_dict() | gates, strict=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_loss_reaches_the_routers(checkpointing):
    torch.manual_seed(0)  # of some weights a router gets next to nothing
    model = timm.create_model("test_moh_transnext").train()
    model.set_grad_checkpointing(checkpointing)
    out = model(torch.randn(2, 3, 64, 64))
    loss = auxiliary_losses(model)["head_balance"]
    (0 * out.sum() + loss).backward()
    gates = [m for m in model.modules() if isinstance(m, HeadGates) and m.topk]
    assert all(gate.routed.grad.abs().max() > 0 for gate in gates)
    assert not auxiliary_losses(model)  # the recomputation offers nothing


@pytest.mark.parametrize(("heads", "shared", "topk"), [(4, 5, 0), (4, 2, 3), (4, 2, 0), (4, 4, 1), (1, 1, 0)])
def test_impossible_heads(heads, shared, topk):
    with pytest.raises(ValueError, match="heads|a single shared head"):
        HeadGates(8, heads, shared, topk)
