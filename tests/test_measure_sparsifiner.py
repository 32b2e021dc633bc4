"""The tool that times Sparsifiner's attention: it checks what it times, and writes rows and a table."""
import csv

import pytest

from tests.tools import load_tool


@pytest.fixture
def tool():
    return load_tool("measure_sparsifiner")


def test_rows_and_table(tool, tmp_path):
    out, page = tmp_path / "rows.csv", tmp_path / "page.md"
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    assert tool.main(["--sides", "8", "10", "--turns", "1", "--out", str(out)]) == 0
    assert tool.main(["--out", str(out), "--page", str(page)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tokens"], row["form"]) for row in rows] == [(n, form) for n in ("64", "100") for form in tool.FORMS]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert [row["over_all_keys"] for row in rows if row["form"] == "all keys"] == ["1", "1"]
    text = page.read_text()
    assert f"| 100 | {rows[5]['ms']} ms (1) | {rows[6]['ms']} ms ({rows[6]['over_all_keys']}) |" in text
    assert "old" not in text


def test_what_is_wrong_is_not_timed(tool, monkeypatch):
    run = tool._run
    monkeypatch.setattr(
        tool, "_run", lambda layer, x, backend: run(layer, x, backend) * (1.01 if backend == "masked" else 1))
    with pytest.raises(RuntimeError, match="8 x 8 tokens: own lists, masked and own lists, gathered differ"):
        tool.measure(8, 1)
