"""The tool that says how the ops' time grows, and from how many tokens they beat full attention."""
import csv

import pytest

from tests.tools import load_tool


@pytest.fixture
def tool():
    return load_tool("write_scaling_table")


def test_slopes_and_crossings(tool):
    ours, full = {n: 3e-3 * n for n in (200, 800, 3200)}, {n: 1e-5 * n ** 2 for n in (200, 800, 3200)}
    assert tool.slope(ours) == pytest.approx(1)
    assert tool.slope(full) == pytest.approx(2)
    assert tool.beats_from(ours, full) == pytest.approx(300)  # where 3e-3 n is 1e-5 n^2
    assert tool.beats_from(full, ours) is None
    assert tool.beats_from({n: ms / 9 for n, ms in ours.items()}, full) == 0
    assert tool.beats_from({200: 1., 800: 9., 3200: 1.}, {200: 2., 800: 3., 3200: 9.}) > 800  # the last crossing counts


def test_table(tool, tmp_path):
    """Times are those of a head; the first of our backends that ran counts; cases of one kind are one row."""
    rows = [
        dict(op="reversed", case=case, direction="forward", backend=backend, best_ms=ms, ratio_to_ours=ratio,
             shape=shape)
        for case, shape, times in (
            ("14x14", "1x196x2x32", (("blocked", 2., 1), ("naive", 1., 0.5), ("dense_sdpa", 1., 0.5))),
            ("28x28", "1x784x2x32", (("blocked", 8., 1), ("dense_sdpa", 16., 2))),
            ("128x128", "1x16384x1x32", (("blocked", 84., 1), ("naive", "", ""), ("dense_sdpa", 840., 10))),
            ("tiny", "1x196x12x16", (("blocked", 7., 1),)),
        )
        for backend, ms, ratio in times]
    source, page = tmp_path / "reversed.csv", tmp_path / "page.md"
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine", "threads", "torch"])
        writer.writeheader()
        writer.writerows(row | {"machine": "a CPU", "threads": 1, "torch": "2"} for row in rows)
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    tool.write_scaling_table([source], page)
    text = page.read_text()
    assert "old" not in text
    assert "a CPU, 1 threads, torch 2." in text
    assert "| reversed | 196 to 16,384 | 1.00 | 1.00 | 84 | 840 | 390 |" in text
