"""Pictures of a run: curves, confusion matrix, reliability, a sheet of images. What they show is handed over."""
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.ticker import MaxNLocator

__all__ = ["Curve", "Tile", "draw_confusion", "draw_curves", "draw_reliability", "draw_sheet"]

NAME = 24  # characters of a class that are shown
NUMBERED, NAMED = 20, 150  # classes up to which the cells of a confusion matrix have numbers, and every class its name
TICKS = 60  # names where there are more classes
ACROSS = 5  # images in a row of a sheet


class Tile(NamedTuple):
    """An image of a sheet.

    Attributes:
        image: ``[H, W, 3]``, uint8.
        text: Lines over it.
    """

    image: np.ndarray
    text: str


Curve = Sequence[tuple[float, float]]  # (epoch, value)


def draw_curves(
        path: Path, panels: Mapping[str, Mapping[str, Curve]], best: Mapping[str, float] | None = None,
        over: str = "epoch") -> bool:
    """Draws a panel for each of ``panels``: its curves by their names over the epochs.

    Args:
        path: The PNG file to write.
        panels: Curves by panel and name; empty ones are left out.
        best: The epoch to mark in a panel.
        over: What the curves are over, if not epochs.

    Returns:
        Whether there was anything to draw.
    """
    panels = {title: {name: curve for name, curve in curves.items() if curve} for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return False
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    named: set[str] = set()  # in a legend
    with _style([*panels, *names]):
        figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
        for axes, (title, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for name, curve in curves.items():
                few = len(curve) < 30
                axes.plot(*zip(*curve, strict=True), color=colours[name], marker="o" if few else None, markersize=3,
                          label=_shown(name, 40), linewidth=1.5)
            if best and title in best:
                axes.axvline(best[title], color="0.6", linewidth=1, linestyle="--", zorder=0)
            axes.set_title(_shown(title, 40), parse_math=False)
            axes.set_xlabel(over)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.grid(alpha=0.3)
            if len(curves) > 1 and not named.issuperset(curves):
                named.update(curves)
                for text in axes.legend(fontsize="small").get_texts():
                    text.set_parse_math(False)
        _save(figure, path)
    return True


def draw_confusion(path: Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Draws a confusion matrix: a row is the truth, its colours are shares of the row; empty rows are grey.

    Args:
        path: The PNG file to write.
        counts: ``[classes, classes]``, rows are the truth, columns what was predicted.
        names: Of the classes.
        title: A line over the matrix.
    """
    size = len(names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    step = 1 if size <= NAMED else -(-size // TICKS)
    ticks = range(0, size, step)
    with _style(names, f"{title} predicted true"):
        labels = [_shown(names[tick]) for tick in ticks]
        # Lengths in inches. A layout that matplotlib finds itself takes it seconds for many names.
        side = max(2.2, 0.5 * size) if size <= NUMBERED else max(10.0, 0.16 * size) if size <= NAMED else 12.0
        points = 9 if size <= NUMBERED else 6.5
        margin = 0.5 + 0.0098 * points * max(map(_width, labels))
        lines = textwrap.wrap(title, round(12 * side))
        width, height = margin + side + 1.0, margin + side + 0.2 + 0.2 * len(lines)
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        bar = figure.add_axes(((margin + side + 0.2) / width, margin / height, 0.15 / width, min(side, 4) / height))
        # The root shows what is rare, too.
        colours = matplotlib.colormaps["Blues"].with_extremes(bad="0.92")
        shown = axes.imshow(shares, cmap=colours, norm=PowerNorm(1.0 if size <= NUMBERED else 0.5, 0, 1),
                            interpolation="nearest")
        named: dict[str, Any] = dict(labels=labels, fontsize=points, parse_math=False)
        axes.set_xticks(ticks, rotation=90, **named)
        axes.set_yticks(ticks, **named)
        figure.text((margin + side / 2) / width, 0.12 / height, "predicted", ha="center")
        figure.text(0.12 / width, (margin + side / 2) / height, "true", va="center", rotation=90)
        axes.set_title("\n".join(lines), fontsize=10, parse_math=False)
        if size <= NUMBERED:
            _write_numbers(axes, counts, shares)
        figure.colorbar(shown, cax=bar, label="share of the row")
        _save(figure, path)


def draw_reliability(path: Path, bins: Mapping[str, np.ndarray], title: str) -> None:
    """Draws how often predictions are right against how sure they were.

    Args:
        path: The PNG file to write.
        bins: By name: ``[bins, 3]``, number of images, sum of their confidences, number that was right.
        title: A line over the picture.
    """
    with _style([title, *bins]):
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
        for number, (name, (count, confidence, right)) in enumerate((name, part.T) for name, part in bins.items()):
            filled = count > 0
            axes.plot(confidence[filled] / count[filled], right[filled] / count[filled], color=f"C{number}",
                      label=name, linewidth=1, zorder=2)
            axes.scatter(confidence[filled] / count[filled], right[filled] / count[filled], color=f"C{number}",
                         s=8 + 160 * count[filled] / count.sum(), alpha=0.7, zorder=3)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share that is right")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")
        _save(figure, path)


def draw_sheet(path: Path, tiles: Sequence[Tile], title: str) -> None:
    """Draws images in rows, each with its text; wide ones fewer in a row."""
    shape = float(np.median([tile.image.shape[1] / tile.image.shape[0] for tile in tiles]))
    shape = min(max(shape, 0.7), 4.0)
    across = min(len(tiles), max(1, round(ACROSS / max(1.0, shape))))
    down = -(-len(tiles) // across)
    # Lengths in inches.
    width = 2.3 * max(1.0, shape)
    text = 0.08 + 0.15 * max(tile.text.count("\n") + 1 for tile in tiles)
    high = text + width / shape + 0.06
    letters = int(15 * width)
    with _style([title, *(tile.text for tile in tiles)]):
        across_all, down_all = across * (width + 0.1) + 0.1, down * high + 0.4
        figure = Figure(figsize=(across_all, down_all))
        figure.text(0.5, 1 - 0.25 / down_all, _shown(title, letters * across), fontsize=10, ha="center",
                    parse_math=False)
        for number, tile in enumerate(tiles):
            row, column = divmod(number, across)
            left, bottom = 0.1 + column * (width + 0.1), down_all - 0.4 - (row + 1) * high + 0.06
            axes = figure.add_axes((left / across_all, bottom / down_all, width / across_all, width / shape / down_all))
            axes.set_axis_off()
            axes.set_anchor("N")
            axes.imshow(tile.image, interpolation="nearest")
            lines = "\n".join(_shown(line, letters) for line in tile.text.split("\n"))
            axes.set_title(lines, fontsize=8, parse_math=False, pad=3)
        _save(figure, path)


def _write_numbers(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    large = counts.max(initial=0) > 99_999  # pixels: shares in per cent are what can be read
    for (row, column), count in np.ndenumerate(counts):
        if count:
            share = shares[row, column]
            text = f"{100 * share:.3g}%" if large else f"{count:,}".replace(",", " ")
            axes.text(column, row, text, ha="center", va="center", fontsize=7,
                      color="white" if share > 0.6 else "black")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# Names are of any script and may hold what matplotlib takes for formulas.

@contextmanager
def _style(texts: Iterable[str], *more: str) -> Iterator[None]:
    """Matplotlib's own settings, whatever the user's are, with fonts that have the letters of ``texts``."""
    families = ["DejaVu Sans", *_families("".join(sorted(set("".join([*texts, *more])))))]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.family"] = families
        yield


def _shown(text: str, most: int = NAME) -> str:
    """``text`` as it can be drawn: shortened in the middle, and letters that no font has as their numbers."""
    lacking = {letter for letter in text if not letter.isprintable()} | (set(text) - _drawable(text))
    text = "".join(letter.encode("unicode_escape").decode() if letter in lacking else letter for letter in text)
    while _width(text) > most:
        middle = len(text) // 2
        text = f"{text[:middle - 1].rstrip('…')}…{text[middle + 1:].lstrip('…')}"
    return text


def _width(text: str) -> int:
    """Columns of a text: letters of the Far East take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


@lru_cache(maxsize=64)
def _families(letters: str) -> tuple[str, ...]:
    """Fonts of this machine that have what matplotlib's own lacks of ``letters``."""
    lacking = {letter for letter in letters if not letter.isascii()}
    found = []
    for font in [None, *sorted(fontManager.ttflist, key=lambda font: font.name)]:
        if not lacking:
            break
        name = font.name if font else "DejaVu Sans"
        if font and (name.startswith(("Last Resort", "DejaVu", "STIX", "cm")) or font.weight != 400
                     or font.style != "normal"):
            continue
        has = lacking & _letters(font.fname if font else _own_font())
        if font and has:
            found.append(name)
        lacking -= has
    return tuple(found)


def _drawable(text: str) -> set[str]:
    families = {"DejaVu Sans", *_families("".join(sorted(set(text))))}
    files = {font.fname for font in fontManager.ttflist if font.name in families and font.weight == 400
             and font.style == "normal"}
    return {letter for letter in text if letter.isascii() or any(letter in _letters(file) for file in files)}


def _own_font() -> str:
    return fontManager.findfont("DejaVu Sans")


@lru_cache(maxsize=1024)
def _letters(file: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, get_font(file).get_charmap()))
    except (OSError, RuntimeError):  # of a font that is broken
        return frozenset()
