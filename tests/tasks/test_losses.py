"""Losses of segmentation against loops over pixels."""
import math

import pytest
import torch

from visionattn.tasks.losses import SegmentationLoss, dice_loss, ohem_loss, pixel_loss

CLASSES = 4


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, CLASSES, 5, 7, generator=generator)
    labels = torch.randint(3, (2, 5, 7), generator=generator)  # class 3 does not occur
    labels[0, :2] = 255
    return logits, labels


def pixels(logits, labels):
    """``(probabilities of the classes, label)`` of every pixel that counts."""
    return [(logits[b, :, y, x].softmax(0).tolist(), int(labels[b, y, x]))
            for b, y, x in (labels != 255).nonzero().tolist()]


def test_cross_entropy(batch):
    losses = [-math.log(p[label]) for p, label in pixels(*batch)]
    assert pixel_loss(*batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_class_weights(batch):
    weights = [0.2, 1.0, 3.0, 0.5]
    found = [(weights[label], -math.log(p[label])) for p, label in pixels(*batch)]
    expected = sum(weight * loss for weight, loss in found) / sum(weight for weight, _ in found)
    loss = SegmentationLoss({"cross_entropy": 2.0}, class_weights=weights)
    assert loss(*batch).item() == pytest.approx(2 * expected, rel=1e-5)
    assert loss.double()(*batch).item() == pytest.approx(2 * expected, rel=1e-5)  # computes in float32 all the same
    assert SegmentationLoss({"cross_entropy": 1.0}, class_weights=[2, 2, 2, 2])(*batch) == pixel_loss(*batch)
    rare = torch.full_like(batch[1], 255)
    rare[0, 0, 0] = 0  # one pixel, of the smallest weight
    assert loss(batch[0], rare).item() == pytest.approx(2 * pixel_loss(batch[0], rare).item(), rel=1e-5)
    assert loss(batch[0], torch.full_like(rare, 255)).item() == 0


def test_dice(batch):
    found = pixels(*batch)
    scores = []
    for c in range(3):
        common = sum(p[c] for p, label in found if label == c)
        scores.append(2 * common / (sum(p[c] for p, _ in found) + sum(label == c for _, label in found)))
    assert dice_loss(*batch).item() == pytest.approx(1 - sum(scores) / 3, rel=1e-5)


def test_dice_of_a_perfect_prediction():
    labels = torch.arange(CLASSES).repeat(3).view(1, 3, CLASSES)
    logits = 50 * torch.nn.functional.one_hot(labels).movedim(-1, 1).float()
    assert dice_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)


def test_ohem_counts_pixels_below_the_threshold(batch):
    losses = [-math.log(p[label]) for p, label in pixels(*batch) if p[label] < 0.7]
    assert len(losses) > batch[1].numel() / 16
    assert ohem_loss(*batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_ohem_keeps_a_sixteenth_of_easy_pixels(batch):
    logits, labels = batch
    right = torch.nn.functional.one_hot(labels.where(labels != 255, 0), CLASSES).movedim(-1, 1)
    logits = logits / 10 + 10 * right
    losses = sorted((-math.log(p[label]) for p, label in pixels(logits, labels)), reverse=True)
    assert losses[0] < -math.log(0.7)
    kept = losses[:labels.numel() // 16]
    assert ohem_loss(logits, labels).item() == pytest.approx(sum(kept) / len(kept), rel=1e-3)


def test_weighted_sum(batch):
    loss = SegmentationLoss({"cross_entropy": 1.0, "dice": 3.0, "ohem": 0.5})
    expected = pixel_loss(*batch) + 3 * dice_loss(*batch) + 0.5 * ohem_loss(*batch)
    torch.testing.assert_close(loss(*batch), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "dice", "ohem"])
def test_ignored_pixels_have_no_gradient(name, batch):
    logits, labels = batch[0].requires_grad_(), batch[1]
    loss = SegmentationLoss({name: 1.0})
    loss(logits, labels).backward()
    ignored = (labels == 255)[:, None].expand_as(logits)
    assert logits.grad[ignored].count_nonzero() == 0
    assert logits.grad[~ignored].count_nonzero() > 0
    nothing = loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad.isfinite().all()


def test_another_ignore_index(batch):
    logits, labels = batch
    other = labels.where(labels != 255, 77)
    loss = {"cross_entropy": 1.0, "dice": 1.0, "ohem": 1.0}
    torch.testing.assert_close(SegmentationLoss(loss, 77)(logits, other), SegmentationLoss(loss)(logits, labels))


@pytest.mark.parametrize("weights", [{}, {"focal": 1.0}])
def test_unknown_losses(weights):
    with pytest.raises(ValueError, match="cross_entropy, dice, ohem"):
        SegmentationLoss(weights)


@pytest.mark.parametrize(("weights", "class_weights", "message"), [
    ({"dice": 1.0}, [1.0, 2.0], "cross_entropy, losses are dice"),
    ({"cross_entropy": 1.0}, [1.0, 0.0], "must be positive"),
    ({"cross_entropy": 1.0}, [1.0, math.nan], "must be positive"),
])
def test_unfit_class_weights(weights, class_weights, message):
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(weights, class_weights=class_weights)
