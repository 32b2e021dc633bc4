"""Several labels for an image: metrics and thresholds against scikit-learn, and a run from a table to predictions."""
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch.nn.functional import binary_cross_entropy_with_logits

from visionattn.cli import main
from visionattn.export.facts import facts
from visionattn.tasks import ClassificationTask
from visionattn.tasks.multilabel import average_precisions, best_thresholds, threshold_scores
from visionattn.tasks.rebuild import create_model

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 220, 60)}


def _scores(seed, classes=4, count=60):
    rng = np.random.default_rng(seed)
    labels = rng.random((count, classes)) < 0.3
    labels[:, -1] = False  # a class of which there is no image
    return torch.tensor(np.round(rng.random((count, classes)) * 0.7 + 0.3 * labels, 2)).float(), torch.tensor(labels)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_scikit_learn(seed):
    scores, labels = _scores(seed)
    found = average_precisions(scores, labels)
    expected = [average_precision_score(labels[:, label], scores[:, label]) for label in range(3)]
    assert found[:3].tolist() == pytest.approx(expected, abs=1e-5)
    assert found[3].isnan()
    assert average_precisions(scores[:, :1], labels[:, :1]).tolist() == pytest.approx(expected[:1], abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_have_the_best_f1(seed):
    scores, labels = _scores(seed)
    thresholds = best_thresholds(scores, labels)
    found = threshold_scores(scores, labels, thresholds)["f1"]
    for label in range(3):
        every = [f1_score(labels[:, label], scores[:, label] >= least) for least in scores[:, label].unique().tolist()]
        assert found[label].item() == pytest.approx(max(every), abs=1e-6)
    assert thresholds[3] == 0.5
    assert found[3].isnan()


def test_loss():
    task = ClassificationTask(
        "test_dinat", num_classes=3, multi_label=True, label_smoothing=0.2, class_weights=[1, 2, 3])
    logits, labels = torch.randn(4, 3), torch.tensor([[1., 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    expected = binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1, pos_weight=torch.tensor([1., 2, 3]))
    assert torch.equal(task._training_loss(logits, labels), expected)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"class_weights": [1.0, 2.0]}, "class_weights must be balanced or 3 numbers"),
    ({"class_weights": "equal"}, "class_weights must be balanced"), ({"class_weights": [1, -1, 1]}, "must be positive"),
])
def test_bad_weights(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask("test_dinat", num_classes=3, **kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a table whose images have squares of colours, and its folder of data."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    (root / "images").mkdir()
    rows = []
    for index in range(48):
        image = rng.integers(80, 110, (36, 36, 3)).astype(np.uint8)
        names = [name for name in COLOURS if rng.random() < 0.4]
        for place, name in enumerate(names):
            image[4:32, 4 + 10 * place:12 + 10 * place] = COLOURS[name]
        Image.fromarray(image).save(root / "images" / f"{index}.png")
        rows.append(f"{index},{';'.join(names)}\n")
    (root / "labels.csv").write_text("image,tags\n" + "".join(rows))
    arguments = [
        "fit", "--model", "ClassificationTask", "--model.backbone", "test_dinat", "--model.lr", "3e-3",
        "--model.warmup_epochs", "1", "--model.mixup", "0.2", "--model.cutmix", "1.0", "--model.ema_decay", "0.9",
        "--model.class_weights", "balanced", "--data", "CsvData", "--data.root", root, "--data.image_size", "32",
        "--data.batch_size", "8", "--data.num_workers", "0", "--data.auto_augment", "null",
        "--data.random_erasing", "0", "--data.scale", "[0.8, 1.0]", "--data.balanced_sampling", "true",
        "--trainer.max_epochs", "10", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", root / "run"]
    assert main(list(map(str, arguments))) == 0
    return root / "run"


def test_run(run):
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["map"] > 0.8
    assert set(metrics["per_class"]) == {"blue", "green", "red"}
    assert metrics["f1"] == pytest.approx(np.mean([found["f1"] for found in metrics["per_class"].values()]), abs=1e-5)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    kept = best["hyper_parameters"]["_thresholds"]
    assert [found["threshold"] for found in metrics["per_class"].values()] == pytest.approx(kept, abs=1e-6)
    assert best["hyper_parameters"]["multi_label"] is True
    assert "monitor" in next(str(key) for key in best["callbacks"] if "val/map" in str(key))


def test_test_and_predict(run):
    metrics = (run / "test_metrics.json").read_text()
    assert main(["test", "--config", str(run / "config.yaml")]) == 0
    assert json.loads((run / "test_metrics.json").read_text()) == json.loads(metrics)
    assert main(["predict", "--config", str(run / "config.yaml")]) == 0
    thresholds = {name: found["threshold"] for name, found in json.loads(metrics)["per_class"].items()}
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == json.loads(metrics)["num_images"]
    for row in rows:
        present = [name for name, least in thresholds.items() if float(row[name]) >= least]
        assert row["labels"].split("|") == (present or [""])


def test_an_exported_file_says_so(run):
    found = facts(create_model(None, run / "checkpoints" / "best.ckpt"), (1, 3, 32, 32))
    assert found["multi_label"] is True
    assert len(found["thresholds"]) == 3


def test_a_run_of_one_label_each_is_another(run, capfd):
    argv = ["test", "--config", str(run / "config.yaml"), "--data.multi_label", "false", "--data.on_error", "skip"]
    assert main(argv) == 1
    assert "its multi_label is True, the configuration's is False" in capfd.readouterr().err
