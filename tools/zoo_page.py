"""The page of the zoo: a table to sort and filter and a scatter, which a script draws from the facts."""

__all__ = ["BODY", "SCRIPT", "STYLE"]

BODY = """
<p>Point at a number, or tap it, to see where it comes from. Top-1 on ImageNet-1k is what the authors published; all
else is counted or measured here: <b>ms</b> of one image in evaluation, <b>step</b> of training as a multiple of
swin_tiny's, <b>digits</b>: accuracy of a small model trained from scratch on scanned digits (in italics on the other
models of its family), <b>parity</b>: what the tests compare with the authors' code, <b>formats</b> that it was exported
to, of those tried, <b>recipes</b> of the family by task. A click on a family highlights it.</p>
<div class="bar">
  <label>find <input id="text" type="search" placeholder="name or family"></label>
  <label>family <select id="family"></select></label>
  <label>recipes for <select id="task"></select></label>
  <label>licence <select id="licence"></select></label>
  <label>parameters <select id="size"></select></label>
  <label>latency on <select id="machine"></select></label>
  <label><input id="tests" type="checkbox"> small models for tests</label>
</div>
<figure>
  <div class="bar"><label>cost <select id="cost"></select></label>
    <span class="key"><i class="dot"></i> 224 pixels, ImageNet-1k alone
      <i class="dot hollow"></i> other sizes, or ImageNet-22k first</span></div>
  <div id="chart"></div>
  <div id="legend"></div>
</figure>
<p id="found" aria-live="polite"></p>
<div id="scroll"><table id="models"><thead><tr></tr></thead><tbody></tbody></table></div>
<div id="tip" role="tooltip" hidden></div>
"""

STYLE = """
  body { max-width: none; margin: 1rem auto; }
  .bar { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin: .4rem 0; }
  label { white-space: nowrap; color: #555; font-size: .9rem; }
  select, input[type=search] { font: inherit; max-width: 19rem; padding: .1rem .2rem; }
  figure { margin: .6rem 0; border: 1px solid #ddd; border-radius: 6px; padding: .4rem .8rem .6rem; }
  #chart svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
  #chart text { font: 12px system-ui, sans-serif; fill: #555; }
  #chart circle { cursor: pointer; }
  .faded { opacity: .12; }
  #legend { display: flex; flex-wrap: wrap; gap: .1rem .35rem; }
  #legend button, .link { border: 0; background: none; font: inherit; font-size: .85rem; cursor: pointer; }
  #legend button { padding: .05rem .3rem; }
  #legend button[aria-pressed=true] { outline: 2px solid currentColor; border-radius: 4px; }
  .link { color: inherit; text-decoration: underline dotted; padding: 0; font-size: inherit; }
  .dot { display: inline-block; width: .6em; height: .6em; border-radius: 50%; background: #555;
    border: 1.5px solid #555; }
  .dot.hollow { background: #fff; } .key { font-size: .85rem; color: #555; }
  #scroll { overflow: auto; max-height: 85vh; border: 1px solid #ddd; border-radius: 6px; }
  #models { font-size: .85rem; width: 100%; border-collapse: separate; border-spacing: 0; }
  #models th { position: sticky; top: 0; background: #f6f6f6; z-index: 2; white-space: nowrap; cursor: pointer; }
  #models th:first-child, #models td:first-child { position: sticky; left: 0; background: #fff; z-index: 1; }
  #models th:first-child { background: #f6f6f6; z-index: 3; }
  #models td { border-bottom: 1px solid #eee; white-space: nowrap; padding: .15rem .4rem; }
  #models th { padding: .3rem .4rem; }
  #models .number { text-align: right; }
  #models .faint { color: #777; font-style: italic; }
  #models tr:hover td { background: #f2f7fc; } #models tr.picked td { background: #fff6dc; }
  th[aria-sort=ascending]::after { content: " \\25b2"; } th[aria-sort=descending]::after { content: " \\25bc"; }
  [data-tip] { cursor: help; }
  #tip { position: fixed; z-index: 9; max-width: min(26rem, 90vw); background: #222; color: #fff; padding: .4rem .6rem;
    border-radius: 5px; font-size: .85rem; line-height: 1.35; white-space: pre-line; pointer-events: none;
    overflow-wrap: anywhere; }
  @media (max-width: 600px) {
    body { padding: 0 .5rem; } figure { padding: .3rem; } select, input[type=search] { max-width: 60vw; }
    #models td:first-child, #models th:first-child { max-width: 9.5rem; overflow: hidden; text-overflow: ellipsis; }
    #models td:nth-child(2), #models th:nth-child(2) { display: none; }  /* the legend has the families */
  }
"""

SCRIPT = r"""
const NONE = "\u2014", SVG = "http://www.w3.org/2000/svg";
const digits = (value, count) => Number(value.toPrecision(count)).toLocaleString("en", {maximumFractionDigits: 4});
const where = cell => {
  const row = Object.entries(cell.row).map(([key, value]) => `${key} ${value}`).join(", ");
  return `${cell.note}\n${cell.file}: ${cell.column} of ${row}${cell.url ? `\n${cell.url}` : ""}`;
};
const latency = model => model.latencies.find(cell => cell.file + cell.note === byId("machine").value) || null;
const family = model => data.families[model.family];
const formats = model => family(model).exports.classification || [];
const tried = model => formats(model).length + (family(model).refused.classification || []).length;
const lines = lists => Object.entries(lists).map(([task, names]) => `${task}: ${names.join(", ")}`).join("\n");
const SHORT = {classification: "cls", detection: "det", segmentation: "seg", multitask: "multi"};
const WORDS = {model: "this model", family: "its family", part: "a part", none: "none"};
const ORDER = ["model", "family", "part", "none"];
const number = (head, of, show, whole = show) => ({
  head, number: true, value: model => of(model)?.value ?? null,
  text: model => of(model) ? show(of(model).value) : NONE,
  tip: model => of(model) && `${head} ${whole(of(model).value)}\n${where(of(model))}`,
});
const digit = model => {
  const cells = family(model).digits;
  return cells.find(cell => cell.row.model === model.name) || cells[0] || null;
};
const tenth = value => Number.isInteger(value) ? value.toFixed(1) : String(value);
const COLUMNS = [
  {head: "model", value: model => model.name, text: model => model.name,
    tip: model => [`weights: ${model.tag}`, ...model.papers.map(paper => `arXiv ${paper}`), model.code]
      .filter(Boolean).join("\n")},
  {head: "family", value: model => model.family, text: model => model.family, tip: () => "highlights the family"},
  number("parameters, M", model => model.parameters, value => digits(value / 1e6, 4),
    value => `${digits(value / 1e6, 4)}: ${value.toLocaleString("en")}`),
  number("GMACs", model => model.gmacs, value => digits(value, 3)),
  {head: "pixels", number: true, value: model => model.image[0], text: model => String(model.image[0]),
    tip: () => "size of the image that the model is made for, from its settings in timm"},
  number("top-1, %", model => model.top1, tenth),
  number("ms", latency, value => digits(value, 3)),
  number("step", model => model.training, value => digits(value, 2),
    value => `${digits(value, 2)} times that of swin_tiny_patch4_window7_224`),
  {...number("digits, %", digit, value => (100 * value).toFixed(1)),
    faint: model => digit(model) && digit(model).row.model !== model.name},
  {head: "parity", value: model => ORDER.indexOf(model.parity[0]), text: model => WORDS[model.parity[0]],
    tip: model => data.parity[model.parity[0]]
      + (model.parity[1].length ? `\ntests/golden: ${model.parity[1].join(", ")}` : "")},
  {head: "formats", number: true, value: model => formats(model).length || null,
    text: model => formats(model).length ? `${formats(model).length} of ${tried(model)}` : NONE,
    tip: model => formats(model).length
      ? `exported files of ${family(model).exported}, which give what PyTorch gives\n` +
      `${lines(family(model).exports)}\nnot made: ${lines(family(model).refused) || NONE}\n` +
      `results/export.csv: rows of family ${model.family}` : null},
  {head: "recipes", value: model => -Object.keys(family(model).recipes).length || null,
    text: model => Object.keys(family(model).recipes).map(task => SHORT[task] || task).join(" ") || NONE,
    tip: model => Object.keys(family(model).recipes).length
      ? `${lines(family(model).recipes)}\nvisionattn/configs` : null},
  {head: "licence", value: model => model.licence, text: model => model.licence,
    tip: () => "in the model's settings in timm, of the weights where there are some"},
  {head: "weights", value: model => model.weights ? 0 : null, text: model => model.weights ? "file" : NONE,
    tip: model => model.weights || null},
];
const SIZES = [["any", 0, Infinity], ["below 5 M", 0, 5e6], ["5 to 15 M", 5e6, 15e6], ["15 to 35 M", 15e6, 35e6],
  ["35 to 100 M", 35e6, 1e8], ["100 M and more", 1e8, Infinity]];
const COSTS = [["GMACs", model => model.gmacs], ["parameters", model => model.parameters],
  ["ms of one image", latency]];
const families = [...new Set(data.models.map(model => model.family))];
const colour = name => { const k = families.indexOf(name);
  return `hsl(${(k * 137.5) % 360} ${k % 2 ? 55 : 75}% ${k % 3 ? 38 : 46}%)`; };
let sorted = 5, down = true, picked = null;

const make = (tag, attributes, text) => {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
};
const draw = (parent, tag, attributes, text) => {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
};
const options = (id, entries) => entries.forEach(([value, text]) => byId(id).append(make("option", {value}, text)));
const distinct = of => [...new Set(data.models.flatMap(of))].sort().map(value => [value, value]);
options("family", [["", "all"], ...distinct(model => [model.family])]);
options("task", [["", "anything"], ...distinct(model => Object.keys(family(model).recipes))]);
options("licence", [["", "any"], ...distinct(model => [model.licence])]);
options("size", SIZES.map(([text], index) => [index, text]));
options("machine", data.machines.map(([file, note]) => [file + note, `${note} (${file})`]));
options("cost", COSTS.map(([text], index) => [index, text]));

const shown = () => {
  const words = byId("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [, least, most] = SIZES[byId("size").value];
  const task = byId("task").value, chosen = byId("family").value, licence = byId("licence").value;
  return data.models.filter(model => (byId("tests").checked || !model.test)
    && words.every(word => model.name.toLowerCase().includes(word) || model.family.includes(word))
    && (!chosen || model.family === chosen) && (!task || task in family(model).recipes)
    && (!licence || model.licence === licence)
    && model.parameters.value >= least && model.parameters.value < most);
};

const pick = name => { picked = picked === name ? null : name; update(); };

const heads = COLUMNS.map((column, index) => {
  const head = make("th", column.number ? {class: "number", tabindex: 0} : {tabindex: 0}, column.head);
  const sort = () => {
    if (sorted === index) down = !down; else { sorted = index; down = Boolean(column.number) && index === 5; }
    update();
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  document.querySelector("#models thead tr").append(head);
  return head;
});

const fill = models => {
  const of = COLUMNS[sorted].value;
  models.sort((a, b) => {
    const x = of(a), y = of(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  });
  heads.forEach((head, index) => {
    if (index === sorted) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  const body = document.querySelector("#models tbody");
  body.replaceChildren(...models.map(model => {
    const row = make("tr", {class: model.family === picked ? "picked" : ""});
    for (const column of COLUMNS) {
      const kind = `${column.number ? "number" : ""} ${column.faint?.(model) ? "faint" : ""}`;
      const cell = make("td", {class: kind}), tip = column.tip(model);
      if (tip) cell.setAttribute("data-tip", tip);
      if (column.head === "model") cell.append(make("a", {href: family(model).card}, model.name));
      else if (column.head === "weights" && model.weights) cell.append(make("a", {href: model.weights}, "file"));
      else if (column.head === "top-1, %" && model.top1)
        cell.append(make("a", {href: model.top1.url}, column.text(model)));
      else if (column.head === "family") {
        const button = make("button", {class: "link", type: "button"}, model.family);
        button.addEventListener("click", () => pick(model.family));
        cell.append(button);
      } else cell.textContent = column.text(model);
      row.append(cell);
    }
    return row;
  }));
  byId("found").textContent = `${models.length} of ${data.models.length} models`;
};

const scatter = models => {
  const [title, cost] = COSTS[byId("cost").value];
  const wide = byId("chart").clientWidth > 700, width = wide ? 1100 : 420, height = wide ? 430 : 340;
  const left = 44, right = 16, top = 10, bottom = 40;
  const points = models.filter(model => model.top1 && cost(model));
  byId("chart").replaceChildren();
  const svg = draw(byId("chart"), "svg",
    {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `top-1 against ${title}`});
  if (!points.length) {
    draw(svg, "text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "none of these models has both figures");
    return;
  }
  const costs = points.map(model => cost(model).value), tops = points.map(model => model.top1.value);
  const low = Math.log10(Math.min(...costs) / 1.2), high = Math.log10(Math.max(...costs) * 1.2);
  const errors = top => Math.log(100 - top);  // their share's logarithm spreads the best
  const worst = errors(Math.min(...tops) - 1), best = errors(Math.max(...tops) + .5);
  const x = value => left + (Math.log10(value) - low) / (high - low) * (width - left - right);
  const y = top1 => top + (errors(top1) - best) / (worst - best) * (height - top - bottom);
  let above = Infinity;
  for (let value = 1; value < 100; value++) {
    const at = y(value);
    if (at < top || at > height - bottom || above - at < 22) continue;
    above = at;
    draw(svg, "path", {d: `M${left} ${at}H${width - right}`, stroke: "#e8e8e8"});
    draw(svg, "text", {x: left - 6, y: at + 4, "text-anchor": "end"}, value);
  }
  const units = high - low > 1.6 && !wide ? [1] : [1, 2, 5];
  for (let power = Math.floor(low); power <= high; power++) for (const unit of units) {
    const value = unit * 10 ** power;
    if (Math.log10(value) < low || Math.log10(value) > high) continue;
    draw(svg, "path", {d: `M${x(value)} ${top}V${height - bottom}`, stroke: "#f2f2f2"});
    draw(svg, "text", {x: x(value), y: height - bottom + 16, "text-anchor": "middle"},
      title === "parameters" ? `${Number((value / 1e6).toPrecision(3))} M` : Number(value.toPrecision(3)));
  }
  draw(svg, "text", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle"}, title);
  draw(svg, "text", {transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle"},
    "published top-1, %");
  for (const name of families) {
    const members = points.filter(model => model.family === name).sort((a, b) => cost(a).value - cost(b).value);
    if (!members.length) continue;
    const group = draw(svg, "g", {class: picked && picked !== name ? "faded" : "", "data-family": name});
    draw(group, "path", {fill: "none", stroke: colour(name), "stroke-opacity": picked === name ? .9 : .3,
      "stroke-width": 1.5, d: "M" + members.map(model => `${x(cost(model).value)} ${y(model.top1.value)}`).join("L")});
    for (const model of members) {
      const plain = model.image[0] === 224 && model.tag !== "in22k_ft_in1k";
      const value = cost(model).value;
      const tip = [`${model.name} (${model.family})`, `top-1 ${tenth(model.top1.value)} %\n${where(model.top1)}`,
        `${title} ${value > 1e5 ? value.toLocaleString("en") : digits(value, 3)}\n${where(cost(model))}`];
      const circle = draw(group, "circle", {cx: x(value), cy: y(model.top1.value), r: wide ? 5 : 4.5,
        fill: plain ? colour(name) : "#fff", stroke: colour(name), "stroke-width": 1.8, "data-name": model.name,
        "data-tip": tip.join("\n\n")});
      circle.addEventListener("click", () => pick(name));
    }
  }
  const legend = families.filter(name => points.some(model => model.family === name)).map(name => {
    const button = make("button",
      {type: "button", style: `color: ${colour(name)}`, "aria-pressed": picked === name}, `\u25cf ${name}`);
    button.addEventListener("click", () => pick(name));
    return button;
  });
  byId("legend").replaceChildren(...legend);
};

const update = () => { byId("tip").hidden = true; const models = shown(); scatter(models); fill(models); };

const show = event => {
  const of = event.target.closest?.("[data-tip]"), tip = byId("tip");
  tip.hidden = !of;
  if (!of) return;
  tip.textContent = of.getAttribute("data-tip");
  tip.style.left = "0"; tip.style.top = "0";
  const box = tip.getBoundingClientRect(), gap = 14;
  const across = Math.min(event.clientX + gap, innerWidth - box.width - 8);
  const under = event.clientY + gap + box.height < innerHeight ? event.clientY + gap : event.clientY - gap - box.height;
  tip.style.left = `${Math.max(4, across)}px`;
  tip.style.top = `${Math.max(4, under)}px`;
};
document.addEventListener("pointermove", show);
document.addEventListener("click", show);
document.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
byId("scroll").addEventListener("scroll", () => { byId("tip").hidden = true; });
for (const id of ["family", "task", "licence", "size", "machine", "cost", "tests"])
  byId(id).addEventListener("change", update);
byId("text").addEventListener("input", update);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; update(); } });
update();
"""
