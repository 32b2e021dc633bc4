"""DHVT against the authors' numbers; images that their code refuses, and checkpoints."""
import pytest
import timm
import torch

from tests import golden
from visionattn.dense import DenseBackbone
from visionattn.heads import Segmenter
from visionattn.models import dhvt

PARAMETERS = {  # of the authors' code
    "dhvt_tiny_cifar_patch4": 6_008_650, "dhvt_tiny_cifar_patch2": 5_845_162,
    "dhvt_small_cifar_patch4": 23_425_450, "dhvt_small_cifar_patch2": 22_766_698,
    "dhvt_tiny_domain_patch16": 6_105_975, "dhvt_small_domain_patch16": 23_788_431,
    "dhvt_tiny_imagenet_patch16": 6_267_334, "dhvt_small_imagenet_patch16": 24_040_606,
}


def from_authors(name):
    """The model in float64 with the authors' weights, nothing missing and nothing left over but batch counters."""
    model = timm.create_model(name, dtype=torch.float64)
    weights = dhvt.checkpoint_filter_fn(golden.official_state_dict(golden.load(name)), model)
    counters = {key for key in model.state_dict() if key.endswith(".num_batches_tracked")}
    assert weights.keys() == model.state_dict().keys() - counters
    model.load_state_dict(weights, strict=False)
    return model.eval()


@pytest.mark.parametrize(("name", "run"), [
    ("dhvt_tiny_cifar_patch4", 0), ("dhvt_tiny_cifar_patch4", 1), ("dhvt_tiny_imagenet_patch16", 0),
    ("dhvt_tiny_imagenet_patch16", 1)])
@torch.no_grad()
def test_logits_and_tokens(name, run):
    model = from_authors(name)
    run = golden.load(name)["runs"][run]
    x = golden.random(run["input"]["seed"], run["input"]["shape"])
    taken = {}
    for i in (0, 5, 11):
        model.blocks[i].register_forward_hook(lambda module, args, out, i=i: taken.__setitem__(f"block{i}_tokens", out))
    model.patch_embed.register_forward_hook(
        lambda module, args, out: taken.__setitem__("patch_embed_tokens", out.flatten(1, 2)))
    taken["final_norm_tokens"] = model.forward_features(x)
    torch.testing.assert_close(
        model.forward_head(taken["final_norm_tokens"]), torch.tensor(run["logits"], dtype=torch.float64),
        rtol=1e-9, atol=1e-9)
    assert taken.keys() == run["features"].keys()
    for tap, summary in run["features"].items():
        golden.assert_matches(taken[tap], summary)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@torch.no_grad()
def test_images_that_are_not_square():
    """The authors' code refuses them. A transposed image through transposed kernels gives the transposed map."""
    torch.manual_seed(0)
    model = timm.create_model("test_dhvt", patch_size=4, dtype=torch.float64).eval()
    x = torch.randn(1, 3, 24, 44, dtype=torch.float64)
    plain = model.forward_intermediates(x, intermediates_only=True)[-1]
    assert plain.shape == (1, 48, 6, 11)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.copy_(layer.weight.mT.clone())
    turned = model.forward_intermediates(x.mT, intermediates_only=True)[-1]
    torch.testing.assert_close(turned.mT, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("args", "message"), [
    (dict(patch_size=8), "patch_size must be 2, 4 or 16, got 8"),
    (dict(num_heads=5), r"num_heads \(5\) must divide dim \(48\)")])
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_dhvt", **args)


@pytest.mark.parametrize("patch_size", [2, 4])
@torch.no_grad()
def test_segments_at_fine_strides(patch_size):
    """Maps of stride 2 and 4 go to the heads as those of any stride."""
    backbone = DenseBackbone("test_dhvt", "segmentation", model_args=dict(patch_size=patch_size))
    assert (backbone.channels, backbone.reductions) == ([48], [patch_size])
    logits = Segmenter(backbone, 3, "semantic_fpn", channels=8).eval()(torch.rand(1, 3, 21, 34))
    assert logits.shape == (1, 3, 21, 34)


@pytest.mark.parametrize("in_chans", [1, 4])
@torch.no_grad()
def test_file_of_the_authors_for_other_images(tmp_path, in_chans):
    """The affine map before the first convolution takes the mean over the colours, the convolution goes timm's way."""
    official = {key: x.float() for key, x in golden.official_state_dict(golden.load("dhvt_tiny_cifar_patch4")).items()}
    torch.save({"model": official, "epoch": 299}, tmp_path / "checkpoint.pth")
    model = timm.create_model(
        "dhvt_tiny_cifar_patch4", pretrained=True, in_chans=in_chans, num_classes=5,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "checkpoint.pth")))
    torch.testing.assert_close(
        model.patch_embed.pre_affine.weight, official["patch_embed.pre_affine.alpha"].mean().expand(in_chans))
    assert torch.equal(model.blocks[3].attn.head_embed, official["blocks.3.attn.pos_embed"])
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 5)
