"""The page of ``visionattn analyze``: a grid of layers and heads, in which a head is picked."""
import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .head_table import MEASURES, HeadRow, layers_of
from .pages import write_page

__all__ = ["write_head_page"]


def write_head_page(
        path: Path, title: str, says: str, rows: Sequence[HeadRow], offsets: Mapping[str, Sequence[Tensor | None]],
        pixels: Mapping[tuple[str, int], float], clusters: Tensor | None) -> None:
    """Writes the page.

    Args:
        path: HTML file.
        title: Its title.
        says: A line below it.
        rows: The heads.
        offsets: Mean attention of layers' heads by offset, by the name of the layer: a map ``[rows, columns]`` a head,
            or None of one whose map is not known.
        pixels: Pixels of the image that a step between offsets is, by layer and head.
        clusters: Mean pattern of each cluster ``[clusters, side, side]``.
    """
    layers = [{
        "name": name,
        "heads": [{
            "values": {measure: _number(getattr(row, measure)) for measure in MEASURES},
            "why": row.why,
            "map": None if values is None else _map(values),
            "pixels": pixels.get((name, row.head), 0),
        } for row, values in zip(of_layer, offsets[name], strict=True)],
    } for name, of_layer in layers_of(rows).items()]
    options = "".join(f'<option value="{measure}">{name}</option>' for measure, name in MEASURES.items())
    data = {"layers": layers, "measures": MEASURES,
            "clusters": [] if clusters is None else [_map(mean) for mean in clusters]}
    write_page(path, title, f"<p>{html.escape(says)}</p>{_BODY.replace('OPTIONS', options)}", _SCRIPT, data, _STYLE)


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.6g}")


def _map(values: Tensor) -> dict[str, Any]:
    """Values from 0, the least, to 255, the largest, and what these are."""
    least, largest = values.min().item(), values.max().item()
    scaled = ((values - least) / (largest - least) * 255).round() if largest > least else torch.zeros_like(values)
    return {"rows": values.shape[0], "columns": values.shape[1],
            "least": float(f"{least:.3g}"), "largest": float(f"{largest:.3g}"),
            "values": base64.b64encode(scaled.byte().numpy().tobytes()).decode()}


_STYLE = """
  .split { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
  .grid { overflow-x: auto; max-width: 100%; }
  .grid td { padding: 1px; } .grid th { border: 0; font-weight: normal; font-size: 0.8rem; padding: 0 0.4rem 0 0; }
  .grid button { width: 1.5rem; height: 1.2rem; border: 1px solid #ccc; padding: 0; cursor: pointer; }
  .grid button[aria-pressed=true] { outline: 3px solid #d22; }
  .grid button.unknown { background: repeating-linear-gradient(45deg, #fff 0 3px, #ddd 3px 6px); }
  .scale { display: inline-block; width: 8rem; height: 0.8rem; }
  .head { width: 20rem; max-width: 100%; min-height: 34rem; }
  canvas { image-rendering: pixelated; border: 1px solid #999; }
  #map { width: 18rem; max-width: 100%; }
  #clusters { display: flex; flex-wrap: wrap; gap: 1rem; } #clusters figure { margin: 0; }
  #clusters canvas { width: 10rem; height: 10rem; }
  #clusters figcaption { max-width: 9.5rem; font-size: 0.85rem; }
"""

_BODY = """<p><label>Colour: <select id="measure">OPTIONS</select></label>
<span id="low"></span> <span class="scale" id="scale"></span> <span id="high"></span></p>
<div class="split">
<div class="grid"><table id="grid"></table><p>A row a layer, a cell a head: point at one, or click to keep it.</p></div>
<div class="head"><h2 id="name"></h2>
<table id="numbers"></table><p id="why"></p>
<div id="drawn"><canvas id="map"></canvas><p id="reach"></p></div></div>
</div>
<div id="groups"><h2>Clusters: heads that look alike</h2>
<p>Mean patterns, the query in the middle: shares of attention at all offsets that a layer reaches, which fill the
picture.</p><div id="clusters"></div></div>"""

_SCRIPT = """
const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const groups = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"];
const mixed = t => {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
};
const colour = t => `rgb(${mixed(t).join()})`;
const short = value => value === null ? "not known" : Number.isInteger(value) ? String(value) : value.toPrecision(4);
const rounded = value => String(Number(value.toPrecision(3)));
let kept = null;

const draw = (canvas, map) => {
  canvas.width = map.columns;
  canvas.height = map.rows;
  const values = atob(map.values), context = canvas.getContext("2d");
  const image = context.createImageData(map.columns, map.rows);
  for (let i = 0; i < values.length; i++) {
    image.data.set([...mixed(Math.sqrt(values.charCodeAt(i) / 255)), 255], 4 * i);  // so that the faint can be seen
  }
  context.putImageData(image, 0, 0);
};

const show = (layer, number) => {
  const head = data.layers[layer].heads[number];
  byId("name").textContent = `${data.layers[layer].name}, head ${number}`;
  byId("numbers").replaceChildren(...Object.entries(data.measures).map(([key, name]) => {
    const row = document.createElement("tr");
    for (const text of [name, short(head.values[key])]) row.insertCell().textContent = text;
    return row;
  }));
  byId("why").textContent = head.why;
  byId("drawn").hidden = !head.map;
  if (head.map) {
    draw(byId("map"), head.map);
    const reach = [head.map.columns, head.map.rows].map(count => rounded((count - 1) / 2 * head.pixels));
    byId("reach").textContent = `Mean attention by offset: the query is in the middle, the edges are ${reach[0]} ` +
      `pixels to each side of it, ${reach[1]} above and below. Darkest is ${head.map.least}, brightest ` +
      `${head.map.largest}.`;
  }
};

const cells = [];
const keep = cell => {
  kept = cell;
  for (const other of cells) other.button.setAttribute("aria-pressed", other === cell);
  show(cell.layer, cell.number);
};
data.layers.forEach((layer, i) => {
  const row = byId("grid").insertRow(), name = document.createElement("th");
  name.textContent = layer.name;
  row.append(name);
  layer.heads.forEach((head, number) => {
    const button = document.createElement("button"), cell = {button, head, layer: i, number};
    button.type = "button";
    button.setAttribute("aria-label", `${layer.name}, head ${number}`);
    button.addEventListener("pointerenter", () => show(i, number));
    button.addEventListener("focus", () => show(i, number));
    button.addEventListener("click", () => keep(cell));
    row.insertCell().append(button);
    cells.push(cell);
  });
});
byId("grid").addEventListener("pointerleave", () => show(kept.layer, kept.number));

const paint = () => {
  const key = byId("measure").value, grouped = key === "cluster";
  const values = cells.map(cell => cell.head.values[key]).filter(value => value !== null);
  const low = Math.min(...values), high = Math.max(...values);
  byId("low").textContent = grouped || !values.length ? "" : short(low);
  byId("high").textContent = values.length ? grouped ? "" : short(high) : "not known of any head";
  byId("scale").style.background = grouped || !values.length ? "none" :
    `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(colour).join()})`;
  for (const {button, head, layer, number} of cells) {
    const value = head.values[key];
    button.classList.toggle("unknown", value === null);
    button.style.background = value === null ? "" : grouped ? groups[value % groups.length] :
      colour(high > low ? (value - low) / (high - low) : 0);
    button.title = `${data.layers[layer].name}, head ${number}: ${short(value)}`;
  }
};
byId("measure").addEventListener("change", paint);
paint();

byId("groups").hidden = !data.clusters.length;
data.clusters.forEach((map, number) => {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  const count = cells.filter(cell => cell.head.values.cluster === number).length;
  caption.textContent = `Cluster ${number}: ${count} head${count === 1 ? "" : "s"}, ${map.least} to ${map.largest}`;
  caption.style.borderLeft = `0.6rem solid ${groups[number % groups.length]}`;
  caption.style.paddingLeft = "0.4rem";
  draw(canvas, map);
  figure.append(canvas, caption);
  byId("clusters").append(figure);
});
keep(cells[0]);
"""
