"""NAT, DiNAT, DiNAT_s and the isotropic models against the authors' numbers; their checkpoints and wrong ones."""
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn  # noqa: F401
from tests import golden
from visionattn.models import isotropic, nat

PARAMETERS = {  # of the authors' code
    "nat_mini": 19_984_174, "nat_tiny": 27_901_582, "nat_small": 50_743_297, "nat_base": 89_769_652,
    "dinat_mini": 19_984_174, "dinat_tiny": 27_901_582, "dinat_small": 50_719_681, "dinat_base": 89_769_652,
    "dinat_large": 200_943_514, "dinat_large_384": 200_943_514, "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354, "dinat_s_small": 49_606_258, "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476, "dinat_s_large_384": 196_532_476,
    "nat_iso_small": 21_999_736, "dinat_iso_small": 21_999_736, "vitrpb_small": 22_080_376,
    "nat_iso_base": 86_465_800, "dinat_iso_base": 86_465_800, "vitrpb_base": 86_627_080,
}


def from_authors(name: str, filter_fn, state_dict: dict, **kwargs) -> torch.nn.Module:
    """The model in float64 with the authors' weights, nothing missing and nothing left over."""
    model = timm.create_model(name, dtype=torch.float64, device="meta", **kwargs)
    model.load_state_dict(filter_fn(state_dict, model), strict=True, assign=True)
    return model.eval()


def images(run: dict) -> torch.Tensor:
    return golden.random(run["input"]["seed"], run["input"]["shape"])


def assert_stages_match(maps: list[torch.Tensor], features: dict, norms: dict) -> None:
    """Compares stage maps, raw and through the norms that the authors' dense backbones add."""
    for i, x in enumerate(maps):
        if f"stage{i + 1}_raw" in features:
            golden.assert_matches(x, features[f"stage{i + 1}_raw"])
        normed = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *norms[i]).permute(0, 3, 1, 2)
        golden.assert_matches(normed, features[f"stage{i + 1}"])


def dense_norms(channels: list[int]) -> list:
    return [[golden.fill(f"norm{i}.{leaf}", [c]) for leaf in ("weight", "bias")] for i, c in enumerate(channels)]


@pytest.mark.parametrize("run", range(3), ids=["224", "256x320", "160x200"])
@pytest.mark.parametrize("name", ["nat_mini", "dinat_tiny", "dinat_s_tiny"])
@torch.no_grad()
def test_logits_and_stage_maps(name, run):
    authors = golden.load(name)
    model = from_authors(name, nat.checkpoint_filter_fn, golden.official_state_dict(authors))
    run = authors["runs"][run]
    features, maps = model.forward_intermediates(images(run))
    logits = model.forward_head(features)
    torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_stages_match(maps, run["features"], dense_norms([x.shape[1] for x in maps]))


@pytest.mark.parametrize("name", ["dinat_iso_small", "vitrpb_small"])
@torch.no_grad()
def test_logits_and_block_maps(name):
    authors = golden.load(name)
    model = from_authors(name, isotropic.checkpoint_filter_fn, golden.official_state_dict(authors))
    run, = authors["runs"]
    features, maps = model.forward_intermediates(images(run))
    logits = model.forward_head(features)
    torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    golden.assert_matches(features.flatten(1, 2), run["features"]["final_norm_tokens"])
    for block in (1, 2, 6, 12):
        golden.assert_matches(maps[block - 1], run["features"][f"block{block}"])


@pytest.mark.parametrize("run", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["320x416", "800x832"])
@torch.no_grad()
def test_dense_backbone_with_its_dilations(run):
    authors = golden.load("dinat_mini_coco_backbone")
    official = golden.official_state_dict(authors)
    norms = [[official[f"norm{i}.{leaf}"] for leaf in ("weight", "bias")] for i in range(4)]
    for key, shape in (("norm.weight", [512]), ("norm.bias", [512])):  # a backbone has none
        official[key] = golden.fill(key, shape)
    model = from_authors(
        "dinat_mini", nat.checkpoint_filter_fn, official, num_classes=0,
        dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)))
    run = authors["runs"][run]
    maps = model.forward_intermediates(images(run), intermediates_only=True)
    assert_stages_match(maps, run["features"], norms)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["dinat_large_21k", "dinat_large_21k_11x11", "dinat_s_large_21k"])
def test_22k_models_have_its_classes(name):
    assert timm.create_model(name, device="meta").head.fc.out_features == 21841


def test_dilations_per_block():
    dilations = [block.attn.dilation for stage in timm.create_model("dinat_mini", device="meta").stages
                 for block in stage.blocks]
    assert dilations == [1, 8, 1, 1, 4, 1, 4, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1]
    dilations = [block.attn.dilation for block in timm.create_model("dinat_iso_small", device="meta").blocks]
    assert dilations == [1, 2] * 6


@pytest.mark.parametrize("dilations", [[[1, 8]], [[1, 1, 1], [1], [1], [1]], [[], [1], [1], [1]]])
def test_dilations_that_do_not_fit(dilations):
    with pytest.raises(ValueError, match="dilations"):
        timm.create_model("test_dinat", dilations=dilations)


def test_drop_path_grows_linearly_to_the_last_block():
    model = timm.create_model("test_dinat", drop_path_rate=0.7)
    rates = [getattr(block.drop_path1, "drop_prob", 0.) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_weights_of_7x7_in_a_model_of_11x11():
    small = timm.create_model("test_dinat", kernel_size=7)
    large = timm.create_model(
        "test_dinat", kernel_size=11, pretrained=True, pretrained_cfg_overlay=dict(state_dict=small.state_dict()))
    for name, table in small.state_dict().items():
        if name.endswith(".rpb"):
            expected = F.interpolate(table[None], size=(21, 21), mode="bicubic", align_corners=False)[0]
            torch.testing.assert_close(large.state_dict()[name], expected)
        else:
            torch.testing.assert_close(large.state_dict()[name], table)


def test_rpb_of_full_attention_on_another_grid():
    """A table that is linear in the offset is stretched over the offsets of a smaller map."""
    attn = isotropic.RelativePositionAttention(8, 2, grid_size=8)
    offset = torch.arange(-7., 8.)
    with torch.no_grad():
        attn.rpb.copy_(offset[:, None].expand(2, 15, 15))
    bias = isotropic._pairwise_bias(attn.rpb, 4, 6)[0].unflatten(2, (4, 6)).unflatten(1, (4, 6))  # head, query, key
    bias = bias.detach()
    assert torch.equal(bias[0, 1, 2], bias[1, 1, 2])
    torch.testing.assert_close(bias[:, 2, 3, 2], torch.zeros(2, 6), atol=1e-5, rtol=0)  # same row
    assert bias[0, 0, 0, 3, 0] > bias[0, 0, 0, 1, 0] > 0 > bias[0, 3, 0, 0, 0]
    same = isotropic._pairwise_bias(attn.rpb, 8, 8)[0].unflatten(2, (8, 8)).unflatten(1, (8, 8))
    assert same[1, 5, 3, 1, 7].item() == 1 - 5  # key minus query


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_file_of_the_authors_for_another_task(tmp_path, wrapper):
    """Official names, gray images and five classes."""
    authors = golden.load("dinat_iso_small")
    official = {key: x.float() for key, x in golden.official_state_dict(authors).items()}
    torch.save(official if wrapper is None else {wrapper: official}, tmp_path / "weights.pth")
    model = timm.create_model(
        "dinat_iso_small", pretrained=True, in_chans=1, num_classes=5,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
    assert torch.equal(model.blocks[3].attn.rpb, official["layers.3.attn.rpb"])
    torch.testing.assert_close(
        model.patch_embed.proj.weight, official["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert model.head.fc.out_features == 5


def test_norms_of_a_dense_backbone_are_left_out():
    model = timm.create_model("test_dinat")
    weights = model.state_dict()
    assert nat.checkpoint_filter_fn(weights | {"norm2.weight": torch.ones(64)}, model).keys() == weights.keys()


def assert_one_line(info, *parts: str) -> None:
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_dead_url_says_what_to_do():
    with pytest.raises(RuntimeError) as info:
        timm.create_model(
            "dinat_mini", pretrained=True, pretrained_cfg_overlay=dict(url="http://127.0.0.1:9/dinat_mini.pth"))
    assert_one_line(info, "http://127.0.0.1:9/dinat_mini.pth", "pretrained_cfg_overlay=dict(file=")


def test_file_of_another_model(tmp_path):
    torch.save(timm.create_model("test_dinat", depths=(2, 2, 3, 2)).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError) as info:
        timm.create_model(
            "test_dinat", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
    assert_one_line(info, "another model", "weights.pth")


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_file_that_carries_code(tmp_path):
    weights, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    weights.write_bytes(pickle.dumps({"head.weight": Trap(str(sprung))}, protocol=2))
    with pytest.raises(RuntimeError) as info:
        timm.create_model("test_dinat", pretrained=True, pretrained_cfg_overlay=dict(file=str(weights)))
    assert_one_line(info, "weights.pth")
    assert not sprung.exists()
