"""Places of tokens in the image: attention at them is what gradients say of the layer's input and output."""
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from tests.models.test_families import images, make
from visionattn.analysis import recorded_by_layer, token_places
from visionattn.dense import DenseBackbone
from visionattn.layers import BiLevelRoutingAttention, NeighborhoodAttention2d, WindowAttention
from visionattn.models.agent_cswin import StripeAttention


class OnPixels(nn.Module):
    """A layer on maps ``[B, H, W, dim]`` whose tokens are the pixels of an image."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1))


def influence(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Whether an output token changes with an input token, ``[tokens, tokens]``."""
    x = x.requires_grad_()
    out = model(x).flatten(1, 2)[0]
    return torch.stack([
        torch.autograd.grad(token.square().sum(), x, retain_graph=True)[0].abs().sum(dim=1).flatten() for token in out
    ]) > 1e-12


LAYERS = {
    "window": lambda: WindowAttention(4, 2, 3, shift=1),
    "swin": lambda: SwinTransformerBlock(4, (6, 8), num_heads=2, window_size=3, shift_size=1),
    "neighborhood": lambda: NeighborhoodAttention2d(4, 2, 3),
    "dilated": lambda: NeighborhoodAttention2d(4, 2, 3, dilation=3),
    "panorama": lambda: NeighborhoodAttention2d(4, 2, 3, wrap=True),
    "stripes": lambda: StripeAttention(4, 2, 3),
    "routed": lambda: BiLevelRoutingAttention(4, 2, 3, topk=2, pad="qkv", lepe_kernel=1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_attend_to_what_changes_them(kind):
    torch.manual_seed(0)
    model, x = OnPixels(LAYERS[kind]()).double().eval(), torch.randn(1, 4, 5, 8).double()
    with torch.no_grad(), recorded_by_layer(model) as layers:
        model(x)
    seen = torch.eye(40, dtype=torch.bool)  # windows and stripes hold the token itself, a convolution of one too
    for layer in layers:
        places = token_places(layer)
        assert places.others == ""
        assert (places.queries[..., 2:] - places.queries[..., :2] == 1)[~places.queries[..., 2:].isnan()].all()
        for window, maps in enumerate(layer.maps):
            for query, row in zip(places.queries[window], maps.sum(dim=0), strict=True):
                if query.isnan().any() or query[2] > 5 or query[3] > 8:
                    continue
                keys = places.keys[window][row > 1e-12]
                keys = keys[(keys[:, 2] <= 5) & (keys[:, 3] <= 8)].long()
                seen[int(query[0]) * 8 + int(query[1]), keys[:, 0] * 8 + keys[:, 1]] = True
    assert torch.equal(seen, influence(model, x))


def places_of(model: nn.Module, height: int = 64, width: int = 64):
    with torch.no_grad(), recorded_by_layer(model) as layers:
        model(images(1, height, width))
    return {(layer.name, layer.part): token_places(layer) for layer in layers}


def test_class_tokens_and_patches_of_a_vit():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=24, depth=1, num_heads=3, img_size=(32, 48)).eval()
    (places,) = places_of(model, 32, 48).values()
    assert places.prefix == 2
    assert places.others == "class tokens and the like"
    assert places.keys[0, :2].isnan().all()
    assert places.keys[0, 2:].tolist() == [
        [top, left, top + 16, left + 16] for top in (0, 16) for left in (0, 16, 32)]
    assert torch.equal(places.queries.nan_to_num(-1), places.keys.nan_to_num(-1))


def test_pooled_keys_are_boxes_of_several_tokens():
    places = places_of(make("test_transnext"))["stages.0.blocks.0.attn", 0]
    assert places.keys[0, 256:].tolist() == [
        [top, left, top + 32, left + 32] for top in (0, 32) for left in (0, 32)]
    places = places_of(make("test_datr"))["stages.0.blocks.0.attn", 0]
    assert places.keys[0].tolist() == [[top, left, top + 32, left + 32] for top in (0, 32) for left in (0, 32)]


def test_keys_without_a_place_are_said_to_have_none():
    places = places_of(make("test_favit"))
    assert places["stages.0.blocks.0.attn", 1].keys.isnan().all()
    assert places["stages.0.blocks.0.attn", 1].others == "keys merged from all tiles of the map"
    assert places["stages.0.blocks.0.attn", 0].keys[0, -1].tolist() == [32, 32, 64, 64]
    places = places_of(make("test_fcaformer"))["stages.2.blocks.2.attn", 0]
    assert places.keys[0].isnan().any(dim=1).tolist() == [False] * 16 + [True] * 2


def test_windows_of_a_dense_backbone_shift_by_their_padding():
    model = DenseBackbone("test_fcaformer", "segmentation", model_args=dict(window_sizes=(3, 3))).eval()
    places = places_of(model)  # of 4 x 4 tokens in the third stage
    corners = [places[f"stages.2.blocks.{block}.attn", 0].keys[0, 0].tolist() for block in (0, 1)]
    assert corners == [[-32, -32, -16, -16], [0, 0, 16, 16]]
    keys = places["stages.2.blocks.1.attn", 0].keys
    assert keys[3, 0].tolist() == [48, 48, 64, 64]
    assert keys[3].isnan().any(dim=1).tolist() == [False] * 9 + [True]


def test_nothing_is_guessed():
    model = make("test_dependency_vit_lite")  # which prunes tokens on its way
    with torch.no_grad(), recorded_by_layer(model) as layers:
        model(images())
    assert token_places(layers[1]).keys[0, -1].tolist() == [56, 56, 64, 64]
    for layer in layers[2:]:
        with pytest.raises(ValueError, match="it is not known where the tokens of"):
            token_places(layer)
    with torch.no_grad(), recorded_by_layer(model) as layers:
        model.forward_features(images())
    with pytest.raises(ValueError, match="DependencyViT was not called with images"):
        token_places(layers[0])
