"""The tool that compares two checkouts: what agrees is timed, what differs is said."""
import csv
import shutil
from pathlib import Path

import pytest

from tests.tools import load_tool

ROOT = Path(__file__).parent.parent

compare_versions = load_tool("compare_versions")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A checkout whose agent attention gives one per cent more."""
    checkout = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "visionattn", checkout / "visionattn", ignore=shutil.ignore_patterns("__pycache__"))
    file = checkout / "visionattn" / "ops" / "agent" / "fused.py"
    text = file.read_text()
    line = "    gathered = sdpa_of_few_keys("
    assert line in text
    file.write_text(text.replace(line, f"    v = v * 1.01\n{line}"))
    return checkout


def run(before, after, tmp_path, *options):
    out = tmp_path / "new" / "compared.csv"
    code = compare_versions.main([
        str(before), str(after), "--turns", "1", "--bound", "1000000", "--out", str(out), *options])
    with out.open(newline="") as file:
        return code, {(row["name"], row["direction"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_what_agrees_is_timed_and_what_differs_is_said(changed, tmp_path, capsys):
    code, rows = run(ROOT, changed, tmp_path, "--only", "agent_attention/small", "routed_attention/small",
                     "--processor-time")
    assert code == 1
    assert len(rows) == 4
    for direction in compare_versions.DIRECTIONS:
        same, other = rows["routed_attention/small", direction], rows["agent_attention/small", direction]
        assert float(same["ratio"]) > 0
        assert float(same["before_ms"]) > 0
        assert float(same["error"]) == 0
        assert other["ratio"] == other["before_ms"] == ""
        assert other["note"].startswith("results differ by ")
    assert "could not be compared: 2 of 4\n  agent_attention/small forward: results differ" in capsys.readouterr().out


def test_a_model_is_compared_with_the_same_weights(tmp_path):
    code, rows = run(ROOT, ROOT, tmp_path, "--only", "test_agent_deit")
    assert code == 0
    assert {row["name"] for row in rows.values()} == {"test_agent_deit"}
    assert all(float(row["ratio"]) > 0 for row in rows.values())


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of visionattn"):
        compare_versions.main([str(tmp_path), str(ROOT)])
