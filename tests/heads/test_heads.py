"""The segmentation heads against hand-written formulas, and their shapes on maps of all kinds."""
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from visionattn.heads import FCNHead, PyramidPooling, SegFormerHead, SemanticFPNHead, UPerNetHead

ODD = [(33, 47), (17, 24), (9, 12), (5, 6)]  # of an image whose sides 32 does not divide
CHANNELS = [4, 6, 8, 10]


def maps(sizes=ODD, channels=CHANNELS, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, *size, generator=generator) for width, size in zip(channels, sizes, strict=False)]


def make(kind, channels=CHANNELS, reductions=(4, 8, 16, 32), classes=3):
    torch.manual_seed(0)
    if kind == "upernet":
        return UPerNetHead(channels, classes, channels=8)
    if kind == "segformer":
        return SegFormerHead(channels, classes, channels=8)
    return SemanticFPNHead(channels, reductions, classes, channels=8, fpn_channels=16)


@pytest.mark.parametrize("kind", ["upernet", "semantic_fpn", "segformer"])
@pytest.mark.parametrize(("sizes", "reductions"), [
    (ODD, (4, 8, 16, 32)),
    ([(8, 8), (4, 4), (2, 2)], (16, 32, 64)),
    ([(7, 5), (4, 3)], (8, 16)),
    ([(9, 11)] * 3, (16, 16, 16)),
    ([(3, 4), (1, 1)], (8, 32)),
], ids=str)
def test_logits_have_the_size_of_the_finest_map(kind, sizes, reductions):
    channels = CHANNELS[:len(sizes)]
    head = make(kind, channels, reductions).train()
    logits = head(maps(sizes))
    assert logits.shape == (2, 3, *sizes[0])
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("kind", ["upernet", "semantic_fpn", "segformer"])
def test_every_map_is_used(kind):
    features = [x.requires_grad_() for x in maps()]
    make(kind).eval()(features).square().sum().backward()
    assert all(x.grad.count_nonzero() > 0 for x in features)


def test_pyramid_pooling_is_averages_over_cells():
    torch.manual_seed(0)
    height, width, channels, grids = 5, 7, 2, (1, 2, 3)
    pooling = PyramidPooling(channels, 3, grids).eval()
    randomise_norms(pooling)
    x = torch.randn(1, channels, height, width)
    parts = [x]
    for side, branch in zip(grids, pooling.branches, strict=True):
        cells = torch.empty(1, channels, side, side)
        for i in range(side):
            for j in range(side):  # cells overlap where the side does not divide
                rows = slice(i * height // side, math.ceil((i + 1) * height / side))
                columns = slice(j * width // side, math.ceil((j + 1) * width / side))
                cells[..., i, j] = x[..., rows, columns].mean(dim=(2, 3))
        mixed = torch.einsum("bchw,dc->bdhw", cells, branch.conv.weight[..., 0, 0])
        scale = branch.norm.weight / (branch.norm.running_var + branch.norm.eps).sqrt()
        mixed = (mixed - branch.norm.running_mean[:, None, None]) * scale[:, None, None]
        mixed = (mixed + branch.norm.bias[:, None, None]).clamp(min=0)
        parts.append(interpolate(mixed, size=(height, width), mode="bilinear"))
    expected = pooling.fusion(torch.cat(parts, dim=1))
    torch.testing.assert_close(pooling(x), expected)


def test_upernet_is_its_formula():
    """Laterals are added from the coarsest down, each sum smoothed, and all fused at the finest map."""
    head = make("upernet", CHANNELS[:3]).eval()
    randomise_norms(head)
    fine, middle, coarse = maps()[:3]

    def to(x, other):
        return interpolate(x, size=other.shape[-2:], mode="bilinear")

    top = head.pooling(coarse)
    between = head.lateral[1](middle) + to(top, middle)
    bottom = head.lateral[0](fine) + to(between, fine)
    levels = [head.smooth[0](bottom), to(head.smooth[1](between), fine), to(top, fine)]
    expected = head.classifier.conv(head.fusion(torch.cat(levels, dim=1)))
    torch.testing.assert_close(head([fine, middle, coarse]), expected)


@pytest.mark.parametrize(("reductions", "convolutions"), [
    ((4, 8, 16, 32), [1, 1, 2, 3]), ((8, 16, 32), [1, 1, 2]), ((16, 32, 64), [1, 1, 2]), ((4, 16), [1, 2])])
def test_semantic_fpn_has_a_convolution_for_each_doubling(reductions, convolutions):
    head = make("semantic_fpn", CHANNELS[:len(reductions)], reductions)
    assert [len(convs) for convs in head.scale_heads] == convolutions


def test_semantic_fpn_is_its_formula():
    head = make("semantic_fpn", CHANNELS[:3], (4, 8, 16)).eval()
    randomise_norms(head)
    features = maps([(12, 8), (6, 4), (3, 2)])
    levels = list(head.fpn(dict(zip("abc", features, strict=True))).values())

    def double(x):
        return interpolate(x, scale_factor=2, mode="bilinear")

    fine, middle, coarse = head.scale_heads
    total = fine[0](levels[0]) + double(middle[0](levels[1])) + double(coarse[1](double(coarse[0](levels[2]))))
    torch.testing.assert_close(head(features), head.classifier.conv(total))


def test_segformer_is_its_formula():
    """Of the maps at the size of the finest, side by side; the authors' order of them is the other way around."""
    head = make("segformer", CHANNELS[:3]).eval()
    randomise_norms(head)
    features = maps()[:3]
    wide = torch.cat([interpolate(linear(x), size=features[0].shape[-2:], mode="bilinear")
                      for linear, x in zip(head.linear, features, strict=True)], dim=1)
    weight = torch.cat([fusion.weight for fusion in head.fusion], dim=1)
    fused = head.norm(nn.functional.conv2d(wide, weight)).relu()
    torch.testing.assert_close(head(features), head.classifier.conv(fused))


def test_fcn_head():
    head = FCNHead(4, 3, channels=8).eval()
    x = torch.randn(2, 4, 5, 6)
    assert head(x).shape == (2, 3, 5, 6)
    torch.testing.assert_close(head(x), head.classifier.conv(head.conv.norm(head.conv.conv(x)).relu()))


@pytest.mark.parametrize("head", [
    UPerNetHead([64, 64], 200, channels=64), SemanticFPNHead([64, 64], [4, 8], 200, 64, 64), FCNHead(64, 200, 64)],
    ids=lambda head: type(head).__name__)
def test_initial_weights(head):
    last = head.classifier.conv
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert last.bias.count_nonzero() == 0
    blocks = [block for block in head.modules() if isinstance(block, nn.Sequential) and hasattr(block, "norm")]
    assert blocks
    for block in blocks:
        fan_out = block.conv.out_channels * block.conv.kernel_size[0] ** 2
        assert block.conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert block.conv.bias is None


def test_upernet_on_one_image():
    head = make("upernet")
    with pytest.raises(ValueError, match="two images or more"):
        head.train()(maps(batch=1))
    assert head.eval()(maps(batch=1)).shape == (1, 3, *ODD[0])


def randomise_norms(module):
    """Statistics and scales that show where a norm is left out."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
                tensor.normal_()
            layer.running_var.uniform_(0.5, 2)
