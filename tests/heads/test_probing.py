"""Heads for probing: the authors' numbers, what they pool, and classifiers that have them."""
import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests import golden
from visionattn import Predictor
from visionattn.cli import main
from visionattn.heads import EfficientProbing, MultiHeadPooling, PooledHead, pool_tokens
from visionattn.tasks import ClassificationTask
from visionattn.tasks.rebuild import create_model

CASES = golden.load("ep_ops")["cases"]
KINDS = ["mean", "attention", "ep", "ep_all"]


def official(case, prefix):
    """The authors' weights by our names."""
    names = {"cls_token": "queries"}
    return {names.get(key.removeprefix(prefix), key.removeprefix(prefix)): golden.fill(key, shape)
            for key, shape in case["state_dict"] if key.startswith(prefix)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['dim']}-{case['num_queries']}")
@torch.no_grad()
def test_golden(case):
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    prefix = "" if case["kind"] == "pool" else "0."
    pool = EfficientProbing(case["dim"], case["num_queries"], case["d_out"], dtype=torch.float64)
    pool.load_state_dict(official(case, prefix))
    module, count = pool, sum(parameter.numel() for parameter in pool.parameters())
    if prefix:
        width = case["dim"] // case["d_out"]
        norm = nn.BatchNorm1d(width, eps=1e-6, affine=False, dtype=torch.float64)
        norm.load_state_dict({**official(case, "1."), "num_batches_tracked": torch.tensor(0)})
        fc = nn.Linear(width, 10, dtype=torch.float64)
        fc.load_state_dict(official(case, "2."))
        module = nn.Sequential(pool, norm, fc).eval()
        count += sum(parameter.numel() for parameter in fc.parameters())
    assert count == case["num_params"]
    golden.assert_matches(pool.attention(x), case["attn_B_Q_N_summary"], 1e-12)
    out = module(x)
    golden.assert_matches(out, case["out_summary"], 1e-12)
    np.testing.assert_allclose(out.numpy(), case["out"], rtol=0, atol=1e-12)


def test_queries_of_a_call_and_half_precision():
    torch.manual_seed(0)
    pool, tokens = EfficientProbing(24, 4), torch.randn(2, 7, 24)
    torch.testing.assert_close(pool(tokens, pool.queries), pool(tokens))
    assert not torch.allclose(pool(tokens, pool.queries + 1), pool(tokens))
    low = copy.deepcopy(pool).to(torch.bfloat16)
    assert low.attention(100 * tokens.bfloat16()).dtype == torch.float32
    assert low(tokens.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("dim", "options"), [(24, dict(num_queries=5)), (24, dict(num_queries=8, reduction=2)),
                                              (24, dict(reduction=0))], ids=str)
def test_channels_that_cannot_be_divided(dim, options):
    with pytest.raises(ValueError, match="24 channels cannot be divided among"):
        EfficientProbing(dim, **options)


def test_tokens():
    """Of the image, or all; of maps of either order."""
    tokens = torch.randn(2, 1 + 12, 8)
    assert torch.equal(PooledHead("ep", 8, 3, 1).tokens(tokens), tokens[:, 1:])
    assert torch.equal(PooledHead("ep_all", 8, 3, 1).tokens(tokens), tokens)
    assert torch.equal(PooledHead("token", 8, 3, 1).tokens(tokens), tokens[:, :1])
    maps = tokens[:, 1:].unflatten(1, (3, 4))
    assert torch.equal(PooledHead("mean", 8, 3, output_fmt="NHWC").tokens(maps), tokens[:, 1:])
    assert torch.equal(PooledHead("mean", 8, 3).tokens(maps.permute(0, 3, 1, 2)), tokens[:, 1:])
    head = PooledHead("mean", 8, 3).eval()
    assert torch.equal(head(maps.permute(0, 3, 1, 2), pre_logits=True), head.norm(tokens[:, 1:].mean(1)))
    with pytest.raises(ValueError, match="the model has none: take mean or ep"):
        PooledHead("token", 8, 3)
    with pytest.raises(ValueError, match="pooling must be one of mean, token, attention, ep, ep_all, got 'max'"):
        PooledHead("max", 8, 3)


def test_multi_head_pooling_is_attention():
    torch.manual_seed(0)
    pool, tokens = MultiHeadPooling(128).double(), torch.randn(2, 5, 128, dtype=torch.float64)
    weight, bias = pool.attn.in_proj_weight, pool.attn.in_proj_bias
    q, k, v = (x.unflatten(-1, (2, 64)).transpose(1, 2) for x in (
        pool.query.expand(2, -1, -1) @ weight[:128].T + bias[:128], tokens @ weight[128:256].T + bias[128:256],
        tokens @ weight[256:].T + bias[256:]))
    out = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)[:, 0]
    torch.testing.assert_close(pool(tokens), pool.attn.out_proj(out))


@pytest.mark.parametrize("name", ["test_vit", "test_dinat", "test_resnet"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_with_another_head(name, kind):
    """They are as trainable, copied and saved as others; every parameter of the head learns."""
    torch.manual_seed(0)
    size = {"img_size": 64} if name == "test_vit" else {}
    model = pool_tokens(timm.create_model(name, num_classes=0, **size), kind, 7)
    images = torch.randn(3, 3, 64, 64)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.pooled_head.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(images)
        assert expected.shape == (3, 7)
        assert torch.equal(model.forward_head(model.forward_features(images)), expected)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), expected)
            nn.init.zeros_(twin.pooled_head.fc.weight)
            assert not torch.equal(twin(images), expected)
        assert torch.equal(model(images), expected)


def test_a_frozen_backbone_trains_its_head_alone():
    task = ClassificationTask("test_vit", num_classes=4, frozen=True, pooling="ep", model_args={"img_size": 32})
    training = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert training == {f"pooled_head.{name}" for name in ("pool.queries", "pool.v.weight", "fc.weight", "fc.bias")}


def test_a_model_without_a_head_of_its_own():
    class Bare(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Bare has no forward_features and forward_head"):
        pool_tokens(Bare(2, 2), "ep", 3)


@pytest.mark.slow
def test_a_run_with_another_head_goes_out(tmp_path):
    """Trained, tested, predicted with, exported, and started from, as any run."""
    run, onnx = tmp_path / "run", tmp_path / "model.onnx"
    shorter = ["--model.backbone", "test_dinat", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
               "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu",
               "--data.image_size", "32", "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"]
    pooled = ["--model.pooling", "ep", "--model.frozen", "true"]
    assert main(["fit", "--config", "digits_dinat", *shorter, *pooled, "--trainer.default_root_dir", str(run)]) == 0
    checkpoint = run / "checkpoints" / "best.ckpt"
    model = create_model(None, checkpoint).eval()
    assert isinstance(model.pooled_head.pool, EfficientProbing)
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(onnx)]) == 0
    image = tmp_path / "0.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8)).save(image)
    found = [Predictor(source)(image) for source in (run, onnx)]
    assert found[0].probability == pytest.approx(found[1].probability, abs=1e-4)
    task = ClassificationTask("test_dinat", num_classes=3, checkpoint_path=str(checkpoint))
    for key, value in task.model.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(value, model.state_dict()[key]), key
