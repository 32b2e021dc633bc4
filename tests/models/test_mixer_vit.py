"""The frame of token mixers, with every mixer: sizes, batch mates, gradients, and the exported file."""
import pytest
import timm
import torch

from visionattn import export
from visionattn.layers import auxiliary_losses
from visionattn.models.mixer_vit import MIXERS

OPTIONS = {  # of mixers that need some for maps as small as these
    "agent": {"agents": 3}, "neighborhood": {"kernel_size": 3}, "routed": {"n_win": 3, "topk": 2},
}


def make(mixer, depth=2, mlp="plain", **options):
    torch.manual_seed(0)
    return timm.create_model(
        "test_mixer_vit", num_classes=5, depth=depth, mixer=mixer, mixer_args=OPTIONS.get(mixer, {}) | options,
        mlp=mlp).eval()


def make_any(name, depth=2):
    """The model of a mixer, or of full attention with perceptrons as experts."""
    return make("full", depth, mlp="uoe") if name == "perceptrons" else make(name, depth)


def images(batch=1, height=40, width=56, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixer", [*MIXERS, "perceptrons"])
def test_an_image_does_not_depend_on_its_batch_mates(mixer):
    model = make_any(mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = images(3)
        together = model(x)
        torch.testing.assert_close(together, torch.cat([model(image[None]) for image in x]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(torch.cat([x[:1], 9 * x[1:]]))[:1], together[:1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[0], together[1])
        assert model(images(1, 17, 100)).isfinite().all()  # 3 x 13 patches, the last ones padded


@pytest.mark.parametrize("mixer", [*MIXERS, "perceptrons"])
def test_all_that_a_mixer_has_learns(mixer):
    model = make_any(mixer).train()
    (model(images(2)).square().sum() + sum(auxiliary_losses(model).values())).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_first_weights():
    """Of the blocks' linear layers and of experts by their fans, of the classifier small."""
    torch.manual_seed(0)
    model = make("uoe", depth=1, mlp="plain")
    weight = model.blocks[0].mlp.fc1.weight
    assert 0.98 < weight.abs().max() / (6 / sum(weight.shape)) ** 0.5 <= 1
    experts = model.blocks[0].attn.qkv
    torch.testing.assert_close(experts.std().item(), (2 / (48 + 36)) ** 0.5, rtol=0.05, atol=0)
    assert model.head.fc.weight.std() < 0.03


def test_merged_tokens():
    """Maps of several strides, by default those of each stride, of odd sizes too; every block learns."""
    options = dict(img_size=64, mixer="maelre", mixer_args={"switch": 20}, depth=3, merge_after=(1, 2))
    backbone = timm.create_model("test_mixer_vit", features_only=True, **options)
    assert backbone.feature_info.reduction() == [8, 16, 32]
    assert [x.shape[1:] for x in backbone(images())] == [(48, 5, 7), (48, 3, 4), (48, 2, 2)]
    model = timm.create_model("test_mixer_vit", **options).train()
    assert not model.blocks[1].downsample.score.any()
    model(images(2)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    model.set_grad_checkpointing()
    torch.jit.script(model)
    with pytest.raises(ValueError, match=r"merge_after must be ascending numbers of 1 to 2, got \[2, 1\]"):
        timm.create_model("test_mixer_vit", merge_after=(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [*MIXERS, "perceptrons"])
def test_exported_file_agrees_with_eager(mixer, tmp_path):
    report = export.export_onnx(make_any(mixer, depth=1), tmp_path / "model.onnx", (40, 56))
    assert report.difference <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [{"window_size": 3}, {"pattern": "fixed", "segment": 8}, {"pattern": "mixture"}])
@torch.no_grad()
def test_exported_file_of_free_sizes(pattern, tmp_path):
    import onnxruntime

    model = make("combiner", depth=1, **pattern)
    report = export.export_onnx(model, tmp_path / "model.onnx", (64, 96), dynamic_size=True)
    x = images(2, 96, 160)
    found, = onnxruntime.InferenceSession(report.path).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"mixer must be one of full, gqa, .* got 'fast'"):
        make("fast")
    with pytest.raises(ValueError, match="mixer_args do not fit mixer 'full': .* unexpected keyword argument 'window'"):
        make("full", window=7)
    with pytest.raises(ValueError, match="mlp must be one of plain, uoe, got 'gated'"):
        make("full", mlp="gated")
