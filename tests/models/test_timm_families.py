"""Families of the papers behind the zoo that timm ships: our fit, export and list take them, timm's features work."""
import pytest
import timm
import torch
import yaml

from visionattn.cli import main

MODELS = {  # a small model of each family, its image size, and arguments that make it smaller still
    "eca_halonext26ts": (64, dict(output_stride=8)),  # HaloNet: its blocks of 8 x 8 tokens must divide the maps
    "davit_tiny": (64, dict(depths=[1, 1, 1, 1], embed_dims=[16, 32, 64, 128], num_heads=[1, 2, 4, 8])),
    "shvit_s1": (64, dict(depth=[1, 1, 1])),
    "ghostnetv2_100": (64, {}),
    "mambaout_femto": (64, dict(depths=[1, 1, 1, 1], dims=[16, 32, 64, 128])),
}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """Name, image size and arguments of a model, and the checkpoint that two steps of ``visionattn fit`` wrote."""
    name = request.param
    size, args = MODELS[name]
    folder = tmp_path_factory.mktemp(name)
    config = {
        "model": {"class_path": "ClassificationTask", "init_args": {
            "backbone": name, "model_args": args, "warmup_epochs": 0, "layer_decay": 0.9}},
        "data": {"class_path": "DigitsData", "init_args": {"image_size": size, "batch_size": 4, "num_workers": 0}},
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 2,
            "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False,
            "log_every_n_steps": 1, "default_root_dir": str(folder)},
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "given.yaml")]) == 0
    return name, size, args, folder / "checkpoints" / "last.ckpt"


def test_fit(trained):
    """The steps reached every parameter that has a gradient, and the checkpoint is of the whole model."""
    name, _, args, path = trained
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    weights = {key.removeprefix("model."): x for key, x in checkpoint["state_dict"].items()}
    model = timm.create_model(name, num_classes=10, **args)
    model.load_state_dict(weights)
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    assert len(moments) == len(list(model.parameters()))
    assert all(moment.isfinite().all() for moment in moments)
    assert sum(bool(moment.any()) for moment in moments) > 0.9 * len(moments)


@pytest.mark.parametrize("trained", [
    pytest.param(name, marks=[] if name == "shvit_s1" else pytest.mark.slow) for name in MODELS], indirect=True)
def test_export(trained, tmp_path, capsys):
    _, size, _, checkpoint = trained
    out = tmp_path / "model.onnx"
    assert main(["export", "--checkpoint", str(checkpoint), "--img-size", str(size), "--out", str(out)]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert out.exists()


@torch.no_grad()
def test_features(trained):
    name, size, args, _ = trained
    model = timm.create_model(name, features_only=True, **args).eval()
    maps = model(torch.randn(1, 3, size, size))
    assert len(maps) >= 3
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        x = x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", None) == "NHWC" else x
        assert x.shape == (1, channels, size // reduction, size // reduction)
        assert x.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_list(name, capsys):
    assert main(["list", name]) == 0
    _, row = capsys.readouterr().out.splitlines()
    words = row.split()
    model = timm.create_model(name, device="meta")
    assert words[:3] == [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}", "M"]
    assert float(words[3]) > 0
    assert words[-2].startswith("timm.")
