"""TCPA: the authors' numbers, which prompts are seen, and models that have them."""
import copy

import numpy as np
import pytest
import timm
import torch

from tests import golden
from visionattn import adapters
from visionattn.adapters import attach
from visionattn.adapters.tcpa import BlockPrompts, PromptPool, choose, coordinated_attention, fourier, visible
from visionattn.export.graph import graph_of
from visionattn.export.source import plain
from visionattn.layers import attention_maps, auxiliary_losses

CASES = golden.load("tcpa_ops")
SMALL = {kind: [case for case in CASES["small"] if case["kind"] == kind] for kind in ("pool", "attention", "whole")}


@pytest.mark.parametrize("case", SMALL["pool"], ids=lambda case: str(case["seed"]))
def test_golden_choice(case):
    shape = case["layers"], case["pool_size"]
    keys = golden.fill("keys", (*shape, case["dim"])).requires_grad_()
    pool = PromptPool(case["dim"], case["pool_size"], case["len_prompts"]).double()
    del pool.keys
    pool.keys = keys[case["layer"]]
    x = golden.random(case["seed"], (case["rows"], case["dim"])).requires_grad_()
    scores = None
    if case["random"]:
        scores = golden.uniform(case["seed"] + 1, (case["rows"], case["pool_size"]))
    index, distance = choose(pool.similarity(x), case["topk"], scores)
    assert index.tolist() == case["index"]
    assert distance.item() == pytest.approx(case["distance"], abs=1e-14)
    distance.backward()
    golden.assert_equals(keys.grad.flatten(), case["grad_keys"], 1e-14)
    golden.assert_equals(x.grad.flatten(), case["grad_x"], 1e-14)


def _seen(index_cls, index_image, sizes, lengths):
    """What each token sees of the prompts of both pools."""
    own = visible(torch.tensor(index_cls)[:, None], sizes[0], lengths[0])
    others = visible(torch.tensor(index_image), sizes[1], lengths[1])
    return torch.cat([torch.nn.functional.pad(own, (0, others.shape[-1])),
                      torch.nn.functional.pad(others, (own.shape[-1], 0))], dim=1)


@pytest.mark.parametrize("case", SMALL["attention"], ids=lambda case: str(case["seed"]))
def test_golden_attention(case):
    dim, heads, tokens = case["dim"], case["heads"], 1 + case["image_tokens"]
    sizes = case["pool_size_cls"], case["pool_size_image"]
    lengths = case["len_prompts_cls"], case["len_prompts_image"]
    count = sum(size * length for size, length in zip(sizes, lengths, strict=True))
    weights = {key: golden.fill(f"attn.{key}", shape).requires_grad_() for key, shape in {
        "qkv.weight": (3 * dim, dim), "qkv.bias": (3 * dim,), "proj.weight": (dim, dim), "proj.bias": (dim,)}.items()}
    x = golden.random(case["seed"] + 1, (case["batch"], tokens + count, dim)).requires_grad_()
    qkv = torch.nn.functional.linear(x, weights["qkv.weight"], weights["qkv.bias"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    rows = [0, *range(1 + count, tokens + count)]
    seen = _seen(case["index_cls"], case["index_image"], sizes, lengths)
    out = coordinated_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], k[:, :, 1:1 + count],
                                v[:, :, 1:1 + count], seen)
    out = torch.nn.functional.linear(out.transpose(1, 2).flatten(2), weights["proj.weight"], weights["proj.bias"])
    golden.assert_equals(out.flatten(), case["out"], 1e-14)
    (out * golden.random(case["seed"] + 2, out.shape)).sum().backward()
    golden.assert_equals(x.grad.flatten(), case["grad_x"], 1e-14)
    golden.assert_equals(weights["qkv.weight"].grad.flatten(), case["grad_qkv_weight"], 1e-14)


def test_left_out_after_the_softmax():
    """The equal form is the formula: softmax over all, times the mask, without norming again; of extreme scores too."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    prompt_k, prompt_v = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64)
    seen = torch.rand(2, 5, 3).round().double()
    for factor in (1, 100):  # of a prompt all or nothing is left
        keys = torch.cat([factor * prompt_k.expand(2, -1, -1, -1), k], dim=2)
        weights = (q @ keys.mT / 2).softmax(dim=-1)
        weights[..., :3] *= seen[:, None]
        expected = weights @ torch.cat([prompt_v.expand(2, -1, -1, -1), v], dim=2)
        torch.testing.assert_close(coordinated_attention(q, k, v, factor * prompt_k, prompt_v, seen), expected)


def test_fourier_as_products(monkeypatch):
    prompts = torch.randn(5, 12, dtype=torch.float64)
    expected = torch.fft.fft(torch.fft.fft(prompts, dim=1), dim=0).real
    torch.testing.assert_close(fourier(prompts), expected)
    monkeypatch.setattr("visionattn.adapters.tcpa.exporting", lambda: True)
    torch.testing.assert_close(fourier(prompts), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES["cases"] + SMALL["whole"], ids=lambda case: str(case["seed"]))
def test_golden_model(case, monkeypatch):
    """Logits, distances, gradients and what is seen in a ViT-B of few blocks."""
    model = timm.create_model("vit_base_patch16_224", depth=case["depth"], num_classes=case["num_classes"]).double()
    select = case.get("select", "similarity")
    adapter = attach(
        model, "tcpa", select=select, fourier=case.get("fourier", True), distance=0.1, dropout=0.0,
        value_prompts=case["value_prompts_scaled"], image_prompt=case["image_prompt"],
        reweighting=case.get("reweighting", False), random_epochs=0,
        **{f"{ours}_{option}": case[f"{theirs}_{kind}"] for ours, kind in (("class", "cls"), ("image", "image"))
           for option, theirs in (("pool", "pool_size"), ("topk", "topk"), ("length", "len_prompts"))})
    values = {key: golden.fill(key, shape) for key, shape in case["state_dict"] if not key.startswith("backbone.")}
    own = {}  # the authors' tensors are of all 12 blocks
    for i, block in enumerate(adapter.blocks):
        for kind, pool in (("cls", block.cls), ("image", block.image)):
            own |= {(f"Pool.Pool_{kind}.{name}", i): x for name, x in pool.named_parameters()}
    if case["value_prompts_scaled"]:
        own |= {("ADVP_w", None): adapter.value_factor, ("ADVP_b", None): adapter.value_summand}
    if case["image_prompt"]:
        for i, name in enumerate(("conv1", "act", "conv2")):
            own |= {(f"Prompter.Prompter.{i}.{leaf}", None): x
                    for leaf, x in getattr(adapter.image, name).named_parameters()}
    with torch.no_grad():
        for (key, i), x in own.items():
            x.copy_(values[key] if i is None else values[key][i])
        for key, x in model.state_dict().items():
            if not key.startswith("adapters."):
                x.copy_(golden.fill(f"backbone.{key}", x.shape))
    if select == "random":
        state = np.random.RandomState(case["seed"] + 2)
        monkeypatch.setattr(torch, "rand_like", lambda x: torch.from_numpy(
            state.random_sample((x.shape[0] * x.shape[1], x.shape[2]))).reshape(x.shape))
    seen, plain = [], BlockPrompts.select
    monkeypatch.setattr(BlockPrompts, "select", lambda self, *args: seen.append(plain(self, *args)) or seen[-1])
    model.train()
    assert not model.blocks.training
    logits = model(golden.random(case["seed"], (case["batch"], 3, 224, 224)))
    golden.assert_equals(logits, case["logits"], 1e-12)
    loss = (logits * golden.random(case["seed"] + 1, logits.shape)).sum()
    losses = auxiliary_losses(model)
    assert bool(losses) == (case["distance"] is not None)
    if losses:
        assert losses["prompt_distance"].item() == pytest.approx(0.1 * case["distance"], abs=1e-13)
        loss = loss + losses["prompt_distance"]
    loss.backward()
    for key, expected in case["grads"].items():
        if expected is None:
            assert not any(name == key for name, _ in own)
            continue
        grad = torch.zeros(values[key].shape, dtype=torch.float64)
        for (name, i), x in own.items():
            if name == key:
                (grad if i is None else grad[i]).copy_(x.grad)
        golden.assert_matches(grad, expected, 1e-12)
    mask = case.get("mask_last_block")
    if mask:
        last = seen[-1][0][0]
        assert [last.shape[0], last.shape[0] + last.shape[1]] == mask["shape"]
        assert last[0].tolist() == mask["cls_row"]
        assert last.sum(dim=0).tolist() == mask["column_sums"]
        assert last.sum() + last.shape[0] ** 2 == mask["ones"]
        for row, expected in zip(last[1:4], mask["image_rows_3"], strict=True):
            assert row.tolist() == expected
    sizes, lengths = ((case[f"{name}_cls"], case[f"{name}_image"]) for name in ("pool_size", "len_prompts"))
    for block, own_index, first in zip(seen, case.get("index_cls_per_block", []),
                                       case.get("index_image_first_tokens_per_block", []), strict=False):
        rows = _seen(own_index[:1], [first], sizes, lengths)  # of the first image
        assert torch.equal(block[0][:1, :rows.shape[1]], rows)


SMALL_POOLS = dict(class_pool=5, class_topk=2, class_length=2, image_pool=6, image_topk=3)


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(**args):
    torch.manual_seed(0)
    return timm.create_model("test_vit", **dict(img_size=32, num_classes=4, depth=2) | args).eval()


@torch.no_grad()
def test_a_block_is_the_formula():
    """Prompts before the norm, all in one softmax, with the block's own norms of queries and keys, and scales."""
    model = vit(qk_norm=True, init_values=0.5, scale_attn_norm=True).double()
    block, attention = model.blocks[0], model.blocks[0].attn
    x = torch.randn(2, 1 + 4, 64, dtype=torch.float64)
    adapter = attach(model, "tcpa", value_prompts=True, **SMALL_POOLS)
    pools, found = adapter.blocks[0], block(x)
    prompts = torch.fft.fft2(torch.cat([pools.cls.prompts.flatten(0, 1), pools.image.prompts.flatten(0, 1)])).real
    count = len(prompts)
    adapters.switch(model, None)
    z = block.norm1(torch.cat([x[:, :1], prompts.expand(2, -1, -1), x[:, 1:]], dim=1))
    q, k, v = attention.qkv(z).chunk(3, dim=-1)
    v[:, 1:1 + count] = v[:, 1:1 + count] * adapter.value_factor + adapter.value_summand
    q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    weights = (attention.q_norm(q) @ attention.k_norm(k).mT * attention.scale).softmax(dim=-1)
    mask = torch.ones(2, 1 + count + 4, 1 + count + 4, dtype=torch.float64)
    for image in range(2):
        for row in (0, *range(1 + count, 1 + count + 4)):
            pool, topk, start, length = (pools.image, 3, 11, 1) if row else (pools.cls, 2, 1, 2)
            token = x[image, row - count if row else 0]
            cosines = torch.nn.functional.cosine_similarity(token, pool.keys, dim=-1)
            mask[image, row, 1:1 + count] = 0
            for entry in cosines.argsort(descending=True)[:topk].tolist():
                mask[image, row, start + entry * length:start + (entry + 1) * length] = 1
    out = attention.norm((weights * mask[:, None] @ v).transpose(1, 2).flatten(2))
    out = attention.proj(out[:, [0, *range(1 + count, 1 + count + 4)]])
    h = x + block.ls1(out)
    torch.testing.assert_close(found, h + block.ls2(block.mlp(block.norm2(h))))


@pytest.mark.parametrize(("name", "args"), [
    ("test_vit", dict(qk_norm=True, drop_path_rate=0.5)), ("deit_tiny_distilled_patch16_224", dict(depth=2)),
    ("test_agent_deit", dict(agent_depth=0))])
def test_models(name, args, tmp_path):
    """All of it learns, of one image alone the answer is the same, and files and copies are what they are of."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, num_classes=4, **args).eval()
    backbone = copy.deepcopy(model)
    options = dict(value_prompts=True, image_prompt=True, reweighting=True, noise=1e-3, random_epochs=2, **SMALL_POOLS)
    adapter = attach(model, "tcpa", **options)
    model.train()
    assert adapter.training
    assert not any(block.training for block in model.blocks)
    losses = []
    for epoch in (0, 2):
        adapter.begin_epoch(epoch)
        assert adapter.at_random == (epoch == 0)
        answers = model(images())  # of a distilled model two
        losses.append(auxiliary_losses(model)["prompt_distance"])
        (losses[-1] + sum(x.square().sum() for x in answers)).backward()
        assert {key for key, x in adapter.named_parameters() if x.grad is None or not x.grad.any()} == set()
        model.zero_grad()
    assert losses[1] < losses[0]
    model.eval()
    assert not adapter.at_random
    with torch.no_grad():
        found = model(images())
        assert not auxiliary_losses(model)
        torch.testing.assert_close(model(images()[1:2]), found[1:2])
        assert torch.equal(copy.deepcopy(model)(images()), found)
        adapters.save(model, tmp_path / "a.safetensors")
        adapters.load(backbone, tmp_path / "a.safetensors")
        torch.testing.assert_close(backbone(images()), found)
        assert not adapters.merge(backbone)
        torch.testing.assert_close(backbone(images()), found)
        torch.testing.assert_close(plain(model, True)(images()), found)
        for pool in (adapter.blocks[0].cls, adapter.blocks[0].image):  # what was kept of them is not used any more
            pool.prompts += 0.1
        assert not torch.equal(model(images()), found)


def test_gradients_with_inner_values_computed_twice():
    """What is drawn at random is drawn once, and the distance is of one pass."""
    gradients = []
    for enable in (False, True):
        model = vit()
        torch.manual_seed(1)
        adapter = attach(model, "tcpa", noise=1e-3, select="random", **SMALL_POOLS)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        logits = model.train()(images())
        (logits.sum() + auxiliary_losses(model)["prompt_distance"]).backward()
        gradients.append([x.grad for x in adapter.parameters()])
        assert not auxiliary_losses(model)
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


def test_half_precision_and_maps():
    """The choice is that of float32; maps of attention are those between tokens."""
    model = vit()
    attach(model, "tcpa", **SMALL_POOLS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images())
    with torch.no_grad(), attention_maps(model) as maps:
        found = model(images())
    assert half.dtype == torch.bfloat16
    assert (half - found).abs().max() < 0.05 * found.abs().max()
    assert len(maps) == 2
    assert maps[0].shape[-2:] == (5, 5)
    assert (maps[0].sum(dim=-1) < 1).all()


def test_roles_have_no_keys():
    model = vit()
    adapter = attach(model, "tcpa", select="role", **SMALL_POOLS)
    model.train()(images()).sum().backward()
    assert not auxiliary_losses(model)
    assert not any("keys" in key for key, _ in adapter.named_parameters())
    assert all(x.grad is not None for x in adapter.parameters())
    seen, _ = adapter.blocks[0].select(torch.randn(2, 5, 64), 1)
    assert seen[0].tolist() == [[1] * 10 + [0] * 6] + 4 * [[0] * 10 + [1] * 6]


@pytest.mark.parametrize(("name", "args", "message"), [
    ("swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1)), "SwinTransformer has none: take a ViT or DeiT"),
    ("vit_base_patch16_siglip_224", dict(depth=1, embed_dim=24, num_heads=2), "VisionTransformer has none"),
    ("test_agent_deit", {}, "AgentDeiT has AgentAttention: take a ViT or DeiT")])
def test_other_models_are_refused(name, args, message):
    model = timm.create_model(name, **args)
    with pytest.raises(ValueError, match=message):
        attach(model, "tcpa")
    assert not adapters.adapters_of(model)


@pytest.mark.parametrize(("options", "message"), [
    ({"select": "all"}, "tcpa's select must be one of similarity, role, random, got 'all'"),
    ({"class_topk": 19}, "tcpa's class_topk must be 1 to class_pool and class_length at least 1, got 19 of 18"),
    ({"image_length": 0}, "image_length at least 1"),
    ({"dropout": 1.}, "dropout must be from 0 to below 1"),
    ({"noise": -1.}, "not negative")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        attach(vit(), "tcpa", **options)


@pytest.mark.slow
def test_exported():
    """The choice goes along, and no Fourier transform; images of a batch of any size."""
    import onnxruntime

    model = vit()
    attach(model, "tcpa", **SMALL_POOLS)
    for fuse in (True, False):
        proto = graph_of(plain(model, fuse), images(), 18, input_names=["images"], output_names=["logits"],
                         dynamic_shapes=({0: torch.export.Dim("batch")},))
        kinds = {node.op_type for node in proto.graph.node}
        assert "TopK" in kinds
        assert not {"DFT", "RandomUniform", "RandomNormal"} & kinds
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        for x in (images(), images()[:1]):
            with torch.no_grad():
                np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], model(x), atol=1e-5)
