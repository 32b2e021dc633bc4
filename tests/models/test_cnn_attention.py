"""ResNet and MobileNetV2 with attention: the networks without it are timm's; where layers stand."""
import csv
import importlib
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.models.test_families import images, make
from visionattn.layers import EfficientLocalAttention, LittleBitAttention, SubspaceAttention
from visionattn.models import cnn_attention

KINDS = {"ela": EfficientLocalAttention, "ulsam": SubspaceAttention, "lba": LittleBitAttention}
LAYERS = tuple(KINDS.values())


def layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


@pytest.mark.parametrize(("name", "count", "parameters"), [
    ("resnet50_ela", 16, 26_191_400), ("resnet50_ulsam", 16, 25_632_744), ("resnet50_lba", 2, 25_724_042),
    ("mobilenetv2_100_ela", 16, 3_554_600), ("mobilenetv2_100_ulsam", 16, 3_540_584),
    ("mobilenetv2_100_lba", 2, 3_507_194)])
def test_parameters(name, count, parameters):
    """The network's own and those of its layers, which are counted by their formulas."""
    network, _, attn = name.rpartition("_")
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    found = [module for module in model.modules() if isinstance(module, LAYERS)]
    assert [type(module) for module in found] == [KINDS[attn]] * count
    plain = sum(parameter.numel() for parameter in timm.create_model(network, device="meta").parameters())
    assert plain + sum(parameter.numel() for module in found for parameter in module.parameters()) == parameters


def timms(name):
    """A network of timm's with weights that no zero hides."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


@pytest.mark.parametrize("network", ["resnet50", "mobilenetv2_100"])
@torch.no_grad()
def test_timms_weights(network):
    """Give timm's logits with layers that start as nothing; with others the layers are left as they were drawn."""
    peer, x = timms(network), images(2)
    overlay = dict(state_dict=peer.state_dict(), num_classes=7)
    model = timm.create_model(
        f"{network}_lba", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7).eval()
    expected = peer(x)
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours = timm.create_model(f"{network}_ulsam", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    for key, value in ours.state_dict().items():
        if ".attn." not in key:
            assert torch.equal(value, model.state_dict()[key]), key


@torch.no_grad()
def test_weights_of_timms_network_with_the_layer():
    """As it is trained through timm's own hook."""
    peer = timm.create_model(
        "resnet26", block_args=dict(attn_layer=EfficientLocalAttention), num_classes=7).eval()
    torch.manual_seed(0)
    for parameter in peer.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    model = timm.create_model(
        "resnet50_ela", depths=(2, 2, 2, 2), attn_args={}, num_classes=7, pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=peer.state_dict(), num_classes=7)).eval()
    x = images(2)
    expected = peer(x)
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["test_resnet_ela", "test_mobilenetv2_ulsam"])
@torch.no_grad()
def test_positions(name):
    """A layer follows what is named; one that starts as nothing changes nothing at first, in training neither."""
    options = dict(attn="lba", attn_args={})
    bare = timm.create_model(name, **options, positions=())
    assert layers(bare) == []
    model = timm.create_model(name, **options, positions=["stages.1", "stages.0.blocks.0", "stages.3.blocks.0"])
    assert layers(model) == ["stages.0.blocks.0.attn_out", f"stages.1.blocks.{len(model.stages[1].blocks) - 1}.attn_out",
                             "stages.3.blocks.0.attn_out"]
    model.load_state_dict(bare.state_dict(), strict=False)
    assert torch.equal(model(images(2)), bare(images(2)))


def test_layers_after_blocks_learn():
    model = make("test_resnet_ela", attn="lba", positions=("stages.1", "stages.2"), num_classes=7).train()
    model(images(2)).square().sum().backward()
    assert len(layers(model)) == 2
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("options", "message"), [
    (dict(attn="se"), "attn must be one of ela, ulsam, lba, got 'se'"),
    (dict(positions=["stages.4"]), "positions must be 'branches', or a list of stages.0 to stages.3 and of their .* got 'stages.4'"),
    (dict(positions=["stages.0.blocks.1"]), "got 'stages.0.blocks.1'"),
    (dict(positions=["layer2"]), "got 'layer2'"),
    (dict(attn="ulsam", attn_args={"groups": 5}), r"groups \(5\) of ULSAM must be positive and divide its channels"),
])
def test_wrong_arguments_end_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        timm.create_model("test_resnet_ela", **options)
    assert "\n" not in str(caught.value)


def test_other_networks_weights_are_refused():
    for name, other in (("resnet50_lba", "resnet34"), ("mobilenetv2_100_lba", "mobilenetv2_050")):
        state_dict = timm.create_model(other).state_dict()
        with pytest.raises(RuntimeError, match="is a checkpoint of another model"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))


def test_what_this_zoo_saved_is_loaded_as_it_is():
    model = timm.create_model("test_resnet_ela")
    weights = model.state_dict()
    assert cnn_attention.checkpoint_filter_fn(weights, model) is weights


def test_the_tool_that_times_layers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    tool = importlib.import_module("benchmark_cnn_attention")
    monkeypatch.setattr(tool, "describe_machine", dict)
    out, threads = tmp_path / "times.csv", torch.get_num_threads()
    try:
        assert tool.main(["--networks", "test_resnet", "--image-size", "32", "--repeats", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    with out.open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["none", "SE", "ECA", "CBAM", "ELA", "ULSAM", "LBA", "LBA, 2 positions"]
    assert float(rows["none"]["over_plain"]) == 1
    assert all(float(row["ms_per_image"]) > 0 for row in rows.values())
    plain, few, every = (int(rows[layer]["parameters"]) for layer in ("none", "LBA, 2 positions", "LBA"))
    assert plain < few < every
