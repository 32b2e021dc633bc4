"""FcaFormer: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests import golden
from visionattn.dense import DenseBackbone
from visionattn.layers import ForwardCrossAttention
from visionattn.models import family_of, fcaformer

# Parameters of the classifier, and of the authors' dense backbone.
VARIANTS = {
    "fcaformer_l1": (6_187_560, 6_219_008),
    "fcaformer_l2": (16_275_870, 16_334_390),
    "fcaformer_l3": (27_894_484, 27_945_516),
    "fcaformer_l4": (65_638_204, 65_718_420),
}
NAME = "test_fcaformer"


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def loaded(name: str, state_dict: dict, **options) -> nn.Module:
    """A model with given weights, loaded as a user loads them."""
    overlay = dict(state_dict={"model": state_dict}, num_classes=options.get("num_classes", 1000))
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


def small(**options) -> nn.Module:
    """A model whose tables are random."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, dtype=torch.float64, num_classes=7, **options).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn_like(x))
    return model


def images(*size: int) -> torch.Tensor:
    return golden.random(3, (2, 3, *size))


def authors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the authors' names and in their shapes, the inverse of the filter."""
    found = {}
    for key, x in model.state_dict().items():
        stage = int(key.split(".")[1]) if key.startswith("stages.") else 0
        if ".downsample." in key:
            key = key.replace(f"stages.{stage}.", f"layer_{stage - 1}.")
        key = key.replace(f"stages.{stage}.", f"layer_{stage}.")
        key = key.replace("patch_embed.conv1", "patch_embed.seq.0").replace("patch_embed.conv2", "patch_embed.seq.2")
        if stage < 2 and ".blocks." in key:
            key = key.replace(".conv.", ".dwconv.").replace("mlp.fc", "pwconv").replace("ls.gamma", "gamma")
        else:
            key = key.replace(".conv.weight", ".c.weight").replace("ls1.gamma", "gamma_1").replace(
                "ls2.gamma", "gamma_2").replace("mlp_norm", "mlp.norm").replace("cross.weight", "dw_conv.weight")
        if key.endswith(".attn.rpb"):
            key, x = key.replace("attn.rpb", "attention_biases"), x.flatten(1)
        elif key.endswith(".attn.cross_bias"):
            key, x = key.replace("attn.cross_bias", "s_token_bias"), x.flatten(1)[None, :, None]
        elif key.endswith(".attn.cross_scale"):
            key, x = key.replace("attn.cross_scale", "s_scale_factors"), x.flatten()[None, :, None]
        key = key.replace("attn.cross_norm", "s_norm").replace("attn.", "")
        found[key.replace("head.norm", "norm_head").replace("head.fc", "head")] = x
    return found


# The authors' numbers


@torch.no_grad()
def test_golden():
    case = golden.load("fcaformer_l1")
    weights = golden.official_state_dict(case)
    model = loaded("fcaformer_l1", weights)
    assert count(model) == case["num_params"]
    assert authors(model).keys() >= weights.keys()
    for run in case["runs"]:
        last, features = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
        logits = model.forward_head(last)
        if "forward_error" in run:  # a size that the authors' code refuses
            assert [x.shape[2:] for x in features] == [(64, 80), (32, 40), (16, 20), (8, 10)]
            assert logits.isfinite().all()
            continue
        for feature, summary in zip(features, run["features"].values(), strict=True):
            golden.assert_matches(feature, summary)
        golden.assert_matches(logits, run["logits_summary"])
        expected = torch.tensor(run["logits"], dtype=torch.float64)
        torch.testing.assert_close(logits[:1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_counts(name, params):
    assert count(timm.create_model(name, device="meta")) == params[0]
    with torch.device("meta"):
        backbone = DenseBackbone(name, "detection")
    assert count(backbone) == params[1]
    assert backbone.channels == [96, 192, 384, 768]


def test_parameter_count_at_another_size():
    assert count(timm.create_model("fcaformer_l2", img_size=(256, 320), device="meta")) == 16_286_436


def test_heads_are_of_32_channels():
    for name in VARIANTS:
        for stage in timm.create_model(name, device="meta").stages[2:]:
            for i, block in enumerate(stage.blocks):
                assert block.attn.qkv.in_features == 32 * block.attn.num_heads
                assert block.attn.sources == i
                assert (block.cross is None) == (i == len(stage.blocks) - 1)


# Attention


@torch.no_grad()
@pytest.mark.parametrize(("size", "sources"), [((4, 6), 0), ((5, 9), 2)])
def test_attention_is_its_definition(size, sources):
    """Token by token and head by head, with biases by distance and by handed-on token."""
    torch.manual_seed(0)
    layer = ForwardCrossAttention(6, 2, size, sources, dtype=torch.float64).eval()
    for x in layer.parameters():
        x.add_(torch.randn_like(x))
    height, width = size
    handed = sources * -(-height // 4) * -(-width // 4)
    x = golden.random(1, (1, height, width, 6))
    crossed = golden.random(2, (1, handed, 6)) if sources else None
    tokens = x[0].flatten(0, 1)
    if crossed is not None:
        modulated = crossed[0] * layer.cross_scale.flatten()[:, None]
        tokens = torch.cat([tokens, layer.cross_norm(modulated)])
    q, k, v = (part.view(-1, 2, 3) for part in layer.qkv(tokens).chunk(3, dim=-1))
    expected = torch.empty(height * width, 2, 3, dtype=torch.float64)
    for head in range(2):
        for i in range(height * width):
            scores = q[i, head] @ k[:, head].T * 3 ** -0.5
            for j in range(height * width):
                scores[j] += layer.rpb[head, abs(i // width - j // width), abs(i % width - j % width)]
            for j in range(handed):
                scores[height * width + j] += layer.cross_bias[head].flatten()[j]
            expected[i, head] = scores.softmax(0) @ v[:, head]
    actual = layer(x, crossed)
    torch.testing.assert_close(actual[0].flatten(0, 1), layer.proj(expected.flatten(1)), rtol=1e-12, atol=1e-12)


def test_tokens_that_are_missing():
    for sources, crossed in ((1, None), (0, torch.zeros(1, 1, 8))):
        with pytest.raises(ValueError, match="crossed must be given if there are sources, and only then"):
            ForwardCrossAttention(8, 2, (4, 4), sources)(torch.zeros(1, 4, 4, 8), crossed)


@torch.no_grad()
def test_what_earlier_blocks_hand_on_matters():
    """Of every earlier block, also of the first for the last."""
    model, x = small(), images(96, 96)
    expected = model(x)
    for i in range(2):
        changed = small()
        changed.stages[2].blocks[2].attn.cross_bias[:, i] -= 100.
        assert not torch.allclose(changed(x), expected, rtol=1e-6)


# Any size


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 96), (64, 160), (130, 50)])
def test_set_input_size_computes_what_interpolation_does(size):
    plain, fitted, x = small(), small(), images(*size)
    fitted.set_input_size(size)
    assert [block.attn.rpb.shape[1:] for stage in fitted.stages[2:] for block in stage.blocks] == [
        (-(-size[0] // stride), -(-size[1] // stride)) for stride in (16, 16, 16, 32)]
    torch.testing.assert_close(fitted(x), plain(x), rtol=1e-9, atol=1e-9)
    again = loaded(NAME, plain.state_dict(), img_size=size, num_classes=7)
    torch.testing.assert_close(again(x), plain(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_authors_tables_for_another_size(size):
    """Of square images they are interpolated; of others they load into a model for that size."""
    source = small(img_size=size)
    weights = authors(source)
    assert weights["layer_2.blocks.2.s_token_bias"].shape[:3] == (1, 3, 1)
    x = images(*size)
    assert torch.equal(loaded(NAME, weights, img_size=size, num_classes=7)(x), source(x))
    if size[0] == size[1]:
        model = loaded(NAME, weights, img_size=(128, 64), num_classes=7)
        source.set_input_size((128, 64))
        torch.testing.assert_close(model(images(128, 64)), source(images(128, 64)))
    else:
        with pytest.raises(RuntimeError, match="entries 8 of another shape"):
            loaded(NAME, weights, img_size=128, num_classes=7)


@torch.no_grad()
def test_distance_zero_keeps_its_bias():
    table = golden.random(0, (2, 6, 5))
    for size in ((1, 1), (3, 9), (12, 10)):
        resized = fcaformer.resize_offsets(table, size)
        assert resized.shape == (2, *size)
        torch.testing.assert_close(resized[:, 0, 0], table[:, 0, 0])
    assert fcaformer.resize_offsets(table, (6, 5)) is table


# Windows


@torch.no_grad()
def test_windows_as_large_as_the_map_change_nothing():
    x = images(96, 96)
    torch.testing.assert_close(small(window_sizes=(6, 3))(x), small()(x))


@torch.no_grad()
def test_windows_are_apart_and_shift():
    """A stage of one block keeps windows to themselves; padding lies in front in even blocks and behind in odd ones."""
    torch.manual_seed(0)
    for index, front in ((0, True), (1, False)):
        block = fcaformer.FcaBlock(
            8, 2, (4, 4), index, True, 4, 2., 1., 0., dtype=torch.float64).eval()
        x = golden.random(0, (1, 6, 6, 8))
        crossed = golden.random(1, (4, 1, 8)) if index else None
        y, _ = block(x, crossed)
        changed = x.clone()
        changed[0, 1 if front else 3, 1 if front else 3, 0] += 1.  # in the first window only
        moved = (block(changed, crossed)[0] - y).abs().amax(-1)[0] > 0
        inside = torch.zeros(6, 6, dtype=torch.bool)
        inside[:2 if front else 4, :2 if front else 4] = True  # padded to 8: two rows in front, or behind
        assert torch.equal(moved, inside)
        whole, _ = block(F.pad(x, (0, 0, 2, 0, 2, 0) if front else (0, 0, 0, 2, 0, 2)), crossed)
        torch.testing.assert_close(whole[:, 2:, 2:] if front else whole[:, :6, :6], y)


@torch.no_grad()
def test_tables_of_windows_do_not_depend_on_the_image():
    model = small(window_sizes=(6, 3), img_size=300)
    assert {block.attn.rpb.shape[1:] for block in model.stages[2].blocks} == {(6, 6)}
    before = model.state_dict()
    model.set_input_size(500)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@torch.no_grad()
def test_checkpoints_between_tasks(tmp_path):
    """A classifier's weights in a dense backbone, with fresh layers on its maps; a dense one's in a classifier."""
    source = small()
    torch.save({"model": authors(source)}, tmp_path / "weights.pth")
    backbone = DenseBackbone(
        NAME, "detection", checkpoint_path=str(tmp_path / "weights.pth"), model_args={"dtype": torch.float64}).eval()
    x = images(96, 96)
    maps = source.forward_intermediates(x, intermediates_only=True)
    for actual, expected, layer in zip(backbone(x), maps, backbone.norms.values(), strict=True):
        torch.testing.assert_close(actual, layer(expected))
        assert not layer.proj.weight.isnan().any()
    dense = authors(source) | {
        f"{part}{i}.weight": torch.zeros(1) for part in ("head", "norm") for i in range(4)}
    assert torch.equal(loaded(NAME, dense, num_classes=7)(x), source(x))


def test_dense_args_change_no_weight():
    for name in (*VARIANTS, NAME):
        settings = family_of(name).dense_settings(name, "segmentation")
        plain, dense = (timm.create_model(name, device="meta", **args).state_dict() for args in ({}, settings))
        assert {key: x.shape for key, x in plain.items()} == {key: x.shape for key, x in dense.items()}


# Construction


@torch.no_grad()
def test_norm_comes_after_pooling():
    model, x = small(), images(96, 96)
    pooled = model.forward_features(x).mean((1, 2))
    expected = F.layer_norm(pooled, (32,), model.head.norm.weight, model.head.norm.bias)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)


def test_initial_values():
    model = timm.create_model("fcaformer_l1", depths=(1, 1, 2, 1))
    values = {"rpb": 0., "cross_bias": 0., "cross_scale": 1., "gamma": 1e-6}
    for key, x in model.named_parameters():
        if (leaf := key.rpartition(".")[2]) in values:
            assert (x == values[leaf]).all(), key


def test_bad_options():
    for options, message in (
            (dict(depths=(1, 1, 2)), "depths must have one entry per stage, 4, got"),
            (dict(num_heads=(1, 2, 3, 4)), "num_heads must have one entry per stage of the last two, 2, got"),
            (dict(window_sizes=(7,)), "window_sizes must have one entry per stage of the last two, 2, got"),
            (dict(window_sizes=(0, 7)), "window_sizes must be positive, got"),
            (dict(num_heads=(5, 4)), "num_heads 5 must divide dim 24"),
            (dict(global_pool="catavgmax"), "global_pool 'catavgmax' doubles the channels")):
        with pytest.raises(ValueError, match=message):
            timm.create_model(NAME, **options)
    with pytest.raises(ValueError, match="global_pool 'catavgmax' doubles the channels"):
        timm.create_model(NAME).reset_classifier(5, "catavgmax")


def test_weights_that_meet_padding_alone_have_no_gradient():
    """In bfloat16 on maps that a kernel reaches beyond, whatever the memory held before."""
    torch.manual_seed(0)
    conv = fcaformer.HandingConv2d(24, 24, 7, stride=4, padding=3, groups=24, bias=False)
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 24, 2, 2).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        junk = [torch.full((size,), torch.nan) for size in (256, 1176, 1 << 14) for _ in range(50)]
        del junk
        conv.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert conv.weight.grad.isfinite().all()
        assert not conv.weight.grad[..., 0].any()
        assert conv.weight.grad[..., 3, 3].any()
