"""The tool that compares the token mixers: what a layer costs, and the table of the rows that there are."""
import csv

import pytest

from tests.tools import load_tool


@pytest.fixture
def tool():
    return load_tool("measure_mixers")


def test_every_mixer_has_a_row(tool, tmp_path, monkeypatch):
    """Rows that the file has are kept; the table has them all."""
    trained = []

    def measure(name, seed, epochs, image_size, options):
        trained.append(options["mixer"])
        return {"model": name, "parameters": 1234567, "seed": seed, "accuracy": 0.975, "minutes": 1}

    monkeypatch.setattr(tool, "measure", measure)
    out, page = tmp_path / "mixers.csv", tmp_path / "page.md"
    assert tool.main(["--out", str(out), "--sides", "4", "--mixers", "full"]) == 0
    assert tool.main(["--out", str(out), "--sides", "4", "--mixers", "full", "combiner"]) == 0
    assert trained == ["full", "combiner"]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["ms_16"]) > 0 and float(row["mib_16"]) > 0 for row in rows)
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    assert tool.main(["--out", str(out), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"| combiner | 97.5 | {rows[1]['ms_16']}, {rows[1]['mib_16']} |" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs the lines <!-- measured mixers -->"):
        tool.main(["--out", str(out), "--page", str(page)])
