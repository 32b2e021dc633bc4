"""Where layers look: attention of layers, agents, clusters, windows, rollout and Grad-CAM as weights over the image."""
import sys

import pytest
import timm
import torch
from torch import nn

from tests.models.test_families import images, make
from visionattn.analysis import Places, looks, recorded_by_layer, token_places
from visionattn.analysis.gradcam import find_grad_cam, grad_cam
from visionattn.analysis.insides import find_agents, find_clusters, find_windows, inputs_of
from visionattn.analysis.looks import choose_layers, halved, look_at, look_of
from visionattn.analysis.rollout import find_rollout, rollout


def run(model, size=64):
    with torch.no_grad(), recorded_by_layer(model) as layers, inputs_of(model) as inputs:
        model(images(1, size, size))
    return layers, inputs


def by_name(layers, name):
    return next(layer for layer in layers if layer.name == name)


def test_weights_lie_where_the_keys_are():
    boxes = torch.tensor([[0, 0, 2, 2], [0, 2, 2, 4], [2, 0, 4, 2], [2, 2, 4, 4], [4, 0, 6, 2.]])  # the last is padding
    nowhere = torch.full((1, 4), torch.nan)
    whole = torch.tensor([[0, 0, 4, 4.]])
    places = Places(torch.cat([nowhere, boxes])[None], torch.cat([nowhere, boxes, whole])[None], 1, "class token")
    maps = torch.zeros(1, 1, 6, 7)
    maps[0, 0, 3] = torch.tensor([0.1, 0.2, 0, 0, 0.1, 0.2, 0.4])  # of the query at the bottom left
    maps[0, 0, 0] = torch.tensor([0, 0, 0.5, 0, 0, 0, 0])
    look = look_at("a", maps, places, (4, 4))
    assert look.side == 2
    assert (look.rows.tolist(), look.columns.tolist()) == ([[0, 2], [2, 4]], [[0, 2], [2, 4]])
    assert torch.allclose(look.weights[0, 1, 0], torch.tensor([[0.3, 0.1], [0.1, 0.2]]))
    assert look.weights[0, 0, 0].sum() == 0
    assert look.fixed.tolist() == [[[0, 0.5], [0, 0]]]
    assert (look.fixed_name, look.others) == ("class token", "class token and padding around the map")


def test_maps_that_are_too_large_are_not_computed(monkeypatch):
    layers, _ = run(make("test_dependency_vit"))
    monkeypatch.setattr(looks, "MOST_NUMBERS", layers[0].count)
    assert look_of(layers[0]).why == ""
    assert "tables of tokens by tokens would be" in find_rollout(layers).why  # of all layers at once
    monkeypatch.setattr(looks, "MOST_NUMBERS", layers[1].count - 1)
    assert "tables of tokens by tokens would be" in look_of(layers[1]).why
    assert "maps" not in vars(layers[1])


@pytest.mark.parametrize("name", ["test_dinat", "test_agent_swin", "test_transnext"])
def test_looks_are_the_maps(name):
    layers, _ = run(make(name))
    for layer in layers:
        look, (height, width) = look_of(layer), (64, 64)
        places = token_places(layer)
        box = torch.stack([look.rows[1, 0], look.columns[0, 0], look.rows[1, 1], look.columns[0, 1]])  # of a query
        window, query = (places.queries == box).all(dim=-1).nonzero()[0].tolist()
        inside = (places.keys[window, :, 2] <= height) & (places.keys[window, :, 3] <= width)
        found, expected = look.weights[:, 1, 0].sum(dim=(1, 2)), layer.maps[window, :, query, inside].sum(dim=1)
        assert torch.allclose(found, expected, atol=1e-5)
        less = halved(look)
        assert less.weights.numel() <= look.weights.numel() / 3 or look.weights.numel() < 300
    assert [layer.name for layer in choose_layers(layers)] == [
        layer.name for layer in layers if layer.name.split(".")[3] == max(
            other.name.split(".")[3] for other in layers if other.name.split(".")[1] == layer.name.split(".")[1])]


def test_large_maps_are_thinned_and_keep_their_weight():
    places = Places(*[torch.stack([torch.arange(80) // 80, torch.arange(80), torch.ones(80), torch.arange(1, 81)], 1)[
        None].float()] * 2)
    look = look_at("a", torch.eye(80)[None, None], places, (1, 80))
    assert look.weights.shape == (1, 1, 27, 1, 40)
    assert look.side == 2
    assert torch.equal(look.weights.sum(dim=(3, 4)), torch.ones(1, 1, 27))
    assert (look.weights[0, 0, :, 0].argmax(dim=1) * 2 - look.columns[:, 0]).abs().max() <= 1
    less = halved(look)
    assert less.weights.shape == (1, 1, 27, 1, 20)
    assert torch.equal(less.weights.sum(dim=(3, 4)), torch.ones(1, 1, 27))


def test_agents_gather_what_tokens_read_of_them():
    layers, inputs = run(make("test_agent_deit"))
    layer = by_name(layers, "blocks.1.attn")
    gathered, read = layer.module.agent_maps(*inputs[layer.module])
    assert torch.allclose(read @ gathered, layer.maps, atol=1e-6)
    gather, reading = find_agents(layer, inputs[layer.module])
    assert gather.weights.shape[1:3] == layer.module.agent_grid
    assert torch.allclose(gather.weights[:, 1, 0].flatten(1), gathered[0, :, layer.module.agent_grid[1], 1:], atol=1e-6)
    assert torch.allclose(reading.weights.sum(dim=(3, 4)), torch.ones(3, 4, 4), atol=1e-5)


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_tokens_attend_within_their_clusters(assignment):
    layers, inputs = run(make("test_routing_vit", assignment=assignment))
    layer = by_name(layers, "stages.0.blocks.0.1.attn")
    queries, keys = layer.module.clusters(inputs[layer.module][0])
    seen = torch.zeros(layer.maps.shape, dtype=torch.bool)
    for head in range(queries.shape[1]):
        for cluster in range(queries.shape[2]):
            taken = queries[0, head, cluster]
            seen[0, head, taken[taken >= 0][:, None], keys[0, head, cluster]] = True
    assert torch.equal(layer.maps > 0, seen)
    found = find_clusters(layer, inputs[layer.module])
    assert found.owner.shape == (queries.shape[1], 16, 16)
    assert torch.equal((found.owner >= 0).flatten(1), seen[0].any(dim=2))
    shares = found.look.weights[0].flatten(0, 1).flatten(1)
    assert (shares.diagonal()[found.owner[0].flatten() >= 0] == 1).all()


def test_sampled_windows_hold_what_is_seen():
    model = make("test_vitaev2_vsa")
    for module in model.modules():
        if hasattr(module, "predictor"):
            nn.init.normal_(module.predictor.weight, std=0.5)
    layers, inputs = run(model)
    layer = by_name(layers, "stages.0.blocks.0.attn")
    look = find_windows(layer, inputs[layer.module], look_of(layer))
    left, top, right, bottom = (edges[..., None, None] for edges in look.windows.unbind(-1))
    left, right = torch.minimum(left, right), torch.maximum(left, right)
    top, bottom = torch.minimum(top, bottom), torch.maximum(top, bottom)
    middle = (torch.arange(16) + 0.5) * look.side
    near = 1.01 * look.side  # samples are interpolated between tokens
    inside = ((middle[:, None] > top - near) & (middle[:, None] < bottom + near) & (middle > left - near)
              & (middle < right + near))
    assert ((look.weights > 1e-6) <= inside).all()
    assert 0.02 < inside.float().mean() < 0.7


def test_rollout_of_hand_made_attention():
    swap = torch.tensor([[[[0, 1.], [1, 0]], [[0, 1.], [1, 0]]]])
    first = torch.tensor([[[[1, 0.], [1, 0]]]])  # all tokens attend to the first
    assert torch.allclose(rollout([swap]), torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
    # The second layer mixes what the first made: half of it itself, half of what token 0 became.
    assert torch.allclose(rollout([first, first]), torch.tensor([[[1, 0.], [0.75, 0.25]]]))
    assert torch.allclose(rollout([first, swap]), torch.tensor([[[0.75, 0.25], [0.75, 0.25]]]))


@pytest.mark.parametrize(("name", "why"), [
    ("test_dinat", "stages have not the same tokens"), ("test_fan", r"queries x keys: 16 x 16, 1 x 17"),
    ("test_dependency_vit", "do not sum to one"), ("test_mixer_vit", ""),
])
def test_rollout_or_why_not(name, why):
    look = find_rollout(run(make(name))[0])
    assert why in look.why
    assert bool(look.why) == bool(why)
    if not why:
        assert torch.allclose(look.weights.sum(dim=(3, 4)), torch.ones(look.weights.shape[:3]), atol=1e-5)


class Tiny(nn.Module):
    """A classifier whose Grad-CAM is known: its logits are linear in the mean of the last map."""

    def __init__(self, fmt):
        super().__init__()
        self.output_fmt, self.feature_info = fmt, [dict(num_chs=3, reduction=1, module="last")]
        self.last, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2)
        if fmt == "NHWC":
            self.last = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        x = self.last(x if self.output_fmt == "NCHW" else x.permute(0, 2, 3, 1))
        return self.fc(x.relu_().mean(dim=(2, 3) if self.output_fmt == "NCHW" else (1, 2)))


@pytest.mark.parametrize("fmt", ["NCHW", "NHWC"])
def test_grad_cam_by_hand(fmt):
    torch.manual_seed(0)
    model, x = Tiny(fmt), images(2, 3, 5)  # three channels, three rows: the layout is not seen from the sizes
    weight = model.last.weight.detach().view(3, 3)
    features = torch.einsum("oc,bchw->bohw", weight, x)
    slopes = model.fc.weight[1].detach()[:, None, None] * (features > 0) / 15  # of the logit by the map
    expected = (features * slopes.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu()
    assert torch.allclose(grad_cam(model, x, 1), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_fan", "test_biformer", "test_dependency_vit"])
def test_grad_cam_of_models(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.default_cfg["input_size"][1]
    cam = grad_cam(model, images(1, size, size), 3)
    assert cam.isfinite().all()
    assert cam.shape[1] == cam.shape[2] > 1
    assert not any(module._forward_hooks for module in model.modules())


def test_grad_cam_says_what_is_missing(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    assert "Sequential has no feature_info" in find_grad_cam(model, images(1, 4, 4), 0, "zero").why
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "captum", None)
    assert "pip install visionattn[explain]" in find_grad_cam(Tiny("NCHW"), images(1, 3, 5), 0, "zero").why
