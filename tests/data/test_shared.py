"""Files that two splits have in common."""
from visionattn.data.reading import Faults, shared_files

from .images import write_image


def test_the_same_picture_is_found_under_another_name(tmp_path):
    train = [write_image(tmp_path / "train" / f"{seed}.png", seed=seed) for seed in range(3)]
    val = [write_image(tmp_path / "val" / "0.png", seed=7), write_image(tmp_path / "val" / "copy.png", seed=1)]
    assert shared_files(val, train) == [val[1]]
    assert shared_files([*val, train[2], tmp_path / "lost.png"], train) == [val[1], train[2]]


def test_faults_are_listed_and_those_that_are_only_noted_do_not_stop(tmp_path):
    faults = Faults(tmp_path, "raise")
    faults.note("line 3", "a box has no width", "a.txt", "left out")
    assert faults.listed == [("line 3 (a.txt)", "a box has no width", "left out")]
    assert faults.more == 0
