"""The page of ``visionattn explain``: the pointer moves the query, for one model or two side by side."""
import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .looks import Look, halved
from .pages import png_address, write_page

__all__ = ["Explained", "write_explanation"]

_BUDGET = 6_500_000  # bytes of weights and pictures; a third more in the page
_SIDE = 640  # of pictures at most, in pixels; the page shows them smaller


class Explained(NamedTuple):
    """What is shown of one model.

    Attributes:
        name: Of the model.
        says: What the model says of the image; "" for nothing.
        picture: What the model sees, ``[height, width, 3]`` in [0, 1].
        looks: Where it looks.
        answer: What it finds in the image, drawn; None of a classifier.
    """

    name: str
    says: str
    picture: Tensor
    looks: Sequence[Look]
    answer: Image.Image | None = None


def write_explanation(path: Path, title: str, models: Sequence[Explained]) -> None:
    """Writes the page, of less than 10 MB: of large maps every second point, or larger cells, until they fit."""
    looks = [list(model.looks) for model in models]
    sizes = {(i, number): _bytes(look) for i, of_model in enumerate(looks) for number, look in enumerate(of_model)}
    seen = [_address(Image.fromarray((model.picture * 255).round().to(torch.uint8).numpy())) for model in models]
    answers = ["" if model.answer is None else _address(model.answer) for model in models]
    budget = _BUDGET - 3 * sum(map(len, seen + answers)) // 4
    while sum(sizes.values()) > budget:
        i, number = largest = max(sizes, key=sizes.__getitem__)
        look = looks[i][number]
        if min(look.weights.shape[1:3]) < 8 and min(look.weights.shape[3:]) < 8:
            break
        looks[i][number] = halved(look)
        sizes[largest] = _bytes(looks[i][number])
    data = [{
        "picture": address, "size": list(model.picture.shape[:2]), "looks": [_data(look) for look in of_model],
    } for model, address, of_model in zip(models, seen, looks, strict=True)]
    body = ""
    for number, (model, address) in enumerate(zip(models, answers, strict=True)):
        name = html.escape(model.name)
        answer = _ANSWER.format(name=name, address=address) if address else ""
        below, beside = (answer, "") if len(models) > 1 else ("", answer)
        body += _MODEL.format(number=number, name=name, says=html.escape(model.says), answer=below) + beside
    write_page(path, title, f'{_INTRODUCTION}<div class="models">{body}</div>', _SCRIPT, data, _STYLE)


def _address(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((_SIDE, _SIDE))
    return png_address(picture)


def _bytes(look: Look) -> int:
    heads, rows, columns = look.weights.shape[:3]
    if not rows:
        return 0
    high, wide = _crop(look.weights)[2]
    return (heads + (heads > 1)) * rows * columns * high * wide


def _data(look: Look) -> dict[str, Any]:
    """A look as the page reads it: weights of each query from 0 to 255, its largest being 255, of the part of the image
    that it sees."""
    heads, rows, columns, *grid = look.weights.shape
    data: dict[str, Any] = {
        "title": look.title, "why": look.why, "others": look.others, "side": look.side, "grid": grid,
        "rows": look.rows.tolist(), "columns": look.columns.tolist(), "heads": heads}
    if look.fixed is not None:
        fixed = _with_mean(look.fixed.flatten(1))
        data |= {"fixedName": look.fixed_name, "fixed": [_levels(one[None]) for one in fixed],
                 "fixedMost": fixed.max(dim=1).values.tolist(), "fixedSum": fixed.sum(dim=1).tolist()}
    if rows:
        first_row, first_column, (high, wide) = _crop(look.weights)
        weights = _with_mean(look.weights).flatten(1, 2)
        query = torch.arange(rows * columns)[:, None, None]
        row = (first_row[:, None] + torch.arange(high))[:, :, None]
        column = (first_column[:, None] + torch.arange(wide))[:, None]
        data |= {
            "crop": [high, wide], "first": _text(torch.stack([first_row, first_column], 1).to(torch.uint8)),
            "weights": [_levels(one[query, row, column].flatten(1)) for one in weights],
            "most": _text(weights.amax(dim=(2, 3))), "sum": _text(weights.sum(dim=(2, 3)))}
        if look.windows is not None:
            data["windows"] = _text(look.windows.flatten(1, 2))
    return data


def _with_mean(weights: Tensor) -> Tensor:
    """The mean of the heads, and the heads where there are several."""
    mean = weights.mean(dim=0, keepdim=True)
    return torch.cat([mean, weights]) if len(weights) > 1 else mean


def _crop(weights: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """First row and column of the keys that each query sees, and how many rows and columns hold those of any query."""
    most = weights.amax(dim=(-2, -1), keepdim=True)
    seen = (weights * 510 > most).any(dim=0).flatten(0, 1)  # half a level
    edges, sides = [], []
    for axis, length in ((2, seen.shape[1]), (1, seen.shape[2])):
        line = seen.any(dim=axis).to(torch.uint8)
        first, last = line.argmax(dim=1), length - 1 - line.flip(1).argmax(dim=1)
        side = int((last - first).max()) + 1 if line.any() else 1
        edges.append(first.clamp(max=length - side))
        sides.append(side)
    return edges[0], edges[1], (sides[0], sides[1])


def _levels(weights: Tensor) -> str:
    """Of weights ``[queries, keys]``."""
    most = weights.amax(dim=1, keepdim=True).clamp(min=1e-30)
    return _text((weights / most * 255).round().clamp(0, 255).to(torch.uint8))


def _text(values: Tensor) -> str:
    return base64.b64encode(np.ascontiguousarray(values.numpy()).tobytes()).decode()


_INTRODUCTION = """
<p>Move the pointer over the image: it chooses the query, in the blue frame, and orange shows what that attends to, the
strongest place brightest. Arrow keys move the query too.</p>
"""
_MODEL = """
<section class="model" id="model{number}">
<h2>{name}</h2><p>{says}</p>
<p class="choices"><label>Layer <select class="layer"></select></label>
<label>Heads <select class="head"></select></label>
<label>Query <select class="query"></select></label></p>
<canvas tabindex="0" aria-label="the image, and where {name} looks"></canvas>
<p class="status" aria-live="polite"></p>{answer}
</section>
"""
_ANSWER = """
<figure class="model">
<figcaption>What {name} finds</figcaption>
<img src="{address}" alt="what {name} finds">
</figure>
"""
_STYLE = """
  .models { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } .model { flex: 0 1 30rem; min-width: 0; }
  figure { margin: 1.1rem 0; } figure img { width: 100%; }
  canvas { width: 100%; image-rendering: pixelated; cursor: crosshair; } select { font: inherit; max-width: 100%; }
  .choices label { display: block; margin: 0.2rem 0; } .status { min-height: 3em; color: #555; }
"""
_SCRIPT = r"""
const at = {x: 0.5, y: 0.5};  // of the pointer, in shares of the image
const panels = [];
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer);
const percent = share => Number((100 * share).toPrecision(2)) + " %";

class Panel {
  constructor(model, section) {
    this.model = model;
    [this.height, this.width] = model.size;
    this.canvas = section.querySelector("canvas");
    this.scale = Math.max(1, Math.round(480 / Math.max(this.height, this.width)));
    this.canvas.width = this.width * this.scale;
    this.canvas.height = this.height * this.scale;
    this.status = section.querySelector(".status");
    [this.layer, this.head, this.query] = ["layer", "head", "query"].map(name => section.querySelector("." + name));
    model.looks.forEach((look, i) => this.layer.add(new Option(look.title + (look.why ? " (not shown)" : ""), i)));
    const first = model.looks.findIndex(look => !look.why);
    this.layer.value = Math.max(first, 0);
    this.layer.addEventListener("change", () => this.choose());
    for (const select of [this.head, this.query]) select.addEventListener("change", () => this.draw());
    for (const event of ["pointermove", "pointerdown"]) this.canvas.addEventListener(event, e => this.point(e));
    this.canvas.addEventListener("keydown", e => this.step(e));
    this.image = new Image();
    this.image.onload = () => this.draw();
    this.image.src = model.picture;
    this.choose();
  }
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    at.x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 0.9999);
    at.y = Math.min(Math.max((event.clientY - box.top) / box.height, 0), 0.9999);
    for (const panel of panels) panel.draw();
  }
  step(event) {
    const to = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!to || !this.look.rows.length) return;
    event.preventDefault();
    const [row, column] = this.nearest();
    const move = (lines, n) => lines[Math.min(Math.max(n, 0), lines.length - 1)];
    const [down, right] = [move(this.look.rows, row + to[0]), move(this.look.columns, column + to[1])];
    at.y = Math.min((down[0] + down[1]) / 2 / this.height, 0.9999);
    at.x = Math.min((right[0] + right[1]) / 2 / this.width, 0.9999);
    for (const panel of panels) panel.draw();
  }
  choose() {
    const look = this.look = this.model.looks[this.layer.value];
    const kept = this.head.value;
    this.head.replaceChildren();
    if (look.heads > 1) this.head.add(new Option("mean of all " + look.heads, 0));
    for (let i = 0; i < look.heads; i++) this.head.add(new Option("head " + (i + 1), look.heads > 1 ? i + 1 : 0));
    if ([...this.head.options].some(option => option.value === kept)) this.head.value = kept;
    this.query.replaceChildren();
    if (look.rows.length) this.query.add(new Option("the pointer's place", "point"));
    if (look.fixed) this.query.add(new Option(look.fixedName, "fixed"));
    this.head.disabled = look.heads < 2;
    this.query.disabled = this.query.length < 2;
    if (look.rows.length && !look.ready) {
      look.ready = true;
      look.weights = look.weights.map(bytes);
      look.first = bytes(look.first);
      look.most = floats(look.most);
      look.sum = floats(look.sum);
      if (look.windows) look.windows = floats(look.windows);
    }
    if (look.fixed && typeof look.fixed[0] === "string") look.fixed = look.fixed.map(bytes);
    this.draw();
  }
  nearest() {
    const index = (lines, place) => lines.reduce((best, line, i) => {
      const away = Math.abs((line[0] + line[1]) / 2 - place);
      return away < best[0] ? [away, i] : best;
    }, [Infinity, 0])[1];
    return [index(this.look.rows, at.y * this.height), index(this.look.columns, at.x * this.width)];
  }
  draw() {
    const context = this.canvas.getContext("2d"), look = this.look, scale = this.scale;
    context.drawImage(this.image, 0, 0, this.canvas.width, this.canvas.height);
    this.status.textContent = look.why ? "Nothing is drawn: " + look.why + "." : "";
    if (look.why) return;
    context.globalCompositeOperation = "saturation";  // to grey
    context.fillStyle = "#888";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "rgba(0, 0, 0, 0.3)";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const head = Number(this.head.value), cells = new ImageData(look.grid[1], look.grid[0]);
    const fixed = this.query.value === "fixed";
    const put = (row, column, level) => cells.data.set(
      [255, 140, 0, 200 * Math.pow(level / 255, 0.75)], 4 * (row * look.grid[1] + column));
    let most, sum, said = look.fixedName + ": ";
    if (fixed) {
      look.fixed[head].forEach((level, i) => put(Math.floor(i / look.grid[1]), i % look.grid[1], level));
      [most, sum] = [look.fixedMost[head], look.fixedSum[head]];
      this.overlay(context, cells);
    } else {
      const [row, column] = this.nearest(), query = row * look.columns.length + column;
      const [high, wide] = look.crop, count = look.rows.length * look.columns.length;
      for (let i = 0; i < high * wide; i++)
        put(look.first[2 * query] + Math.floor(i / wide), look.first[2 * query + 1] + i % wide,
            look.weights[head][query * high * wide + i]);
      [most, sum] = [look.most[head * count + query], look.sum[head * count + query]];
      this.overlay(context, cells);
      context.lineWidth = 2;
      if (look.windows) {
        const heads = head ? [head - 1] : [...Array(look.heads).keys()];
        for (const one of heads) {
          const [left, top, right, bottom] = look.windows.subarray(4 * (one * count + query)).map(x => x * scale);
          context.strokeStyle = `hsl(${(one * 67 + 100) % 360} 80% 70%)`;
          context.strokeRect(left, top, right - left, bottom - top);
        }
      }
      const [[top, bottom], [left, right]] = [look.rows[row], look.columns[column]];
      context.strokeStyle = "deepskyblue";
      context.strokeRect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
      said = `From (${Math.round((left + right) / 2)}, ${Math.round((top + bottom) / 2)}) of ${this.width} x ` +
        `${this.height} pixels: `;
    }
    const rest = look.others ? `, ${percent(sum)} in the image; the rest: ${look.others}` : "";
    this.status.textContent = look.title.startsWith("Grad-CAM") ? look.fixedName :
      said + percent(most) + " on the brightest place" + rest;
  }
  overlay(context, cells) {
    const small = document.createElement("canvas"), size = this.look.side * this.scale;
    [small.width, small.height] = [cells.width, cells.height];
    small.getContext("2d").putImageData(cells, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, cells.width * size, cells.height * size);
  }
}
data.forEach((model, i) => panels.push(new Panel(model, byId("model" + i))));
for (const panel of panels) panel.draw();
"""
