"""The tool that cuts a model of experts to one task: its tasks, its rows, and the table of them."""
import csv

import pytest

from tests.tools import load_tool


@pytest.fixture
def tool():
    return load_tool("measure_experts")


def test_counts(tool):
    """Labels are of the scenes that the images show, in training as in the test."""
    images, labels = next(tool.training_batches("count", 0))
    assert images.shape == (32, 3, 32, 32)
    assert set(labels.tolist()) == {0, 1, 2}
    images, labels = tool.test_set("count")
    assert len(images) == len(labels) == 400
    digits, labels = tool.test_set("read")
    assert len(digits) == 300
    assert set(labels.tolist()) == set(range(10))


def test_rows_and_table(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CLASSES", {"read": 10})
    monkeypatch.setattr(tool, "_onnx", lambda model, folder, images: lambda: model(images))
    out, page = tmp_path / "experts.csv", tmp_path / "page.md"
    assert tool.main(["--steps", "1", "--thresholds", "0", "1", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        whole, same, least = csv.DictReader(file)
    assert [row["threshold"] for row in (whole, same, least)] == ["", "0.0", "1.0"]
    assert (whole["attn_experts"], least["mlp_experts"]) == ("8 8 8", "2 2 2")
    assert whole["accuracy"] == same["accuracy"]
    assert int(least["parameters"]) < 0.5 * int(whole["parameters"])
    assert float(least["ms"]) > 0
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    assert tool.main(["--out", str(out), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| read | whole model | 8+8+8, 8+8+8 | " in text
    assert f"| read | 100 % of tokens | 2+2+2, 2+2+2 | {int(least['parameters']):,} (" in text
