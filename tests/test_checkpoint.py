"""Reading checkpoints: what loads, and how files that do not fit end."""
import argparse
import pickle

import pytest
import safetensors.torch
import timm
import torch

from visionattn.checkpoint import create_model, read_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_dinat", num_classes=5)


def _same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dict(model, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    _same(create_model("test_dinat", path, num_classes=5), model)
    with pytest.raises(ValueError, match="say which model"):
        create_model(None, path)


def test_run_checkpoint_knows_its_model(model, tmp_path):
    path = tmp_path / "best.ckpt"
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"backbone": "test_dinat", "num_classes": 5}}, path)
    _same(create_model(None, path), model)
    with pytest.raises(ValueError, match="is of the model test_dinat, not test_biformer"):
        create_model("test_biformer", path)
    with pytest.raises(ValueError, match="has 5 classes, not 7"):
        create_model(None, path, num_classes=7)


class _Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_do_not_fit(model, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint|not weights"):
        read_checkpoint(path)
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"state_dict": _Code()}))
    with pytest.raises(ValueError, match="not opened"):
        read_checkpoint(path)
    torch.save({"model": _Code()}, path)
    with pytest.raises(ValueError, match="not opened"):
        read_checkpoint(path)
    assert "code ran" not in capsys.readouterr().out
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="holds a Tensor"):
        read_checkpoint(path)


def test_options_beside_the_weights_are_no_obstacle(model, tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3)}, path)
    _same(create_model("test_dinat", path, num_classes=5), model)


def test_weights_of_another_model_end_in_one_line(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    for other in ("test_biformer", "test_vit"):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            create_model(other, path, num_classes=5)
        assert "\n" not in str(caught.value)
        assert "weights.pth" in str(caught.value)
