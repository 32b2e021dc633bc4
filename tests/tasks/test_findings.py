"""What a test finds beside its metrics: counted rightly, bounded in memory, drawn whatever the names are."""
import csv
import json
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from visionattn.data import DigitScenesData
from visionattn.tasks import DetectionTask, SegmentationTask
from visionattn.tasks.calibration import calibration_bins, calibration_error, fit_temperature
from visionattn.tasks.charts import Tile, draw_confusion, draw_curves, draw_sheet
from visionattn.tasks.findings import WORST, Mistakes, class_rows, thumbnail
from visionattn.tasks.matching import match_objects

FAR = ["犬", "кошка", "قطة", "$x^2$ and $", "line\nbreak", "a name that is too long to be shown as it is", "", "x_y"]


@pytest.fixture(autouse=True)
def no_warnings():
    """Such as those of a letter that no font has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="matplotlib|visionattn")
        warnings.filterwarnings("ignore", "'.*' deprecated - use")  # older matplotlib's use of pyparsing
        yield


def _table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _counts(path):
    with path.open(newline="", encoding="utf-8") as file:
        return np.array([[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])


# Counting

def test_worst_mistakes_of_two_processes():
    badness = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    made, kept = [], []
    for part in (badness[:50], badness[50:]):
        mistakes = Mistakes()
        for value in part:
            mistakes.add(value, lambda value=value: made.append(value) or Tile(np.zeros((1, 1, 3)), str(value)))
        kept += mistakes.take()
        assert mistakes.take() == []
    assert len(kept) == 2 * WORST
    assert len(made) < 100
    assert [tile.text for tile in Mistakes.worst(kept)] == [str(value) for value in range(99, 99 - WORST, -1)]


def test_calibration_error():
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (500,), generator=torch.Generator().manual_seed(1))
    bins = sum(calibration_bins(logits[part::3], labels[part::3]) for part in range(3))
    expected = multiclass_calibration_error(logits.softmax(dim=1), labels, 4, n_bins=15, norm="l1")
    assert calibration_error(bins) == pytest.approx(expected.item(), abs=1e-5)
    assert bins[:, 0].sum() == 500


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature(temperature):
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(dim=1), 1, generator=generator)[:, 0]
    logits = temperature * true
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    losses = [cross_entropy(logits / (found * factor), labels).item() for factor in (0.99, 1, 1.01)]
    assert min(losses) == losses[1]


def test_temperature_of_predictions_that_are_all_right():
    assert fit_temperature(torch.eye(3) * 2, torch.arange(3)) == pytest.approx(0.05)


def test_class_rows():
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 4]])
    assert class_rows(["a", "b"], counts, "objects") == [
        {"class": "a", "objects": 4, "predicted": 5, "right": 3, "precision": 0.6, "recall": 0.75},
        {"class": "b", "objects": 0, "predicted": 1, "right": 0, "precision": 0.0, "recall": None}]


def test_objects_are_matched():
    truth = {"boxes": torch.tensor([[0., 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [50, 50, 90, 90]]),
             "labels": torch.tensor([1, 2, 1, 1]), "iscrowd": torch.tensor([0, 0, 0, 1])}
    found = {
        "boxes": torch.tensor([
            [1., 0, 10, 10],  # of another class, and surer than
            [0, 0, 10, 9],  # the right one
            [20, 0, 30, 8],  # the wrong class
            [0, 20, 10, 24],  # too small
            [60, 60, 70, 70],  # within the crowd
            [0, 20, 10, 30]]),  # not sure enough
        "labels": torch.tensor([2, 1, 1, 1, 2, 1]), "scores": torch.tensor([0.95, 0.9, 0.8, 0.7, 0.9, 0.4])}
    matches = match_objects(found, truth, 0.5)
    assert (sorted(matches.pairs), matches.missed, matches.false) == ([(1, 1), (2, 1)], [1], [2, 1])
    assert matches.counts(2).tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert matches.errors() == 4
    assert matches.boxes.tolist() == [[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [1, 0, 10, 10], [0, 20, 10, 24]]
    tile = matches.tile(torch.zeros(3, 50, 50), {"orig_size": torch.tensor([100, 100]), "file_name": "a/b.jpg"}, "xy")
    assert tile.text == "missed x\nfalse y as x, y, x\nb.jpg"


def test_nothing_to_match():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    one = {"boxes": torch.tensor([[0., 0, 1, 1]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    assert match_objects(empty, empty, 0.5).errors() == 0
    assert match_objects(one, empty, 0.5).false == match_objects(empty, one, 0.5).missed == [1]


def test_thumbnail():
    image = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(3, 600, 300)
    assert thumbnail(image).shape == (240, 120, 3)
    assert thumbnail((image - 0.4) / 0.2, ([0.4] * 3, [0.2] * 3))[0, 0].tolist() == [0, 128, 255]
    assert thumbnail(image[1:2])[0, 0].tolist() == [128, 128, 128]


# Drawing

@pytest.mark.parametrize("names", [["a", "b"], FAR, [f"breed {number}" for number in range(120)]], ids=len)
def test_confusion_matrix_is_drawn(names, tmp_path):
    counts = np.diag(np.arange(len(names)))  # the first class is empty
    draw_confusion(tmp_path / "a.png", counts, names, "title")
    picture = imread(tmp_path / "a.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.05


def test_sheet_and_curves_are_drawn(tmp_path):
    wide, high = np.zeros((10, 40, 3), np.uint8), np.zeros((40, 20, 3), np.uint8)
    draw_sheet(tmp_path / "sheet.png", [Tile(wide, "\n".join(FAR[:4])), Tile(high, ""), Tile(wide, FAR[5])], FAR[0])
    draw_curves(tmp_path / "curves.png", {FAR[3]: {FAR[0]: [(1, 0.5)], "b": [(1, 1), (2, 3)]}, "empty": {"c": []}})
    assert imread(tmp_path / "sheet.png").std() > 0.05
    assert imread(tmp_path / "curves.png").shape[1] < 600  # one panel


# Of the tasks; the classifier's are in test_cli

def _test(module, tmp_path, **data):
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False)
    data = DigitScenesData(image_size=64, digits=[1, 2], digit_size=[24, 32], test_scenes=6, batch_size=4, **data)
    trainer.test(module, data, verbose=False)
    return json.loads((tmp_path / "test_metrics.json").read_text()), data


def test_findings_of_segmentation(tmp_path):
    torch.manual_seed(0)
    names = [FAR[0], *map(str, range(10))]
    task = SegmentationTask("test_biformer", 11, names, head="semantic_fpn", head_channels=8)
    metrics, _ = _test(task, tmp_path, task="segmentation")
    counts, rows = _counts(tmp_path / "confusion.csv"), _table(tmp_path / "classes.csv")
    assert counts.sum() == 6 * 64 * 64
    assert np.trace(counts) / counts.sum() == pytest.approx(metrics["accuracy"], abs=1e-6)
    assert [row["class"] for row in rows] == names
    assert [float(row["iou"]) if row["iou"] else None for row in rows] == list(metrics["iou"].values())
    assert {path.name for path in tmp_path.glob("*.png")} == {"confusion.png", "mistakes.png"}


def test_findings_of_detection(tmp_path):
    torch.manual_seed(0)
    task = DetectionTask("test_biformer", 10, list("0123456789"), detector="fcos", strides=[8, 16], fpn_channels=64,
                         min_size=64, max_size=64, class_metrics=True, picture_score=0.0)
    metrics, data = _test(task, tmp_path)
    counts, rows = _counts(tmp_path / "confusion.csv"), _table(tmp_path / "classes.csv")
    targets = [target for _, batch in data.test_dataloader() for target in batch]
    labels = [label for target in targets for label in target["labels"].tolist()]
    assert counts.shape == (11, 11)
    assert counts[:10].sum(axis=1).tolist() == [labels.count(label) for label in range(1, 11)]
    assert counts[10].sum() > 0
    assert [int(row["objects"]) for row in rows] == counts[:10].sum(axis=1).tolist()
    precisions = {row["class"]: float(row["box_ap"]) for row in rows if row["box_ap"]}
    assert precisions == metrics["box_map_per_class"]
    assert np.mean(list(precisions.values())) == pytest.approx(metrics["box_map"], abs=1e-5)
    assert {path.name for path in tmp_path.glob("*.png")} == {"confusion.png", "mistakes.png"}
