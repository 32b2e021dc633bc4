"""Grad-CAM of segmenters and detectors, on each map of their backbone, and what they find, in words.

Of a segmenter it is Seg-Grad-CAM of all pixels of a class: "Towards Interpretable Semantic Segmentation via
Gradient-weighted Class Activation Mapping" (AAAI 2020, arXiv 2002.11434).
"""
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import pad

from ..dense import DenseBackbone, dense_backbone_of
from ..runtime.results import Detections, Result, Segmentation
from .gradcam import TITLE, captum_grad_cam, look_of_cam
from .looks import Look

__all__ = ["find_dense_grad_cams", "says_of"]

_LISTED = 6  # of what was found


def find_dense_grad_cams(task: Any, image: Tensor, x: Tensor, answer: Result, label: int | None) -> list[Look]:
    """Where each of the backbone's maps speaks for a class, the finest first; one look that says why if none is shown.

    Of a segmenter it is for the sum of the class's logits over the pixels that it gives the class to, of a detector for
    the score of its best object of the class.

    Args:
        task: A :class:`visionattn.tasks.SegmentationTask` or :class:`visionattn.tasks.DetectionTask` in eval mode.
        image: ``[C, H, W]`` as the task takes it.
        x: The same as its backbone is given it, ``[1, C, height, width]``.
        answer: What the task finds in it.
        label: The class, among the names; None for the one with most pixels that is not the background, or the best
            object's.
    """
    if label is None:
        label = _found_most(answer)
    if label is None:
        found = ", but for the background" if isinstance(answer, Segmentation) else ""
        return [Look(TITLE, why=f"nothing was found{found}")]
    name = answer.names[label]
    if isinstance(answer, Segmentation):
        said, score = f"the pixels of {name}", _score_of_pixels(task, label, name)
    else:
        said, score = f"the best {name}", _score_of_object(task, label, name)
    body, looks = cast(DenseBackbone, dense_backbone_of(task.model)), []
    for level, (index, step) in enumerate(zip(body.out_indices, body.reductions, strict=True)):
        probe = _Probe(body, level, score)
        try:
            cam = captum_grad_cam(probe, probe.seen, image[None].to(x.device), None)
        except (ValueError, ModuleNotFoundError) as error:
            return [Look(TITLE, why=str(error))]
        rows, columns = (-(-side // step) for side in x.shape[2:])  # of the padded image
        cam = pad(cam, (0, columns - cam.shape[2], 0, rows - cam.shape[1]))
        title = f"{TITLE} of {body.model.feature_info[index]['module']}"
        looks.append(look_of_cam(cam, x.shape[2:], said, title))
    return looks


def says_of(answer: Result, task: Any) -> str:
    """What was found, in a sentence; and, where that is so, that it was not found in one look at the image.

    Args:
        answer: Of a segmenter or a detector.
        task: Its task.
    """
    if isinstance(answer, Detections):
        found = answer.above(answer.threshold)
        listed = [f"{answer.names[label - 1]} {score:.2f}" for label, score in zip(
            found.labels.tolist(), found.scores.tolist(), strict=True)]
        return f"It finds: {_listed(listed)} (scores from {answer.threshold:g} on)."
    assert isinstance(answer, Segmentation)
    counts = _counts(answer)
    said = f"It finds: {_listed([answer.names[label] for label in (-counts).argsort(kind='stable') if counts[label]])}."
    window, scales, flip = (task.args[key] for key in ("window", "test_scales", "test_flip"))
    ways = [f"windows of {window} pixels"] * (window is not None)
    ways += ["several copies"] * (scales not in (None, [1.0]) or flip)
    return said + (f" That is by {' and '.join(ways)}; below is one look at the whole image." if ways else "")


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return (", ".join(names[:_LISTED]) or "nothing") + (f" and {more} more" if more > 0 else "")


def _counts(answer: Segmentation) -> np.ndarray:
    """Pixels of each class."""
    return np.bincount(answer.labels.ravel(), minlength=len(answer.names))


def _found_most(answer: Result) -> int | None:
    """The class of most pixels but for the background's, or of the best object."""
    if isinstance(answer, Detections):
        return int(answer.labels[answer.scores.argmax()]) - 1 if len(answer) else None
    assert isinstance(answer, Segmentation)
    counts = _counts(answer)
    counts[[name.lower() == "background" for name in answer.names]] = 0
    return int(counts.argmax()) if counts.any() else None


def _score_of_pixels(task: Any, label: int, name: str) -> Callable[[Tensor], Tensor]:
    def score(images: Tensor) -> Tensor:
        logits = task(images)
        chosen = logits.argmax(dim=1) == label
        if not chosen.any():
            raise ValueError(f"no pixel is given to {name}")
        return (logits[:, label] * chosen).sum(dim=(1, 2))
    return score


def _score_of_object(task: Any, label: int, name: str) -> Callable[[Tensor], Tensor]:
    def score(images: Tensor) -> Tensor:
        found, = task.detect(list(images))
        scores = found["scores"][found["labels"] == label + 1]
        if not len(scores):
            raise ValueError(f"no {name} was found")
        return scores.max()[None]
    return score


class _Probe(nn.Module):
    """Gives a score of what a model finds, a map of whose backbone passes through the module ``seen``."""

    def __init__(self, body: DenseBackbone, level: int, score: Callable[[Tensor], Tensor]):
        super().__init__()
        self.body, self.level, self.score, self.seen = body, level, score, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        handle = self.body.register_forward_hook(lambda module, inputs, maps: [
            self.seen(x.clone()).clone() if level == self.level else x for level, x in enumerate(maps)])
        try:
            return self.score(images)
        finally:
            handle.remove()
