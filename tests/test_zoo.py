"""The cards, the page and the picture of the zoo: made anew they are the same, and every number is in its file."""
import csv
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

from tests.pages import act
from tests.tools import load_tool
from visionattn import listing, models

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "zoo.html"
GOLDENS = {path.name.removesuffix(".json.gz") for path in (ROOT / "tests" / "golden").glob("*.json.gz")}


@pytest.fixture(scope="module")
def made():
    return load_tool("write_zoo").made()


@pytest.fixture(scope="module")
def data():
    line, = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("const data = "))
    return json.loads(line.removeprefix("const data = ").removesuffix(";"))


def test_files_are_what_the_tool_makes(made):
    cards = {f"docs/models/{path.name}" for path in (ROOT / "docs" / "models").glob("*.md")}
    assert made.keys() == {"docs/zoo.html", "docs/images/zoo.svg"} | cards
    stale = [path for path, text in made.items() if (ROOT / path).read_text(encoding="utf-8") != text]
    assert not stale, "run python tools/write_zoo.py"


def test_the_page_has_all_models(data):
    assert {model["name"] for model in data["models"]} == set(listing.chosen())
    assert data["families"].keys() == models.families().keys()
    for family in data["families"].values():
        assert (PAGE.parent / family["card"]).is_file()


def _numbers(value, path=()):
    """Cells and, by their paths, numbers outside of cells."""
    if isinstance(value, dict) and "column" in value:
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def test_every_number_of_the_page_is_in_its_file(data):
    files, cells = {}, 0
    for path, cell in _numbers(data):
        if not isinstance(cell, dict):  # what the models' settings in timm say
            _, index, key, *axis = path
            config = timm.get_pretrained_cfg(data["models"][index]["name"])
            assert key in ("image", "classes")
            assert cell == (config.input_size[1 + axis[0]] if key == "image" else config.num_classes)
            continue
        cells += 1
        if cell["file"].endswith(".py"):
            name, family = cell["row"]["model"], models.family_of(cell["row"]["model"])
            assert cell["file"] == f"visionattn/models/{data['models'][path[1]]['family']}.py"
            assert cell["value"] == getattr(family.published[name], cell["column"])
            assert cell["url"] == (family.published[name].source or timm.get_pretrained_cfg(name).origin_url)
            assert cell["url"].startswith("https://")
            continue
        if cell["file"] not in files:
            with (ROOT / cell["file"]).open(newline="") as file:
                files[cell["file"]] = list(csv.DictReader(file))
        found = [row for row in files[cell["file"]] if cell["row"].items() <= row.items()]
        assert found, cell
        assert cell["value"] == pytest.approx(statistics.fmean(float(row[cell["column"]]) for row in found), rel=1e-12)
        if "digits" not in path:  # of which several seeds make a mean
            assert len({row["date"] for row in found}) == 1
        assert all(row["date"] in cell["note"] for row in found)
        if "machine" in found[0]:
            assert found[0]["machine"] in cell["note"]
    assert cells > 2 * len(data["models"])
    assert {"results/models_cpu.csv", "results/export_speed_cpu.csv", "results/train_cpu.csv", "results/digits.csv",
            "results/zoo.csv"} <= files.keys()


def test_exports_and_recipes_of_the_page_are_in_their_files(data):
    with (ROOT / "results" / "export.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, family in data["families"].items():
        for task in ("classification", "detection", "segmentation"):
            of = [row for row in rows if row["family"] == name and row["task"] == task]
            assert set(family["refused"].get(task, [])) == {row["format"] for row in of if row["kept"] == "False"}
            kept = {(row["format"], bool(row["difference"])) for row in of if row["kept"] == "True"}
            assert set(family["exports"].get(task, [])) == {
                name if compared else f"{name} (not run)" for name, compared in kept}
        for task, recipes in family["recipes"].items():
            for recipe in recipes:
                backbone = re.search(r"^ *backbone: (\w+)", (
                    ROOT / "visionattn" / "configs" / task / f"{recipe}.yaml").read_text(), re.MULTILINE)[1]
                assert timm.model_entrypoint(backbone).__module__.endswith(f".{name}")


def test_goldens_are_those_of_the_tests(data):
    named = {file: model for family in models.families().values() for file, model in family.goldens.items()}
    assert named.keys() <= GOLDENS
    whole = {file for file in GOLDENS if not file.endswith("_ops")}  # of models, not of parts alone
    assert whole - named.keys() == {"cab", "efficientvit_timm_check", "tapadl_adl"}
    for file, model in named.items():
        assert timm.is_model(model) or "*" in model
        assert any(f'"{file}"' in path.read_text() for path in (ROOT / "tests").rglob("test_*.py")), file
    parity = {model["name"]: model["parity"][0] for model in data["models"]}
    assert [parity[name] for name in ("dinat_tiny", "dinat_large", "flowformer", "maformer_s", "resnet50_ulsam",
                                      "resnet50_ela")] == ["model", "family", "part", "none", "part", "none"]


def test_the_picture_names_every_family_once(data):
    svg = ElementTree.fromstring((ROOT / "docs" / "images" / "zoo.svg").read_text())
    space = {"s": "http://www.w3.org/2000/svg"}
    shown = [model for model in data["models"] if model["top1"] and model["gmacs"]]
    titles = [title.text for title in svg.findall(".//s:circle/s:title", space)]
    assert titles == [
        f"{model['name']}: {model['top1']['value']:g} %, {model['gmacs']['value']:.3g} GMACs" for model in shown]
    texts = [text for text in svg.findall("s:text", space) if text.get("paint-order")]
    assert [text.text for text in texts] == list(dict.fromkeys(model["family"] for model in shown))
    boxes = [(float(text.get("x")), float(text.get("y")), 7.5 * len(text.text)) for text in texts]
    for index, (x, y, width) in enumerate(boxes):
        assert not any(abs(y - y2) < 13 and x < x2 + width2 and x2 < x + width for x2, y2, width2 in boxes[:index])


def test_a_model_that_was_not_counted_and_a_family_without_a_card(tmp_path):
    facts = load_tool("zoo_facts")
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(ROOT / "docs" / "models", tmp_path / "docs" / "models")
    (tmp_path / "docs" / "models" / "agent.md").unlink()
    with pytest.raises(ValueError, match=r"the family agent_cswin needs a card, docs/models/agent_cswin\.md"):
        facts.read_facts(tmp_path)
    shutil.copy(ROOT / "docs" / "models" / "agent.md", tmp_path / "docs" / "models" / "agent_cswin.md")
    lines = (tmp_path / "results" / "zoo.csv").read_text().splitlines()
    (tmp_path / "results" / "zoo.csv").write_text("\n".join(line for line in lines if "agent_cswin_s" not in line))
    with pytest.raises(ValueError, match=r"results/zoo\.csv lacks agent_cswin_s: python tools/write_zoo\.py counts it"):
        facts.read_facts(tmp_path)


def test_counting_keeps_other_rows(tmp_path, monkeypatch, capsys):
    facts, rows = load_tool("zoo_facts"), load_tool("rows")
    (tmp_path / "results").mkdir()
    before = rows.read_rows(ROOT / "results" / "zoo.csv")
    rows.write_rows(tmp_path / "results" / "zoo.csv", [row for row in before if row["model"] != "test_dinat"])
    facts.count(["test_dinat"], tmp_path)
    counted = ("model", "parameters", "gmacs", "height", "width")
    after = rows.read_rows(tmp_path / "results" / "zoo.csv")
    assert [[row[key] for key in counted] for row in after] == [[row[key] for key in counted] for row in before]


# In a browser

ROWS = ('const rows = () => [...document.querySelectorAll("#models tbody tr")]'
        '.map(row => [...row.cells].map(cell => cell.textContent));')
SET = ('const set = (id, value) => { byId(id)[id === "tests" ? "checked" : "value"] = value;'
       ' byId(id).dispatchEvent(new Event(id === "text" ? "input" : "change")); };')


@pytest.mark.slow
def test_the_table_sorts(data):
    found = json.loads(act(PAGE, ROWS + """
        const heads = [...document.querySelectorAll("#models th")], names = heads.map(head => head.textContent);
        const column = name => {
          heads[names.indexOf(name)].click();
          return rows().map(row => row[names.indexOf(name)]);
        };
        return {names, first: rows(), up: column("GMACs"), down: column("GMACs"), model: column("model"),
                ms: column("ms"), sort: heads.map(head => head.getAttribute("aria-sort"))};"""))
    shown = [model for model in data["models"] if not model["test"]]
    top1 = found["names"].index("top-1, %")
    figures = sorted((model["top1"]["value"] for model in shown if model["top1"]), reverse=True)
    assert [float(row[top1]) for row in found["first"][:len(figures)]] == figures
    assert {row[top1] for row in found["first"][len(figures):]} == {"—"}
    gmacs = [float(value) for value in found["up"]]
    assert gmacs == sorted(gmacs) == list(reversed([float(value) for value in found["down"]]))
    assert found["model"] == sorted(model["name"] for model in shown)
    file, machine = data["machines"][0]
    times = [cell["value"] for model in shown for cell in model["latencies"]
             if [cell["file"], cell["note"]] == [file, machine]]
    assert [float(ms) for ms in found["ms"] if ms != "—"] == pytest.approx(sorted(times), rel=0.01)
    assert found["sort"].count(None) == len(found["names"]) - 1
    row, = (row for row in found["first"] if row[0] == "biformer_tiny")
    assert row[1:6] == ["biformer", "13.14", "2.22", "224", "81.4"]


@pytest.mark.slow
def test_the_page_filters_and_highlights(data):
    found = json.loads(act(PAGE, ROWS + SET + """
        const names = () => rows().map(row => row[0]), found = {};
        const tried = (key, ids) => {
          for (const [id, value] of Object.entries(ids)) set(id, value);
          found[key] = names();
          for (const id of Object.keys(ids)) set(id, id === "size" ? 0 : id === "tests" ? false : "");
        };
        tried("text", {text: "DINAT large"}); tried("family", {family: "smt"}); tried("task", {task: "segmentation"});
        tried("licence", {licence: "apache-2.0"}); tried("size", {size: 1}); tried("tests", {tests: true});
        tried("none", {text: "no such model"});
        set("cost", 1); found.axis = byId("chart").textContent.includes("parameters");
        set("cost", 2); found.timed = document.querySelectorAll("#chart circle").length;
        set("cost", 0); found.circles = document.querySelectorAll("#chart circle").length;
        const buttons = [...document.querySelectorAll("#legend button")];
        buttons.find(button => button.textContent.endsWith("biformer")).click();
        found.bright = [...document.querySelectorAll("#chart g:not(.faded)")].map(group => group.dataset.family);
        found.picked = [...document.querySelectorAll("tr.picked")].map(row => row.cells[0].textContent).sort();
        return found;"""))
    of = {model["name"]: model for model in data["models"]}
    shown = {name for name, model in of.items() if not model["test"]}

    def are(key, condition):
        assert set(found[key]) == {name for name in shown if condition(of[name])} != set()

    are("text", lambda model: "dinat" in model["name"] and "large" in model["name"])
    are("family", lambda model: model["family"] == "smt")
    are("task", lambda model: "segmentation" in data["families"][model["family"]]["recipes"])
    are("licence", lambda model: model["licence"] == "apache-2.0")
    are("size", lambda model: model["parameters"]["value"] < 5e6)
    assert set(found["tests"]) == set(of)
    assert found["none"] == []
    assert found["axis"]
    assert found["circles"] == sum(of[name]["top1"] is not None for name in shown)
    assert 0 < found["timed"] < found["circles"]
    assert found["bright"] == ["biformer"]
    assert found["picked"] == sorted(name for name in shown if of[name]["family"] == "biformer")


@pytest.mark.slow
def test_the_pointer_shows_where_a_number_comes_from():
    found = json.loads(act(PAGE, """
        const over = element => {
          const place = {bubbles: true, clientX: innerWidth - 5, clientY: innerHeight - 5};
          element.dispatchEvent(new PointerEvent("pointermove", place));
          const tip = byId("tip"), box = tip.getBoundingClientRect();
          const inside = box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight;
          return [tip.hidden, tip.textContent, inside];
        };
        const rows = [...document.querySelectorAll("tbody tr")];
        const row = rows.find(row => row.cells[0].textContent === "biformer_tiny");
        return {none: over(document.querySelector("h1")), circle: over(document.querySelector("[data-name=smt_t]")),
                cells: [...row.cells].map(cell => over(cell)[1])};"""))
    assert found["none"][0] is True
    hidden, text, inside = found["circle"]
    assert (hidden, inside) == (False, True)
    for part in ("smt_t (smt)", "top-1 82.2 %", "https://github.com/AFeng-x/SMT",
                 "results/zoo.csv: gmacs of model smt_t"):
        assert part in text
    cells = "\n".join(found["cells"])
    for part in ("13,142,760", "results/zoo.csv: parameters of model biformer_tiny", "results/digits.csv: accuracy",
                 "tests/golden: biformer_tiny", "results/export.csv", "classification: ", "imagenet_biformer_tiny",
                 "visionattn/models/biformer.py: top1", "AMD EPYC, 1 thread"):
        assert part in cells
