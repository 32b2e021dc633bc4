"""What is known about the models of the zoo, every number with the file, and the row of it, that it comes from.

What takes a while to count, parameters and multiplications, stands in ``results/zoo.csv``; :func:`count` writes it.
"""
import fnmatch
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from rows import read_rows, when_and_with, write_rows

from visionattn import listing, models

__all__ = ["COUNTED", "ROOT", "Cell", "Facts", "FamilyFacts", "count", "machines", "read_facts"]

ROOT = Path(__file__).parent.parent
COUNTED = "results/zoo.csv"

# Where single images in evaluation were timed: the rows of a file about that, and their column of milliseconds.
LATENCIES = {
    "results/models_cpu.csv": ({"batch": "1"}, "median_ms"),
    "results/transnext_cpu.csv": ({"batch": "1"}, "median_ms"),
    "results/export_speed_cpu.csv": ({"form": "eager"}, "latency_ms"),
}
TRAINING, DIGITS, EXPORTS = "results/train_cpu.csv", "results/digits.csv", "results/export.csv"
TASKS = ("classification", "detection", "segmentation")


class Cell(NamedTuple):
    """A number and where it comes from: the mean of a column over the rows of a file that match."""

    value: float
    file: str  # below the project's folder
    row: dict[str, str]  # columns and what they say; of a family's file the model's name
    column: str
    note: str = ""  # machine, date, and what else a reader must know
    url: str = ""  # where its authors published it


class FamilyFacts(NamedTuple):
    """What is known about all models of a family alike."""

    name: str  # its module
    card: str  # page about it, below the project's folder
    goldens: list[str]  # files of tests/golden with numbers of the authors' code
    recipes: dict[str, list[str]]  # whose backbone is one of its models, by task
    exported: str  # the small model that was written as files; "" for none
    exports: dict[str, list[str]]  # formats in which it was kept, by task: it gave PyTorch's results where it could run
    refused: dict[str, list[str]]  # formats that were tried in vain
    digits: list[Cell]  # accuracy of its small models, a share


class Facts(NamedTuple):
    """What is known about a model."""

    name: str
    family: FamilyFacts
    tag: str  # of its weights, as timm says it: in1k, in22k_ft_in1k, untrained
    classes: int
    image: tuple[int, int]
    licence: str  # of the weights
    weights: str  # address; "" for none
    papers: tuple[str, ...]  # numbers on arXiv
    code: str  # the authors' repository; "" for none
    parity: tuple[str, list[str]]  # "model", "family", "part" or "none"; the files with the authors' numbers
    parameters: Cell
    gmacs: Cell | None
    top1: Cell | None
    authors_gmacs: Cell | None
    latencies: list[Cell]
    training: Cell | None


def count(names: Sequence[str], root: Path = ROOT) -> None:
    """Counts models as ``visionattn list`` does and writes what was counted; rows of other models stay as they are."""
    path = root / COUNTED
    before = {row["model"]: row for row in read_rows(path)} if path.exists() else {}
    for name in names:
        entry = listing.describe(name)
        height, width = entry.image_size
        gmacs = "" if entry.gmacs is None else f"{entry.gmacs:.6g}"
        before[name] = {
            "model": name, "parameters": str(entry.parameters), "gmacs": gmacs, "height": str(height),
            "width": str(width)} | when_and_with()
        print(name, entry.parameters, gmacs, flush=True)
    write_rows(path, [before[name] for name in listing.chosen() if name in before])


def read_facts(root: Path = ROOT) -> list[Facts]:
    """The facts of all models, families by their names, models by their parameters.

    Raises:
        ValueError: A model was not counted, or its family has no card.
    """
    counted = {row["model"]: row for row in read_rows(root / COUNTED)}
    rows = {file: read_rows(root / file) for file in (*LATENCIES, TRAINING, DIGITS, EXPORTS)}
    recipes = list(_recipes(root))
    found = []
    for family, record in models.families().items():
        members = [name for name in listing.chosen() if models.family_of(name) is record]
        exported = [row for row in rows[EXPORTS] if row["family"] == family]
        used = {task: [recipe for of, recipe, model in recipes if of == task and model in members]
                for task in dict.fromkeys(task for task, _, _ in recipes)}
        digits = [_mean(rows[DIGITS], DIGITS, {"model": name}, "accuracy", _digits_note) for name in members]
        alike = FamilyFacts(
            family, _card(family, root), list(record.goldens), {task: names for task, names in used.items() if names},
            exported[0]["model"] if exported else "", _formats(exported, "True"), _formats(exported, "False"),
            [cell for cell in digits if cell])
        for name in members:
            if name not in counted:
                raise ValueError(f"{COUNTED} lacks {name}: python tools/write_zoo.py counts it")
            found.append(_facts(name, alike, record, counted[name], rows))
    return sorted(found, key=lambda of: (of.family.name, of.name.startswith("test_"), of.parameters.value, of.name))


def machines(facts: Iterable[Facts]) -> list[tuple[str, str]]:
    """File and machine of every set of latencies that can be compared, the largest first."""
    sets = [(cell.file, cell.note) for of in facts for cell in of.latencies]
    return sorted(dict.fromkeys(sets), key=lambda key: -sets.count(key))


def _facts(
        name: str,
        family: FamilyFacts,
        record: models.Family,
        counted: dict[str, str],
        rows: dict[str, list[dict[str, str]]],
) -> Facts:
    config: Any = timm.get_pretrained_cfg(name)
    image = config.input_size[1:]
    row = {"model": name}
    versions = f"counted by visionattn list, timm {counted['timm']}, {counted['date']}"
    latencies = []
    for file, (of, column) in LATENCIES.items():
        of = of | row | ({"image": str(image[0])} if "image" in rows[file][0] else {})
        latencies.append(_mean(rows[file], file, of, column, _machine))
    published = record.published.get(name)
    stands = (f"visionattn/models/{family.name}.py", row)
    address = (published.source if published else "") or config.origin_url
    papers = (config.paper_ids,) if isinstance(config.paper_ids, str) else tuple(config.paper_ids or ())
    code = config.origin_url if "arxiv.org" not in (config.origin_url or "") else ""
    hub = config.hf_hub_id
    return Facts(
        name, family, config.tag, config.num_classes, image, config.license,
        f"https://huggingface.co/{hub}" if hub else config.url or "", tuple(map(_arxiv, papers)), code,
        _parity(name, record.goldens),
        Cell(int(counted["parameters"]), COUNTED, row, "parameters", versions),
        Cell(float(counted["gmacs"]), COUNTED, row, "gmacs", f"{versions}; {image[0]} x {image[1]} pixels")
        if counted["gmacs"] else None,
        Cell(published.top1, *stands, "top1", "published by the authors, not measured here", address)
        if published else None,
        Cell(published.gmacs, *stands, "gmacs", "published by the authors", address)
        if published and published.gmacs is not None else None,
        [cell for cell in latencies if cell],
        _mean(rows[TRAINING], TRAINING, {"model": name, "form": "eager"}, "step_over_swin_tiny", _machine))


def _mean(rows: list[dict[str, str]], file: str, row: dict[str, str], column: str, note: Any) -> Cell | None:
    of = [found for found in rows if all(found[key] == value for key, value in row.items()) and found[column]]
    return Cell(statistics.fmean(float(found[column]) for found in of), file, row, column, note(of)) if of else None


def _machine(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] != '1' else ''}"
    return f"{first['machine']}, {threads}, torch {first['torch']}{', ' + first['date'] if first['date'] else ''}"


def _digits_note(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    return (f"from scratch on scanned digits of {first['image_size']} pixels, {first['epochs']} epochs, "
            f"{seeds}, {' and '.join(sorted({row['date'] for row in rows}))}")


def _formats(rows: list[dict[str, str]], kept: str) -> dict[str, list[str]]:
    of = {task: [row for row in rows if (row["task"], row["kept"]) == (task, kept)] for task in TASKS}
    unrun = " (not run)" if kept == "True" else ""
    return {task: sorted(row["format"] + ("" if row["difference"] else unrun) for row in found)
            for task, found in of.items() if found}


def _parity(name: str, goldens: Mapping[str, str]) -> tuple[str, list[str]]:
    whole = {file: model for file, model in goldens.items() if timm.is_model(model)}
    own = [file for file, model in whole.items() if model == name]
    parts = [file for file, pattern in goldens.items() if file not in whole and fnmatch.fnmatch(name, pattern)]
    levels = {"model": own, "family": list(whole), "part": parts}
    return next(((level, files) for level, files in levels.items() if files), ("none", []))


def _recipes(root: Path) -> Iterator[tuple[str, str, str]]:
    """Task, name and backbone of every recipe."""
    for path in sorted((root / "visionattn" / "configs").glob("*/*.yaml")):
        for line in path.read_text().splitlines():
            key, _, value = line.strip().partition(":")
            if key == "backbone" and value:
                yield path.parent.name, path.stem, value.split()[0]


def _card(family: str, root: Path) -> str:
    """The page of the family, or of those whose names begin as its own does."""
    words = family.split("_")
    for length in range(len(words), 0, -1):
        card = f"docs/models/{'_'.join(words[:length])}.md"
        if (root / card).exists():
            return card
    raise ValueError(f"the family {family} needs a card, docs/models/{family}.md")


def _arxiv(paper: str) -> str:
    return paper.removeprefix("arXiv:")
