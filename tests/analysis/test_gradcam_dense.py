"""Grad-CAM of segmenters and detectors: by hand the same, and for what was found."""
import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.test_families import images
from visionattn.analysis.gradcam_dense import find_dense_grad_cams, says_of
from visionattn.dense import dense_backbone_of
from visionattn.runtime.results import Detections, Segmentation
from visionattn.tasks import DetectionTask, SegmentationTask

pytest.importorskip("captum")
NAMES = ["Background", "cat", "dog"]
PICTURE = Image.new("RGB", (8, 8))


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return SegmentationTask("test_dinat", num_classes=3, head="semantic_fpn", head_channels=16).eval()


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return DetectionTask("test_dinat", num_classes=2, detector="retinanet", strides=[16, 32], fpn_channels=16,
                         min_size=64, max_size=64, detector_args=dict(score_thresh=0.0, topk_candidates=20)).eval()


def segmentation(labels):
    return Segmentation(PICTURE, NAMES, "", np.array(labels, np.uint8))


def detections(*found):
    labels, scores = zip(*found, strict=True) if found else ((), ())
    return Detections(PICTURE, NAMES[1:], "", np.zeros((len(found), 4), np.float32), np.array(labels, np.int64),
                      np.array(scores, np.float32))


def by_hand(task, image, score):
    """Grad-CAM of the score for each map, which is given in place of what the backbone computes."""
    given = []

    def give(module, inputs, maps):
        given[:] = [x.detach().requires_grad_() for x in maps]
        return given

    handle = dense_backbone_of(task.model).register_forward_hook(give)
    score = score(image)
    handle.remove()
    cams = []
    for x, gradient in zip(given, torch.autograd.grad(score, given), strict=True):
        cam = (gradient.mean(dim=(2, 3), keepdim=True) * x).sum(dim=1, keepdim=True).relu().detach()
        cams.append(torch.nn.functional.interpolate(cam, size=(64, 64), mode="bilinear")[:, 0])
    return cams


def check(looks, cams, name):
    assert any(cam.any() for cam in cams)
    for look, cam in zip(looks, cams, strict=True):
        if cam.any():
            assert torch.allclose(look.fixed, cam, atol=1e-6 * float(cam.max()) + 1e-9)
            assert look.fixed_name == f"for {name}"
        else:
            assert look.why == f"nothing in this map speaks for {name}"


def test_a_segmenters_is_of_the_pixels_of_the_class(segmenter):
    image = images(1, 64, 64)[0]
    with torch.no_grad():
        x, labels = segmenter.model.normalised(image[None]), segmenter(image[None]).argmax(dim=1)
    label = int(labels.mode().values.mode().values)

    def score(image):
        return segmenter(image[None])[0, label][labels[0] == label].sum()

    answer = segmentation([[label]])
    looks = find_dense_grad_cams(segmenter, image, x, answer, label)
    assert [look.title for look in looks] == [f"Grad-CAM of stages.{stage}" for stage in range(4)]
    check(looks, by_hand(segmenter, image, score), f"the pixels of {NAMES[label]}")
    missing = next(label for label in range(3) if not (labels == label).any())
    look, = find_dense_grad_cams(segmenter, image, x, answer, missing)
    assert look.why == f"no pixel is given to {NAMES[missing]}"


def test_a_detectors_is_of_the_best_object(detector):
    image = images(1, 64, 64)[0]
    with torch.no_grad():
        x, found = detector.model.transform([image])[0].tensors, detector.detect([image])[0]
    label = int(found["labels"][0])
    cams = by_hand(detector, image, lambda image: detector.detect([image])[0]["scores"][0])
    looks = find_dense_grad_cams(detector, image, x, detections((label, 0.9)), None)
    assert [look.title for look in looks] == ["Grad-CAM of stages.2", "Grad-CAM of stages.3"]  # strides 16 and 32
    check(looks, cams, f"the best {NAMES[label]}")


def test_what_was_found_most(segmenter, detector):
    image, x = torch.rand(3, 64, 64), torch.rand(1, 3, 64, 64)
    for look in find_dense_grad_cams(segmenter, image, x, segmentation([[0, 0, 0, 2, 2, 1]]), None):
        assert "dog" in look.fixed_name + look.why
    look, = find_dense_grad_cams(segmenter, image, x, segmentation([[0, 0]]), None)
    assert look.why == "nothing was found, but for the background"
    look, = find_dense_grad_cams(detector, image, x, detections(), None)
    assert look.why == "nothing was found"


def test_what_is_said(segmenter, detector):
    assert says_of(segmentation([[1, 1, 2]]), segmenter) == "It finds: cat, dog."
    assert says_of(detections((2, 0.9), (1, 0.4)), detector) == "It finds: dog 0.90 (scores from 0.5 on)."
    assert says_of(detections(), detector) == "It finds: nothing (scores from 0.5 on)."
    windows = SegmentationTask("test_dinat", num_classes=3, head="semantic_fpn", head_channels=16, window=32,
                               test_flip=True)
    assert says_of(segmentation([[1]]), windows) == (
        "It finds: cat. That is by windows of 32 pixels and several copies; below is one look at the whole image.")
