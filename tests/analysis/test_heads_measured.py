"""Measures of heads: by hand, by finite differences, and of timm's Swin."""
import math

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from tests.layers.test_attention_maps import tiny
from tests.models.test_families import images, make
from visionattn.analysis import find_heads, masked_heads, recorded_by_layer
from visionattn.analysis.clusters import cluster_patterns, cropped, patterns_of
from visionattn.analysis.importance import ablate_heads, gradient_importance
from visionattn.analysis.measures import measure_attention, measure_maps
from visionattn.analysis.places import Places
from visionattn.models.agent_cswin import StripeAttention

NOWHERE = [math.nan] * 4
SQUARE = [[0., 0, 8, 8], [0, 8, 8, 16], [8, 0, 16, 8], [8, 8, 16, 16]]  # 2 x 2 tokens of 8 pixels
IMAGE = (16, 16)


def places(queries, keys=None, prefix=0):
    return Places(torch.tensor([queries]), torch.tensor([queries if keys is None else keys]), prefix)


def test_measures_by_hand():
    """The first head looks at the query itself, the second everywhere, the third to the left or right."""
    mixed = torch.tensor([[0., 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    maps = torch.stack([torch.eye(4), torch.full((4, 4), 0.25), mixed])[None].repeat(2, 1, 1, 1)
    found = measure_maps(maps, places(SQUARE), IMAGE)
    assert found.entropy.tolist() == pytest.approx([0, math.log(4), 0])
    assert found.distance.tolist() == pytest.approx([0, (0 + 8 + 8 + 8 * 2 ** 0.5) / 4, 8])
    assert found.self_share.tolist() == [1, 0.25, 0]
    assert found.class_share.isnan().all()
    assert (found.pixels, found.why) == (8, "")
    side = cropped(found.offsets)
    assert side.shape == (3, 3, 3)
    assert side[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert side[1].tolist() == [[0.25] * 3] * 3
    assert side[2].tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_class_tokens_pooled_keys_and_padding_by_hand():
    maps = torch.tensor([[[[1., 0, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]]]])
    found = measure_maps(maps, places([NOWHERE, *SQUARE[:2]], prefix=1), IMAGE)
    assert found.class_share.item() == pytest.approx((1 + 0.5 + 0.2) / 3)
    assert found.self_share.item() == pytest.approx((1 + 0.5 + 0.6) / 3)
    assert found.distance.item() == pytest.approx(0.2 * 8 / (0.5 + 0.8))  # of what does not go to the class token
    pooled = measure_maps(torch.ones(1, 1, 4, 1), places(SQUARE, [[0., 0, 16, 16]]), IMAGE)
    assert pooled.distance.item() == pytest.approx(4 * 2 ** 0.5)
    assert pooled.self_share.isnan().all()
    outside = [*SQUARE[:1], [16., 0, 24, 8]]  # the second is padding
    padded = measure_maps(torch.tensor([[[[0.5, 0.5], [0, 1]]]]), places(outside), IMAGE)
    assert padded.entropy.item() == pytest.approx(math.log(2))
    assert padded.distance.item() == 0
    assert padded.self_share.item() == 0.5


def test_rows_that_sum_to_nothing_or_are_negative():
    half = measure_maps(torch.tensor([[[[0., 0], [3, 3]]]]), places(SQUARE[:2]), IMAGE)
    assert half.entropy.item() == pytest.approx(math.log(2))  # of the one query that attends
    assert half.self_share.item() == 0.5
    negative = measure_maps(torch.tensor([[[[-1., 2], [1, 0]]]]), places(SQUARE[:2]), IMAGE)
    assert negative.entropy.isnan().all()
    assert negative.offsets is None
    assert "negative" in negative.why


def test_shifted_windows_stay_where_they_are():
    """Of Swin's wrapped windows, which hold tokens of all edges, none attends from one edge to the other."""
    model, x = tiny("swin", depths=(2,), num_heads=(1,)), images(3, 32, 32)  # 8 x 8 tokens of 4 pixels, shifted by 2
    found = measure_attention(model, x, batch=2)
    assert list(found) == ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn"]
    for shift, (plain,) in zip((0, 2), found.values(), strict=True):
        assert plain.why == ""
        assert plain.pixels == 4
        assert cropped(plain.offsets).shape == (1, 7, 7)  # windows of 4 x 4
        with torch.no_grad(), recorded_by_layer(model) as layers:
            model(x)
        maps = layers[shift // 2].maps.view(3, 2, 2, 16, 16)
        total = 0.
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            index = torch.arange(4)
            rows, columns = (4 * row + index + shift) % 8, (4 * column + index + shift) % 8
            at = torch.stack([rows[:, None].expand(4, 4), columns.expand(4, 4)], dim=-1).flatten(0, 1).float() * 4
            total += (maps[:, row, column] * torch.cdist(at, at)).sum().item()
        assert plain.distance.item() == pytest.approx(total / (3 * 64), rel=1e-5)


def test_uneven_stripes_are_of_the_same_heads():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), StripesOfMaps(8, 2, 3)).eval()
    vertical, horizontal = measure_attention(model, images(2, 5, 7))["1.stripes"]
    assert [len(group.entropy) for group in (vertical, horizontal)] == [1, 1]
    assert cropped(vertical.offsets).shape == (1, 9, 5)
    assert cropped(horizontal.offsets).shape == (1, 5, 13)


class StripesOfMaps(torch.nn.Module):
    """Takes maps with channels first."""

    def __init__(self, *args):
        super().__init__()
        self.stripes = StripeAttention(*args)

    def forward(self, x):
        return self.stripes(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_gradients_are_those_of_finite_differences(kind):
    model, x, labels = tiny(kind).double(), images(3, 32, 32).double(), torch.tensor([0, 3, 1])
    found = gradient_importance(model, x, labels)
    step = 1e-5
    for heads in find_heads(model):
        for head in range(heads.count):
            losses = []
            for factor in (1 + step, 1 - step):
                mask = torch.ones(heads.count, dtype=torch.float64)
                mask[head] = factor
                with torch.no_grad(), masked_heads(model, {heads.name: mask}):
                    losses.append(cross_entropy(model(x), labels, reduction="none"))
            expected = ((losses[0] - losses[1]) / (2 * step)).abs().mean().item()
            assert found[heads.name][head].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_ablation_is_the_loss_without_the_head():
    model, x = make("test_agent_deit", num_classes=4), images(3)
    labels = torch.tensor([0, 1, 2])
    found = ablate_heads(model, x, labels, batch=2)
    with torch.no_grad():
        assert found.loss == pytest.approx(cross_entropy(model(x), labels).item(), rel=1e-5)
        for heads in find_heads(model):
            with masked_heads(model, {heads.name: torch.tensor([1., 0, 1])}):
                scores = model(x)
            assert found.losses[heads.name][1].item() == pytest.approx(cross_entropy(scores, labels).item(), rel=1e-5)
            assert found.accuracies[heads.name][1].item() == pytest.approx(
                (scores.argmax(dim=1) == labels).float().mean().item())


def test_clusters_part_what_looks_different_and_never_change():
    torch.manual_seed(0)
    maps = torch.rand(9, 11, 11) * 0.1
    maps[0:4, 5, 5] += 5  # at the query
    maps[4:7, 5] += 5  # along its row
    maps[7:, :, 5] += 5  # along its column
    patterns = patterns_of(maps)
    assert patterns.sum(dim=(1, 2)).tolist() == pytest.approx([1] * 9)
    found, means = cluster_patterns(patterns, 3)
    assert found == [0] * 4 + [1] * 3 + [2] * 2
    assert torch.allclose(means[1], patterns[4:7].mean(dim=0))
    assert cluster_patterns(patterns, 3)[0] == found
    assert cluster_patterns(patterns[:1].expand(3, -1, -1), 6)[0] == [0, 0, 0]  # as many as there are
    with pytest.raises(ValueError, match="groups of 0 patterns"):
        cluster_patterns(patterns[:0], 3)


def test_layers_without_maps_are_missing():
    assert measure_attention(timm.create_model("test_resnet").eval(), images(1, 32, 32)) == {}
