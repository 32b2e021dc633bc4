"""``visionattn analyze``: what it writes, for timm's models and one of each family, and the page in a browser."""
import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.models.test_families import FAMILIES, SMALL, family, make
from tests.pages import act
from visionattn import Predictor
from visionattn.analysis import find_heads, load_pruned, pruned_heads
from visionattn.analysis.analyze import analyze
from visionattn.cli import main

COLORS = {"green": (0, 1, 0), "red": (1, 0, 0)}
TIMM = {
    "vit": ("test_vit", {}),
    "deit": ("deit_tiny_distilled_patch16_224", dict(img_size=64, embed_dim=24, depth=2, num_heads=3)),
    "swin": ("swin_tiny_patch4_window7_224", dict(
        img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)),
}


def write_images(root, classes):
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for name, color in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = random.randint(0, 100, (64, 64, 3)) + 140 * np.array(color)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), COLORS)


def predictor_of(model, name="test_vit"):
    """A predictor by a model's name, with this model in place of its own."""
    predictor = Predictor(name, "cpu", pretrained=False)
    predictor.engine.model = model.eval()
    return predictor


@pytest.mark.slow
def test_command(photos, tmp_path, capsys, said):
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    out = tmp_path / "out"
    assert main(["analyze", "test_vit", str(photos), "--checkpoint", str(tmp_path / "weights.pth"), "--images", "2",
                 "--out", str(out), "--prune", "1", "--device", "cpu"]) == 0
    with (out / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    heads = [(one.name, str(head)) for one in find_heads(model) for head in range(one.count)]
    assert [(row["layer"], row["head"]) for row in rows] == heads
    assert not any(row["why"] for row in rows)
    assert all(float(row[key]) >= 0 for row in rows for key in (
        "gradient", "loss_without", "accuracy_without", "distance", "entropy", "class_share", "self_share", "cluster"))
    least = min(rows, key=lambda row: float(row["gradient"]))
    pruned = load_pruned(timm.create_model("test_vit"), out / "pruned.safetensors")
    assert pruned_heads(pruned) == {least["layer"]: [int(least["head"])]}
    printed = capsys.readouterr().out
    assert f"before{len(rows):>12}" in printed
    assert f"after{len(rows) - 1:>13}" in printed
    assert "None of the classes is the model's" in said.text
    assert {"heads.png", "clusters.png"} < {file.name for file in out.iterdir()}
    found = json.loads(act(out / "heads.html", """
        const name = () => byId("name").textContent, numbers = () => byId("numbers").textContent;
        const pixels = () => byId("map").toDataURL();
        const buttons = [...document.querySelectorAll("#grid button")];
        const seen = [[name(), numbers(), pixels()]];
        buttons[1].dispatchEvent(new PointerEvent("pointerenter"));
        seen.push([name(), numbers(), pixels()]);
        byId("grid").dispatchEvent(new PointerEvent("pointerleave"));
        seen.push([name(), numbers(), pixels()]);
        buttons[1].click();
        byId("grid").dispatchEvent(new PointerEvent("pointerleave"));
        seen.push([name(), numbers(), pixels()]);
        const before = buttons.map(button => button.style.background);
        byId("measure").value = "entropy";
        byId("measure").dispatchEvent(new Event("change"));
        return {seen, count: buttons.length, before, after: buttons.map(button => button.style.background)};
    """))
    first, pointed, left, kept = found["seen"]
    assert found["count"] == len(rows)
    assert left == first
    assert kept == pointed
    assert pointed[0] == f"{rows[1]['layer']}, head 1"
    assert all(one != other for one, other in zip(first, pointed, strict=True))
    assert found["before"] != found["after"]


def test_classes_of_the_data_and_of_the_model(tmp_path, said):
    model = timm.create_model("test_vit")
    labels = write_images(tmp_path / "labels", {"3": (0, 1, 0), "17": (1, 0, 0)})
    predictor = predictor_of(model)
    predictor.engine.meaning = predictor.engine.meaning._replace(names=[str(label) for label in range(1000)])
    with torch.no_grad():
        model.head.bias[17] += 1000
    analyze("test_vit", predictor, labels, tmp_path / "out", images=2)
    with (tmp_path / "out" / "heads.csv").open(newline="") as file:
        assert {row["accuracy_without"] for row in csv.DictReader(file)} == {"0.5"}
    assert "takes the place of labels" not in said.text
    mixed = write_images(tmp_path / "mixed", {"3": (0, 1, 0), "red": (1, 0, 0)})
    with pytest.raises(ValueError, match="has the class red, which the model does not know"):
        analyze("test_vit", predictor, mixed, tmp_path / "out")


def test_what_cannot_be_analyzed(photos, tmp_path):
    predictor = predictor_of(timm.create_model("test_vit"))
    with pytest.raises(ValueError, match="at most"):
        analyze("test_vit", predictor, photos, tmp_path, prune=1000)
    with pytest.raises(ValueError, match="images and batch must be 1 or more"):
        analyze("test_vit", predictor, photos, tmp_path, images=0)
    with pytest.raises(ValueError, match="no attention with heads"):
        analyze("test_resnet", predictor_of(timm.create_model("test_resnet")), photos, tmp_path, images=1)
    assert list(tmp_path.iterdir()) == []


FIRST = {family(name): name for name in reversed(SMALL)}  # the first of each family


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*TIMM, *(name for name in FAMILIES if name != "cnn_attention")])
def test_models(kind, photos, tmp_path):
    if kind in TIMM:
        name, args = TIMM[kind]
        torch.manual_seed(0)
        model = timm.create_model(name, **args)
    else:
        name = FIRST[kind]
        model = make(name)
    predictor = predictor_of(model)
    if kind != "vit":  # which takes 160 x 160 alone
        predictor.engine.config["resize"] |= {"centre_crop": [64, 64], "shorter_side": 64}
    rows = analyze(name, predictor, photos, tmp_path, images=1)
    masked = kind != "modular_vit"  # whose heads are experts
    assert all((row.gradient >= 0) == (row.loss_without >= 0) == masked for row in rows)
    assert all(bool(row.why) != masked for row in rows)
    assert all(row.entropy >= 0 for row in rows)
    assert any(row.distance > 0 for row in rows)
    assert all(row.distance >= 0 or np.isnan(row.distance) for row in rows)
    assert {"heads.csv", "heads.html", "heads.png", "clusters.png"} == {file.name for file in tmp_path.iterdir()}
