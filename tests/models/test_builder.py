"""Loading weights: what fits loads, and what cannot be fetched, read or used ends in one line."""
import urllib.error

import pytest
import timm
import torch
from timm.models import save_for_hf

from tests import golden
from tests.models import SAFETENSORS
from visionattn.models._builder import CheckpointError, build_model

NAME = "test_biformer"


def create(file=None, name=NAME, **options):
    overlay = options.pop("overlay", dict(file=str(file)))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def message(*args, **options):
    with pytest.raises(CheckpointError) as caught:
        create(*args, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return timm.create_model(NAME).state_dict()


class TestWhatFits:
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"state_dict": x, "epoch": 3}])
    def test_own_checkpoint(self, tmp_path, weights, wrap):
        torch.save(wrap(weights), tmp_path / "x.pth")
        model = create(tmp_path / "x.pth")
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())

    def test_saved_for_the_hub(self, tmp_path, weights):
        model = timm.create_model(NAME, num_classes=7)
        save_for_hf(model, tmp_path, safe_serialization=SAFETENSORS)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())

    @pytest.mark.parametrize("num_classes", [0, 5])
    def test_other_classes_and_channels(self, tmp_path, weights, num_classes):
        torch.save(weights, tmp_path / "x.pth")
        model = create(tmp_path / "x.pth", num_classes=num_classes, in_chans=1)
        for name, x in model.state_dict().items():
            if name == "stem.conv1.weight":
                torch.testing.assert_close(x, weights[name].sum(dim=1, keepdim=True))
            elif not name.startswith("head."):
                assert torch.equal(x, weights[name]), name

    def test_features_only(self, tmp_path, weights):
        torch.save({key: x for key, x in weights.items() if not key.startswith("head.")}, tmp_path / "x.pth")
        model = create(tmp_path / "x.pth", features_only=True, out_indices=(1, 2))
        assert torch.equal(model.model.stem.conv1.weight, weights["stem.conv1.weight"])
        assert model.feature_info.reduction() == [8, 16]

    @pytest.mark.parametrize("name", ["biformer_tiny", "dinat_tiny"])
    def test_official_checkpoint(self, name, tmp_path):
        torch.save({"model": golden.official_state_dict(golden.load(name))}, tmp_path / "x.pth")
        model = create(tmp_path / "x.pth", name=name, num_classes=3)
        assert model.get_classifier().weight.shape[0] == 3


class TestWhatDoesNot:
    def test_no_weights_known(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist for test_biformer"):
            timm.create_model(NAME, pretrained=True)

    def test_no_such_file(self, tmp_path):
        assert message(tmp_path / "nothing.pth") == f"{NAME}: there is no checkpoint '{tmp_path}/nothing.pth'"

    @pytest.mark.parametrize(("content", "part"), [
        (b"<html>sign in</html>", "cannot be read as a checkpoint of tensors"), (b"", "cannot be read")])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_not_a_checkpoint(self, tmp_path, content, part, suffix):
        (tmp_path / f"x.{suffix}").write_bytes(content)
        text = message(tmp_path / f"x.{suffix}")
        assert part in text
        assert f"x.{suffix}" in text

    @pytest.mark.parametrize("content", [[1, 2], {"model": [torch.zeros(1)]}, {"a": 1}, {}, torch.zeros(3), {1: 2}])
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "x.pth")
        text = message(tmp_path / "x.pth")
        assert "holds no state dict" in text or "cannot be read as a checkpoint of tensors" in text

    def test_code_is_not_run(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return open, (str(tmp_path / "run"), "w")

        torch.save({"model": Payload()}, tmp_path / "x.pth")
        assert "cannot be read as a checkpoint of tensors" in message(tmp_path / "x.pth")
        save_for_hf(timm.create_model(NAME), tmp_path / "hub", safe_serialization=True)
        (tmp_path / "hub" / "model.safetensors").unlink()
        torch.save({"x": Payload()}, tmp_path / "hub" / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint of tensors"):
            timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
        assert not (tmp_path / "run").exists()

    def test_another_model(self, tmp_path):
        other = timm.create_model(NAME, depths=(1, 2, 1, 1), embed_dims=(16, 32, 64, 256)).state_dict()
        torch.save(other, tmp_path / "x.pth")
        for options in (dict(), dict(num_classes=5, in_chans=1), dict(features_only=True)):
            text = message(tmp_path / "x.pth", **options)
            assert "x.pth is a checkpoint of another model: entries" in text
            assert "missing (first: stages.2.blocks.1.pos_conv.weight)" in text
            assert "unexpected (first: stages.1.blocks.1.pos_conv.weight)" in text
            assert "of another shape (first: stages.3.downsample.conv.weight, [256, 64, 3, 3] for [128, 64, 3, 3])" \
                in text

    def test_another_number_of_classes(self, tmp_path):
        torch.save(timm.create_model(NAME, num_classes=5).state_dict(), tmp_path / "x.pth")
        assert "2 of another shape (first: head.fc.weight, [5, 128] for [1000, 128])" in message(tmp_path / "x.pth")

    @pytest.mark.parametrize("error", [
        urllib.error.URLError("no route"), urllib.error.HTTPError("u", 404, "Not Found", None, None), TimeoutError()])
    def test_unreachable(self, monkeypatch, error, tmp_path):
        folders = []

        def fail(url, *args, model_dir=None, **kwargs):
            folders.append(model_dir)
            raise error

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)
        text = message(name="biformer_tiny", overlay=None)
        assert "https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvChHEOoGkgwgQzEDlM/root/content" in text
        assert "timm.create_model('biformer_tiny', pretrained=True, pretrained_cfg_overlay=dict(file='PATH'))" in text
        # The authors' links all end in "content": each needs a folder of its own.
        assert folders == [f"{tmp_path}/hub/checkpoints/biformer_tiny"]

    def test_hub_offline(self):
        text = message(overlay=dict(hf_hub_id="nobody/nothing"))
        assert "cannot get weights from nobody/nothing" in text

    def test_wrong_arguments_are_not_blamed_on_the_checkpoint(self, tmp_path, weights):
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(TypeError, match="n_wim"):
            create(tmp_path / "x.pth", n_wim=3)

    def test_names_of_the_filter_are_checked(self, weights):
        with pytest.raises(CheckpointError, match=r"1 missing \(first: head\.fc\.bias\), 1 unexpected \(first: x\)"):
            build_model(
                lambda **kwargs: timm.create_model(NAME, **kwargs), NAME, True,
                pretrained_filter_fn=lambda state_dict, model: {
                    "x" if key == "head.fc.bias" else key: x for key, x in state_dict.items()},
                pretrained_cfg_overlay=dict(state_dict=weights))
