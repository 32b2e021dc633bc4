"""``visionattn bench data``: both rates are there, and the verdict follows from them."""
import re

import pytest

from visionattn.cli import main
from visionattn.tasks.bench_data import verdict


def test_a_recipe_is_timed_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "data", "digits_dinat", "--model.backbone", "test_dinat", "--data.batch_size", "16",
                 "--trainer.accelerator", "cpu"]) == 0
    said = capsys.readouterr().out
    rates = [float(re.search(rf"The {what} ([\d,.]+) images/s", said)[1].replace(",", ""))
             for what in ("loader gives", "model takes")]
    assert min(rates) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("loaded", "needed", "workers", "expected"), [
    (100, 400, 2, "The model waits, 75% of its time: raise data.init_args.num_workers"),
    (400, 100, 2, "The loader waits: its processes are idle 75% of their time"),
    (100, 100, 0, "about 50.0: set data.init_args.num_workers to 1 or more"),
])
def test_what_waits_is_told_by_the_rates(loaded, needed, workers, expected):
    assert expected in verdict(loaded, needed, workers, "CPU")


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match=r"more than 3 batches to be timed: take a smaller data.init_args.batch_size"):
        verdict(0, 10, 1, "CPU")
