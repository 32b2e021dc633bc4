"""EfficientViT: the authors' and timm's weights give their numbers (see test_families.py for what all families do)."""
import copy

import pytest
import timm
import torch
from torch import nn

from tests import golden
from visionattn.models import efficientvit_cga
from visionattn.models._builder import CheckpointError

# Parameters as published, and after fusing.
VARIANTS = {
    "efficientvit_cga_m0": (2_349_436, 2_334_916),
    "efficientvit_cga_m1": (2_980_560, 2_964_256),
    "efficientvit_cga_m2": (4_187_554, 4_168_338),
    "efficientvit_cga_m3": (6_900_722, 6_875_890),
    "efficientvit_cga_m4": (8_804_228, 8_776_340),
    "efficientvit_cga_m5": (12_473_772, 12_436_260),
}
NAME = "test_efficientvit_cga"


def official(name, case, **options):
    """A float64 model with the weights of a golden file, loaded as a user loads them."""
    overlay = dict(state_dict={"model": golden.official_state_dict(golden.load(case))})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


def fill(model: nn.Module) -> nn.Module:
    """Weights and running statistics that no zero hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                if name.endswith("running_var"):
                    x.copy_(1 + 0.2 * noise.abs())
                else:
                    x.add_(noise * (0.1 if x.ndim < 2 or "bias" in name else 0.02))
    return model.eval()


# The authors' numbers


@pytest.mark.parametrize(("name", "case", "options", "last_tolerance"), [
    ("efficientvit_cga_m0", "efficientvit_m0", {}, 1e-9),
    ("efficientvit_cga_m2", "efficientvit_m2", {}, 1e-9),
    # These test weights amplify rounding: two right implementations differ by up to 6e-10 after the last stage.
    ("efficientvit_cga_m4", "efficientvit_m4_img320", dict(img_size=320), 1e-7),
])
@torch.no_grad()
def test_golden(name, case, options, last_tolerance):
    model = official(name, case, **options)
    assert sum(p.numel() for p in model.parameters()) == golden.load(case)["num_params"]
    for run in golden.load(case)["runs"]:
        last, features = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
        logits = model.forward_head(last)
        if "forward_error" in run:  # a size that the authors' code refuses
            assert logits.isfinite().all()
            continue
        for i, (feature, key) in enumerate(zip(features, ("stage1", "stage2", "stage3"), strict=True)):
            golden.assert_matches(feature, run["features"][key], last_tolerance if i == 2 else 1e-9)
        golden.assert_matches(logits, run["logits_summary"], last_tolerance)
        expected = torch.tensor(run["logits"], dtype=torch.float64)
        assert (logits - expected).abs().max() <= last_tolerance * expected.abs().max()


@torch.no_grad()
def test_golden_detection_backbone():
    """Windows of 7 in every stage; runs at any size, also the one at which the authors' code crashes."""
    case = golden.load("efficientvit_m4_det")
    options = efficientvit_cga.dense_args("efficientvit_cga_m4", "detection")
    model = timm.create_model("efficientvit_cga_m4", num_classes=0, dtype=torch.float64, **options).eval()
    weights = efficientvit_cga.checkpoint_filter_fn(golden.official_state_dict(case), model)
    model.load_state_dict(weights)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    errors = 0
    for run in case["runs"]:
        maps = model.forward_intermediates(
            golden.random(run["input"]["seed"], run["input"]["shape"]), intermediates_only=True)
        if "forward_error" in run:
            errors += 1
            assert [tuple(x.shape[2:]) for x in maps] == [(16, 20), (8, 10), (4, 5)]
            assert all(x.isfinite().all() for x in maps)
            continue
        for x, key in zip(maps, ("stage1", "stage2", "stage3"), strict=True):
            golden.assert_matches(x, run["features"][key])
    assert errors == 1


def test_dense_args():
    for task in ("detection", "segmentation"):
        for name in VARIANTS:
            model = timm.create_model(name, device="meta", **efficientvit_cga.dense_args(name, task))
            assert {block.attn.window_size for stage in model.stages for block in stage.blocks} == {7}
    with pytest.raises(ValueError, match="unknown variant 'efficientvit_m0'; known: efficientvit_cga_m0"):
        efficientvit_cga.dense_args("efficientvit_m0", "detection")
    with pytest.raises(ValueError, match="task must be 'detection' or 'segmentation', got 'pose'"):
        efficientvit_cga.dense_args("efficientvit_cga_m0", "pose")


@torch.no_grad()
def test_classification_weights_fit_the_dense_backbone():
    weights = golden.official_state_dict(golden.load("efficientvit_m0"))
    options = efficientvit_cga.dense_args("efficientvit_cga_m0", "detection")
    model = timm.create_model(
        "efficientvit_cga_m0", features_only=True, pretrained=True, dtype=torch.float64,
        pretrained_cfg_overlay=dict(state_dict=weights), **options)
    table = weights["blocks3.4.mixer.m.attn.attention_biases"].view(1, 4, 4, 4)
    expected = nn.functional.interpolate(table, size=(7, 7), mode="bicubic", align_corners=False).view(4, 49)
    assert torch.equal(model.model.stages[2].blocks[1].attn.rpb, expected)
    assert [tuple(x.shape[1:]) for x in model.eval()(torch.randn(1, 3, 130, 258, dtype=torch.float64))] == [
        (64, 9, 17), (128, 5, 9), (192, 3, 5)]


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params[0]
    assert sum(p.numel() for p in model.fuse().parameters()) == params[1]
    check = golden.load("efficientvit_timm_check")[name.removeprefix("efficientvit_cga_")]
    assert (check["params_official"], check["params_fused"]) == params


# timm's weights


@pytest.mark.parametrize("size", [(224, 224), (200, 330), (64, 96)], ids=str)
@torch.no_grad()
def test_weights_of_timm(size):
    """Its state dict loads as a checkpoint and gives its logits and maps, also at sizes where maps are padded."""
    theirs = fill(timm.create_model("efficientvit_m0", dtype=torch.float64))
    overlay = dict(state_dict=theirs.state_dict())
    ours = timm.create_model(
        "efficientvit_cga_m0", pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64).eval()
    x = golden.random(0, (2, 3, *size))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-12)
    for a, b in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_of_both_sources_cover_every_variant(name):
    model = timm.create_model(name, device="meta")
    wanted = {key: x.shape for key, x in model.state_dict().items()}
    timm_name = name.replace("_cga", "")
    theirs = timm.create_model(timm_name, device="meta").state_dict()
    renamed = efficientvit_cga.checkpoint_filter_fn(theirs, model)
    assert {key: x.shape for key, x in renamed.items()} == wanted
    ours = efficientvit_cga.checkpoint_filter_fn(model.state_dict(), model)
    assert {key: x.shape for key, x in ours.items()} == wanted
    assert set(timm.list_models("efficientvit_m*")) >= {timm_name}
    assert timm.get_pretrained_cfg(timm_name).hf_hub_id


@torch.no_grad()
def test_unusual_checkpoints():
    """Matrices for 1x1 convolutions as in an early format; weights of another variant are refused in one line."""
    weights = golden.official_state_dict(golden.load("efficientvit_m0"))
    flat = {key: x[:, :, 0, 0] if x.ndim == 4 and x.shape[2:] == (1, 1) else x for key, x in weights.items()}
    models = [timm.create_model("efficientvit_cga_m0", pretrained=True, pretrained_cfg_overlay=dict(state_dict=x))
              for x in (weights, flat)]
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match=r"efficientvit_cga_m1: .* is a checkpoint of another model") as caught:
        timm.create_model("efficientvit_cga_m1", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))
    assert "\n" not in str(caught.value)
    bare = timm.create_model(
        "efficientvit_cga_m0", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), num_classes=0)
    assert torch.equal(bare.patch_embed[0].conv.weight, models[0].patch_embed[0].conv.weight)


# Sizes


@pytest.mark.parametrize("size", [(96, 96), (512, 640), (33, 500), (256, 320)], ids=str)
@torch.no_grad()
def test_any_size(size):
    model = fill(timm.create_model(NAME, num_classes=3))
    maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    for x, stride in zip(maps, (16, 32, 64), strict=True):
        assert x.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
        assert x.isfinite().all()


@torch.no_grad()
def test_set_input_size():
    """The windows of a model built for that size, tables interpolated as for a checkpoint; there and back."""
    model = fill(timm.create_model(NAME, dtype=torch.float64))
    assert [stage.blocks[0].attn.window_size for stage in model.stages] == [7, 7, 4]
    x = golden.random(0, (1, 3, 96, 128))
    before = model(x)
    for size, windows in [((96, 128), [6, 3, 2]), (320, [7, 7, 5]), ((512, 640), [7, 7, 7])]:
        resized, built = copy.deepcopy(model), timm.create_model(
            NAME, img_size=size, pretrained=True, dtype=torch.float64,
            pretrained_cfg_overlay=dict(state_dict=model.state_dict())).eval()
        resized.set_input_size(size)
        assert [stage.blocks[0].attn.window_size for stage in resized.stages] == windows
        for (key, a), b in zip(resized.state_dict().items(), built.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        assert torch.equal(resized(x), built(x))
        assert not torch.equal(resized(x), before)
    model.set_input_size(224)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match=r"at least 16 pixels a side, got \(224, 15\)"):
        model.set_input_size((224, 15))


# Fusing


@pytest.mark.parametrize("name", [NAME, "efficientvit_cga_m0"])
@torch.no_grad()
def test_fuse(name):
    model = fill(timm.create_model(name, dtype=torch.float64))
    images = [golden.random(0, (2, 3, *size)) for size in ((224, 224), (97, 130))]
    expected = [(model(x), *model.forward_intermediates(x)[1]) for x in images]
    assert model.fuse() is model
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
    assert not list(model.buffers())
    for x, outputs in zip(images, expected, strict=True):
        for a, b in zip((model(x), *model.forward_intermediates(x)[1]), outputs, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    twin = timm.create_model(name, dtype=torch.float64).fuse()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images[0]), model(images[0]))
    assert torch.equal(model.fuse()(images[0]), twin(images[0]))  # a second time changes nothing


def test_fused_model_in_other_uses():
    """Half precision, a new classifier, gradients, a compiled graph, features."""
    model = fill(timm.create_model(NAME)).fuse()
    x = torch.randn(2, 3, 64, 96)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        expected = model(x)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert (half.float() - expected).norm() < 0.1 * expected.norm()
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    features = timm.create_model(NAME, features_only=True).eval()
    features.model.fuse()
    assert [m.shape[1] for m in features(x)] == [16, 32, 48]
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


# Weights that change in eval mode


@pytest.mark.parametrize("change", ["load_state_dict", "half", "double", "deepcopy", "ema", "to"])
@torch.no_grad()
def test_nothing_stale_in_eval_mode(change):
    """The answers after a change are those of a model that was built with the new weights."""
    model, x = fill(timm.create_model(NAME, num_classes=4)), torch.randn(1, 3, 64, 96)
    model(x)
    other = timm.create_model(NAME, num_classes=4).eval()
    other.load_state_dict({
        key: value + (key.endswith(".rpb") * torch.randn(value.shape)) for key, value in model.state_dict().items()})
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "ema":
        for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            ours.copy_(ours.lerp(theirs, 0.5) if ours.is_floating_point() else ours)
    elif change == "deepcopy":
        model = copy.deepcopy(model)
        model.load_state_dict(other.state_dict())
    else:
        model = {"half": model.half, "double": model.double, "to": lambda: model.to("meta").to_empty(device="cpu")}[
            change]()
        if change == "to":
            model.load_state_dict(other.state_dict())
    dtype = next(model.parameters()).dtype
    fresh = timm.create_model(NAME, num_classes=4, dtype=dtype).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x.to(dtype)), fresh(x.to(dtype)))


# Two classifiers


def test_distilled():
    """In training a pair after set_distilled_training, the mean otherwise; published weights fill both classifiers."""
    plain = fill(timm.create_model(NAME))
    model = timm.create_model(
        NAME, distilled=True, pretrained=True, pretrained_cfg_overlay=dict(state_dict=plain.state_dict())).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), plain(x))
    assert model.get_classifier() == (model.head.linear, model.head_dist.linear)
    model.reset_classifier(6)
    with torch.no_grad():
        features = model.forward_features(x).mean((2, 3))
        expected = (model.head(features) + model.head_dist(features)) / 2
        assert not torch.allclose(model.head(features), model.head_dist(features))
        torch.testing.assert_close(model(x), expected)
    assert model.train()(x).shape == (2, 6)
    model.set_distilled_training()
    logits, distilled = model(x)
    assert logits.shape == distilled.shape == (2, 6)
    (logits + 2 * distilled).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(x).shape == (2, 6)
    expected = model.double()(x.double())
    torch.testing.assert_close(model.fuse()(x.double()), expected, rtol=1e-11, atol=1e-11)
    assert model.head_dist.bn.__class__ is nn.Identity
    with pytest.raises(ValueError, match="create it with distilled=True"):
        plain.set_distilled_training()


def test_distilled_weights_with_other_classes():
    source = timm.create_model(NAME, distilled=True)
    overlay = dict(state_dict=source.state_dict())
    model = timm.create_model(NAME, distilled=True, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert torch.equal(model.head_dist.bn.weight, source.head_dist.bn.weight)
    with pytest.raises(CheckpointError, match=r"unexpected \(first: head_dist"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


# Construction


@torch.no_grad()
def test_initial_blocks_do_nothing():
    """Every branch of a block starts at zero (the paper's training starts so)."""
    model = timm.create_model(NAME).eval()
    for stage, dim in zip(model.stages, (16, 32, 48), strict=True):
        x = torch.randn(1, dim, 9, 5)
        assert torch.equal(stage.blocks(x), x)
    assert not torch.equal(model.stages[1].downsample.res1(y := torch.randn(1, 16, 8, 8)), y)


def test_weight_decay_spares_the_tables():
    model = timm.create_model("efficientvit_cga_m0", device="meta")
    assert len(model.no_weight_decay()) == 6


def test_bad_options():
    with pytest.raises(ValueError, match="multiple of 8, got 60"):
        timm.create_model(NAME, embed_dims=(60, 64, 96))
    with pytest.raises(ValueError, match='global_pool "" goes with num_classes=0'):
        timm.create_model(NAME, global_pool="")
    with pytest.raises(ValueError, match="at least 16 pixels"):
        timm.create_model(NAME, img_size=8)
    with pytest.raises(ValueError, match="output_fmt must be NCHW"):
        timm.create_model(NAME).forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NHWC")
