"""Adapters through the command line: a step of training, the file that a run leaves, and its model exported."""
import pytest
import timm
import torch

from visionattn import adapters
from visionattn.cli import main
from visionattn.tasks.rebuild import create_model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [
    ("mosa", "{shape: lora, targets: qkvo, bottleneck: 8}"),
    ("tcpa", "{class_pool: 4, class_topk: 2, image_pool: 4, image_topk: 2, value_prompts: true}")])
def test_a_run(name, options, tmp_path, caplog, capsys):
    run = tmp_path / "run"
    assert main([
        "fit", "--config", "digits_biformer", "--trainer.default_root_dir", str(run), "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1",
        "--data.image_size", "32", "--data.batch_size", "4", "--model.backbone", "test_vit", "--model.model_args",
        "{img_size: 32, depth: 2}", "--model.adapter", name, "--model.adapter_args", options]) == 0
    checkpoint, file = run / "checkpoints" / "best.ckpt", tmp_path / "model.onnx"
    model, images = create_model(None, checkpoint).eval(), torch.randn(2, 3, 32, 32)
    plain = timm.create_model("test_vit", img_size=32, depth=2)
    plain.load_state_dict({key: x for key, x in model.state_dict().items()
                           if not key.startswith(("head.", "adapters."))}, strict=False)
    adapters.load(plain, run / "adapter.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), model(images))
    assert main(["adapters", "merge", str(run), "--out", str(tmp_path / "merged.safetensors")]) != 0
    assert "cannot be folded into the backbone's weights" in caplog.text + capsys.readouterr().err
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(file)]) == 0  # compares the answers
    assert file.stat().st_size > 10_000
