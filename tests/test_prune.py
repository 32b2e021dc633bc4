"""Heads taken away: the same as masked, in every layer that allows it."""
import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import Attention

from tests.test_attention_heads import HEADS, images, make
from visionattn import adapters
from visionattn.analysis import (
    find_heads,
    inseparable_heads,
    least_important,
    load_pruned,
    masked_heads,
    prune_heads,
    pruned_heads,
    save_pruned,
)
from visionattn.layers import (
    CombinerAttention,
    GaussianAdaptiveAttention,
    GroupedQueryAttention,
    LongRangeAttention,
    attention_maps,
)

DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
WHOLE = {  # families of which no head can be taken away, and why not
    "test_biformer": "its routes follow the queries and keys of all heads",
    "test_dependency_vit": "its selector splits a message among all heads",
    "test_dhvt": "its heads are tokens too, which all heads see",
    "test_efficientvit_cga": "each head works on the output of the one before",
    "test_favit": "its heads share the projections of their keys and values",
    "test_moh_transnext": "its gates weigh the heads against each other",
    "vit_dlittle_patch16_reg1_gap_256": "DiffAttention does not say which of its parameters belong to which head",
}
PARTLY = {"test_agent_cswin": 2, "test_maformer": 2}  # layers of which none can


def spared(model):
    """The first head of each layer that has several, and the last of those with three or more."""
    whole = inseparable_heads(model)
    return {heads.name: [0, heads.count - 1][:1 + (heads.count > 2)] for heads in find_heads(model)
            if heads.count > 1 and heads.name not in whole}


def zeros(model, away):
    """Masks without these heads."""
    masks = {heads.name: torch.ones(heads.count, dtype=torch.float64) for heads in find_heads(model)}
    for name, numbers in away.items():
        masks[name][numbers] = 0
    return masks


def compare(model, x):
    """Runs a model with heads masked and then without them."""
    away = spared(model)
    assert away
    with torch.no_grad():
        whole = model(x)
        with masked_heads(model, zeros(model, away)):
            masked = model(x)
        counts = {heads.name: heads.count for heads in find_heads(model)}
        assert prune_heads(model, away) is model
        torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-12)
    assert not torch.allclose(masked, whole, atol=1e-9)
    assert {heads.name: heads.count for heads in find_heads(model)} == {
        name: count - len(away.get(name, ())) for name, count in counts.items()}
    assert pruned_heads(model) == away


@pytest.mark.parametrize("name", [name for name in HEADS if name not in WHOLE])
def test_a_pruned_model_is_the_masked_one(name):
    model = make(name)
    assert len(inseparable_heads(model)) == PARTLY.get(name, 0)
    compare(model, images())


@pytest.mark.parametrize(("name", "fused", "arguments"), [
    (DEIT, False, {}),
    (DEIT, True, {"qk_norm": True}),
    (DEIT, False, {"qk_norm": True, "qkv_bias": False}),
    (SWIN, True, {}),
    (SWIN, False, {"qkv_bias": False}),
], ids=str)
def test_timms_attention_fused_or_not(name, fused, arguments):
    set_fused_attn(fused, experimental=fused)
    try:
        compare(make(name, **arguments), images())
    finally:
        set_fused_attn(True)


@pytest.mark.parametrize("layer", [
    lambda **dd: CombinerAttention(12, 3, "axial", row_summary="wsum", **dd),
    lambda **dd: GaussianAdaptiveAttention(12, 3, **dd),
    lambda **dd: GaussianAdaptiveAttention(12, 3, axis="channels", **dd),
    lambda **dd: GroupedQueryAttention(12, 3, 3, **dd),
    lambda **dd: LongRangeAttention(12, 3, mode="linear", **dd),
    lambda **dd: Attention(12, 3, attn_head_dim=2, gated=True, **dd),
], ids=["combiner", "gaam tokens", "gaam channels", "gqa", "maelre", "timm gated"])
def test_a_pruned_layer_is_the_masked_one(layer):
    layer = layer(dtype=torch.float64).eval()
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    compare(layer, x.flatten(1, 2) if isinstance(layer, Attention) else x)


@pytest.mark.parametrize("name", WHOLE)
def test_heads_that_hang_together_are_refused(name):
    model = make(name)
    first = next(heads for heads in find_heads(model) if heads.count > 1)
    with pytest.raises(ValueError, match=f"^the heads of {first.name} cannot be taken apart: {WHOLE[name]}$"):
        prune_heads(model, {first.name: [0]})
    assert pruned_heads(model) == {}
    assert set(inseparable_heads(model)) == {heads.name for heads in find_heads(model)}


def test_layers_that_can_be_made_so_are_refused():
    grouped = GroupedQueryAttention(12, 4, 2)
    norm = Attention(12, 3, scale_norm=True, norm_layer=torch.nn.LayerNorm)
    rows = CombinerAttention(12, 3, "axial")
    assert [inseparable_heads(layer) for layer in (grouped, norm, rows)] == [
        {"": "its heads share keys and values"}, {"": "a norm runs over the outputs of all heads"},
        {"": "the keys of its rows are projected from all heads"}]
    plain = Attention(12, 3)
    plain.qkv = torch.nn.Sequential(plain.qkv)
    assert inseparable_heads(plain) == {"": "its qkv is no plain layer but Sequential"}


def test_a_pruned_model_is_a_model():
    """It trains as the masked one does, and is copied, saved, looked into and pruned again."""
    model, x = make(DEIT), images()
    masked, away = copy.deepcopy(model), {"blocks.0.attn": [1], "blocks.1.attn": [0, 2]}
    model.pos_embed.requires_grad = model.blocks[0].attn.qkv.weight.requires_grad = False
    size = sum(parameter.numel() for parameter in model.parameters())
    prune_heads(model, away)
    assert size - sum(parameter.numel() for parameter in model.parameters()) == 3 * (4 * 8 * 24 + 3 * 8)
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    assert model.blocks[0].attn.proj.weight.requires_grad
    assert (model.blocks[1].attn.qkv.out_features, model.blocks[1].attn.proj.in_features) == (24, 8)
    model.train()(x).square().sum().backward()
    with masked_heads(masked, zeros(masked, away)):
        masked.train()(x).square().sum().backward()
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, masked.patch_embed.proj.weight.grad, **close)
    kept = masked.blocks[1].attn.qkv.weight.grad.unflatten(0, (3, 3, 8))[:, 1].flatten(0, 1)
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight.grad, kept, **close)

    model.eval()
    other = prune_heads(make(DEIT), away)
    other.load_state_dict(model.state_dict())
    with torch.no_grad(), attention_maps(model) as maps:
        expected = model(x)
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert model.forward_features(x).shape == (1, 17, 24)
    assert [len(weights[0]) for weights in maps[:2]] == [2, 1]
    prune_heads(model, {"blocks.0.attn": [1]})  # the third at first
    assert pruned_heads(model) == {"blocks.0.attn": [1, 2], "blocks.1.attn": [0, 2]}


def test_a_pruned_model_in_a_file(tmp_path):
    model, path, x = make(SWIN), tmp_path / "folder" / "pruned.safetensors", images()
    with pytest.raises(ValueError, match="SwinTransformer lost no heads: save its state_dict"):
        save_pruned(model, path)
    prune_heads(model, {"layers.1.blocks.0.attn": [1], "layers.2.blocks.0.attn": [3, 0]})
    prune_heads(model, {"layers.2.blocks.0.attn": [0]})
    assert save_pruned(model, path) == path.stat().st_size
    loaded = load_pruned(make(SWIN).apply(lambda module: torch.manual_seed(1)), path)
    assert pruned_heads(loaded) == {"layers.1.blocks.0.attn": [1], "layers.2.blocks.0.attn": [0, 1, 3]}
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match=r"must be loaded into a model with all of its heads; this one lost some"):
        load_pruned(loaded, path)
    with pytest.raises(ValueError, match=r"pruned.safetensors is of another model than this VisionTransformer"):
        load_pruned(make(DEIT), path)
    with pytest.raises(ValueError, match=r"is of another model than this SwinTransformer: .*size mismatch"):
        load_pruned(make(SWIN, window_size=2), path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"pruned.safetensors is damaged: its content does not match its digest"):
        load_pruned(make(SWIN), path)


@pytest.mark.parametrize(("away", "message"), [
    ({"blocks.7.attn": [0]}, "VisionTransformer has no attention layer 'blocks.7.attn' with heads; it has blocks.0"),
    ({"blocks.0.attn": [0, 3]}, r"heads to take from blocks.0.attn must be different numbers from 0 to 2, got \[0"),
    ({"blocks.0.attn": [1, 1]}, r"must be different numbers from 0 to 2, got \[1, 1\]"),
    ({"blocks.0.attn": [0], "blocks.1.attn": [2, 0, 1]},
     "blocks.1.attn would lose all of its 3 heads; at least one must stay"),
], ids=str)
def test_bad_numbers_change_nothing(away, message):
    model = make(DEIT)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_heads(model, away)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert pruned_heads(prune_heads(model, {"blocks.0.attn": []})) == {}


def test_models_with_adapters_are_refused():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, img_size=64)
    adapters.attach(model, "onebit")
    with pytest.raises(ValueError, match="the model has adapters, which are made for all of its heads: merge or"):
        prune_heads(model, {"blocks.0.attn": [0]})


def test_the_least_important_heads():
    scores = {"a": torch.tensor([3., 1., 2.]), "b": torch.tensor([0.5, 0.1]), "c": torch.tensor([0.])}
    assert least_important(scores, 0) == {}
    assert least_important(scores, 1) == {"b": [1]}
    assert least_important(scores, 2) == {"a": [1], "b": [1]}  # b keeps its best one
    assert least_important(scores, 3) == {"a": [1, 2], "b": [1]}
    with pytest.raises(ValueError, match="of 6 heads in 3 layers at most 3 can be taken away: each layer keeps one"):
        least_important(scores, 4)
    with pytest.raises(ValueError, match=r"scores of a must be finite, got \[nan\]"):
        least_important({"a": torch.tensor([torch.nan])}, 0)


def test_the_docs_code_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/looking.md").read_text(encoding="utf-8")
    text = page.partition("## Taking heads away")[2].partition("\n## ")[0]
    names = {"batches": [(torch.rand(1, 3, 224, 224), torch.tensor([7]))]}
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/looking.md", "exec"), names)
    assert sum(map(len, pruned_heads(names["model"]).values())) == 6
    assert "{'blocks." in capsys.readouterr().out
