"""MaskMix, progressive attention labels and SMMix: beside loops that say the same, and in training."""
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from tests.layers.test_attention_maps import tiny
from tests.processes import together
from visionattn.data import DigitsData
from visionattn.layers import attention_maps
from visionattn.tasks import ClassificationTask
from visionattn.tasks.mixing import (
    MaskMix,
    Mixed,
    Seen,
    SelfMotivatedMix,
    attention_share,
    draw_cells,
    forward_tokens,
    masked_mean,
    mix_by_attention,
    mix_by_cells,
    progressive_loss,
    token_attention,
    tokens_of_cells,
    window_sums,
)
from visionattn.tasks.sharding import FullySharded

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _task(**kwargs):
    torch.manual_seed(0)
    arguments = dict(backbone="vit_tiny_patch16_224", model_args=VIT, num_classes=10, warmup_epochs=0, mixing_prob=1.0)
    return ClassificationTask(**arguments | kwargs)


# MaskMix


def test_as_many_cells_of_every_image_are_kept():
    shares = set()
    for _ in range(60):
        mask, share = draw_cells(5, (2, 3))
        assert mask.shape == (5, 2, 3)
        assert mask.flatten(1).sum(dim=1).tolist() == [round(6 * share)] * 5
        shares.add(round(6 * share))
    assert shares == {1, 2, 3, 4, 5, 6}  # never none, perhaps all
    many, share = draw_cells(400, (2, 3))
    assert torch.allclose(many.float().mean(dim=0), torch.full((2, 3), share), atol=0.1)


@pytest.mark.parametrize("size", [(12, 18), (10, 17)])  # the last cells are cut off
def test_mixing_by_cells(size):
    images, partners = torch.randn(2, 3, 2, *size)
    mask = torch.rand(3, 2, 3) > 0.5
    mixed = mix_by_cells(images, partners, mask, cell=6)
    for image in range(3):
        for y in range(size[0]):
            for x in range(size[1]):
                source = images if mask[image, y // 6, x // 6] else partners
                assert torch.equal(mixed[image, :, y, x], source[image, :, y, x])


def test_tokens_of_cells_are_of_one_image():
    mask = torch.rand(2, 2, 2) > 0.5
    found = tokens_of_cells(mask, cell=8, patch=4, grid=(3, 4))  # of 12 x 16 pixels
    expected = [[bool(image[y * 4 // 8, x * 4 // 8]) for y in range(3) for x in range(4)] for image in mask]
    assert found.tolist() == expected
    with pytest.raises(ValueError, match="multiple of what a token of the model's last map spans, 4 pixels, got 6"):
        tokens_of_cells(mask, cell=6, patch=4, grid=(3, 3))


def test_mixed_labels_are_those_of_the_parts():
    mixing = MaskMix(tiny("vit"), 10, None, False)
    labels = torch.arange(6)
    images = labels[:, None, None, None].float().expand(6, 3, 32, 48).contiguous()  # a pixel says whose it is
    mixed = mixing.mix(tiny("vit"), images, labels)
    assert mixed.targets.shape == (6, 10)
    own = (mixed.images[:, 0] == labels[:, None, None]).float().mean(dim=(1, 2))
    for image, partner in enumerate(mixed.partner_labels.tolist()):
        if partner == image:
            assert mixed.targets[image, image] == 1
            continue
        assert own[image].item() == pytest.approx(mixed.share)
        assert mixed.targets[image, image].item() == pytest.approx(mixed.share)
        assert mixed.targets[image, partner].item() == pytest.approx(1 - mixed.share)
        assert set(mixed.images[image].unique().tolist()) <= {float(image), float(partner)}
    assert sorted(mixed.partner_labels.tolist()) == labels.tolist()


@pytest.mark.parametrize(("kind", "pixels", "labels", "cell"), [
    ("vit", 224, False, 64),  # 3.5 patches: the even number
    ("swin", 224, False, 56),
    ("swin", 224, True, 56 // 8 * 8),  # tokens of the last map of this small one span 8 pixels
    ("pvt", 224, False, 56),
    ("pvt", 224, True, 64),
])
def test_cells_are_patches_near_a_quarter_of_the_image(kind, pixels, labels, cell):
    assert MaskMix(tiny(kind), 4, None, labels)._cell(torch.empty(1, 3, pixels, pixels + 64)) == cell


def test_cells_must_be_whole_patches():
    with pytest.raises(ValueError, match="multiple of the model's patch, 4 pixels, got 6"):
        MaskMix(tiny("swin"), 4, 6, False)
    with pytest.raises(ValueError, match="a token of its last map spans, 32 pixels, got 56"):
        MaskMix(tiny("pvt"), 4, 56, True)
    with pytest.raises(ValueError, match="with 32 pixels a cell, images of 32 x 32 have one"):
        MaskMix(tiny("swin"), 4, 32, False).mix(tiny("swin"), torch.randn(2, 3, 32, 32), torch.arange(2))


# Progressive attention labels


def test_attention_share():
    attention, mask = torch.rand(3, 8), torch.rand(3, 8) > 0.5
    expected = [sum(a for a, m in zip(row, kept, strict=True) if m) / sum(row)
                for row, kept in zip(attention.tolist(), mask.tolist(), strict=True)]
    assert attention_share(attention, mask).tolist() == pytest.approx(expected)
    assert attention_share(attention, torch.ones_like(mask)).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("class_weight", [None, [1.0, 2.0, 0.5, 3.0]])
def test_progressive_loss(class_weight):
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels, partners, shares, area = [0, 1, 3], [2, 1, 0], [0.9, 0.2, 0.5], 0.25
    targets = torch.full((3, 4), 0.025, dtype=torch.float64)
    for image, (label, partner) in enumerate(zip(labels, partners, strict=True)):
        targets[image, label] += 0.9 * area
        targets[image, partner] += 0.9 * (1 - area)
    weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
    found = progressive_loss(
        logits, torch.tensor(labels), torch.tensor(partners), targets, torch.tensor(shares, dtype=torch.float64), area,
        weight)
    total = 0.0
    for image, (label, partner) in enumerate(zip(labels, partners, strict=True)):
        answer = logits[image].exp() / logits[image].exp().sum()
        likeness = (answer * targets[image]).sum() / (answer.norm() * targets[image].norm())
        share = likeness * shares[image] + (1 - likeness) * area
        w = class_weight or [1.0] * 4
        total = total - share * w[label] * answer[label].log() - (1 - share) * w[partner] * answer[partner].log()
    assert found.item() == pytest.approx(total.item() / 3, rel=1e-12)
    gradient, = torch.autograd.grad(found, logits, retain_graph=True)
    expected, = torch.autograd.grad(total / 3, logits)  # through the likeness too
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["vit", "vit with registers", "deit", "swin", "test_agent_deit"])
def test_attention_of_tokens(kind):
    if kind == "test_agent_deit":
        model, images = _task(backbone=kind, model_args=None).model.eval(), torch.randn(2, 3, 64, 64)
    else:
        model, images = tiny(kind), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), attention_maps(model) as maps:
        seen = forward_tokens(model, images)
    assert torch.allclose(seen.logits, model(images), atol=1e-6)
    assert seen.tokens.shape[1] == math.prod(seen.grid)
    prefix = {"vit": 1, "vit with registers": 3, "deit": 2, "swin": 0, "test_agent_deit": 1}[kind]
    heads = maps[-1].mean(dim=1)
    assert torch.allclose(token_attention(maps[-1], seen), heads[:, prefix:, prefix:].mean(dim=1), atol=1e-7)
    if prefix:
        assert torch.allclose(token_attention(maps[-1], seen, True), heads[:, 0, prefix:], atol=1e-7)
    assert MaskMix(model, 4, None, True).class_token == bool(prefix)


def test_attention_that_is_not_over_the_map_is_refused():
    images = torch.randn(2, 3, 64, 64)
    swin = tiny("swin", img_size=64)  # four windows
    with torch.no_grad(), attention_maps(swin) as maps:
        seen = forward_tokens(swin, images)
    with pytest.raises(ValueError, match=r"8 maps of 16 queries and 16 keys for 2 images.* not over the 8 x 8 tokens"):
        token_attention(maps[-1], seen)
    with pytest.raises(ValueError, match="1 keys"):  # of the stage before: keys are pooled
        token_attention(torch.ones(2, 2, 64, 1), seen)
    with pytest.raises(ValueError, match=r"test_convnext|ConvNeXt gives no attention maps"):
        _task(backbone="test_convnext", model_args=None, mixing="smmix")._batch_loss(images, torch.arange(2))


def test_images_of_partial_tokens_are_refused():
    model = tiny("pvt")
    with pytest.raises(ValueError, match="no map of square tokens that images of 40 x 40 are made of"):
        forward_tokens(model, torch.randn(1, 3, 40, 40))


# SMMix


def test_sums_of_windows():
    scores = torch.rand(2, 4, 5)
    found = window_sums(scores, 3)
    assert found.shape == (2, 2, 3)
    for y in range(2):
        for x in range(3):
            assert torch.allclose(found[:, y, x], scores[:, y:y + 3, x:x + 3].sum(dim=(1, 2)))


@pytest.mark.parametrize("batch", [4, 5])
def test_mixing_by_attention(batch):
    """The window of the partner's most attention lands on that of the least, patch by patch; nothing else moves."""
    rows, columns, patch, size = 4, 6, 3, 2
    images, scores = torch.randn(batch, 2, rows * patch, columns * patch), torch.rand(batch, rows, columns)
    mixed, own = mix_by_attention(images, scores, size)
    for image in range(batch):
        partner = batch - 1 - image
        places = [(y, x) for y in range(rows - size + 1) for x in range(columns - size + 1)]

        def total(image, place):
            return scores[image, place[0]:place[0] + size, place[1]:place[1] + size].sum().item()

        to = min(places, key=lambda place, image=image: total(image, place))
        source = max(places, key=lambda place, partner=partner: total(partner, place))
        expected, kept = images[image].clone(), torch.ones(rows, columns, dtype=torch.bool)
        (y, x), (v, u) = ([side * patch for side in place] for place in (to, source))
        expected[:, y:y + size * patch, x:x + size * patch] = images[
            partner][:, v:v + size * patch, u:u + size * patch]
        kept[to[0]:to[0] + size, to[1]:to[1] + size] = False
        assert torch.equal(mixed[image], expected)
        assert torch.equal(own[image], kept)


def test_masked_mean():
    tokens, mask = torch.randn(3, 6, 2), torch.rand(3, 6) > 0.4
    expected = torch.stack([rows[kept].mean(dim=0) for rows, kept in zip(tokens, mask, strict=True)])
    assert torch.allclose(masked_mean(tokens, mask), expected, atol=1e-6)


def test_loss_of_self_motivated_mixing():
    mixing = SelfMotivatedMix(tiny("vit"), 4).double()
    logits, clean = torch.randn(2, 3, 4, dtype=torch.float64)
    tokens, mask = torch.randn(3, 4, 24, dtype=torch.float64), torch.tensor([[[1, 0], [1, 1]]] * 3).bool()
    labels, share = torch.tensor([0, 1, 3]), 0.75
    targets = share * F.one_hot(labels, 4).double() + (1 - share) * F.one_hot(labels.flip(0), 4).double()
    mixed = Mixed(torch.empty(3), targets, labels, labels.flip(0), share, mask, clean)

    def criterion(logits, targets):
        return F.cross_entropy(logits, targets, label_smoothing=0.1)

    found = mixing.loss(mixed, Seen(logits, tokens, (2, 2), 1), criterion)
    total = 0.0
    for image in range(3):
        def cross_entropy(answers, target):
            return -((0.9 * target + 0.1 / 4) * answers.log_softmax(dim=0)).sum()

        own, partners = (torch.eye(4, dtype=torch.float64)[x[image]] for x in (labels, labels.flip(0)))
        kept = tokens[image][[0, 2, 3]].mean(dim=0)
        p, q = clean[image].softmax(dim=0), logits[image].softmax(dim=0)
        total += cross_entropy(logits[image], targets[image]) + (p * (p.log() - q.log())).sum()
        total += 0.5 * (cross_entropy(mixing.token_head(kept), own)
                        + cross_entropy(mixing.token_head(tokens[image][1]), partners))
    assert found.item() == pytest.approx(total.item() / 3, rel=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_mixing_by_what_the_model_sees(size):
    """Windows and the share by the model's own attention; frozen parts, statistics and modes stay as they were."""
    model = _task(backbone="test_routing_vit", model_args=None).model if size[0] == size[1] else tiny(
        "vit", img_size=size, proj_drop_rate=0.5)
    model.train()
    next(model.children()).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(3, 3, *size)
    if size[0] == size[1]:
        images = F.interpolate(images, scale_factor=4)  # whose last map has 4 x 4 tokens
    mixing = SelfMotivatedMix(model, 4)
    sizes = set()
    for _ in range(8):
        mixed = mixing.mix(model, images, torch.arange(3))
        tokens = math.prod(mixed.mask.shape[1:])
        window = (~mixed.mask).flatten(1).sum(dim=1)
        assert (window == window[0]).all()
        assert mixed.share == 1 - window[0].item() / tokens
        sizes.add(math.isqrt(int(window[0])))
    side = min(mixed.mask.shape[1:])
    assert sizes <= set(range(max(1, int(0.25 * side)), int(0.75 * side) + 1))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(images)
    assert torch.allclose(mixed.clean, mixed.share * logits + (1 - mixed.share) * logits.flip(0), atol=1e-5)


# In training


def _trainer(folder, **kwargs):
    defaults = dict(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_train_batches=2, limit_val_batches=1,
        num_sanity_val_steps=0)
    return pl.Trainer(**defaults | kwargs)


@pytest.mark.parametrize("kwargs", [
    dict(mixing="maskmix", mixup=0.2), dict(mixing="maskmix", attention_labels=True, class_weights=[1.0] * 9 + [2.0]),
    dict(mixing="smmix", mixup=0.8, frozen=False), dict(mixing="smmix", attention_diversification=0.5)])
def test_trains_with_everything_on(kwargs, tmp_path):
    task = _task(**kwargs, mixing_prob=0.5, ema_decay=0.9, drop_path_rate=0.2, layer_decay=0.8)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    fit = _trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, precision="bf16-mixed", limit_train_batches=4,
                   gradient_clip_val=1.0)
    fit.fit(task, DigitsData(image_size=32, batch_size=15))
    assert 0 < fit.callback_metrics["val/loss"] < 10
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    changed = [not torch.equal(parameter, old) for parameter, old in zip(task.parameters(), before, strict=True)]
    assert all(changed)


@pytest.mark.parametrize("mixing", ["maskmix", "smmix"])
def test_resumed_run_has_the_weights_of_an_uninterrupted_one(mixing, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def fit(folder, epochs, ckpt_path=None):
        keep = ModelCheckpoint(dirpath=folder, filename="last", save_on_train_epoch_end=True,
                               enable_version_counter=False)
        task = _task(mixing=mixing, mixing_prob=0.7, attention_labels=mixing == "maskmix", lr=1e-3, min_lr=1e-3)
        _trainer(folder, max_epochs=epochs, enable_checkpointing=True, callbacks=[keep]).fit(
            task, DigitsData(image_size=32, batch_size=16), ckpt_path=ckpt_path)
        return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]

    straight = fit(tmp_path / "straight", 2)
    fit(tmp_path / "resumed", 1)
    torch.randn(7)
    resumed = fit(tmp_path / "resumed", 2, tmp_path / "resumed" / "last.ckpt")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert ("mixing.token_head.weight" in straight) == (mixing == "smmix")
    if mixing == "smmix":
        task = ClassificationTask.load_from_checkpoint(tmp_path / "resumed" / "last.ckpt")
        assert torch.equal(task.mixing.token_head.weight, resumed["mixing.token_head.weight"])
        plain = _task(checkpoint_path=str(tmp_path / "resumed" / "last.ckpt"))  # the model is none the larger
        assert all(torch.equal(value, resumed[f"model.{name}"]) for name, value in plain.model.state_dict().items())


def test_every_parameter_has_a_gradient_in_every_batch():
    """Several processes wait for the gradients of all, whether or not a batch is mixed; autocast keeps none back."""
    task = _task(mixing="smmix").train()
    for prob in (0.01, 1.0):
        task.args.mixing_prob = prob
        task.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = task._batch_loss(torch.randn(4, 3, 32, 32), torch.arange(4))
        loss.backward()
        assert all(parameter.grad is not None for parameter in task.parameters())
        assert (task.mixing.token_head.weight.grad != 0).any() == (prob == 1)
        assert (task.model.blocks[0].attn.qkv.weight.grad != 0).any()


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(mixing_prob=0.0), "mixing_prob must be above 0 and at most 1, got 0.0"),
    (dict(attention_labels=True), "attention_labels is of mixing maskmix, and mixing is not set"),
    (dict(mixing="smmix", mask_patch=8), "mask_patch is of mixing maskmix, and mixing is smmix"),
    (dict(mixing="smmix", multi_label=True), "needs one label for an image"),
    (dict(mixing="smmix", bce=True), "mixing smmix weighs cross-entropies: leave bce out"),
    (dict(mixing="maskmix", attention_labels=True, compile=True), "attention_labels needs attention maps"),
    (dict(mixing="maskmix", mask_patch=12), "multiple of the model's patch, 8 pixels, got 12"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _task(**kwargs)


def _two(folder):
    """Two processes that mix, or not, each by its own random numbers, keep the same weights."""
    pl.seed_everything(0, verbose=False)
    task = _task(mixing="smmix", mixing_prob=0.5, lr=1e-2)
    before = task.mixing.token_head.weight.detach().clone()
    trainer = _trainer(folder, devices=2, strategy="ddp", limit_train_batches=5, limit_val_batches=0)
    trainer.fit(task, DigitsData(image_size=32, batch_size=4))
    weights = torch.cat([parameter.detach().flatten() for parameter in task.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(both, weights)
    assert torch.equal(*both)
    assert not torch.equal(task.mixing.token_head.weight, before)


def test_two_processes(tmp_path):
    together(2, _two, tmp_path)


@pytest.mark.parametrize("kwargs", [dict(mixing="smmix"), dict(mixing="maskmix", attention_labels=True)])
def test_models_in_pieces_cannot_run_in_parts(kwargs):
    with pytest.raises(ValueError, match="fsdp2 does not take mixing smmix and attention_labels"):
        FullySharded().shard(_task(**kwargs))
