"""Malformed images, models and options: an answer of finite numbers or one clear line, nothing run from a file.

Every case is drawn from its number alone, so that a failure can be repeated. Files of models are opened in a process of
their own, whose death is seen and whose memory is measured.
"""
import io
import json
import pickle
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

from tests.test_export import save
from tests.test_imports import ENVIRONMENT
from visionattn import Predictor
from visionattn.export import export_onnx
from visionattn.tasks import ClassificationTask
from visionattn.tasks.rebuild import create_model

pytestmark = pytest.mark.slow

IMAGES, FILES, MODELS, OPTIONS = 900, 700, 320, 80  # cases
GIB = 2 ** 20  # KiB
EXPECTED = ValueError, OSError, RuntimeError, TypeError
# Opens each model that is named on stdin, and says in a line of JSON how that ended.
OPENS = """
import json, re, sys
import numpy as np
from visionattn import Predictor
for line in sys.stdin:
    path = line.strip()
    try:
        result = Predictor(path)(np.zeros((40, 40, 3), np.uint8))
        said = [True, bool(np.isfinite(result.probabilities).all())]
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        said = [False, str(error)]
    except BaseException as error:
        said = [None, f"{type(error).__name__}: {error}"]
    memory = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    print(json.dumps([path, *said, memory]), flush=True)
"""


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A folder with a run's checkpoint and its file."""
    top = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    settings = dict(image_size=32, interpolation="bicubic", crop_pct=0.9, mean=[0.5] * 3, std=[0.2] * 3, decoding={})
    content = torch.load(save(ClassificationTask("resnet10t", 3, class_names=list("abc")), top / "run.ckpt"))
    content["hyper_parameters"] |= dict(_mean=[0.5] * 3, _std=[0.2] * 3, _image_settings=settings)
    torch.save(content, top / "run.ckpt")
    export_onnx(create_model(None, top / "run.ckpt"), top / "run.onnx")
    return top


@pytest.fixture(scope="module", params=["run.onnx", "run.ckpt"])
def predictor(request, top):
    return Predictor(top / request.param)


def outcome(work, case):
    """Whether ``work`` gave an answer; an error must be one line that says something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow and numpy on what is drawn
        try:
            results = work()
        except EXPECTED as error:
            assert_clear(str(error), case)
            return False
    for result in results if isinstance(results, list) else [results]:
        assert np.isfinite(result.probabilities).all(), case
        assert result.probabilities.shape == (3,), case
    return True


def most_memory():
    """The most memory that this process had, in KiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def assert_clear(message, case):
    assert 5 < len(message) < 600, f"{case}: {message[:1000]!r}"
    assert "\n" not in message.strip(), f"{case}: {message[:1000]!r}"


def draw_value(pick):
    """Something that is, or is nearly, an image, or many."""
    axes = pick.choice([0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5])
    shape = [pick.choice([0, 1, 1, 2, 3, 3, 4, 5, 17, 40, 300][:11 - 2 * max(0, axes - 3)]) for _ in range(axes)]
    if pick.random() < 0.5 and len(shape) >= 3:
        shape[-1] = 3
    generator = np.random.default_rng(pick.randrange(2 ** 32))
    kind = pick.choice(["uint8", "uint8", "int8", "uint16", "int64", "float16", "float32", "float64", "bool",
                        "complex64", "object", "U1"])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = np.asarray(generator.random(shape) * pick.choice([1, 1, 1, 255, 1e30])).astype(kind)
    if array.dtype.kind == "f" and array.size and pick.random() < 0.5:
        array.flat[pick.randrange(array.size)] = pick.choice([np.nan, np.inf, -np.inf, -0.1, 1.1])
    other = pick.random()
    if other < 0.25 and array.dtype.kind in "uifb" and kind != "uint16":
        return torch.from_numpy(array)
    if other < 0.3:
        return [array] * pick.choice([0, 1, 3])
    if other < 0.4:
        return pick.choice([
            None, True, 1.5, b"\x89PNG", {}, {"a": 1}, set(), object(), "", " ", "no/such.jpg", "\0", "*.nothing", "[",
            "http://example.com/a.jpg", "file:///etc/passwd", "data:image/png;base64,AA==", "a" * 5000, [[]], [None],
            (1.5, 2.5), np.float32(1), torch.nn.Identity(), "/dev/zero/a.jpg",
            np.zeros((500, 1, 1, 3), np.uint8), np.zeros((3, 20000, 3), np.uint8), torch.zeros(3, 1, 20000)])
    return array


def draw_file(pick):
    """Bytes and ending of a picture of any kind, whole or damaged."""
    mode = pick.choice(["1", "L", "LA", "P", "PA", "RGB", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16",
                        "F"])
    size = pick.choice([(1, 1), (1, 40), (40, 1), (33, 57), (64, 64), (20000, 1), (2, 20000), (20000, 40)])
    ending = pick.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
    generator = np.random.default_rng(pick.randrange(2 ** 32))
    picture = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8))
    try:
        picture = picture.convert(mode) if mode not in ("I;16", "LAB") else Image.new(mode, size)
        options = {}
        if ending in ("GIF", "PNG", "TIFF", "WEBP") and pick.random() < 0.2:
            options = dict(save_all=True, append_images=[picture.rotate(90 * turn) for turn in range(3)])
        if ending in ("JPEG", "PNG", "WEBP") and pick.random() < 0.5:
            exif = Image.Exif()
            exif[0x0112] = pick.choice([0, 1, 3, 5, 6, 8, 9, 65535])
            options["exif"] = exif
        file = io.BytesIO()
        picture.save(file, ending, **options)
        content = bytearray(file.getvalue())
    except (OSError, ValueError, KeyError, RuntimeError):  # this kind of file holds no such pictures
        content = bytearray(generator.bytes(pick.choice([0, 1, 50, 3000])))
    damage = pick.random()
    if damage < 0.3:
        del content[pick.randrange(len(content) + 1):]
    elif damage < 0.6:
        for _ in range(pick.choice([1, 3, 30])):
            if content:
                content[pick.randrange(min(len(content), pick.choice([30, 200, 10 ** 9])))] = pick.randrange(256)
    elif damage < 0.65:
        content = content[:20] * 50
    other = pick.choice([ending, ending, ending, ending, "PNG", "JPEG", "npy", "txt"])
    return bytes(content), f".{other.lower()}"


def draw_model(pick, content):
    """A model's file with bytes changed, cut, put in or doubled."""
    content = bytearray(content)
    for _ in range(pick.choice([1, 1, 2, 20])):
        place = pick.randrange(min(len(content), pick.choice([50, 2000, 10 ** 9])))
        place = len(content) - 1 - place if pick.random() < 0.4 else place
        change = pick.random()
        if change < 0.5:
            content[place] = pick.randrange(256)
        elif change < 0.7:
            del content[place:]
            content += b" "
        elif change < 0.85:
            content[place:place] = pick.randbytes(pick.choice([1, 9, 500]))
        else:
            del content[place:place + pick.choice([1, 9, 500])]
            content += b" "
    return bytes(content)


def test_values(predictor):
    answered = 0
    for number in range(IMAGES // 2):
        value = draw_value(random.Random(number))
        case = f"value {number}: {type(value).__name__} {getattr(value, 'shape', '')} {getattr(value, 'dtype', '')}"
        answered += outcome(lambda value=value: predictor(value), case)
    assert IMAGES // 20 < answered < IMAGES // 2


def test_files(predictor, tmp_path):
    before, answered = most_memory(), 0
    for number in range(FILES // 2):
        content, ending = draw_file(random.Random(number))
        file = tmp_path / f"{number}{ending}"
        file.write_bytes(content)
        answered += outcome(lambda file=file: predictor(file), f"file {number}")
        file.unlink()
    assert FILES // 20 < answered < FILES // 2
    assert most_memory() - before < 2 * GIB


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("name", ["run.onnx", "run.ckpt"])
def test_models(name, top, tmp_path):
    whole = (top / name).read_bytes()
    files = []
    for number in range(MODELS // 2):
        files.append(tmp_path / f"{number}{name[3:]}")
        files[-1].write_bytes(draw_model(random.Random(number), whole))
    opened, seen = 0, 0
    while seen < len(files):
        process = subprocess.run([sys.executable, "-c", OPENS], input="\n".join(map(str, files[seen:])), text=True,
                                 capture_output=True, env=ENVIRONMENT)
        rows = [json.loads(line) for line in process.stdout.splitlines()]
        assert process.returncode == 0, f"{files[seen + len(rows)]} ended the process: {process.stderr[-500:]}"
        for path, good, said, memory in rows:
            assert good is not None, f"{path}: {said}"
            if good:
                opened += 1
            else:
                assert_clear(said, path)
            assert memory < 4 * GIB, f"{path}: {memory / GIB:.1f} GiB"
        seen += len(rows)
    assert 0 < opened < len(files)


def test_nothing_is_run_from_a_file(top, tmp_path):
    content = torch.load(top / "run.ckpt", weights_only=False)
    for number, wrong in enumerate([
            content | {"more": Evil(tmp_path / "trace")}, content | {"state_dict": Evil(tmp_path / "trace")},
            content | {"hyper_parameters": content["hyper_parameters"] | {"more": Evil(tmp_path / "trace")}}]):
        torch.save(wrong, tmp_path / f"{number}.ckpt")
        with pytest.raises(ValueError, match="ckpt") as error:
            Predictor(tmp_path / f"{number}.ckpt")
        assert_clear(str(error.value), number)
    for ending in (".ckpt", ".pth", ".onnx", ".npy"):
        file = tmp_path / f"plain{ending}"
        file.write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
        with pytest.raises(EXPECTED):
            Predictor(top / "run.onnx")(file) if ending == ".npy" else Predictor(file)
    assert not (tmp_path / "trace").exists()


def test_external_data_outside_of_the_folder_are_not_read(top, tmp_path):
    model = onnx.load(top / "run.onnx")
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../../../../../../../etc/passwd"), ("offset", "0"), ("length", "4")):
        weight.external_data.add(key=key, value=value)
    (tmp_path / "outside.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"outside\.onnx") as error:
        Predictor(tmp_path / "outside.onnx")
    assert_clear(str(error.value), "external data")


def test_options_of_export(tmp_path):
    model = timm.create_model("resnet10t", num_classes=2)
    written = 0
    for number in range(OPTIONS):
        pick = random.Random(number)
        options = dict(
            image_size=pick.choice([None, (0, 32), (-1, 5), (1, 1), (32, 32), (31, 33), (10 ** 9, 4), (32,), "32",
                                    (32.5, 32), (None, 32)]),
            dynamic_size=pick.choice([False, False, True]),
            opset=pick.choice([20, 20, 20, 0, -1, 16, 24, 99, "20", 20.5]),
            preprocess=pick.choice([False, True]))
        file = tmp_path / f"{number}.onnx"
        if options["opset"] == 20 and options["image_size"] in (None, (32, 32), (31, 33)) and written > 2:
            continue  # takes seconds, and has tests of its own
        try:
            export_onnx(model, file, **options)
            written += 1
        except EXPECTED as error:
            assert_clear(str(error), options)
            assert not file.exists(), options
    assert written
