"""A backbone with its head; windows and scales against what they are the mean of."""
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch.nn.functional import interpolate

from tests.models.test_families import SMALL
from visionattn.dense import DenseBackbone
from visionattn.heads import Segmenter, multi_scale, sliding_window

FROM_STRIDE_4 = [  # what segmentation_models_pytorch takes; it passes no arguments that would make others small
    name for name in SMALL if name.startswith("test_")
    and timm.create_model(name, features_only=True, device="meta").feature_info.reduction() == [4, 8, 16, 32]]


def images(*size, batch=1):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return Segmenter(DenseBackbone("test_dinat", "segmentation"), 4, channels=8, auxiliary=True).eval()


@torch.no_grad()
def test_logits_cover_the_image(segmenter):
    x = images(45, 70)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = segmenter.backbone((x - mean[:, None, None]) / std[:, None, None])
    expected = interpolate(segmenter.head(features), size=(45, 70), mode="bilinear")
    torch.testing.assert_close(segmenter(x), expected)


@pytest.mark.parametrize(("head", "channels", "width", "auxiliary"), [
    ("upernet", None, 512, 256), ("upernet", 32, 32, 16), ("semantic_fpn", None, 128, 64),
    ("segformer", None, 256, 128)])
def test_widths(head, channels, width, auxiliary):
    with torch.device("meta"):
        made = Segmenter(DenseBackbone("test_dinat", "segmentation"), 4, head, channels, auxiliary=True)
    assert made.head.classifier.conv.in_channels == width
    assert made.auxiliary_head.classifier.conv.in_channels == auxiliary
    assert made.auxiliary_head.conv.conv.in_channels == made.backbone.channels[-2]
    if head == "semantic_fpn":
        assert made.head.fpn.layer_blocks[0][0].out_channels == 256


def test_unknown_head():
    with pytest.raises(ValueError, match="upernet, semantic_fpn, segformer or taskexpert"):
        Segmenter(DenseBackbone("test_dinat", "segmentation"), 4, "fcn")


@torch.no_grad()
@pytest.mark.parametrize("window", [70, 100])
def test_a_window_that_covers_the_image_is_the_whole(segmenter, window):
    x = images(45, 70, batch=2)
    assert torch.equal(sliding_window(segmenter, x, window, 30), segmenter(x))


@pytest.mark.parametrize(("size", "window", "stride"), [
    ((10, 7), 4, 3), ((11, 4), 4, 4), ((3, 9), 5, 2), ((8, 8), 4, 4)])
def test_windows_are_averaged_where_they_overlap(size, window, stride):
    x = images(*size)

    def model(part):  # tells windows apart
        return torch.cat([part, part.mean(dim=(2, 3), keepdim=True).expand_as(part)], dim=1)

    def starts(length):
        found = [0]
        while found[-1] + window < length:
            found.append(min(found[-1] + stride, length - window))
        return found

    total, count = torch.zeros(1, 6, *size), torch.zeros(size)
    for top in starts(size[0]):
        for left in starts(size[1]):
            total[..., top:top + window, left:left + window] += model(x[..., top:top + window, left:left + window])
            count[top:top + window, left:left + window] += 1
    assert count.min() >= 1
    torch.testing.assert_close(sliding_window(model, x, window, stride), total / count)


@torch.no_grad()
def test_scales_and_mirrors_are_averaged(segmenter):
    x, size = images(40, 60), (50, 64)
    parts = []
    for height, width in ((20, 30), (40, 60), (60, 90)):
        copy = interpolate(x, size=(height, width), mode="bilinear")
        for logits in (segmenter(copy), segmenter(copy.flip(3)).flip(3)):
            parts.append(interpolate(logits, size=size, mode="bilinear").softmax(dim=1))
    got = multi_scale(segmenter, x, size, scales=(0.5, 1.0, 1.5), flip=True)
    torch.testing.assert_close(got.softmax(dim=1), sum(parts) / 6)
    alone = multi_scale(segmenter, x, size)
    torch.testing.assert_close(alone, interpolate(segmenter(x), size=size, mode="bilinear"))


@pytest.mark.parametrize("decoder", ["UPerNet", "FPN"])
@pytest.mark.parametrize("name", FROM_STRIDE_4)
def test_other_libraries_heads_take_our_backbones(name, decoder):
    """segmentation_models_pytorch builds its encoders with ``timm.create_model(name, features_only=True)``."""
    torch.manual_seed(0)
    model = getattr(smp, decoder)(encoder_name=f"tu-{name}", encoder_weights=None, classes=3)
    logits = model(images(64, 96, batch=2))
    assert logits.shape == (2, 3, 64, 96)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
