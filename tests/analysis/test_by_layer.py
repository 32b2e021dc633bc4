"""Attention maps by layer: the same as without layers, and of the right ones."""
import threading

import pytest
import timm
import torch

from tests.layers.test_attention_maps import tiny
from tests.models.test_families import images, make
from visionattn.analysis import recorded_by_layer, token_places
from visionattn.dense import DenseBackbone
from visionattn.layers import attention_maps


@pytest.mark.parametrize(("name", "layers"), [
    ("swin", [(f"layers.{stage}.blocks.{block}.attn", 0) for stage in range(2) for block in range(2)]),
    ("test_maformer", [
        (f"stages.{stage}.blocks.0.attn{part}", 0) for stage in range(2) for part in (".local", "")] + [
        ("stages.2.blocks.0.attn", 0), ("stages.2.blocks.1.attn", 0), ("stages.3.blocks.0.attn", 0)]),
    ("test_favit", [(f"stages.{stage}.blocks.{block}.attn", part) for stage, block in (
        (0, 0), (1, 0), (2, 0), (2, 1), (3, 0)) for part in (0, 1)]),
])
def test_maps_are_of_their_layers(name, layers):
    model = tiny("swin") if name == "swin" else make(name)
    x = images(2, *(32, 32) if name == "swin" else (64, 64))
    with attention_maps(model) as expected:
        plain = model(x)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with recorded_by_layer(model) as found:
        assert torch.equal(model(x), plain)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [(layer.name, layer.part) for layer in found] == layers
    for layer, maps in zip(found, expected, strict=True):
        assert model.get_submodule(layer.name) is layer.module
        assert torch.equal(layer.maps, maps)
        assert layer.maps.requires_grad
        assert layer.around[0] == (model, tuple(x.shape))


@pytest.mark.parametrize(("name", "image"), [("test_dinat", (40, 50)), ("test_vit", (48, 64))])
def test_a_dense_backbone_is_recorded_as_the_model_in_it(name, image):
    body, x = DenseBackbone(name, "segmentation").eval(), images(1, 40, 50)
    with torch.no_grad(), attention_maps(body) as expected:
        plain = body(x)
    with torch.no_grad(), recorded_by_layer(body) as layers:
        assert all(map(torch.equal, body(x), plain))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.modules())
    for layer, maps in zip(layers, expected, strict=True):
        assert body.model.get_submodule(layer.name) is layer.module
        assert layer.around[0] == (body.model, (1, 3, *image))  # padded to whole patches of 16
        assert layer.count == maps.numel()
        assert torch.equal(layer.maps, maps)
    last = [48, 64] if name == "test_vit" else [96, 96]  # where a map of 2 x 2 is padded to a neighborhood of 3 x 3
    assert token_places(layers[-1]).keys[0, -1, 2:].tolist() == last


@pytest.mark.parametrize("name", ["test_transnext", "test_routing_vit", "test_favit", "test_agent_pvt"])
def test_sizes_of_maps_are_known_before(name):
    model = make(name)
    with torch.no_grad(), recorded_by_layer(model) as layers:
        model(images())
    assert [layer.count for layer in layers] == [layer.maps.numel() for layer in layers]


def test_heads_that_are_computed_one_after_the_other_are_one_map():
    model, x = make("test_efficientvit_cga"), images()
    with torch.no_grad(), attention_maps(model) as heads:
        model(x)
    with torch.no_grad(), recorded_by_layer(model) as layers:
        model(x)
    assert [layer.maps.shape[1] for layer in layers] == [2, 2, 3, 3]
    assert torch.equal(torch.cat([layer.maps.flatten() for layer in layers]), torch.cat([
        torch.cat(heads[first:first + count], dim=1).flatten() for first, count in ((0, 2), (2, 2), (4, 3), (7, 3))]))


def test_models_without_attention_and_compiled_ones():
    model = timm.create_model("test_resnet").eval()
    with recorded_by_layer(model) as layers:
        model(images(1, 32, 32))
    assert layers == []
    model.compile()
    with pytest.raises(ValueError, match="ResNet is compiled"), recorded_by_layer(model):
        pass


def test_other_threads_and_models_are_not_recorded():
    model, other = tiny("vit"), tiny("deit")
    with torch.no_grad(), recorded_by_layer(model) as layers:
        thread = threading.Thread(target=model, args=(images(1, 32, 32),))
        thread.start()
        thread.join()
        other(images(1, 32, 32))
        with pytest.raises(AssertionError):
            model(images(1, 48, 32))
        model(images(3, 32, 32))
    assert [layer.maps.shape[0] for layer in layers] == [3, 3]
    assert [layer.part for layer in layers] == [0, 0]
