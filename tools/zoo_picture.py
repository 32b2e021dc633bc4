"""The picture of accuracy against cost: an SVG whose points are models, and whose lines are families."""
import math
from html import escape
from itertools import groupby
from typing import NamedTuple

from zoo_facts import Cell, Facts

__all__ = ["draw"]

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 20, 50
SIZE = 13  # of the labels, in pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#e07b00", "#8c564b", "#c2379b", "#5f6b7a", "#7a8500", "#0b8ea0")


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        return max(0., min(self.right, other.right) - max(self.left, other.left)) * max(
            0., min(self.bottom, other.bottom) - max(self.top, other.top))


def draw(facts: list[Facts]) -> str:
    """Published top-1 against GMACs at the models' own image sizes, labelled by family."""
    shown = [of for of in facts if of.top1 and of.gmacs]
    x, y = [_value(of.gmacs) for of in shown], [_value(of.top1) for of in shown]
    low, high = math.log10(min(x) * .85), math.log10(max(x) * 1.35)
    worst, best = math.log(100 - min(y) + 2), math.log(100 - max(y) - 1)  # of the errors, which spreads the best

    def column(gmacs: float) -> float:
        return LEFT + (math.log10(gmacs) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def line(percent: float) -> float:
        return TOP + (math.log(100 - percent) - best) / (worst - best) * (HEIGHT - TOP - BOTTOM)

    def place(of: Facts) -> tuple[float, float]:
        return column(_value(of.gmacs)), line(_value(of.top1))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="{SIZE}" role="img" aria-label="Published top-1 against GMACs">',
        '<rect width="100%" height="100%" fill="#fff"/>']
    for percent in (*range(50, 80, 5), *range(80, 100, 2)):
        if TOP <= (at := line(percent)) <= HEIGHT - BOTTOM:
            lines += [f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>',
                      f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#555">{percent}</text>']
    for gmacs in (value * 10 ** power for power in range(-2, 3) for value in (1, 2, 5)):
        if LEFT <= (at := column(gmacs)) <= WIDTH - RIGHT:
            lines += [f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#f0f0f0"/>',
                      f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555">{gmacs:g}'
                      '</text>']
    lines += [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">GMACs of one image '
              '(counted)</text>',
              f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
              'top-1 on ImageNet-1k, % (published)</text>']
    families = {family: list(of) for family, of in groupby(shown, key=lambda of: of.family.name)}
    taken = [_Box(px - 5, py - 5, px + 5, py + 5) for px, py in map(place, shown)]
    for number, (family, members) in enumerate(families.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = sorted(map(place, members))
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-opacity=".45" stroke-width="1.5"/>')
        for of in members:
            px, py = place(of)
            plain = of.image == (224, 224) and of.tag != "in22k_ft_in1k"
            lines.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{colour if plain else "#fff"}" stroke="{colour}" '
                f'stroke-width="1.5"><title>{escape(of.name)}: {_value(of.top1):g} %, {_value(of.gmacs):.3g} GMACs'
                "</title></circle>")
        label = _label(family, points, taken)
        taken.append(label)
        lines.append(f'<text x="{label.left:.1f}" y="{label.bottom - 4:.1f}" fill="{colour}" stroke="#fff" '
                     f'stroke-width="3" paint-order="stroke">{escape(family)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _value(cell: Cell | None) -> float:
    if cell is None:
        raise ValueError("only models with both figures are drawn")
    return cell.value


def _label(text: str, points: list[tuple[float, float]], taken: list[_Box]) -> _Box:
    """Where the text, beside one of the points, covers least of what is taken."""
    width, height = .58 * SIZE * len(text), SIZE + 4
    inside = _Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    choices = []
    for far in (8, 18, 30):
        for px, py in points:
            for dx, dy in ((far, -height / 2), (-far - width, -height / 2), (-width / 2, -height - far + 2),
                           (-width / 2, far - 2), (far * .7, -height - far * .3), (far * .7, far * .3),
                           (-width - far * .7, -height - far * .3), (-width - far * .7, far * .3)):
                box = _Box(px + dx, py + dy, px + dx + width, py + dy + height)
                outside = width * height - box.overlap(inside)
                choices.append((round(sum(map(box.overlap, taken)) + 10 * outside + 2 * far, 3), len(choices), box))
    return min(choices)[2]
