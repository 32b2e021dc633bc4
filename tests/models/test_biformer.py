"""BiFormer: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn
from tests import golden
from visionattn.models import biformer

VARIANTS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
}


def official(name, **options):
    """A model with the weights of a golden file, loaded as a user loads them."""
    overlay = dict(state_dict={"model": golden.official_state_dict(golden.load(name))})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_golden(name):
    model = official(name)
    for run in golden.load(name)["runs"]:
        x = golden.random(run["input"]["seed"], run["input"]["shape"])
        with torch.no_grad():
            last, features = model.forward_intermediates(x)
            logits = model.forward_head(last)
        if "forward_error" in run:  # sizes that the authors' code refuses
            assert logits.isfinite().all()
            continue
        golden.assert_matches(logits, run["logits_summary"])
        torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
        for feature, summary in zip([*features, last], run["features"].values(), strict=True):
            golden.assert_matches(feature, summary)


def test_golden_segmentation_backbone():
    """The dense backbones are the classification trunk with more regions and a channel norm on each map."""
    case = golden.load("biformer_tiny_seg")
    weights = golden.official_state_dict(case)
    model = timm.create_model("biformer_tiny", features_only=True, n_win=8, dtype=torch.float64).eval()
    trunk = {key: x for key, x in weights.items() if not key.startswith("extra_norms.")}
    renamed = biformer.checkpoint_filter_fn(trunk, biformer.BiFormer(device="meta"))
    result = model.model.load_state_dict(renamed, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for run in case["runs"]:
        with torch.no_grad():
            features = model(golden.random(run["input"]["seed"], run["input"]["shape"]))
        for i, (x, summary) in enumerate(zip(features, run["features"].values(), strict=True)):
            norm = [weights[f"extra_norms.{i}.{leaf}"] for leaf in ("weight", "bias")]
            x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *norm, eps=1e-6).permute(0, 3, 1, 2)
            golden.assert_matches(x, summary)


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params


def test_attention_of_each_variant():
    """Regions per side, topk and heads of the published models."""
    for name in VARIANTS:
        model = timm.create_model(name, device="meta")
        for stage, topk, head_dim in zip(model.stages, (1, 4, 16, None), (32, 32, 32, None), strict=True):
            for block in stage.blocks:
                if topk is None:
                    assert (block.attn.num_heads, block.attn.lepe_of) == (
                        8, "value" if name == "biformer_stl_nchw" else "input")
                else:
                    assert (block.attn.topk, block.attn.n_win) == (topk, 7)
                    assert block.attn.num_heads * head_dim == block.norm1.normalized_shape[0]


def test_drop_path_grows_linearly():
    model = timm.create_model("biformer_tiny", drop_path_rate=0.13, device="meta")
    rates = [getattr(block.drop_path1, "drop_prob", 0.) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(14)])


def test_versions_of_the_checkpoint_are_not_mixed_up():
    """The two stl models have the same tensors, but compute something else in the last stage."""
    weights = golden.official_state_dict(golden.load("biformer_stl"))
    with pytest.raises(ValueError, match="the checkpoint is of the legacy version of BiFormer, the model of the nchw"):
        timm.create_model("biformer_stl_nchw", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))
    weights = golden.official_state_dict(golden.load("biformer_stl_nchw"))
    with pytest.raises(ValueError, match="the checkpoint is of the nchw version of BiFormer, the model of the legacy"):
        timm.create_model("biformer_stl", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 130)])
def test_more_regions_than_the_map_has_tokens(size):
    model = timm.create_model("test_biformer", n_win=16).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.slow
def test_exports_with_dynamic_batch_height_and_width(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model("test_biformer", num_classes=10).eval()
    batch, rows, columns = (torch.export.Dim(name, min=1, max=16) for name in ("batch", "rows", "columns"))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, 64, 96),), dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes=({0: batch, 2: 32 * rows, 3: 32 * columns},)).save(path)
    session = onnxruntime.InferenceSession(path)
    for shape in ((2, 3, 64, 96), (1, 3, 224, 224), (3, 3, 96, 160)):
        x = torch.randn(shape)
        actual = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-5)


def test_version():
    assert visionattn.__version__.count(".") >= 2
