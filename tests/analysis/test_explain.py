"""The command ``visionattn explain``: what it writes, and its page in a browser."""
import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.data.images import coco_content, write_image, write_mask
from tests.models.test_families import SMALL, family, images, make
from tests.pages import act
from tests.test_predict import RUNS, TRAINER
from visionattn import Predictor, cli
from visionattn.analysis.explain import explain
from visionattn.analysis.explain_page import Explained, _data, write_explanation
from visionattn.analysis.looks import Look
from visionattn.runtime.pixels import Decoding

ONE_OF_EACH = list({family(name): name for name in reversed(SMALL)}.values())  # the first of every family


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(file)
    return file


def look(heads=2, rows=3, columns=4, side=5):
    weights = torch.zeros(heads, rows, columns, side, side)
    for row in range(rows):
        for column in range(columns):
            weights[:, row, column, row:row + 2, column:column + 2] = torch.rand(heads, 2, 2) + 0.1
    return Look("a", weights, torch.tensor([[i, i + 1.] for i in range(rows)]),
                torch.tensor([[i, i + 1.] for i in range(columns)]))


def test_the_page_has_the_weights():
    torch.manual_seed(0)
    found = look()
    data = json.loads(json.dumps(_data(found)))
    numbers = {key: np.frombuffer(base64.b64decode(data[key]), kind)
               for key, kind in (("first", np.uint8), ("most", np.float32), ("sum", np.float32))}
    assert data["crop"] == [2, 2]  # of 5 x 5
    weights = torch.cat([found.weights.mean(dim=0, keepdim=True), found.weights]).flatten(1, 2)
    for head, text in enumerate(data["weights"]):
        levels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(12, 2, 2)
        for query in range(12):
            row, column = numbers["first"].reshape(-1, 2)[query]
            again = np.zeros((5, 5))
            again[row:row + 2, column:column + 2] = levels[query] / 255 * numbers["most"].reshape(3, 12)[head, query]
            assert np.abs(again - weights[head, query].numpy()).max() < 1 / 255
    assert np.allclose(numbers["sum"].reshape(3, 12), weights.sum(dim=(2, 3)))


def test_pages_stay_below_ten_megabytes(tmp_path):
    large = Look("a", torch.rand(4, 28, 28, 56, 56), torch.arange(56.).view(28, 2), torch.arange(56.).view(28, 2))
    page = tmp_path / "page.html"
    write_explanation(page, "t", [Explained("m", "", torch.rand(56, 56, 3), [large, look()])])
    assert 1e6 < page.stat().st_size < 1e7


def test_images_that_cannot_be_looked_at(tmp_path, image, capsys):
    assert cli.main(["explain", "test_vit", str(tmp_path / "no.png")]) == 1
    assert "no.png does not exist" in capsys.readouterr().err
    assert cli.main(["explain", "test_vit", str(image.parent)]) == 1
    assert "is not one image: give an image file" in capsys.readouterr().err


def test_what_cannot_be_looked_into(image, tmp_path):
    model = SimpleNamespace(engine=SimpleNamespace(model=make("test_dinat")), names=["cat", "dog", "dog"],
                            task="classification", decoding=Decoding())
    for target, fault in (("emu", "m has no class emu: its classes are cat, dog"), ("dog", "m has 2 classes that are")):
        with pytest.raises(ValueError, match=fault):
            explain([("m", model)], image, tmp_path, target=target)
    exported = SimpleNamespace(engine=SimpleNamespace(), task="classification", decoding=Decoding())
    with pytest.raises(ValueError, match=r"a\.onnx is an exported file"):
        explain([("a.onnx", exported)], image, tmp_path)


def test_the_docs_code_runs():
    page = (Path(__file__).parents[2] / "docs/looking.md").read_text(encoding="utf-8")
    text = page.partition("## Where a model looks")[2].partition("\n## ")[0]
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names = {"torch": torch, "model": make("test_dinat"), "images": images()}
        exec(compile(code, "docs/looking.md", "exec"), names)
        assert len(names["layers"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family(name, image, tmp_path):
    torch.manual_seed(0)
    page = explain([(name, Predictor(name, pretrained=False))], image, tmp_path)
    assert page.stat().st_size < 1e7
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert "Grad-CAM.png" in drawn
    assert len(drawn) > 2 or family(name) == "cnn_attention"
    assert ("dependencies.png" in drawn) == (family(name) == "dependency_vit")
    assert any("routes" in file for file in drawn) == (family(name) == "biformer")
    assert any("clusters" in file for file in drawn) == (family(name) == "routing_vit")
    assert any("agents" in file for file in drawn) == family(name).startswith("agent")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of a segmenter and one of a detector."""
    top = tmp_path_factory.mktemp("runs")
    for split in ("train", "val"):
        (top / "detection").mkdir(exist_ok=True)
        (top / "detection" / f"{split}.json").write_text(json.dumps(coco_content(top / "detection" / split)))
        for index in range(2):
            write_image(top / "segmentation" / "images" / split / f"{index}.png", seed=index)
            write_mask(top / "segmentation" / "masks" / split / f"{index}.png", seed=index)
    for task in ("segmentation", "detection"):
        config = yaml.safe_load(RUNS[task]) | {"trainer": TRAINER | {"default_root_dir": str(top / "runs" / task)}}
        config["data"]["init_args"] |= {"root": str(top / task), "num_workers": 0}
        (top / f"{task}.yaml").write_text(yaml.safe_dump(config))
        assert cli.main(["fit", "--config", str(top / f"{task}.yaml")]) == 0
    return top / "runs"


LAYERS = [f"stages.{stage}.blocks.1.attn.png" for stage in range(4)]


@pytest.mark.slow  # it trains
@pytest.mark.parametrize(("task", "size"), [("segmentation", [48, 64]), ("detection", [64, 64])])
def test_runs_of_dense_tasks(task, size, runs, image, tmp_path):
    torch.manual_seed(0)
    predictor = Predictor(runs / task)
    page = explain([("run", predictor)], image, tmp_path / "one")
    drawn = {file.name for file in (tmp_path / "one").glob("*.png")}
    assert drawn >= {"answer.png", *LAYERS}
    assert any(name.startswith("Grad-CAM") for name in drawn)
    answer = np.asarray(Image.open(tmp_path / "one" / "answer.png"))
    assert np.array_equal(answer, np.asarray(predictor(image).plot()))
    found = json.loads(act(page, """
        const picture = document.querySelector("figure img"), text = document.querySelector(".model p").textContent;
        return {size: data[0].size, answer: [picture.naturalHeight, picture.naturalWidth], text,
                looks: data[0].looks.map(look => [look.title, look.why])};"""))
    assert found["size"] == size  # as the run prepares it: the shorter side is 48, a detector's padded to 32
    assert found["answer"] == list(answer.shape[:2])
    assert found["text"].startswith("It finds: ")
    assert [title for title, why in found["looks"] if not why] == [
        *(f"stages.{stage}.blocks.1.attn" for stage in (3, 2, 1, 0)),
        *(f"Grad-CAM of stages.{stage}" for stage in (3, 2, 1, 0) if f"Grad-CAM_of_stages.{stage}.png" in drawn)]


@pytest.mark.slow
def test_a_classifier_beside_a_detector(runs, image, tmp_path):
    torch.manual_seed(0)
    models = [("test_dinat", Predictor("test_dinat", pretrained=False)), ("run", Predictor(runs / "detection"))]
    found = json.loads(act(explain(models, image, tmp_path), MOVE))
    assert found["moved"] == [True, True]
    assert (tmp_path / "2_run" / "answer.png").is_file()
    assert not (tmp_path / "1_test_dinat" / "answer.png").exists()
    thin = write_image(tmp_path / "thin.png", (1000, 3))
    with pytest.raises(ValueError, match=r"thin\.png cannot be used: Input and output sizes"):
        explain(models[1:], thin, tmp_path)


MOVE = """
const canvases = [...document.querySelectorAll("canvas")], seen = () => canvases.map(canvas => canvas.toDataURL());
const choose = (select, i) => { select.selectedIndex = i; select.dispatchEvent(new Event("change")); };
const point = (x, y) => {
  const box = canvases[0].getBoundingClientRect();
  canvases[0].dispatchEvent(new PointerEvent(
    "pointermove", {clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
};
const differ = (a, b) => a.map((one, i) => one !== b[i]);
point(0.1, 0.1);
const first = seen();
point(0.9, 0.8);
const second = seen();
point(0.1, 0.1);
const again = seen();
choose(document.querySelector(".head"), 1);
const head = seen();
choose(document.querySelector(".layer"), 1);
const layer = seen();
return {moved: differ(first, second), back: differ(first, again), head: differ(again, head),
        layer: differ(head, layer), status: document.querySelector(".status").textContent};
"""


@pytest.mark.slow  # it starts a browser for each
@pytest.mark.parametrize("names", [("test_vit", "tiny_swin"), ("test_swin_vsa",), ("test_resnet",)])
def test_the_pointer_moves_the_query(names, image, tmp_path):
    torch.manual_seed(0)
    sizes = dict(embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, img_size=64)
    models = []
    for name in names:
        predictor = Predictor("swin_tiny_patch4_window7_224" if name == "tiny_swin" else name, pretrained=False)
        if name == "tiny_swin":
            predictor.engine.model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
            predictor.engine.config |= {"resize": {
                "interpolation": "bicubic", "shorter_side": 64, "centre_crop": (64, 64)}}
        with torch.no_grad():
            for parameter in predictor.engine.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        models.append((name, predictor))
    found = json.loads(act(explain(models, image, tmp_path), MOVE if names != ("test_resnet",) else """
        return [document.querySelectorAll(".layer option").length, document.querySelector(".status").textContent];"""))
    if names == ("test_resnet",):  # which has no attention
        assert found[0] == 1
        assert found[1].startswith("for ")
        return
    assert found["moved"] == [True] * len(names)
    assert found["back"] == [False] * len(names)
    assert found["head"] == [True] + [False] * (len(names) - 1)
    assert found["layer"] == found["head"]
    assert "brightest place" in found["status"]


@pytest.mark.slow
def test_the_command_takes_weights_and_a_deit(image, tmp_path, caplog):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    assert cli.main(["explain", "test_vit", str(image), "--checkpoint", str(tmp_path / "weights.pth"), "--out",
                     str(tmp_path / "out"), "--layers", "all"]) == 0
    assert f"Open {tmp_path / 'out' / 'explain.html'} in a browser" in caplog.text
    assert len(list((tmp_path / "out").glob("blocks.*.png"))) == 6
    predictor = Predictor("deit_tiny_distilled_patch16_224", pretrained=False)
    predictor.engine.model = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=24, depth=2, num_heads=3).eval()
    explain([("deit", predictor)], image, tmp_path / "deit")
    assert {file.name for file in (tmp_path / "deit").glob("*.png")} == {
        "Grad-CAM.png", "attention_rollout.png", "blocks.0.attn.png", "blocks.1.attn.png"}
