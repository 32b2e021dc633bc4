"""The comparison of an exported file with eager PyTorch, on photographs and random images: answers and latency."""
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["IMAGES", "TOLERANCE", "Answers", "Check", "Run", "agreement", "apart", "blocks", "compare", "judge",
           "latencies", "onnx_runner", "photographs", "relative", "undecided"]

TOLERANCE = 1e-4  # largest difference from eager, as a share of the answers' scale
IMAGES = 3  # of a detector's check; of the others' checks the images of the second batch

Answers: TypeAlias = tuple[Tensor, ...]
Run: TypeAlias = Callable[[np.ndarray], Sequence[np.ndarray]]  # a file in its runtime: images to its outputs


class Check(NamedTuple):
    """How a model is run beside its file."""

    answer: Callable[[Tensor], Answers]  # eager PyTorch
    difference: Callable[[Answers, Answers], Tensor]  # of each image, as a share of the scale
    draw: Callable[..., Tensor]  # images, with torch.randn's arguments
    shapes: list[tuple[int, ...]]  # of the images of each run
    tolerance: float = TOLERANCE  # largest difference
    rounding: float = 1e-6  # by what part images change on which answers are tried for ties


def onnx_runner(path: str | Path) -> Run:
    """What onnxruntime on the CPU makes of images with a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def compare(check: Check, run: Run) -> tuple[float, int, int]:
    """Largest difference of ``run`` from eager, how many undecided images were redrawn, and the rows of answers."""
    generator = torch.Generator().manual_seed(0)
    worst, ties, rows = 0.0, 0, 0
    for shape in check.shapes:
        for _ in range(10):
            images = check.draw(*shape, generator=generator)
            with torch.inference_mode():
                expected = check.answer(images)
            actual = tuple(map(torch.from_numpy, run(images.numpy())))
            difference = check.difference(actual, expected)
            if difference.max() <= check.tolerance:
                break
            # Routing is discrete, and so is what a detector keeps: on a tie, rounding alone decides. Only images on
            # which eager's own answer jumps under a perturbation of rounding size are excused, and other images must
            # agree instead.
            torn = undecided(check, images, expected)
            if (difference > check.tolerance)[~torn].any():
                break
            ties += int(torn.sum())
        worst = max(worst, difference.max().item())
        rows += len(expected[0])
    return worst, ties, rows


def judge(difference: float, limit: float = TOLERANCE) -> None:
    """Raises a RuntimeError for a difference beyond the limit."""
    if difference == math.inf:
        raise RuntimeError("the exported file gives other objects than PyTorch, or no numbers; it was removed")
    if difference > limit:
        raise RuntimeError(f"the exported file differs from PyTorch by {difference:.1e} of the answers' scale (limit "
                           f"{limit:.0e}); it was removed")


def agreement(check: Check, run: Run) -> float:
    """The share of images, or of their pixels, to which ``run`` gives the class that eager gives them."""
    generator = torch.Generator().manual_seed(0)
    same = []
    for shape in check.shapes:
        images = check.draw(*shape, generator=generator)
        with torch.inference_mode():
            expected = check.answer(images)[0]
        same.append((torch.from_numpy(run(images.numpy())[0]).argmax(dim=1) == expected.argmax(dim=1)).flatten())
    return torch.cat(same).float().mean().item()


def latencies(check: Check, run: Run, times: int = 5) -> tuple[float, float]:
    """Median milliseconds of ``run`` and of eager with the check's first images, in turns, after one of each."""
    images = check.draw(*check.shapes[0], generator=torch.Generator().manual_seed(0))
    inputs = images.numpy()
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(1 + times):
            for kept, work in zip(taken, (lambda: run(inputs), lambda: check.answer(images)), strict=True):
                start = time.perf_counter()
                work()
                kept.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])


def relative(actual: Answers, expected: Answers) -> Tensor:
    """Largest difference of each image's logits, or maps, in units of the batch's largest value of the kind."""
    differences = [(a - b).abs().flatten(1).amax(dim=1) / b.abs().max() for a, b in zip(actual, expected, strict=True)]
    return torch.stack(differences).amax(dim=0).nan_to_num(torch.inf, torch.inf)


def apart(actual: Answers, expected: Answers, side: int) -> Tensor:
    """Largest difference of one image's detections: boxes in units of ``side``, scores of 1, masks of 10; infinite if
    one has no partner of its label. Whatever the order: rounding decides on it where scores are equal.
    """
    (boxes, labels, scores, *masks), (known_boxes, known_labels, known_scores, *known_masks) = actual, expected
    if len(labels) != len(known_labels):
        return torch.tensor([torch.inf])
    if not len(labels):
        return torch.zeros(1)
    pairs = torch.maximum(torch.cdist(boxes, known_boxes, p=torch.inf) / side, (scores[:, None] - known_scores).abs())
    pairs = pairs.masked_fill(labels[:, None] != known_labels, torch.inf)
    nearest, partner = pairs.min(dim=1)
    differences = [nearest, pairs.amin(dim=0)]
    differences += [(a - b[partner]).abs().flatten() / 10 for a, b in zip(masks, known_masks, strict=True)]
    return torch.cat(differences).amax(dim=0, keepdim=True).nan_to_num(torch.inf, torch.inf)


def blocks(*shape: int, generator: torch.Generator) -> Tensor:
    """A random image ``[3, height, width]`` in [0, 1] of squares of all sizes, for detectors to find something in."""
    channels, *size = shape
    grids = [torch.rand(1, channels, side, side, generator=generator) for side in (2, 4, 8, 16, 32)]
    return torch.stack([interpolate(grid, size)[0] for grid in grids]).mean(dim=0)


def photographs(*shape: int, generator: torch.Generator) -> Tensor:
    """Images ``[batch, channels, height, width]`` in [0, 1]: places of the two photographs that scikit-learn has."""
    batch, channels, *size = shape
    images = []
    for _ in range(batch):
        photo = _samples()[int(torch.randint(2, (), generator=generator))]
        sides = [int(torch.randint(side // 2, side + 1, (), generator=generator)) for side in photo.shape[1:]]
        top, left = (int(torch.randint(side - part + 1, (), generator=generator))
                     for side, part in zip(photo.shape[1:], sides, strict=True))
        place = photo[:, top:top + sides[0], left:left + sides[1]]
        colours = [i % 3 for i in range(channels)]
        images.append(interpolate(place[None, colours], size, mode="bilinear", antialias=True)[0])
    return torch.stack(images).clamp(0, 1)


@cache
def _samples() -> list[Tensor]:
    """scikit-learn's photographs ``[3, height, width]`` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(np.array(photo)).movedim(-1, 0) / 255 for photo in load_sample_images().images]


def undecided(check: Check, images: Tensor, expected: Answers, tries: int = 8) -> Tensor:
    """Whether each image's answers jump when the image changes by what rounding may do to it."""
    with torch.inference_mode():
        jumps = [check.difference(check.answer(images * (1 + check.rounding * torch.randn_like(images))), expected)
                 for _ in range(tries)]
    return torch.stack(jumps).amax(dim=0) > check.tolerance
