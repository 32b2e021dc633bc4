"""Grouped query attention: the authors' numbers, what is ours beside them, and trained heads that become groups."""
import copy

import numpy as np
import pytest
import timm
import torch

from tests import golden
from visionattn.layers import GroupedQueryAttention, group_heads, to_gqa
from visionattn.layers.gqa import disturb

CASES = golden.load("gqa_ops")["cases"]
D = dict(dtype=torch.float64)


def cases(*kinds):
    return [pytest.param(case, id=f"{case['kind']}-{i}") for i, case in enumerate(CASES) if case["kind"] in kinds]


def built(case, weights, **options):
    """The layer of a case with the authors' weights, whose q, k and v are one projection here."""
    allocation = "static" if case["kind"] == "gqa" else case["kind"]
    layer = GroupedQueryAttention(case["dim"], case["heads"], case["kv_heads"], allocation, **options, **D)
    state = {f"qkv.{leaf}": torch.cat([weights[f"{part}.{leaf}"] for part in "qkv"]) for leaf in ("weight", "bias")}
    state |= {f"proj.{leaf}": weights[f"proj.{leaf}"] for leaf in ("weight", "bias")}
    missing, unexpected = layer.load_state_dict({key: x.detach() for key, x in state.items()}, strict=False)
    assert set(missing) <= {"owner", "cache", "steps"}
    assert not unexpected
    return layer


def gradients(layer):
    """Of the authors' projections."""
    groups, heads = layer.kv_heads, layer.num_heads
    width = layer.proj.weight.shape[0] // heads
    found = {f"proj.{leaf}": getattr(layer.proj, leaf).grad for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        parts = getattr(layer.qkv, leaf).grad.split([heads * width, groups * width, groups * width])
        found |= {f"{part}.{leaf}": x for part, x in zip("qkv", parts, strict=True)}
    return found


@pytest.mark.parametrize("case", cases("convert"))
def test_conversion_golden(case):
    weights = {key: golden.fill(key, shape) for key, shape in case["source_keys"]}
    grouped = to_gqa(weights, case["heads"], case["kv_heads"])
    for leaf in ("weight", "bias"):
        old, new = weights[f"blocks.0.attn.qkv.{leaf}"], grouped[f"blocks.0.attn.qkv.{leaf}"]
        q, k, v = new.split([case["dim"], *[(len(new) - case["dim"]) // 2] * 2])
        assert torch.equal(q, old[:case["dim"]])
        golden.assert_equals(k, case[f"k_{leaf}"])
        golden.assert_equals(v, case[f"v_{leaf}"])


@pytest.mark.parametrize("case", cases("gqa", "kdgqa"))
def test_golden(case):
    layer = built(case, golden.filled(case["params"])).train()
    x = golden.random(case["x_seed"], case["x_shape"])
    x = (x if case.get("image") is None else x[case["image"]][None]).requires_grad_()
    out = layer(x)
    golden.assert_equals(out, case["out"])
    (out * golden.random(case["grad_seed"], out.shape)).sum().backward()
    golden.assert_equals(x.grad, case["grad_x"])
    for key, expected in case.get("grads", {}).items():
        golden.assert_equals(gradients(layer)[key], expected)
    if "allocation" in case:
        assert torch.bincount(layer.owner, minlength=layer.kv_heads).tolist() == case["allocation"]


@pytest.mark.parametrize("case", cases("dgqa_diff", "dgqa_ema"))
def test_golden_of_a_sequence(case):
    layer = built(case, golden.filled(case["params"]), window_size=case["window_size"], live_eval=True)
    for step in case["steps"]:
        layer.train(step["mode"] == "train")
        golden.assert_equals(layer(golden.random(step["x_seed"], case["x_shape"])), step["out"])
        assert torch.bincount(layer.owner, minlength=layer.kv_heads).tolist() == step["split"]
        torch.testing.assert_close(layer.cache, torch.tensor(step["cache"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", cases("pgqa"))
def test_golden_of_noise(case, monkeypatch):
    layer = built(case, golden.filled(case["params"]), live_eval=True).eval()
    noise = torch.stack([torch.from_numpy(np.random.RandomState(seed).random_sample(case["noise_shape"]))
                         for seed in case["noise_seeds"]])
    layer.generator = torch.Generator()
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: noise.reshape(shape))
    x = golden.random(case["x_seed"], case["x_shape"]).requires_grad_()
    out = layer(x)
    golden.assert_equals(out, case["out"])
    (out * golden.random(case["grad_seed"], out.shape)).sum().backward()
    golden.assert_equals(x.grad, case["grad_x"])
    for key, expected in case["grads"].items():
        golden.assert_equals(gradients(layer)[key], expected)


def test_noise_is_of_training_and_of_a_generator():
    layer, x = GroupedQueryAttention(8, 4, 2, "pgqa", **D), golden.random(0, (2, 5, 8))
    plain = layer(x)
    layer.generator = torch.Generator().manual_seed(0)
    assert torch.equal(layer.eval()(x), plain)
    assert not torch.equal(layer.train()(x), plain)
    out = disturb(golden.random(1, (2, 4, 5, 2)), torch.rand(2, 2, 10, **D))
    torch.testing.assert_close(out.flatten(2).mean(dim=-1), torch.zeros(2, 4, **D))


@pytest.mark.parametrize("allocation", ["kdgqa", "dgqa_diff", "dgqa_ema"])
def test_eval_keeps_the_groups_of_training(allocation):
    layer, x = GroupedQueryAttention(32, 8, 4, allocation, window_size=1, **D), golden.random(303, (2, 5, 32))
    with torch.no_grad():
        layer.qkv.weight[32:64].mul_(torch.arange(1, 33)[:, None] / 8)  # of the keys: heads of unlike norms
    static = layer.owner.clone()
    layer.train()(x)
    learnt = layer.owner.clone()
    assert not torch.equal(learnt, static)
    layer.eval()
    together = layer(golden.random(5, (3, 5, 32)))
    torch.testing.assert_close(layer(golden.random(5, (3, 5, 32))[:1]), together[:1])
    assert torch.equal(layer.owner, learnt)
    again = GroupedQueryAttention(32, 8, 4, allocation, **D)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.owner, learnt)
    again.reset_parameters()
    assert torch.equal(again.owner, static)


@pytest.mark.parametrize("allocation", ["kdgqa", "dgqa_diff"])
def test_norms_that_tell_nothing_give_static_groups(allocation):
    """Where the authors' code divides 0 by 0 and repairs the result for hours."""
    layer = GroupedQueryAttention(16, 4, 2, allocation, window_size=1, live_eval=True, **D)
    with torch.no_grad():
        layer.qkv.weight[20:24] = layer.qkv.weight[16:20]  # the two key heads
        layer.qkv.bias.zero_()
    x = golden.random(0, (2, 5, 16))
    for _ in range(2):  # the second time the norms have not changed
        layer.eval()(x)
    assert layer.owner.tolist() == [0, 0, 1, 1]
    before = layer(x)
    assert layer(x * torch.nan).isnan().all()  # nothing is learnt from it
    assert torch.equal(layer(x), before)


def test_two_steps_before_a_backward_pass():
    layer = GroupedQueryAttention(32, 8, 4, "kdgqa", **D).train()
    losses = [layer(golden.random(seed, (1, 5, 32))).sum() for seed in range(2)]
    sum(losses).backward()
    assert layer.qkv.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_trained_vit_becomes_grouped():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=4, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images)
    same = group_heads(copy.deepcopy(vit), 4)
    assert torch.equal(same(images), expected)  # bit for bit
    assert same.state_dict().keys() == vit.state_dict().keys()
    grouped = group_heads(copy.deepcopy(vit), 2)
    saved = 2 * 2 * 25 * 2 * 6  # depth, k and v, inputs and a bias, two heads of six channels less
    assert sum(x.numel() for x in grouped.parameters()) == sum(x.numel() for x in vit.parameters()) - saved
    assert not torch.equal(grouped(images), expected)
    for key, value in to_gqa(vit.state_dict(), 4, 2).items():
        assert torch.equal(grouped.state_dict()[key], value)
    with pytest.raises(ValueError, match="no attention of timm's vision transformers"):
        group_heads(grouped, 2)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"kv_heads \(3\) must divide the number of heads, 4"):
        GroupedQueryAttention(16, 4, 3)
    with pytest.raises(ValueError, match="allocation must be one of static, kdgqa"):
        GroupedQueryAttention(16, 4, 2, "random")
    with pytest.raises(ValueError, match="nothing to group"):
        to_gqa({"head.weight": torch.zeros(2, 2)}, 4, 2)
    with pytest.raises(ValueError, match="q_norm, k_norm that"):
        group_heads(timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=4, qk_norm=True), 2)
    with pytest.raises(ValueError, match="takes no mask"):
        GroupedQueryAttention(16, 4)(torch.zeros(1, 4, 16), is_causal=True)
