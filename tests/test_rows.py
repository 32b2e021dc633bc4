"""Rows of the tools: their columns are the file's, whatever their order; a table goes between its marks."""
import pytest

from tests.tools import load_tool

rows = load_tool("rows")


def test_rows_go_by_the_columns_of_the_file(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows.append_rows(path, [{"name": "a", "ms": 1, "bytes": 2}])
    rows.append_rows(path, [{"name": "b", "bytes": 4, "ms": 3}, {"bytes": 6, "name": "c"}])
    assert rows.read_rows(path) == [
        {"name": "a", "ms": "1", "bytes": "2"}, {"name": "b", "ms": "3", "bytes": "4"},
        {"name": "c", "ms": "", "bytes": "6"}]
    with pytest.raises(ValueError, match="mib"):
        rows.append_rows(path, [{"name": "d", "mib": 1}])
    assert len(rows.read_rows(path)) == 3


def test_a_page_without_marks_stays_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before <start> old <end> after")
    rows.write_between(page, "<start>", "<end>", ["| new |"])
    assert page.read_text() == "before <start>\n\n| new |\n\n<end> after"
    with pytest.raises(ValueError, match="needs the lines <begin> and <end>"):
        rows.write_between(page, "<begin>", "<end>", ["| newer |"])
    assert "| new |" in page.read_text()
