"""Attention maps of models, ours and timm's: beside the definition, and what the hook must not disturb."""
import copy
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.models.test_families import SMALL, family, images, make
from visionattn.layers import attention_maps
from visionattn.ops.recording import current_recorder

TINY = {
    "vit": ("vit_tiny_patch16_224", dict(embed_dim=24, depth=2, num_heads=3)),
    "vit with registers": ("vit_tiny_patch16_224", dict(embed_dim=24, depth=2, num_heads=3, reg_tokens=2)),
    "deit": ("deit_tiny_distilled_patch16_224", dict(embed_dim=24, depth=2, num_heads=3)),
    "swin": ("swin_tiny_patch4_window7_224", dict(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)),
    "pvt": ("pvt_v2_b0", dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4))),
}
SHAPES = {  # of 32 pixels and 2 images
    "vit": [(2, 3, 5, 5)] * 2,
    "vit with registers": [(2, 3, 7, 7)] * 2,
    "deit": [(2, 3, 6, 6)] * 2,
    "swin": [(8, 1, 16, 16)] * 2 + [(2, 2, 16, 16)] * 2,  # windows of 4 x 4 tokens
    "pvt": [(2, 1, 64, 1), (2, 1, 16, 1), (2, 2, 4, 1), (2, 4, 1, 1)],  # keys of a stage are those of the last map
}


def tiny(kind, **kwargs):
    torch.manual_seed(0)
    name, args = TINY[kind]
    size = {} if kind == "pvt" else {"img_size": 32}
    model = timm.create_model(name, num_classes=4, **size | args | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def explicit(kind):
    """The same model whose attention is written as a softmax and products, with what its dropouts were given."""
    model, found = tiny(kind), []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    return model, found


@pytest.mark.parametrize("kind", TINY)
def test_maps_of_timms_models(kind):
    model, x = tiny(kind), images(2, 32, 32)
    before = [hook for module in model.modules() for hook in module._forward_hooks]
    plain = model(x)
    with attention_maps(model) as maps:
        assert torch.equal(model(x), plain)
    other, expected = explicit(kind)
    other(x)
    assert [tuple(found.shape) for found in maps] == SHAPES[kind]
    for found, one in zip(maps, expected, strict=True):
        assert torch.allclose(found, one, atol=1e-6)
    with attention_maps(model, last=True) as last:
        model(x)
    assert torch.equal(last[0], maps[-1])
    assert len(last) == 1
    sum((one ** 2 * (1 + n)).sum() for n, one in enumerate(maps)).backward()
    sum((one ** 2 * (1 + n)).sum() for n, one in enumerate(expected)).backward()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (same.grad is None)
        assert one.grad is None or torch.allclose(one.grad, same.grad, atol=1e-5)
    assert [hook for module in model.modules() for hook in module._forward_hooks] == before


@pytest.mark.parametrize("name", [name for name in SMALL if family(name) != "cnn_attention"])  # which has gates
def test_maps_of_our_models(name):
    model, x = make(name), images(2)
    plain = model(x)
    with attention_maps(model) as maps:
        assert torch.equal(model(x), plain)
    with torch.no_grad(), attention_maps(model, last=True) as last:
        model(x)
    assert torch.allclose(last[0], maps[-1], atol=1e-6)
    assert not last[0].requires_grad
    sampled = "vsa" in name  # which takes less from samples beside the map
    flows = "flowformer" in name  # whose weights are no probabilities
    if "dependency" in name:  # whose rows are receivers: what a sender spreads is its gate at most
        maps = [found.sum(dim=1, keepdim=True).transpose(2, 3) for found in maps]
        sampled = True
    for found in maps:
        assert found.ndim == 4
        assert found.requires_grad
        sums = found.sum(dim=-1)
        assert (found >= -1e-6).all()
        unseen = (sums == 0) if "routing" in name else torch.zeros_like(sums, dtype=torch.bool)
        assert flows or (sums <= 1 + 1e-5).all()
        assert flows or sampled or (unseen | ((sums - 1).abs() < 1e-4)).all()


def test_what_a_model_without_attention_is_told():
    model = timm.create_model("resnet10t").eval()
    with pytest.raises(ValueError, match="ResNet gives no attention maps: it ran neither"), attention_maps(model):
        model(images(1, 32, 32))


@pytest.mark.parametrize("compiled", [lambda model: model.compile() or model, torch.compile, torch.jit.script])
def test_compiled_models_are_refused(compiled):
    model = compiled(tiny("pvt"))
    with pytest.raises(ValueError, match="is compiled"), attention_maps(model):
        pass


def test_other_softmaxes_are_no_attention():
    class Gates(nn.Module):
        def forward(self, x):
            weights = x.softmax(dim=1)  # over queries
            return weights @ x + x * x.softmax(dim=-1) + x[0].softmax(dim=-1) @ x[0]

    with pytest.raises(ValueError, match="Gates gives no attention maps"), attention_maps(Gates()):
        Gates()(torch.randn(2, 3, 3))


@pytest.mark.parametrize("options", [
    {}, dict(is_causal=True), dict(scale=0.3), dict(attn_mask=torch.ones(4, 4).tril().bool()),
    dict(attn_mask=torch.linspace(-1, 1, 16).view(4, 4).double()), dict(enable_gqa=True),
    dict(enable_gqa=True, dropout_p=0.4),
])
def test_options_of_scaled_dot_product_attention(options):
    torch.manual_seed(0)
    heads = 1 if options.get("enable_gqa") else 2
    q = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, heads, 4, 8, dtype=torch.float64)
    with attention_maps(nn.Identity()) as maps:
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert torch.allclose(maps[0] @ v, out, atol=1e-12)
    if not options.get("dropout_p"):
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **options))
    else:
        assert (maps[0] == 0).any()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_maps_are_taken_after_dropout(kind):
    model = tiny(kind, attn_drop_rate=0.5).train()
    with attention_maps(model) as maps:
        model(images(2, 32, 32))
    assert all(0.3 < (found == 0).float().mean() < 0.7 for found in maps)


def test_nothing_stays_after_an_error():
    model = tiny("vit")
    with pytest.raises(AssertionError, match="Input"), attention_maps(model):
        model(images(2, 48, 32))
    assert current_recorder() is None
    with attention_maps(model) as maps:
        model(images(2, 32, 32))
    assert len(maps) == 2


def test_threads_see_their_own_maps():
    model, found = tiny("vit"), {}
    ready = threading.Barrier(3)

    def run(batch):
        with torch.no_grad(), attention_maps(model) as maps:
            ready.wait()
            model(images(batch, 32, 32, seed=batch))
            ready.wait()
        found[batch] = maps

    threads = [threading.Thread(target=run, args=(batch,)) for batch in (1, 2)]
    for thread in threads:
        thread.start()
    ready.wait()
    model(images(5, 32, 32))  # of nobody
    ready.wait()
    for thread in threads:
        thread.join()
    assert {batch: [len(one) for one in maps] for batch, maps in found.items()} == {1: [1, 1], 2: [2, 2]}


def test_autocast():
    model, x = tiny("vit"), images(2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with attention_maps(model) as maps:
            assert torch.equal(model(x), plain)
    assert plain.dtype == torch.bfloat16
    with attention_maps(model) as precise:
        model(x)
    for found, one in zip(maps, precise, strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found, one, atol=0.02)


@pytest.mark.parametrize("name", ["vit", "test_agent_deit"])
def test_gradients_under_checkpointing(name):
    model = tiny("vit") if name == "vit" else make(name)
    gradients = []
    for enable in (False, True):
        one = copy.deepcopy(model).train()
        one.set_grad_checkpointing(enable)
        with attention_maps(one) as maps:
            logits = one(images(2, *(32, 32) if name == "vit" else (64, 64)))
        (logits.sum() + sum((found ** 2).sum() for found in maps)).backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-5)
