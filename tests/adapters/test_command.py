"""The command ``visionattn adapters``."""
import pytest
import timm
import torch

from visionattn import adapters
from visionattn.cli import main
from visionattn.tasks.rebuild import create_model


@pytest.fixture
def files(tmp_path):
    """A backbone's weights, and two adapters of it: their files by kind, and what the model answers with each."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 160, 160)
    weights = timm.create_model("test_vit", num_classes=5).state_dict()
    torch.save(weights, tmp_path / "backbone.pth")
    found = {}
    for name, options in (("folds", {"shape": "lora", "bihead": True}), ("stays", {})):
        model = timm.create_model("test_vit", num_classes=5).eval()
        model.load_state_dict(weights)
        adapters.attach(model, "onebit", dim=8, scale=10., **options)
        adapters.save(model, tmp_path / f"{name}.safetensors")
        found[name] = model(images)
    return tmp_path, images, found


def test_adapters_are_listed(capsys):
    assert main(["adapters", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == adapters.names()
    assert "bits=1, dim=32" in lines[2 * adapters.names().index("onebit") + 1]


def test_a_file_says_what_it_is(files, capsys):
    folder, *_ = files
    assert main(["adapters", "info", str(folder / "stays.safetensors")]) == 0
    said = capsys.readouterr().out
    for part in ("adapter   onebit", "dim=8", "backbone  test_vit", "classes   5", "head.head.weight 5 x 64",
                 f"{(folder / 'stays.safetensors').stat().st_size:,}"):
        assert part in said


def test_an_adapter_is_merged_where_it_can_be(files, capsys):
    folder, images, expected = files
    options = ["--model", "test_vit", "--checkpoint", str(folder / "backbone.pth"), "--num-classes", "5",
               "--out", str(folder / "m.safetensors")]
    assert main(["adapters", "merge", str(folder / "folds.safetensors"), *options]) == 0
    assert "the adapter is part of the weights" in capsys.readouterr().out
    model = create_model("test_vit", folder / "m.safetensors", num_classes=5).eval()
    torch.testing.assert_close(model(images), expected["folds"])
    for argv, message in (
            ([str(folder / "stays.safetensors"), *options], "cannot be folded into the backbone's weights"),
            ([str(folder / "stays.safetensors")], "is an adapter without its backbone"),
            ([str(folder / "stays.safetensors"), "--model", "test_vit"], "on other weights of test_vit"),
            ([str(folder / "backbone.pth"), *options], "damaged or not an adapter file")):
        assert main(["adapters", "merge", *argv]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.slow
def test_export_takes_an_adapter_file(files):
    folder, images, expected = files
    onnxruntime = pytest.importorskip("onnxruntime")
    for name, more in (("folds", []), ("folds", ["--keep-adapter"]), ("stays", [])):
        out = folder / "model.onnx"
        assert main(["export", "--model", "test_vit", "--checkpoint", str(folder / "backbone.pth"),
                     "--num-classes", "5", "--adapter", str(folder / f"{name}.safetensors"), "--out", str(out),
                     *more]) == 0
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        logits, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[name], atol=1e-4, rtol=1e-4)
