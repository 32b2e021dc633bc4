"""Rows of what the tools measured: in CSV files, which later runs of a tool go on with, and in tables of pages."""
import csv
import datetime
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["append_rows", "put_between", "read_rows", "when_and_with", "write_between", "write_rows"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a CSV file anew, with the columns that any of the rows has, empty where one lacks it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file, by its columns whatever their order in a row; makes the file if it is not there.

    Raises:
        ValueError: A row has a column that the file has not.
    """
    if not path.exists() or not path.stat().st_size:
        write_rows(path, rows)
        return
    with path.open(newline="") as file:
        columns = next(csv.reader(file))
    with path.open("a", newline="") as file:
        csv.DictWriter(file, fieldnames=columns).writerows(rows)


def when_and_with() -> dict[str, str]:
    """Versions of the libraries and today's date, as columns of a row."""
    versions = {library: importlib.metadata.version(library) for library in ("torch", "timm", "visionattn")}
    return versions | {"date": datetime.date.today().isoformat()}


def write_between(page: Path, start: str, end: str, lines: Sequence[str]) -> None:
    """Replaces what is between two marks of ``page``.

    Raises:
        ValueError: The page lacks the marks.
    """
    page.write_text(put_between(page.read_text(), start, end, lines, str(page)))


def put_between(text: str, start: str, end: str, lines: Sequence[str], page: str) -> str:
    """The text of ``page``, with what is between two marks replaced.

    Raises:
        ValueError: It lacks the marks.
    """
    before, found, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{page} needs the lines {start} and {end}")
    return f"{before}{start}\n\n" + "\n".join(lines) + f"\n\n{end}{after}"
