"""Flowformer: the authors' names and sizes, positions of other images (what every family is asked for is in
test_families.py). Their model's numbers are those of its attention, in tests/ops/test_flow.py.
"""
import pytest
import timm
import torch

import visionattn  # noqa: F401  (registers the zoo in timm)

def official(model):
    """A model's weights under the authors' names, as their classifier's file has them."""
    named = {}
    for name, x in model.state_dict().items():
        if name.startswith("patch_embed."):
            name = name.replace("patch_embed.", "patch_embed.0.")
        elif ".downsample." in name:
            name = name.replace("stages.", "patch_embed.").replace(".downsample", "")
        name = name.replace(".ls2.gamma", ".gamma").replace("pos_embed.table", "pos_embed").replace("head.fc", "head")
        if ".blocks." in name:
            _, stage, _, block, rest = name.split(".", 4)
            name = f"blocks.{stage}.{block}.{rest}"
        named[name] = x
    return {"model": named}


def test_parameters():
    """As many as the authors' model has, by their names, and a factor on the perceptrons alone."""
    model = timm.create_model("flowformer", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 43_311_304
    shapes = {name: list(x.shape) for name, x in official(model)["model"].items()}
    assert shapes["pos_embed"] == [1, 3136, 96]
    assert shapes["patch_embed.3.proj.weight"] == [768, 384, 2, 2]
    assert shapes["blocks.2.9.attn.qkv.weight"] == [1152, 384]
    assert [name for name in shapes if name.startswith("blocks.0.0.")] == [f"blocks.0.0.{name}" for name in (
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "gamma")]
    assert {module.num_heads for module in model.modules() if hasattr(module, "num_heads")} == {12}


@torch.no_grad()
def test_the_authors_names():
    source = timm.create_model("test_flowformer").eval()
    model = timm.create_model(
        "test_flowformer", pretrained=True, pretrained_cfg_overlay=dict(state_dict=official(source))).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("size", [96, (64, 100)])
@torch.no_grad()
def test_other_image_sizes(size):
    """Tables of another size compute what interpolation does, made by hand or when weights are loaded."""
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    source = timm.create_model("test_flowformer").eval()
    expected = source(images)
    loaded = timm.create_model("test_flowformer", img_size=size, pretrained=True, pretrained_cfg_overlay=dict(
        state_dict=official(source))).eval()
    source.set_input_size(size)
    for model in (source, loaded):
        assert model.pos_embed.table.shape == (1, -(-height // 4) * -(-width // 4), 16)
        torch.testing.assert_close(model(images), expected)
    moved = images.flip(3)
    assert not torch.allclose(source(moved), expected)  # positions count
