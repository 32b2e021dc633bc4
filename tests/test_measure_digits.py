"""The tool that trains every family on the digits: rows go on where the file ends, and become a table."""
import csv

import pytest

from tests.tools import load_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("measure_digits")


@pytest.mark.slow
def test_a_model_is_trained_once_a_seed(tool, tmp_path, monkeypatch):
    out = tmp_path / "digits.csv"
    options = ["--out", str(out), "--epochs", "1", "--image-size", "32", "--models", "test_agent_deit"]
    assert tool.main([*options, "--seeds", "0"]) == 0
    trained, measure = [], tool.measure
    monkeypatch.setattr(tool, "measure", lambda *args: trained.append(args) or measure(*args))
    assert tool.main([*options, "--seeds", "0", "1"]) == 0
    assert trained == [("test_agent_deit", 1, 1, 32)]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert rows[0]["loss"] != rows[1]["loss"]


def test_the_table_has_the_mean_and_the_spread(tool, tmp_path):
    source, page = tmp_path / "digits.csv", tmp_path / "page.md"
    source.write_text("model,parameters,seed,accuracy\n" + "".join(
        f"{name},1234567,{seed},{accuracy}\n" for name, seed, accuracy in (
            ("test_dinat", 0, 0.97), ("test_dinat", 1, 0.99), ("test_vit", 0, 0.9))))
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    assert tool.main(["--out", str(source), "--page", str(page)]) == 0
    text = page.read_text()
    assert "| test_dinat | 1,234,567 | 2 | 98.0 | 97.0 to 99.0 |" in text
    assert "| timm's test_vit | 1,234,567 | 1 | 90.0 | 90.0 to 90.0 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
