"""Shipped recipes by their names: from any folder, after files of one's own, and with one line for a slip."""
import re
from pathlib import Path

import pytest
import yaml

from visionattn.cli import main
from visionattn.recipes import RECIPES, with_recipes

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*/*.yaml"))


def _configuration(capsys, *argv):
    with pytest.raises(SystemExit):
        main(["fit", *argv, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["imagefolder_finetune", "imagefolder_finetune.yaml",
                                  "configs/classification/imagefolder_finetune.yaml"])
def test_names_are_found_in_any_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = yaml.safe_load(RECIPES["imagefolder_finetune"].read_text())
    assert _configuration(capsys, "--config", name)["data"]["init_args"].items() >= wanted["data"]["init_args"].items()


def test_equals_sign_and_short_form():
    file = str(RECIPES["coco_finetune"])
    assert with_recipes(["fit", "--config=coco_finetune"]) == ["fit", f"--config={file}"]
    assert with_recipes(["fit", "-c", "coco_finetune", "--seed_everything", "1"]) == [
        "fit", "-c", file, "--seed_everything", "1"]
    assert with_recipes(["fit", "--config", "trainer: {max_epochs: 1}"])[2] == "trainer: {max_epochs: 1}"


def test_a_file_of_that_path_goes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("coco_finetune").mkdir()  # which is no file
    mine = RECIPES["coco_finetune"].read_text().replace("max_epochs: ", "max_epochs: 7")
    Path("coco_finetune.yaml").write_text(mine)
    assert str(_configuration(capsys, "--config", "coco_finetune.yaml")["trainer"]["max_epochs"]).startswith("7")
    assert not str(_configuration(capsys, "--config", "coco_finetune")["trainer"]["max_epochs"]).startswith("7")


def test_a_slip_is_answered_by_similar_names(capfd):
    assert main(["fit", "--config", "imagefolder_finetunes"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "similar names: imagefolder_finetune" in line


def test_the_list_has_every_recipe_once_with_what_it_is_for(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({path.stem for path in CONFIGS}) == len(CONFIGS) == len(RECIPES)
    for path in CONFIGS:
        (line,) = [line for line in lines if line.split()[0] == path.stem]
        assert len(line.split()) > 4
        assert len(line) < 160


def test_the_families_cards_name_recipes_that_there_are():
    named = {name for card in (CONFIGS[0].parents[2] / "docs" / "models").glob("*.md")
             for name in re.findall(r"`(?:[^`]* )?(imagenet\w+|\w+_(?:\dx|[48]0k|160k))`", card.read_text())}
    assert len(named) > 30
    assert named <= set(RECIPES)


def test_one_is_printed_as_it_is(capsys):
    assert main(["recipes", "folder_finetune"]) == 0
    assert capsys.readouterr().out == RECIPES["folder_finetune"].read_text()
