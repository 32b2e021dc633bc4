"""From how many tokens an efficient attention pays, and an index over tasks, as "CAB: Comprehensive Attention
Benchmarking on Long Sequence Modeling" (ICML 2023) defines them."""
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["LEAST_R2", "Efficiency", "beats_from", "compositional_index", "efficiency_length", "measured_efficiency"]

LEAST_R2 = 0.95  # below which a fit does not tell where the curves cross
_LEAST_GROWTH = 0.2  # share of the quadratic term at the largest length below which growth is not quadratic
_LEAST_LENGTHS = 4  # a quadratic goes through any three points

Points = Mapping[int, float]  # what is measured, by tokens


class Efficiency(NamedTuple):
    """The efficiency length of an attention, and the two fits that it comes from.

    Attributes:
        length: Tokens from which on the efficient attention is cheaper; 0 where it always is, infinite where it never
            is, NaN where the measurements do not say.
        summary: The same in words, for tables: ``"1877"``, ``"< 64"``, ``"> 4096 (extrapolated: 6000)"``, ...
        quadratic: Of full attention, coefficients of ``N ** 2``, ``N`` and 1.
        linear: Of the efficient one, coefficients of ``N`` and 1.
        r2_full: R^2 of the quadratic.
        r2_efficient: R^2 of the line.
    """

    length: float
    summary: str
    quadratic: tuple[float, ...]
    linear: tuple[float, ...]
    r2_full: float
    r2_efficient: float


def efficiency_length(full: Points, efficient: Points, skip_first: int = 0) -> Efficiency:
    """The larger root of full attention's least-squares quadratic minus the efficient one's line.

    Where there is no real root, one is always cheaper, which the largest length tells. Where the quadratic term is a
    fifth of full attention or less at the largest length, its growth is not quadratic in the measured range. Where a
    fit has an R^2 below 0.95 (as costs of ``N log N`` or ``N ** 1.5`` have), the crossing is :func:`beats_from`'s
    instead, that of the measurements.

    Args:
        full: Time or memory of full attention by tokens, 4 lengths at least.
        efficient: That of the efficient one, at some of these lengths.
        skip_first: Shortest lengths that the line leaves out: 1 for time, because of what a start costs, 0 for memory.

    Raises:
        ValueError: Too few lengths, a length at which full attention was not measured, or a figure that is not
            positive.
    """
    shared = sorted(efficient)
    if len(full) < _LEAST_LENGTHS or len(shared) < 2 + skip_first:
        raise ValueError(f"an efficiency length needs {_LEAST_LENGTHS} lengths of full attention and {2 + skip_first} "
                         f"of the other, got {len(full)} and {len(shared)}")
    if missing := [n for n in shared if n not in full]:
        raise ValueError(f"full attention was not measured at {missing[0]} tokens")
    if not min(*full.values(), *efficient.values()) > 0:
        raise ValueError("times and memory must be positive")
    quadratic, r2_full = _fit(full, sorted(full), 2)
    linear, r2_efficient = _fit(efficient, shared[skip_first:], 1)
    length, summary = _crossing(full, efficient, quadratic, linear, min(r2_full, r2_efficient))
    return Efficiency(length, summary, quadratic, linear, r2_full, r2_efficient)


def measured_efficiency(full: Points, other: Points, skip_first: int) -> Efficiency | None:
    """:func:`efficiency_length` by the lengths at which both were measured; None where these are too few to tell."""
    shared = {tokens: value for tokens, value in other.items() if tokens in full}
    if len(full) < _LEAST_LENGTHS or len(shared) < 3:
        return None
    return efficiency_length(full, shared, skip_first)


def beats_from(ours: Points, full: Points) -> float | None:
    """The tokens from which ours takes less up to the last measurement, 0 for all; None for none.

    Logarithms of the two are linear in that of the tokens between the measurements.
    """
    gains = {n: math.log(full[n] / ours[n]) for n in sorted(ours.keys() & full.keys())}
    slower = [n for n, gain in gains.items() if gain <= 0]
    if not slower:
        return 0.
    after = [n for n in gains if n > slower[-1]]
    if not after:
        return None
    low, high = slower[-1], after[0]
    return low * (high / low) ** (gains[low] / (gains[low] - gains[high]))


def compositional_index(
        scores: Sequence[float],
        mu: Sequence[float],
        sigma: Sequence[float],
        higher_is_better: Sequence[bool],
        tasks: Sequence[Sequence[int]],
) -> float:
    """The mean over tasks of the mean z-score of a task's metrics, for one attention.

    Args:
        scores: Of each metric.
        mu: Its mean over all attentions that are compared.
        sigma: Its standard deviation over them.
        higher_is_better: Its direction.
        tasks: The numbers of each task's metrics.

    Raises:
        ValueError: A deviation of zero, lists of different lengths, or a task without metrics.
    """
    if not all(tasks):
        raise ValueError("a task has no metric")
    z = []
    for score, mean, deviation, higher in zip(scores, mu, sigma, higher_is_better, strict=True):
        if not deviation > 0:
            raise ValueError(f"a metric's standard deviation must be positive, got {deviation}")
        z.append((score - mean) / deviation * (1 if higher else -1))
    return float(np.mean([np.mean([z[metric] for metric in task]) for task in tasks]))


def _fit(points: Points, lengths: Sequence[int], degree: int) -> tuple[tuple[float, ...], float]:
    """Coefficients of the least-squares polynomial, highest power first, and R^2."""
    x, y = np.array(lengths, dtype=float), np.array([points[n] for n in lengths], dtype=float)
    coefficients = np.polyfit(x, y, degree)
    residual, total = np.sum((y - np.polyval(coefficients, x)) ** 2), np.sum((y - y.mean()) ** 2)
    # Measurements that are all the same are fitted exactly.
    r2 = 1 - residual / total if total > (1e-12 * np.abs(y).max()) ** 2 else 1.
    return tuple(map(float, coefficients)), float(r2)


def _crossing(
        full: Points, efficient: Points, quadratic: Sequence[float], linear: Sequence[float], r2: float,
) -> tuple[float, str]:
    """The efficiency length and its summary."""
    least, most = min(efficient), max(efficient)
    a, b, c = quadratic[0], quadratic[1] - linear[0], quadratic[2] - linear[1]
    cheaper = full[most] > efficient[most]
    if r2 < LEAST_R2:
        found = beats_from(efficient, full)
        if found is None:
            return math.inf, f"> {most} (measured)"
        return found, f"< {least} (measured)" if found == 0 else f"{found:.0f} (measured)"
    if a * max(full) ** 2 <= _LEAST_GROWTH * abs(full[max(full)]):
        return math.nan, f"{'cheaper' if cheaper else 'dearer'}, full is not quadratic"
    root = b * b - 4 * a * c
    if root < 0:
        return (0., "fits do not cross, cheaper") if cheaper else (math.inf, "fits do not cross, dearer")
    # The larger root, without the difference of two close numbers.
    s = math.sqrt(root)
    length = (s - b) / (2 * a) if b <= 0 else -2 * c / (b + s)
    if length < least:
        return length, f"< {least}"
    return length, f"> {most} (extrapolated: {length:.0f})" if length > most else f"{length:.0f}"
