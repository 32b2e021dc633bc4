"""Routing ViT: sizes, training with its auxiliary loss, export (what every family must do is in test_families.py)."""
import copy

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from visionattn.export import export_onnx
from visionattn.layers import KMeansRoutingAttention, auxiliary_losses
from visionattn.tasks import ClassificationTask

VARIANTS = {  # parameters, exactly those of BiFormer's variants; blocks of routed attention
    "routing_vit_tiny": (13_142_760, 12),
    "routing_vit_small": (25_536_232, 26),
    "routing_vit_base": (56_804_968, 26),
    "test_routing_vit": (500_904, 4),
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model("test_routing_vit", num_classes=10, **options)


def images(batch=4, height=64, width=64, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "expected"), VARIANTS.items())
def test_sizes_of_the_variants(name, expected):
    model = timm.create_model(name, device="meta")
    routed = [module for module in model.modules() if isinstance(module, KMeansRoutingAttention)]
    assert (sum(p.numel() for p in model.parameters()), len(routed)) == expected
    if name != "test_routing_vit":
        assert {(m.num_clusters, m.qkv.in_features // m.num_heads) for m in routed} == {(56, 32), (28, 32), (14, 32)}


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
@pytest.mark.parametrize("size", [(96, 96), (97, 131), (512, 640)], ids=str)
@torch.no_grad()
def test_any_image_size(size, assignment):
    model = timm.create_model("test_routing_vit", features_only=True, assignment=assignment).eval()
    for x, channels, reduction in zip(
            model(images(1, *size)), model.feature_info.channels(), [4, 8, 16, 32], strict=True):
        assert x.shape == (1, channels, *(-(-side // reduction) for side in size))
        assert x.isfinite().all()


@torch.no_grad()
def test_published_size_at_another_resolution():
    """routing_vit_tiny's own numbers of clusters, on a map that they are not made for."""
    out = timm.create_model("routing_vit_tiny", num_classes=3).eval()(images(1, 96, 161))
    assert out.isfinite().all()


@torch.no_grad()
def test_both_assignments_share_weights():
    model, other = make().eval(), make(assignment="capacity").eval()
    other.load_state_dict(model.state_dict())
    a, b = model(images()), other(images())
    assert not torch.allclose(a, b)  # on these maps some queries are taken twice and some not at all


def train(model, steps=3):
    """Losses of a few steps, weights and buffers after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels, history = torch.arange(4), []
    for step in range(steps):
        loss = cross_entropy(model.train()(images(seed=step)), labels)
        losses = auxiliary_losses(model)
        history.append([loss.item(), losses["commitment"].item()])
        optimizer.zero_grad()
        (loss + 1e3 * losses["commitment"]).backward()
        optimizer.step()
    return history, {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_gradient_checkpointing_in_training(assignment):
    plain, checkpointed = make(assignment=assignment), make(assignment=assignment)
    checkpointed.set_grad_checkpointing()
    (history, weights), (expected_history, expected) = train(checkpointed), train(plain)
    assert history == expected_history
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


def test_compiles_in_training_without_graph_breaks():
    torch.compiler.reset()
    model = make()
    expected_history, expected = train(copy.deepcopy(model), steps=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    history, weights = train(compiled, steps=2)
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected_history), rtol=1e-4, atol=1e-6)
    for key, value in expected.items():
        torch.testing.assert_close(weights[f"_orig_mod.{key}"], value, rtol=1e-3, atol=1e-4, msg=key)


def test_stopped_training_goes_on_as_if_it_had_not():
    _, expected = train(make(), steps=3)
    torch.manual_seed(0)
    first = make()
    train(first, steps=1)
    second = make(seed=7)
    second.load_state_dict(first.state_dict())
    optimizer, labels = torch.optim.SGD(second.parameters(), lr=0.1), torch.arange(4)
    for step in (1, 2):
        loss = cross_entropy(second.train()(images(seed=step)), labels)
        optimizer.zero_grad()
        (loss + 1e3 * auxiliary_losses(second)["commitment"]).backward()
        optimizer.step()
    for key, value in second.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_auxiliary_loss_in_the_task(tmp_path):
    """The trainer's loss is the sum, both are logged, and the moving average of the weights takes the centroids too."""
    task = ClassificationTask(
        "test_routing_vit", num_classes=10, model_args=dict(commitment=10.0), label_smoothing=0.0, warmup_epochs=0,
        ema_decay=0.5)
    twin = copy.deepcopy(task.model).train()
    batch = (images(8), torch.arange(8))
    expected = cross_entropy(twin(batch[0]), batch[1]).item()
    commitment = auxiliary_losses(twin)["commitment"].item()
    assert commitment > 0.1
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0)
    logged = []
    log = task.log
    task.log = lambda name, value, **options: (logged.append((name, value.item())), log(name, value, **options))
    before = task.model.stages[0].blocks[0][1].attn.centroids.clone()
    trainer.fit(task, torch.utils.data.DataLoader([*zip(*batch, strict=True)], batch_size=8))
    values = dict(reversed(logged))  # of the first step
    assert values["train/commitment"] == pytest.approx(commitment, rel=1e-4)
    assert values["train/loss"] == pytest.approx(expected + commitment, rel=1e-4)
    assert not torch.equal(task.model.stages[0].blocks[0][1].attn.centroids, before)


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_exports_with_dynamic_batch_height_and_width(assignment, tmp_path):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    options = dict(depths=(1, 1, 1), embed_dims=(16, 16, 16), num_clusters=(8, 4, None))  # exporting takes its time
    model = make(assignment=assignment, **options)
    train(model, steps=2)
    report = export_onnx(model, tmp_path / "model.onnx", (64, 96), dynamic_size=True)
    assert report.difference < 1e-4
