"""The attention diversification loss: beside the authors' numbers, and its properties."""
import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests import golden
from visionattn.data import DigitsData
from visionattn.layers import attention_maps
from visionattn.tasks import ClassificationTask
from visionattn.tasks.losses import attention_diversification_loss

GOLDEN = golden.load("tapadl_adl")


def drawn(case):
    """What the softmax of each layer of a golden case is of; zeros where attention is even."""
    shape = case["shape"]
    return [torch.zeros(shape, dtype=torch.float64) if layer is None else
            layer["scale"] * golden.random(layer["seed"], shape)
            + layer["key_scale"] * golden.random(layer["key_seed"], [1, 1, 1, shape[-1]]) for layer in case["layers"]]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['shape']}")
def test_golden(case):
    maps = [scores.softmax(dim=-1) for scores in drawn(case)]
    found = attention_diversification_loss(maps, case["threshold"])
    assert found.item() == pytest.approx(case["value"], rel=1e-12, abs=0)
    for one, value in zip(maps, case["single"], strict=True):  # given without the 1e-6 of the number of layers
        assert attention_diversification_loss([one], case["threshold"]).item() == pytest.approx(value, rel=2e-6)
    if case["value"] == 0:
        maps = [one.requires_grad_() for one in maps]
        attention_diversification_loss(maps, case["threshold"]).backward()
        assert all((one.grad == 0).all() for one in maps)


def test_gradient():
    case = GOLDEN["gradient"]
    scale = case["layers"][0]["scale"]
    scores = drawn(case)[0].requires_grad_()
    loss = attention_diversification_loss([scores.softmax(dim=-1)], case["threshold"])
    loss.backward()
    assert loss.item() == pytest.approx(case["value"], rel=1e-12)
    assert torch.allclose(scale * scores.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-9, atol=1e-15)


def peaked(batch, queries=5, keys=7):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(keys, generator=generator, dtype=torch.float64)
    own = torch.randn(batch, 2, queries, keys, generator=generator, dtype=torch.float64)
    return (common + own).softmax(dim=-1)


@pytest.mark.parametrize("batch", [1, 3])
def test_definition(batch):
    """A loop over images and queries; the loss of a batch is the mean of its images' losses, a single one included."""
    attention, total = peaked(batch), 0.0
    for image in attention.mean(dim=1):
        mean = torch.tensor([x if x > 1 / 7 else 0 for x in image.mean(dim=0).tolist()])
        for row in image.tolist():
            total += cosine_similarity(mean, torch.tensor([x if x > 1 / 7 else 0 for x in row]), dim=0, eps=1e-8)
    expected = total / (batch * 5)
    assert 0 < expected < 1
    found = attention_diversification_loss([attention], 1.0)
    assert found.item() == pytest.approx(expected.item() / (1 + 1e-6), rel=1e-6)
    each = torch.stack([attention_diversification_loss([image[None]]) for image in attention])
    assert torch.allclose(attention_diversification_loss([attention]), each.mean())


def test_half_precision_is_computed_in_float32():
    attention = peaked(2).bfloat16()
    found = attention_diversification_loss([attention])
    assert found.dtype == torch.float32
    assert torch.equal(found, attention_diversification_loss([attention.float()]))


def test_class_attention_is_left_out():
    maps = [peaked(2), peaked(2)[:, :, :1]]
    assert torch.equal(attention_diversification_loss(maps), attention_diversification_loss(maps[:1]))
    with pytest.raises(ValueError, match="of several queries, got none"):
        attention_diversification_loss(maps[1:])


def _task(**kwargs):
    torch.manual_seed(0)
    model_args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    arguments = dict(backbone="vit_tiny_patch16_224", model_args=model_args, num_classes=10, warmup_epochs=0, lr=1e-3)
    task = ClassificationTask(**arguments | kwargs)
    with torch.no_grad():
        for block in task.model.blocks:  # all queries attend to the same keys from the start
            block.attn.qkv.bias[:32] = 2.0
            block.attn.qkv.weight[32:64] *= 10
    return task


def test_training_adds_it_to_the_loss(tmp_path):
    task = _task(attention_diversification=0.5, ema_decay=0.9)
    with torch.no_grad(), attention_maps(task.model) as maps:  # the model has no dropout
        logits = task.train()(images := torch.randn(4, 3, 32, 32))
    labels = torch.arange(4)
    plain = task._training_loss(logits, labels).item()
    added = 0.5 * attention_diversification_loss(maps).item()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0, precision="64-true")
    batch = torch.utils.data.DataLoader(list(zip(images.double(), labels, strict=True)), batch_size=4)
    trainer.fit(task, batch)
    assert added > 0.01
    assert trainer.callback_metrics["train/attention_diversification"].item() == pytest.approx(added, rel=1e-4)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(plain + added, rel=1e-4)


def test_training_spreads_attention():
    losses = {}
    for weight in (0.0, 5.0):
        task = _task(attention_diversification=weight, label_smoothing=0.0)
        data = DigitsData(image_size=32, batch_size=32)
        data.setup("fit")
        images, labels = next(iter(data.val_dataloader()))
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
        for _ in range(10):
            with attention_maps(task.model) as maps:
                loss = task._training_loss(task(images), labels)
            found = attention_diversification_loss(maps)
            optimizer.zero_grad()
            (loss + weight * found).backward()
            optimizer.step()
        losses[weight] = found.item()
    assert losses[5.0] < 0.8 * losses[0.0]


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(attention_diversification=-1.0), "must not be negative, got -1.0"),
    (dict(attention_diversification=1.0, compile=True), "leave compile out"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _task(**kwargs)
