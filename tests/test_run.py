"""``visionattn run`` and ``Predictor``: files say without PyTorch what their runs say, of images of any source."""
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from timm.data import create_transform
from torchvision.transforms.v2 import functional as F

import visionattn
from tests.data.images import write_image
from tests.test_export import detection_task, save
from tests.test_imports import ENVIRONMENT, REFUSING
from tests.test_predict import write_inbox
from visionattn import Predictor
from visionattn.cli import main
from visionattn.data.dense_transforms import resize_shorter
from visionattn.export import export_onnx
from visionattn.runtime import Classification, Detections, Runner, Segmentation
from visionattn.runtime.prepare import fitted, linear, normalised, resize_and_crop, scaled_size
from visionattn.tasks import ClassificationTask, SegmentationTask
from visionattn.tasks.rebuild import create_model

MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.3, 0.2]
TASKS = ("classification", "detection", "segmentation")
PROGRAM = """
from visionattn.cli import main
import visionattn, numpy
for task in ("classification", "detection", "segmentation"):
    assert main(["run", f"{task}.onnx", "inbox", "square", "--out", f"run/{task}"]) == 0
result = visionattn.Predictor("classification.onnx")("inbox/wide.png")
assert result.name in ("cat", "dog", "emu")
assert visionattn.Predictor("features.onnx").embed(["inbox/wide.png"]).shape == (1, 512)
assert main(["embed", "features.onnx", "inbox", "--out", "features.npy"]) == 0
assert not any(name.partition(".")[0] in Refusing.names for name in sys.modules)
"""


def write_run(task, path, **more):
    """A run's checkpoint, untrained, with what its data would have said."""
    content = torch.load(save(task, path))
    content["hyper_parameters"] |= more
    torch.save(content, path)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Checkpoints of each task, their files, images, and and what ``predict`` and (without PyTorch) ``run`` wrote."""
    top = tmp_path_factory.mktemp("runtime")
    write_inbox(top / "inbox")
    for side in (48, 64, 130):
        write_image(top / "square" / f"{side}.png", (side, side), seed=side)
    torch.manual_seed(0)
    images = dict(image_size=40, interpolation="bicubic", crop_pct=0.8, mean=MEAN, std=STD, decoding={})
    task = ClassificationTask("resnet10t", 3, class_names=["cat", "dog", "emu"])
    write_run(task, top / "classification.ckpt", _mean=MEAN, _std=STD, _image_settings=images)
    task = detection_task("mask_rcnn", class_names=list("abcd"), picture_score=0.3)
    write_run(task, top / "detection.ckpt", _category_ids=[3, 5, 7, 9], _image_settings={"decoding": {}})
    task = SegmentationTask("resnet10t", 4, head="semantic_fpn", head_channels=16, auxiliary_weight=0.0,
                            class_names=list("abcd"))
    images = dict(short_side=48, max_size=None, crop_size=64, decoding={})
    write_run(task, top / "segmentation.ckpt", _image_settings=images)
    for task in TASKS:
        export_onnx(create_model(None, top / f"{task}.ckpt"), top / f"{task}.onnx")
    export_onnx(timm.create_model("resnet10t", num_classes=0), top / "features.onnx", (32, 32))
    before = os.getcwd()
    os.chdir(top)
    try:
        for task in TASKS:
            assert main(["predict", f"{task}.ckpt", "inbox", "square", "--out", f"predict/{task}"]) == 0
        subprocess.run([sys.executable, "-c", REFUSING + PROGRAM], env=ENVIRONMENT | {"PYTHONPATH": before}, check=True)
    finally:
        os.chdir(before)
    return top


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# An exported file, without PyTorch

def test_classes_are_those_of_predict(top):
    predicted, ran = (rows(top / kind / "classification" / "predictions.csv") for kind in ("predict", "run"))
    assert len(ran) == len(predicted) == 9
    for before, now in zip(predicted, ran, strict=True):
        assert now[0::2] == before[0::2] or now[1::2] == before[1::2]
        assert [cell for cell in now if not cell.startswith("0.")] == [
            cell for cell in before if not cell.startswith("0.")]
    values = [[float(cell) for cell in row if cell.startswith("0.")] for row in predicted[1:] + ran[1:]]
    assert np.abs(np.array(values[:8]) - values[8:]).max() < 1e-4


def test_objects_are_those_of_predict(top):
    """Of images of the file's shape; others are fitted into it."""
    predicted, ran = (COCO(top / kind / "detection" / "predictions_coco.json") for kind in ("predict", "run"))
    assert ran.dataset["categories"] == predicted.dataset["categories"]
    assert ran.dataset["images"] == predicted.dataset["images"]
    for image in ran.dataset["images"]:
        if not image["file_name"].startswith("square"):
            continue
        before, now = (coco.imgToAnns[image["id"]] for coco in (predicted, ran))
        shared = []
        assert len(before) == len(now) > 2
        for one, other in zip(before, now, strict=True):
            assert one["category_id"] == other["category_id"]
            assert np.allclose(one["bbox"], other["bbox"], atol=0.02)
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
            masks = [coco.annToMask(ann).astype(bool) for coco, ann in ((predicted, one), (ran, other))]
            if image["width"] == 64:  # is not resized
                assert np.array_equal(*masks)
            else:
                shared.append((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
        assert np.mean(shared or [1]) > 0.75  # at least of noise, which is what an untrained net's masks are


def test_label_maps_are_those_of_predict(top):
    for name in ("48", "64", "130"):
        predicted, ran = (np.asarray(Image.open(top / kind / "segmentation" / "predictions" / "square" / f"{name}.png"))
                          for kind in ("predict", "run"))
        assert (predicted != ran).mean() <= (0 if name == "48" else 0.002)
        assert len(np.unique(ran)) > 1


@pytest.mark.parametrize("task", TASKS)
def test_the_same_files_are_written(task, top):
    assert files_in(top / "run" / task) == files_in(top / "predict" / task)
    assert (top / "run" / task / "pictures" / "inbox" / "more" / "wide.png").is_file()


def test_images_of_other_shapes_are_seen_whole(top):
    """Windows cover an image that a segmenter's file is too small for; a detector's boxes lie in the image."""
    image = write_image(top / "wide" / "wide.png", (150, 50))
    assert Runner(top / "segmentation.onnx")(image).labels.shape == (50, 150)
    found = Runner(top / "detection.onnx")(image)
    assert len(found) > 2
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [150, 50, 150, 50]).all()
    assert found.boxes[:, 2].max() > 75


@pytest.mark.slow
def test_photos_as_they_are(top, tmp_path):
    """A file that takes bytes gives what the other one gives, but for the rounding of interpolation."""
    report = export_onnx(create_model(None, top / "classification.ckpt"), tmp_path / "photos.onnx", preprocess=True)
    files = [str(file) for file in sorted((top / "inbox").rglob("*.*"))]
    for one, other in zip(Runner(report.path)(files), Runner(top / "classification.onnx")(files), strict=True):
        assert np.abs(one.probabilities - other.probabilities).max() < 5e-3


# What is done to images

@pytest.mark.parametrize("size", [(40, 40), (41, 99), (300, 33), (17, 23)])
@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_classifiers_see_what_validation_shows(size, crop_pct, interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    transform = create_transform(40, crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD)
    rule = {"shorter_side": int(40 / crop_pct), "interpolation": interpolation, "centre_crop": [40, 40]}
    assert np.array_equal(normalised(resize_and_crop(image, rule), MEAN, STD), transform(image).numpy())
    planes = np.random.default_rng(1).random((5, *size), np.float32)
    resized = F.resize(torch.from_numpy(planes), int(40 / crop_pct), F.InterpolationMode(interpolation), antialias=True)
    expected = F.center_crop(resized, [40, 40])
    assert np.allclose(resize_and_crop(planes, rule), expected, atol=1e-5)


def test_a_long_image_is_not_resized_whole():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 3000, 3), np.uint8))
    rule = {"shorter_side": 250, "interpolation": "bicubic", "centre_crop": [224, 224]}  # to 250 x 375,000
    seen = np.asarray(resize_and_crop(image, rule)).astype(int)
    middle = image.crop((1400, 0, 1600, 2)).resize((25000, 250), Image.Resampling.BICUBIC)
    expected = np.asarray(middle.crop((12388, 13, 12612, 237))).astype(int)
    assert np.abs(seen - expected).max() <= 2
    with pytest.raises(ValueError, match="2 x 20000 pixels and would be resized to 2048 x 20480000: cut it into parts"):
        scaled_size((2, 20000), {"shorter_side": 2048})


def test_crops_beyond_the_image_are_filled():
    image = Image.new("RGB", (20, 20), "white")
    rule = {"shorter_side": 20, "interpolation": "bicubic", "centre_crop": [30, 31]}
    seen = np.asarray(resize_and_crop(image, rule))
    assert np.array_equal(seen, F.center_crop(F.pil_to_tensor(image), [30, 31]).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(7, 50), (33, 20), (20, 33)])
def test_interpolation_is_that_of_pytorch(size):
    x = np.random.default_rng(0).random((2, 20, 33), np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x)[None], size, mode="bilinear")[0]
    assert np.allclose(linear(x, *size), expected, atol=1e-6)
    image = Image.fromarray((255 * x[0]).astype(np.uint8)).convert("RGB")
    expected = resize_shorter(F.pil_to_tensor(image), 17, None)
    seen = fitted(image, scaled_size(image.size, {"shorter_side": 17}))
    assert np.abs(np.asarray(seen).astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1


# Sources

def test_sources(top, tmp_path, monkeypatch):
    """An image is the same from wherever it comes; one gives a result, many a list, a generator a generator."""
    monkeypatch.chdir(top)
    predictor = Predictor("classification.onnx", batch_size=3)
    file = "square/64.png"
    image = Image.open(file)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = predictor(file)
    assert isinstance(expected, Classification)
    assert (expected.file, expected.size) == (file, (64, 64))
    for source in (Path(file), image, array, tensor, tensor / 255, (tensor / 255).double(), array / 255,
                   array.astype(np.uint16) * 257):
        assert np.abs(predictor(source).probabilities - expected.probabilities).max() < 1e-6, type(source)
    grey = predictor(array[..., 0])
    assert np.array_equal(grey.probabilities, predictor(array[..., :1].repeat(3, -1)).probabilities)
    for source, count in (("square", 3), ("square/*.png", 3), ([file, image, tensor], 3), (np.stack([array] * 2), 2),
                          (torch.stack([tensor] * 4), 4), ((file,), 1), ([], 0), ([top / "square", file], 4)):
        found = predictor(source)
        assert isinstance(found, list)
        assert len(found) == count
    assert [one.file for one in predictor(["square", array])] == [
        "square/130.png", "square/48.png", "square/64.png", "image 1"]
    asked = []

    def images():
        for _ in range(100):
            asked.append(1)
            yield array

    stream = predictor(images())
    assert next(stream).probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert len(asked) < 10
    assert [one.file for one in predictor.stream("square/*.png")] == [f"square/{name}.png" for name in (130, 48, 64)]
    Path(tmp_path / "list.txt").write_text(f"{file}\n")
    assert len(predictor(tmp_path / "list.txt")) == 1


def image_of(shape, value=0.5, dtype=np.float32):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(("source", "words"), [
    (image_of((8, 8, 4)), "the image cannot be used: it is an array of 8 x 8 x 4 float32, not of height x width x 3"),
    (image_of((3, 8, 8)), "not of height x width x 3; channels come last"),
    (image_of((8,)), "it is an array of 8 float32, not of"),
    (image_of((0, 8, 3)), "it is an array of 0 x 8 x 3 float32, which has no pixels"),
    (image_of((8, 8, 3), np.nan), "it has pixels that are NaN or infinite"),
    (image_of((8, 8, 3), np.inf), "it has pixels that are NaN or infinite"),
    (image_of((8, 8, 3), 200), "its values are floating-point numbers from 200 to 200: set value_range"),
    (image_of((8, 8, 3), 3, np.int64), "its values are integers of an unknown range from 3 to 3"),
    (image_of((8, 8, 3), "a", "<U1"), "8 x 8 x 3 <U1; uint8, or floating-point numbers from 0 to 1, were expected"),
    (image_of((8, 8, 3), 1, np.complex64), "complex64; uint8, or"),
    (torch.rand(1, 8, 8, 8), "image 0 cannot be used: it is an array of 8 x 8 x 8 float32, not of height x width x 3"),
    (torch.full((3, 8, 8), torch.nan), "NaN"),
    (Image.new("RGB", (0, 5)), "it has 0 x 5 pixels"),
    ("https://example.org/cat.jpg", "https://example.org/cat.jpg is a URL: download it and give the file"),
    ([["a.png"]], "image 0 is a list, not a file, folder"),
    ({"a": 1}, "dict is nothing that can be looked at: give a file, folder"),
    (None, "NoneType is nothing that can be looked at"),
    ([b"a"], "image 0: bytes is nothing"),
    ("nothing.png", "nothing.png does not exist"),
    ("a" * 5000, " ... cannot be opened: File name too long"),
])
def test_what_is_no_image(source, words, top):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Predictor(top / "classification.onnx")(source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "words"), [
    (b"BM6\0\x06\0a", "a.txt is no list of files: its byte 4 is no text"),
    (b"b.png\n..\n", "a.txt names .., a folder: a list names files"),
])
def test_lists_that_are_none(content, words, top, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        Predictor(top / "classification.onnx")(tmp_path / "a.txt")


def test_files_that_are_no_images(top, tmp_path, said):
    (tmp_path / "bad.png").write_text("<html>")
    write_image(tmp_path / "good.png")
    with pytest.raises(ValueError, match=r"bad.png cannot be used: it is a web page"):
        Predictor(top / "classification.onnx")(tmp_path)
    out = tmp_path / "out"
    assert main(["run", str(top / "classification.onnx"), str(tmp_path), "--out", str(out)]) == 1
    assert "1 of 2 images cannot be used and were left out" in said.text
    assert len(rows(out / "predictions.csv")) == 2
    assert rows(out / "left_out_predict.csv")[1][1] == "it is a web page"


def test_videos(top, tmp_path, monkeypatch, capfd):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for value in (0, 80, 160):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), value, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    predictor = Predictor(top / "classification.onnx")
    results = list(predictor("clip.mp4"))
    assert [np.asarray(one.image).mean().round(-1) for one in results] == [0, 80, 160]
    assert results[1].file == "clip.mp4/000002"
    assert main(["run", str(top / "classification.onnx"), "clip.mp4", "--out", "out"]) == 0
    assert [row[0] for row in rows(Path("out/predictions.csv"))[1:]] == [f"clip.mp4/00000{n}" for n in (1, 2, 3)]
    assert files_in(Path("out/pictures")) == [f"clip/00000{n}.png" for n in (1, 2, 3)]
    Path("bad.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"bad.mp4 cannot be used: it cannot be opened as a video"):
        list(predictor("bad.mp4"))
    with pytest.raises(ValueError, match="webcam:97 cannot be used: there is no such webcam"):
        list(predictor("webcam:97"))
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["run", str(top / "classification.onnx"), "clip.mp4", "--out", "out"]) == 1
    assert "clip.mp4 is a video, which needs OpenCV or PyAV: pip install" in capfd.readouterr().err


# Results

def test_results(top, tmp_path):
    image = top / "square" / "64.png"
    classes = Predictor(top / "classification.onnx")(image)
    assert classes.names == ["cat", "dog", "emu"]
    assert classes.top(1) == classes.present() == [(classes.name, classes.probability)]
    assert classes.probabilities.sum() == pytest.approx(1)
    objects = Predictor(top / "detection.onnx")(image)
    assert isinstance(objects, Detections)
    assert objects.threshold == pytest.approx(0.3)  # the run's picture_score
    sure = objects.above(0.3)
    assert len(objects) > len(sure) == len(sure.masks) > 0
    record = objects.to_coco(7)[0]
    assert record["category_id"] in (3, 5, 7, 9)
    assert (record["image_id"], record["segmentation"]["size"]) == (7, [64, 64])
    labels = Predictor(top / "segmentation.onnx")(image)
    assert isinstance(labels, Segmentation)
    assert sum(record["area"] for record in labels.to_coco()) == 64 * 64
    assert np.array_equal(np.asarray(labels.label_map()), labels.labels)
    for index, result in enumerate((classes, objects, labels)):
        assert max(result.plot().size) >= 256
        with Image.open(result.save(tmp_path / "new" / f"{index}.jpg")) as picture:
            assert picture.size == result.plot().size
        with pytest.raises(ValueError, match="has no ending of a picture"):
            result.save(tmp_path / "a.txt")


def test_results_as_supervision_has_them(top, monkeypatch):
    classes, objects, labels = (Predictor(top / f"{task}.onnx")(top / "square" / "64.png") for task in TASKS)
    supervision = pytest.importorskip("supervision")
    assert classes.to_supervision().get_top_k(1)[0][0] == classes.label
    found = objects.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert len(found) == len(objects)
    assert found.class_id.tolist() == (objects.labels - 1).tolist()
    assert found.data["class_name"][0] == objects.names[objects.labels[0] - 1]
    assert found.mask.shape == (len(objects), 64, 64)
    assert found.mask[0].sum() == objects.masks[0].mask.sum()
    regions = labels.to_supervision()
    assert np.array_equal(regions.mask.argmax(0), np.searchsorted(np.unique(labels.labels), labels.labels))
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install supervision"):
        objects.to_supervision()


# The Python API

@pytest.mark.parametrize("model", ["classification.ckpt", "classification.onnx", "detection.ckpt"])
def test_threads_share_a_predictor(model, top):
    """Each thread has its own threshold's worth of work at once; all see what one sees."""
    predictor = Predictor(top / model)
    files = [str(file) for file in sorted((top / "square").iterdir())]
    expected = predictor(files)
    found = {}

    def look(number):
        found[number] = [predictor(files) for _ in range(3)]

    threads = [threading.Thread(target=look, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in (one for many in found.values() for one in many):
        for one, other in zip(results, expected, strict=True):
            if isinstance(one, Classification):
                assert np.allclose(one.probabilities, other.probabilities, atol=1e-6)
            else:
                assert np.allclose(one.boxes, other.boxes, atol=1e-3)
    assert len(found) == 2


def test_tiles_of_a_file_are_those_of_its_run(top):
    image = write_image(top / "aerial" / "aerial.png", (112, 112))
    one, other = (Predictor(top / f"segmentation.{kind}", tile=48)(image) for kind in ("ckpt", "onnx"))
    assert (one.labels != other.labels).mean() < 0.002
    one, other = (Predictor(top / f"detection.{kind}", tile=64)(image) for kind in ("ckpt", "onnx"))
    assert len(one) == len(other) > 5
    assert np.allclose(one.boxes, other.boxes, atol=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_half_precision(task, top):
    full, half = (Predictor(top / f"{task}.ckpt", half=half).warmup()(top / "square" / "64.png")
                  for half in (False, True))
    if task == "classification":
        assert half.probabilities.dtype == np.float32
        assert 0 < np.abs(half.probabilities - full.probabilities).max() < 0.05
    elif task == "segmentation":
        assert (half.labels != full.labels).mean() < 0.2
    else:
        assert half.boxes.dtype == np.float32
        assert len(half) > 0


def test_models_by_name(top):
    predictor = Predictor("test_dinat", pretrained=False)
    assert len(predictor.names) == 1000
    assert predictor.names[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert predictor(top / "square" / "64.png").probabilities.shape == (1000,)
    assert visionattn.Predictor is Predictor
    for name, words in (("no_such_model", "no_such_model"), ("runs/nothing", "no run folder, checkpoint or file"),
                        ("nothing.onnx", "there is no file nothing.onnx")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            Predictor(name)


def test_options_that_do_not_fit(top):
    for options, words in ((dict(half=True), "an ONNX file has its own"), (dict(device="openvino"), "openvino"),
                           (dict(device="tpu"), "there is no provider 'tpu'; choose cpu, cuda, openvino"),
                           (dict(tile=64), "a classifier sees an image at once"), (dict(batch_size=0), "batch_size"),
                           (dict(threshold=2), "between 0 and 1"), (dict(checkpoint="a.pth"), "name of a model")):
        with pytest.raises(ValueError, match=words):
            Predictor(top / "classification.onnx", **options)
    with pytest.raises(ValueError, match=r"detections from a score of 0.05 on: a threshold of 0.01"):
        Predictor(top / "detection.onnx", threshold=0.01)


# Features

def test_features(top, tmp_path):
    files = [str(file) for file in sorted((top / "inbox").rglob("*.*"))]
    predictor = Predictor(top / "classification.ckpt")
    features = predictor.embed(files)
    assert (features.shape, features.dtype) == ((5, 512), np.float32)
    model = create_model(None, top / "classification.ckpt").eval()
    images = torch.from_numpy(predictor.engine.prepare(Image.open(files[1]).convert("RGB")))[None]
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert np.allclose(features[1], expected[0], atol=1e-5)
    assert predictor.embed(files[0]).shape == (512,)
    for task in ("detection", "segmentation"):
        assert Predictor(top / f"{task}.ckpt").embed(files).shape == (5, 512)
    with pytest.raises(ValueError, match="gives the answers of classification and no features: export a model without"):
        Predictor(top / "classification.onnx").embed(files)
    with pytest.raises(ValueError, match="no classes, only features"):
        Predictor(top / "features.onnx")(files)
    assert np.load(top / "features.npy").shape == (5, 512)
    assert [row[0] for row in rows(top / "features.csv")] == ["file", *(
        str(Path(file).relative_to(top)) for file in files)]
    by_file = Predictor(top / "features.onnx").embed(files)
    assert np.array_equal(np.load(top / "features.npy"), by_file)


def test_features_as_parquet(top, tmp_path, monkeypatch, capfd):
    command = ["embed", str(top / "classification.ckpt"), str(top / "inbox"), "--out", str(tmp_path / "f.parquet")]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(command) == 0
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert len(table["file"]) == 5
    assert np.allclose(table["features"], Predictor(top / "classification.ckpt").embed(table["file"]), atol=1e-6)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(command) == 1
    assert ".parquet files need the package pyarrow: pip install pyarrow" in capfd.readouterr().err
    assert main([*command[:-1], str(tmp_path / "f.txt")]) == 1
    (tmp_path / "g.csv").write_text("a,b\n")
    assert main([*command[:-1], str(tmp_path / "g.npy")]) == 1
    assert "is not of earlier features and would be written over" in capfd.readouterr().err
    assert (tmp_path / "g.csv").read_text() == "a,b\n"


# Files of others

def changed(proto, **values):
    """A file with other metadata; None leaves one out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = {item.key: item.value for item in copy.metadata_props} | values
    del copy.metadata_props[:]
    for key, value in kept.items():
        if value is not None:
            copy.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return copy.SerializeToString()


def test_files_that_are_not_ours_or_lie(top, tmp_path):
    good = (top / "classification.onnx").read_bytes()
    proto = onnx.load_from_string(good)
    outside = onnx.ModelProto()
    outside.CopyFrom(proto)
    weight = max(outside.graph.initializer, key=lambda item: len(item.raw_data))
    length = str(len(weight.raw_data))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../classification.onnx"), ("offset", "0"), ("length", length)):
        weight.external_data.add(key=key, value=value)
    crop = {"shorter_side": 50, "centre_crop": [40, 40]}
    cases = [
        (good[:len(good) // 2], "cannot be opened as an ONNX file"), (b"", "cannot be opened"),
        (b"<html>", "cannot be opened"), (outside.SerializeToString(), "escapes model directory"),
        (changed(proto, producer=None), "is not of visionattn export, or another program left its metadata out"),
        (changed(proto, task="magic"), "is not of visionattn export"),
        (changed(proto, task="detection", thresholds=[1]), "a file of detection takes image, this one images"),
        (changed(proto, image_size=[99999999, 3]), r"its metadata say image_size is \[99999999, 3\]"),
        (changed(proto, image_size=[-40, 40]), "its metadata say image_size"),
        (changed(proto, image_size=[32, 32]), "its images are 40 x 40, and its metadata say 32 x 32"),
        (changed(proto, image_size=[16384, 16384], channels=900), "its images are 16384 x 16384 of 900 channels"),
        (changed(proto, image_size="[" * 100000), "its metadata say image_size"),
        (changed(proto, channels=1, mean=[0], std=[1]), "have 3 channels, and its metadata say 1"),
        (changed(proto, channels=True), "its metadata say channels is true"),
        (changed(proto, std=[0, 1, 1]), "its metadata say std"), (changed(proto, mean="[NaN, 1, 1]"), "say mean"),
        (changed(proto, mean=[1]), "say mean"), (changed(proto, mean=None), "lack mean"),
        (changed(proto, resize=crop | {"shorter_side": 99999999}), "resize"), (changed(proto, resize=[1]), "resize"),
        (changed(proto, resize=crop | {"interpolation": ["a"]}), "resize"), (changed(proto, resize=None), "resized"),
        (changed(proto, resize=crop | {"centre_crop": [20, 20]}), "40 x 40, and validation's 20 x 20"),
        (changed(proto, class_names=["a"]), "it has 3 logits and 1 class_names"),
        (changed(proto, class_names={"a": 1}), "say class_names"),
        (changed(proto, multi_label=True, thresholds=[0.5]), "it has 1 thresholds and 3 class_names"),
        (changed(proto, layout="uint8, channels last"), "its layout does not fit its values"),
        (changed(proto, decoding={"value_range": [5, 1]}), "value_range must be"),
        (changed(proto, decoding={"value_range": {"a": 1}}), "value_range must be"),
    ]
    for content, words in cases:
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            Runner(tmp_path / "a.onnx")
        assert "a.onnx" in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "a.onnx").write_bytes(changed(proto, multi_label=True, thresholds=None, decoding={"max_pixels": 1e300}))
    result = Runner(tmp_path / "a.onnx")(top / "square" / "64.png")
    assert result.thresholds == [0.5] * 3
    assert result.present() == [one for one in result.top() if one[1] >= 0.5]


# docs/runtime.md

DOCS = (Path(__file__).parent.parent / "docs" / "runtime.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", DOCS.partition("## In the browser")[0], flags=re.DOTALL)  # test_browser


@pytest.fixture
def user(top, tmp_path, monkeypatch):
    """A user's folder with what the examples name."""
    for name, task in (("photos", "classification"), ("boxes", "detection"), ("masks", "segmentation")):
        (tmp_path / f"{name}.onnx").symlink_to(top / f"{task}.onnx")
    (tmp_path / "features.onnx").symlink_to(top / "features.onnx")
    (tmp_path / "runs" / "photos" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "photos" / "checkpoints" / "best.ckpt").symlink_to(top / "classification.ckpt")
    for name in "ab":
        write_image(tmp_path / "inbox" / f"{name}.jpg", seed=ord(name))
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        video.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        video.mux(stream.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples(user):
    examples = [code for kind, code in BLOCKS if kind == "python" and "fastapi" not in code]
    assert len(examples) == 4
    for code in examples:
        exec(compile(code, "docs/runtime.md", "exec"), {})
    assert (user / "seen" / "a.png").is_file()


def test_commands(user):
    commands = [shlex.split(line) for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
    ran = [arguments for program, *arguments in commands if program == "visionattn" and not main(arguments)]
    assert len(ran) == 6
    assert len(commands) == 9  # with three that install, which .ci/run does
    assert (user / "seen_masks" / "predictions" / "a.png").is_file()
    assert (user / "seen" / "crops").is_dir()
    assert np.load("features.npy").shape == np.load("features_of_file.npy").shape == (2, 512)


def test_web_service(user):
    testclient = pytest.importorskip("fastapi.testclient")
    service = {}
    exec(next(code for kind, code in BLOCKS if "fastapi" in code), service)
    client = testclient.TestClient(service["app"])
    found = client.post("/predict", files={"photo": (user / "inbox" / "a.jpg").read_bytes()})
    result = Predictor("photos.onnx")("inbox/a.jpg")
    assert found.json() == {"class": result.name, "probability": round(result.probability, 4)}
    refused = client.post("/predict", files={"photo": b"<html>"})
    assert refused.status_code == 422


def test_triton_configuration(top):
    text = next(code for _, code in BLOCKS if "max_batch_size" in code)
    session = Runner(top / "classification.onnx").engine.session
    kinds = {"TYPE_FP32": "tensor(float)"}
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        block = rf'{kind} \[ {{ name: "(\w+)" data_type: (\w+) dims: \[ ([-\d, ]+) \] }} \]'
        name, kept, dims = re.search(block, text).groups()
        assert (name, kinds[kept]) == (values[0].name, values[0].type)
        assert len(dims.split(",")) == len(values[0].shape) - 1  # Triton adds the batch, whose length is free
        assert isinstance(values[0].shape[0], str)
    detector = Runner(top / "detection.onnx").engine.session
    assert {one.name: (one.type, len(one.shape)) for one in detector.get_outputs()} == {
        "boxes": ("tensor(float)", 2), "labels": ("tensor(int64)", 1), "scores": ("tensor(float)", 1),
        "masks": ("tensor(float)", 4)}


def test_a_run_is_exported_for_the_images_of_its_validation(top):
    sizes = [json.loads(Runner(top / f"{task}.onnx").engine.session.get_modelmeta().custom_metadata_map["image_size"])
             for task in TASKS]
    assert sizes == [[40, 40], [64, 64], [48, 48]]
