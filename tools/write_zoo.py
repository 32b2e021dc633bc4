"""Writes what is known about the models: a table into each card, a page to sort and filter, a picture for the README.

    python tools/write_zoo.py            # counts models that results/zoo.csv lacks, then writes everything
    python tools/write_zoo.py --count    # counts all anew first: a minute

What is written depends on the families' records, the recipes and the files in ``results`` alone.
"""
import argparse
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import zoo_page
import zoo_picture
from rows import put_between, read_rows
from zoo_facts import COUNTED, ROOT, Cell, Facts, count, machines, read_facts

from visionattn import listing
from visionattn.analysis import write_page

__all__ = ["made", "main"]

MARKS = "<!-- facts: made by tools/write_zoo.py -->", "<!-- end -->"
PAGE, PICTURE = "docs/zoo.html", "docs/images/zoo.svg"
PARITY = {
    "model": "the authors' numbers are tested on this model",
    "family": "the authors' numbers are tested on another size of the family",
    "part": "the authors' numbers are tested on a part of it",
    "none": "there are no numbers of the authors to compare with",
}
NONE = "—"


def main() -> None:
    """Runs the tool with the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Writes docs/zoo.html, the tables of docs/models and the picture.")
    parser.add_argument("--count", action="store_true", help="count all models anew, not only those not yet counted")
    anew = parser.parse_args().count or not (ROOT / COUNTED).exists()
    known = set() if anew else {row["model"] for row in read_rows(ROOT / COUNTED)}
    count([name for name in listing.chosen() if name not in known])
    for path, text in made().items():
        (ROOT / path).write_text(text, encoding="utf-8")


def made(root: Path = ROOT) -> dict[str, str]:
    """What the files should say, by their paths below ``root``.

    Raises:
        ValueError: A model was not counted, or a family's card is not there or lacks the marks.
    """
    facts = read_facts(root)
    files = {PAGE: _page(facts), PICTURE: zoo_picture.draw(facts)}
    for card, of in groupby(sorted(facts, key=_card), key=_card):
        text = (root / card).read_text(encoding="utf-8")
        files[card] = put_between(text, *MARKS, _card_lines(list(of)), card)
    return files


def _card_lines(facts: list[Facts]) -> list[str]:
    columns = [
        ("model", [f"`{of.name}`" for of in facts]),
        ("parameters", [f"{of.parameters.value:,}" for of in facts]),
        ("GMACs", [_cell(of.gmacs, "#.3g") for of in facts]),
        ("image", [f"{of.image[0]}" for of in facts]),
        ("classes", [f"{of.classes:,}" for of in facts] if {of.classes for of in facts} != {1000} else [NONE]),
        ("published top-1, %", [_cell(of.top1, "") for of in facts]),
        ("published GMACs", [_cell(of.authors_gmacs, "") for of in facts]),
        ("ms", [_milliseconds(of, facts) for of in facts]),
        ("weights", [_weights(of) for of in facts]),
    ]
    columns = [(head, cells) for head, cells in columns if set(cells) != {NONE}]
    lines = [_row(head for head, _ in columns), "|" + "---|" * len(columns)]
    lines += [_row(cells) for cells in zip(*(cells for _, cells in columns), strict=True)]
    return [*lines, "", *(f"- {line}" for line in _card_notes(facts))]


def _card_notes(facts: list[Facts]) -> list[str]:
    dates = sorted({of.parameters.note.rpartition(", ")[2] for of in facts})
    notes = ["Parameters and GMACs (multiplications with additions counted as one) are counted at the image's size "
             f"({_link(COUNTED)}, {' and '.join(dates)})."]
    if any(of.top1 for of in facts):
        places = dict.fromkeys(of.top1.url for of in facts if of.top1)
        notes.append(f"Top-1 on ImageNet-1k is what the authors published ({', '.join(map(_address, places))}); "
                     "it was not measured again.")
    sets = machines(facts)
    for number, (file, machine) in enumerate(sets):
        mark = _mark(number, sets)
        notes.append(f"Milliseconds{mark} of one image in evaluation, float32: {machine} ({_link(file)}).")
    families = list({of.family.name: of.family for of in facts}.values())
    goldens = dict.fromkeys(file for family in families for file in family.goldens)
    notes.append("The tests reproduce the numbers of the authors' code in "
                 f"{', '.join(f'`{file}`' for file in goldens)} ([tests/golden](../../tests/golden))." if goldens
                 else "There are no numbers of the authors to compare with.")
    licences = ", ".join(dict.fromkeys(of.licence for of in facts))
    notes.append(f"Licence in the models' settings in timm, of the weights where there are some: {licences}.")
    tested: dict[str, list[str]] = {}
    for family in families:
        for task, formats in family.exports.items():
            refused = ", ".join(family.refused.get(task, []))
            said = f"{task}: {', '.join(formats)}{f', not {refused}' if refused else ''}"
            tested.setdefault(said, []).append(f"`{family.exported}`")
    models = list(dict.fromkeys(model for names in tested.values() for model in names))
    if tested:
        said = "; ".join(formats + (f" ({', '.join(names)})" if len(models) > 1 else "")
                         for formats, names in sorted(tested.items()))
        of_one = f" of {models[0]}" if len(models) == 1 else ""
        notes.append(f"Exported files{of_one}, which give what PyTorch gives: {said} ({_link('results/export.csv')}).")
    digits = [cell for family in families for cell in family.digits]
    for note, of in groupby(digits, key=lambda cell: cell.note):
        cells = list(of)
        said = ", ".join(f"`{cell.row['model']}` {100 * cell.value:.1f} %" for cell in cells)
        notes.append(f"{note[0].upper()}{note[1:]}: {said} ({_link(cells[0].file)}).")
    return notes


def _card(of: Facts) -> str:
    return of.family.card


def _milliseconds(of: Facts, facts: list[Facts]) -> str:
    sets = machines(facts)
    marks = [_mark(sets.index((cell.file, cell.note)), sets) for cell in of.latencies]
    return ", ".join(f"{cell.value:.3g}{mark}" for cell, mark in zip(of.latencies, marks, strict=True)) or NONE


def _mark(number: int, sets: list[tuple[str, str]]) -> str:
    return "¹²³⁴⁵⁶⁷⁸⁹"[number] if len(sets) > 1 else ""


def _weights(of: Facts) -> str:
    if not of.weights:
        return NONE
    name = Path(urlparse(of.weights).path).name
    first = ", of ImageNet-22k first" if of.tag == "in22k_ft_in1k" else ""
    return f"[{name if '.' in name else urlparse(of.weights).netloc}]({of.weights}){first}"


def _cell(cell: Cell | None, form: str) -> str:
    return format(cell.value, form).rstrip(".") if cell else NONE


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _link(file: str) -> str:
    return f"[{file}](../../{file})"


def _address(url: str) -> str:
    return f"[{urlparse(url).netloc.removeprefix('www.')}{urlparse(url).path}]({url})"


def _page(facts: list[Facts]) -> str:
    families = {of.family.name: of.family for of in facts}
    data = {
        "models": [_plain(of._replace(family=of.family.name)) | {"test": of.name.startswith("test_")} for of in facts],
        "families": {name: _plain(family._replace(card=family.card.removeprefix("docs/")))
                     for name, family in families.items()},
        "machines": machines(facts), "parity": PARITY}
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(
            Path(folder) / "zoo.html", "The models", zoo_page.BODY, zoo_page.SCRIPT, data, zoo_page.STYLE)
        return page.read_text(encoding="utf-8")


def _plain(facts: Any) -> Any:
    """What JSON can say: records become objects."""
    if hasattr(facts, "_asdict"):
        return {key: _plain(value) for key, value in facts._asdict().items()}
    return [_plain(value) for value in facts] if isinstance(facts, list) else facts


if __name__ == "__main__":
    main()
