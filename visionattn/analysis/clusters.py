"""Heads that look alike: their mean attention by offset, in few components, in groups."""
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["cluster_patterns", "cropped", "patterns_of"]

SIDE = 15  # of a pattern
COMPONENTS = 8
FAINT = 1e-6  # of the largest attention of a layer: less is nothing, as where a mask lets an exponential through


def cropped(offsets: Tensor) -> Tensor:
    """Mean attention of a layer's heads by offset ``[heads, rows, columns]``, without a rim of offsets of nothing.

    The query stays in the middle.
    """
    seen = offsets.amax(dim=0)
    seen = seen > FAINT * seen.max()
    reach = []
    for axis, length in ((1, seen.shape[0]), (0, seen.shape[1])):
        at = seen.any(dim=axis).nonzero()[:, 0] - length // 2
        reach.append(int(at.abs().max()) if len(at) else 0)
    (rows, columns), middle = reach, (seen.shape[0] // 2, seen.shape[1] // 2)
    return offsets[:, middle[0] - rows:middle[0] + rows + 1, middle[1] - columns:middle[1] + columns + 1]


def patterns_of(offsets: Tensor) -> Tensor:
    """Patterns of a layer's heads ``[heads, 15, 15]``, each with the sum 1: comparable whatever the layer's map.

    Args:
        offsets: Mean attention by offset ``[heads, rows, columns]``. All that the layer reaches becomes 15 x 15: a
            pattern is relative to that, not to the image.
    """
    found = interpolate(cropped(offsets)[None], (SIDE, SIDE), mode="area")[0]
    return found / found.sum(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def cluster_patterns(patterns: Tensor, number: int) -> tuple[list[int], Tensor]:
    """Groups of heads that look alike.

    Square roots of the patterns (their distances are Hellinger's, in which one sharp peak is not all) are brought to 8
    principal components and grouped by k-means.

    Args:
        patterns: ``[heads, side, side]``, each with the sum 1.
        number: How many groups at most: fewer where fewer patterns differ.

    Returns:
        The group of each head, the largest group being 0, and the mean pattern of each group.

    Raises:
        ValueError: There are no patterns, or no groups are asked for.
    """
    if not len(patterns) or number < 1:
        raise ValueError(f"{number} groups of {len(patterns)} patterns cannot be made: at least one of each is needed")
    rows = patterns.double().sqrt().flatten(1).numpy()
    few = PCA(min(COMPONENTS, *rows.shape), svd_solver="full").fit_transform(rows)
    number = min(number, len(np.unique(few.round(6), axis=0)))
    labels: Sequence[int] = KMeans(number, n_init=10, random_state=0).fit_predict(few).tolist()
    groups = sorted(set(labels), key=lambda group: (-list(labels).count(group), list(labels).index(group)))
    found = [groups.index(group) for group in labels]
    means = [patterns[[i for i, own in enumerate(found) if own == group]].mean(dim=0) for group in range(len(groups))]
    return found, torch.stack(means)
