"""The tool that compares ways to tune a backbone: rows go on where the file ends, and become a table."""
import csv

import pytest

from tests.tools import load_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("measure_adapters")


@pytest.mark.slow
def test_every_method_is_measured_once(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "TURNS", 1)
    out, page = tmp_path / "adapters.csv", tmp_path / "page.md"
    page.write_text(f"Before\n{tool.START}\n{tool.END}\nAfter\n")
    options = ["--out", str(out), "--epochs", "1", "--seeds", "0"]
    assert tool.main([*options, "--methods", "full", "knn"]) == 0
    assert tool.main([*options, "--page", str(page)]) == 0
    with out.open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["full", "knn", *[name for name in tool.METHODS if name not in ("full", "knn")]]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows.values())
    assert int(rows["full"]["trained"]) == int(rows["full"]["parameters"])
    assert int(rows["knn"]["trained"]) == 0 < int(rows["knn"]["bytes"])
    for name, row in rows.items():
        if name.startswith(("lora", "onebit")):
            assert int(row["trained"]) < 0.02 * int(row["parameters"])
    assert int(rows["onebit_lora"]["bytes"]) < int(rows["lora"]["bytes"]) / 5
    assert page.read_text().count("\n|") == 2 + len(tool.METHODS)


def test_the_table_has_a_line_for_each_method(tool, tmp_path):
    source, page = tmp_path / "adapters.csv", tmp_path / "page.md"
    source.write_text("method,seed,accuracy,trained,parameters,bytes,step,peak_mib\n" + "".join(
        f"{name},{seed},{accuracy},{trained},1000,{size},{step},2\n" for name, seed, accuracy, trained, size, step in (
            ("knn", 0, 0.5, 0, 1234, 0), ("full", 0, 0.9, 1000, 4000, 1), ("full", 1, 0.8, 1000, 4000, 1.2))))
    page.write_text(f"Before\n{tool.START}\n{tool.END}\nAfter\n")
    tool.write_table(source, page)
    lines = page.read_text().splitlines()
    assert lines[5:7] == [
        "| everything | 2 | 85.0 | 80.0 to 90.0 | 1,000 | 100.00 % | 4,000 bytes | 1.10 | 2.0 MiB |",
        "| 20 nearest neighbours | 1 | 50.0 | 50.0 to 50.0 | 0 | 0.00 % | 1,234 bytes | - | - |"]
