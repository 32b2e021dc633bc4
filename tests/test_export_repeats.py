"""Blocks that repeat are captured once, and the file is the same as of a capture of the whole."""
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from visionattn.export import export_onnx, graph
from visionattn.export.repeats import find_repeats


class Block(nn.Module):
    """A block whose kind is more than its layers."""

    def __init__(self, power=1, table=False):
        super().__init__()
        self.norm, self.linear, self.power = nn.LayerNorm(8), nn.Linear(8, 8), power
        self.register_buffer("table", torch.rand(8) if table else None, persistent=False)

    def forward(self, x, times=1):
        x = x + times * self.linear(self.norm(x)) ** self.power
        return x if self.table is None else x * self.table


class Net(nn.Module):
    """Blocks, of which some repeat others, between an embedding and a classifier."""

    def __init__(self, *blocks, looks_inside=False, numbers=(), maps=False, held=False):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(blocks), nn.Linear(8, 5)
        self.looks_inside, self.numbers, self.maps, self.num_classes = looks_inside, numbers, maps, 5
        self.held = list(blocks) if held else None  # and not called by their names
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        found = []
        for block in self.held or self.blocks:
            x = block(x, *self.numbers)
            found.append(x)
            if self.looks_inside:
                x = x + block.linear.bias
        return found if self.maps else self.head(x.mean(1))


def answers(path, images):
    return onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0]


def kinds(model):
    found = find_repeats(model.eval(), torch.randn(2, 3, 16, 16))
    return [[member.path for member in members] for members in found.kinds] if found else []


@pytest.mark.parametrize(("blocks", "expected"), [
    ([Block(), Block(), Block()], [["blocks.0", "blocks.1", "blocks.2"]]),
    ([Block(), Block(2), Block(), Block(2)], [["blocks.0", "blocks.2"], ["blocks.1", "blocks.3"]]),
    ([Block(table=True), Block(), Block(table=True)], [["blocks.0", "blocks.2"]]),
    ([Block(), Block(2)], []),
    ([Block()] * 2, []),  # one that is called twice
])
def test_kinds(blocks, expected):
    assert kinds(Net(*blocks)) == expected


def test_blocks_that_differ_in_their_masks_are_of_two_kinds():
    """Windows of the last stage span its map; one block shifts them all the same, the other does not."""
    model = timm.create_model("test_agent_swin", window_size=7, always_shift=True).eval()
    found = find_repeats(model, torch.randn(1, 3, 128, 128))
    paths = [[member.path for member in members] for members in found.kinds]
    assert ["stages.3.blocks.0.mlp", "stages.3.blocks.1.mlp"] in paths


def test_blocks_within_blocks_are_part_of_them():
    blocks = [nn.Sequential(Block(power), Block(power)) for power in (1, 2, 1, 2)]
    assert kinds(Net(*blocks)) == [["blocks.0", "blocks.2"], ["blocks.1", "blocks.3"]]


@pytest.mark.parametrize("net", [
    Net(Block(), Block(2), Block(), Block(2), Block()),
    Net(Block(table=True), Block(table=True)),
    Net(Block(), Block(), Block(), numbers=(3,)),
    Net(Block(), Block(), looks_inside=True),
    Net(Block(), Block(), held=True),
], ids=["two kinds", "buffers", "numbers", "looked into", "held"])
def test_the_file_is_that_of_the_whole(net, tmp_path, monkeypatch):
    export_onnx(net, tmp_path / "repeats.onnx")
    monkeypatch.setattr(graph, "find_repeats", lambda model, images: None)
    export_onnx(net, tmp_path / "whole.onnx")
    files = [tmp_path / "repeats.onnx", tmp_path / "whole.onnx"]
    images = torch.randn(3, 3, 16, 16)
    np.testing.assert_allclose(*(answers(file, images) for file in files), atol=1e-6)
    one, other = (onnx.load(file).graph for file in files)
    assert sorted(node.op_type for node in one.node) == sorted(node.op_type for node in other.node)
    assert {weight.name for weight in one.initializer if "linear" in weight.name} == {
        weight.name for weight in other.initializer if "linear" in weight.name}
    assert [value.name for value in one.input] == ["images"]
    assert [value.name for value in one.output] == ["logits"]


def test_answers_of_blocks_are_maps_of_the_file(tmp_path):
    net = Net(Block(), Block(), Block(2), maps=True).eval()
    net.num_classes = 0
    export_onnx(net, tmp_path / "maps.onnx")
    assert [value.name for value in onnx.load(tmp_path / "maps.onnx").graph.output] == ["map_0", "map_1", "map_2"]


@pytest.mark.slow
def test_a_deep_model_is_captured_in_its_kinds(tmp_path: Path, monkeypatch):
    seen = []
    capture = graph._captured
    monkeypatch.setattr(graph, "_captured", lambda model, *args, **options: (
        seen.append(model), capture(model, *args, **options))[1])
    model = timm.create_model("nat_small", embed_dim=24, depths=(1, 1, 4, 1))
    report = export_onnx(model, tmp_path / "model.onnx", (64, 64))
    assert [len(members) for members in seen[0].kinds] == [4]
    assert report.difference < 1e-5
