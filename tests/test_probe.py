"""``visionattn probe``: heads on features that are kept on disk, and the run that the best of them becomes."""
import csv
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionattn import Predictor, features
from visionattn.cli import main
from visionattn.probe import probe

CLASSES = {"green": (0, 1, 0), "red": (1, 0, 0), "white": (1, 1, 1)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve, six and six noisy images of each of three colours, and a model's weights."""
    root, random = tmp_path_factory.mktemp("probed"), np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for name, color in CLASSES.items():
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 100, (40, 40, 3)) + 140 * np.array(color)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), root / "weights.pth")
    return root


def run(photos, out, **options):
    return probe("test_vit", photos / "photos", out, **dict(
        checkpoint=str(photos / "weights.pth"), image_size=32, epochs=20, batch_size=16, workers=0,
        cache=out.parent / "features") | options)


def test_heads_learn_and_the_best_is_a_run(photos, tmp_path):
    out = tmp_path / "run"
    found = {row.head: row for row in run(photos, out)}
    assert list(found) == ["mean", "token", "attention", "ep", "ep_all", "knn"]
    assert max(row.val_accuracy for row in found.values()) > 0.8  # one third is chance
    assert found["mean"].trained == 64 * 3 + 3
    assert found["ep"].trained == 32 * 64 + 64 * 64 + 64 * 3 + 3
    assert found["knn"].trained == 0
    with (out / "probe.csv").open(newline="") as file:
        assert [row["head"] for row in csv.DictReader(file)] == list(found)
    best = max((row for row in found.values() if row.trained), key=lambda row: row.val_accuracy)
    predictor = Predictor(out)
    files = sorted((photos / "photos" / "test").glob("*/*.png"))
    right = [predictor(file).name == file.parent.name for file in files]
    assert sum(right) / len(files) == pytest.approx(best.test_accuracy)


def test_features_are_computed_once(photos, tmp_path, monkeypatch):
    computed, compute = [], features._compute
    monkeypatch.setattr(features, "_compute", lambda *args: computed.append(args[2]) or compute(*args))

    def again(**options):
        computed.clear()
        result = run(photos, tmp_path / "run", **dict(epochs=2, heads=["mean", "knn"]) | options)
        return [row[:-1] for row in result], list(computed)

    first, counts = again()
    assert counts == [36, 18, 18]
    assert again() == (first, [])
    assert again(image_size=64)[1] == [36, 18, 18]
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    _, counts = again(checkpoint=str(tmp_path / "other.pth"))
    assert counts == [36, 18, 18]
    touched = photos / "photos" / "val" / "red" / "0.png"
    os.utime(touched, ns=(1, 1))
    assert again() == (first, [18])
    damaged = max((tmp_path / "features").rglob("features.npy"), key=lambda path: path.stat().st_mtime_ns)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert again() == (first, [18])
    assert not list((tmp_path / "features").glob("*.part"))


def test_large_features_are_kept_in_single_precision(photos, tmp_path, monkeypatch):
    tokens_of = features.tokens_of
    monkeypatch.setattr(features, "tokens_of", lambda *args: 1e6 * tokens_of(*args))
    run(photos, tmp_path / "run", epochs=1, heads=["mean"])
    assert {np.load(file).dtype for file in (tmp_path / "features").rglob("*.npy")} == {np.dtype(np.float32)}
    monkeypatch.setattr(features, "tokens_of", lambda *args: torch.nan * tokens_of(*args))
    with pytest.raises(ValueError, match="features of image 0 to 15 are not finite numbers"):
        run(photos, tmp_path / "other", epochs=1, heads=["mean"], cache=tmp_path / "fresh")
    assert not list((tmp_path / "fresh").iterdir())


@pytest.mark.slow
def test_maps_and_export(photos, tmp_path, monkeypatch, capsys):
    """A model of maps, by the command; its file says what the run says."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_dinat").state_dict(), "weights.pth")
    assert main(["probe", "--model", "test_dinat", "--checkpoint", "weights.pth", "--data", str(photos / "photos"),
                 "--image-size", "32", "--epochs", "5", "--batch-size", "8", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isalpha()][:5] == ["head", "mean", "attention", "ep", "knn"]
    image = next((photos / "photos" / "test").glob("*/*.png"))
    run, file = (Predictor(tmp_path / "runs" / "probe-test_dinat" / name)(image) for name in ("", "model.onnx"))
    assert run.probability == pytest.approx(file.probability, abs=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    (dict(epochs=0), "epochs must be 1 or more"),
    (dict(heads=["ep"], checkpoint="none.pth"), "checkpoint none.pth does not exist"),
])
def test_what_cannot_be_done_is_said(photos, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(photos, tmp_path / "run", **options)


def test_several_labels_are_refused(photos, tmp_path):
    folder = photos / "photos" / "train" / "red"
    (tmp_path / "labels.csv").write_text("file,labels\n" + "".join(
        f"{file},{'a;b' if number % 2 else 'a'}\n" for number, file in enumerate(sorted(folder.iterdir()))))
    with pytest.raises(ValueError, match="several labels for an image, and probing is for data with one"):
        probe("test_vit", tmp_path / "labels.csv", tmp_path / "run", checkpoint=str(photos / "weights.pth"),
              image_size=32, workers=0)
