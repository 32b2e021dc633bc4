"""The tool that measures class-incremental training: its letters, and the table of its rows."""

import numpy as np
import pytest
from PIL import Image

from tests.tools import load_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("measure_incremental")


def test_letters_are_drawn_alike_each_time_and_none_is_a_digit(tool, tmp_path, monkeypatch):
    assert not set(tool.LETTERS) & set("0123456789IOlosSZz")
    monkeypatch.setattr(tool, "LETTERS", ["A", "t"])
    monkeypatch.setattr(tool, "COPIES", 2)
    for name in ("one", "two"):
        tool.write_letters(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert {path.parent.name for path in files} == {"capital_a", "small_t"}
    seen = set()
    for file in files:
        pixels, again = (np.asarray(Image.open(tmp_path / name / file)) for name in ("one", "two"))
        assert pixels.shape == (8, 8)
        assert pixels.max() > 100
        assert (pixels == again).all()
        seen.add(pixels.tobytes())
    assert len(seen) == len(files) > 60


def test_the_table_has_means_of_seeds_and_of_steps(tool, tmp_path):
    rows = [(seed, method, step, 2 * step, value + seed / 100) for seed in (0, 1)
            for method, value in (("incremental", 0.9), ("finetune", 0.5), ("joint", 0.95)) for step in (1, 2)]
    (tmp_path / "rows.csv").write_text("seed,method,step,classes,accuracy\n" + "".join(
        ",".join(map(str, row)) + "\n" for row in rows))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    assert tool.main(["--out", str(tmp_path / "rows.csv"), "--page", str(page)]) == 0
    text = page.read_text()
    assert "| | 2 classes | 4 classes | average | least to most at the end |" in text
    assert "| step by step, adapters | 90.5 | 90.5 | 90.5 | 90.0 to 91.0 |" in text
    assert "| all classes at once, all weights | 95.5 | 95.5 | 95.5 | 95.0 to 96.0 |" in text
    assert "old" not in text
