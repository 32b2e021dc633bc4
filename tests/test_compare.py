"""visionattn compare: what run folders tell, side by side; what is none ends in one line."""
import csv
import json

import pytest
import yaml
from matplotlib.image import imread

from visionattn.cli import main


def _run(folder, lr, accuracy, ended=True, **model_args):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "seed_everything": 0,
        "trainer": {"max_epochs": 3, "default_root_dir": str(folder)},
        "model": {"class_path": "visionattn.tasks.ClassificationTask",
                  "init_args": {"backbone": "test_biformer", "lr": lr, "model_args": model_args or None}},
        "data": {"class_path": "visionattn.data.DigitsData", "init_args": {"batch_size": 64}}}))
    rows = [["epoch", "step", "lr", "train/loss_epoch", "train/loss_step", "val/accuracy"]]
    for epoch, value in enumerate(accuracy):
        rows += [[epoch, epoch, "", "", "0.5", ""], [epoch, epoch, "", "", "", value],
                 [epoch, epoch, lr, 1 / (epoch + 1), "", ""]]
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    if ended:
        (folder / "summary.json").write_text(json.dumps({
            "task": "ClassificationTask", "model": "test_biformer", "parameters": 373194, "epochs": len(accuracy),
            "metric": "val/accuracy", "best": max(accuracy), "best_epoch": accuracy.index(max(accuracy)) + 1,
            "seconds": 75.2, "images_per_second": 812.3, "device": "CPU",
            "test": {"accuracy": 0.9, "num_images": 300}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [_run(tmp_path / "犬", 1e-3, [0.5, 0.95, 0.9]), _run(tmp_path / "b", 1e-2, [0.4, 0.3], ended=False, n_win=4)]


def test_table_and_picture(runs, tmp_path, capsys):
    picture, table = tmp_path / "out" / "a.png", tmp_path / "out" / "a.csv"
    assert main(["compare", *map(str, runs), "--picture", str(picture), "--csv", str(table)]) == 0
    lines = [[cell for cell in line.split("  ") if cell] for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: [cell.strip() for cell in line[1:]] for line in lines}
    assert shown["run"] == ["犬", "b"]
    assert shown["parameters"] == ["373,194", "-"]
    assert shown["best val/accuracy"] == ["0.95", "0.4"]
    assert shown["in epoch"] == ["2", "1"]
    assert shown["epochs"] == ["3", "2"]
    assert shown["test accuracy"] == ["0.9", "-"]
    assert shown["training time"] == ["1:15", "-"]
    assert shown["model.init_args.lr"] == ["0.001", "0.01"]
    assert shown["model.init_args.model_args"] == ["-", "{'n_win': 4}"]
    assert not {"trainer.default_root_dir", "trainer.max_epochs", "test num_images"} & shown.keys()
    with table.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["run"], first["parameters"], second["model.init_args.lr"]) == ("犬", "373194", "0.01")
    assert imread(picture).shape[1] > 1000  # loss, accuracy and learning rate


def test_no_run(runs, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 3")
    for folder, words in (("nowhere", "is no folder"), ("other", "is no run folder: it has no config.yaml")):
        assert main(["compare", str(runs[0]), str(tmp_path / folder)]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"visionattn: error: {tmp_path / folder} {words}")
