"""DetectionTask: real steps with every family, and that what is measured, drawn and written is right."""
import io
import itertools
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from tests.models.test_families import SMALL
from tests.test_dense import DILATIONS
from visionattn.data import DigitScenesData
from visionattn.data.loading import collate_detection
from visionattn.dense import DenseBackbone
from visionattn.layers import auxiliary_losses
from visionattn.tasks import DetectionTask

DETECTORS = ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"]
FEW = dict(rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16)  # regions


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a few batches whose run folder is ``tmp_path``."""
    def make(**kwargs):
        defaults = dict(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, limit_train_batches=3, limit_val_batches=1,
            num_sanity_val_steps=0)
        return pl.Trainer(**defaults | kwargs)
    return make


def task(**kwargs):
    torch.manual_seed(0)
    defaults = dict(
        backbone="test_dinat", num_classes=10, detector="fcos", fpn_channels=64, min_size=64, max_size=96,
        warmup_steps=0, milestones=[])
    if kwargs.get("detector", "").endswith("rcnn"):
        defaults["detector_args"] = FEW
    return DetectionTask(**defaults | kwargs)


def scenes(**kwargs):
    defaults = dict(image_size=64, digits=(1, 3), digit_size=(16, 32), batch_size=2, train_scenes=6, val_scenes=4,
                    test_scenes=5)
    return DigitScenesData(**defaults | kwargs)


def sample(height=75, width=109, **kwargs):
    """An image with two objects."""
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 5:35, 10:30] = 1
    masks[1, 30:70, 50:100] = 1
    target = dict(
        boxes=torch.tensor([[10., 5, 30, 35], [50, 30, 100, 70]]), labels=torch.tensor([1, 3]), masks=masks, image_id=7,
        iscrowd=torch.zeros(2, dtype=torch.int64), area=torch.tensor([600., 2000]), file_name="photo.jpg",
        orig_size=torch.tensor([height, width]))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return image, target | kwargs


def loader(*samples):
    return DataLoader(samples, batch_size=2, collate_fn=collate_detection)


@pytest.mark.parametrize("name", [*SMALL, "resnet10t"])
def test_every_family_trains(name, trainer):
    """One step on images that 32 does not divide; no parameter is without gradient."""
    model = task(backbone=name, model_args=SMALL.get(name, {}) | DILATIONS.get(name, {}), lr=1e-3, num_classes=3)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}

    class Gradients(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.missing = [key for key, parameter in module.named_parameters() if parameter.grad is None]

    watch = Gradients()
    trainer(max_steps=1, limit_val_batches=0, callbacks=[watch]).fit(model, loader(sample(), sample(91, 70)))
    assert not watch.missing
    changed = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
    assert len(changed) > 0.5 * len(before)  # some families begin with branches scaled by zero
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("detector", DETECTORS)
def test_learns(detector, trainer):
    """An image by heart: its objects are found again."""
    model = task(detector=detector, num_classes=3, lr=3e-3, schedule="cosine", strides=[4, 8, 16],
                 anchor_scale={"fcos": 2}.get(detector, 4), backbone="resnet10t")
    data = loader(sample())
    fit = trainer(max_epochs=50, limit_val_batches=0, gradient_clip_val=1.0)
    fit.fit(model, data)
    assert {key for key in fit.callback_metrics if not key.endswith(("_step", "_epoch"))} == {"train/loss"} | {
        f"train/{name}" for name in {
            "fcos": ["classification", "bbox_regression", "bbox_ctrness"],
            "retinanet": ["classification", "bbox_regression"],
            "faster_rcnn": ["classifier", "box_reg", "objectness", "rpn_box_reg"],
            "mask_rcnn": ["classifier", "box_reg", "mask", "objectness", "rpn_box_reg"]}[detector]}
    metrics = fit.test(model, data, verbose=False)[0]
    assert metrics["test/box_map_50"] >= 0.5
    if detector == "mask_rcnn":
        assert metrics["test/mask_map_50"] >= 0.5


def test_everything_on(tmp_path, trainer):
    model = task(backbone="test_biformer", detector="mask_rcnn", layer_decay=0.8, ema_decay=0.9, drop_path_rate=0.2,
                 warmup_steps=2, schedule="step", milestones=[1], frozen_stages=1, frozen_norms=True,
                 grad_checkpointing=True, class_metrics=True, lr=1e-2)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    fit = trainer(max_epochs=2, accumulate_grad_batches=2, precision="bf16-mixed", gradient_clip_val=1.0,
                  enable_checkpointing=True, callbacks=[keep])
    fit.fit(model, scenes(masks=True))
    assert fit.global_step == 4
    assert fit.callback_metrics["val/mask_map"] >= 0
    rates = {group["lr"] for group in fit.optimizers[0].param_groups}
    assert max(rates) == pytest.approx(1e-3)  # after the milestone
    assert min(rates) < 0.6 * max(rates)  # deeper layers
    # The checkpoint stands alone, and its backbone starts other runs.
    again = DetectionTask.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    image, _ = sample()
    with torch.no_grad():
        for a, b in zip(again([image])[0].values(), model.eval()([image])[0].values(), strict=True):
            torch.testing.assert_close(a, b)
        backbone = DenseBackbone("test_biformer", "detection", checkpoint_path=str(tmp_path / "last.ckpt")).eval()
        for a, b in zip(backbone(image[None]), again.model.backbone.body(image[None]), strict=True):
            assert torch.equal(a, b)


def test_weight_decay_and_rates(trainer):
    model = task(layer_decay=0.5, lr=1e-3, weight_decay=0.1)
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(model, loader(sample()))
    groups = fit.optimizers[0].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rate = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    rates = set()
    for key, p in model.named_parameters():
        assert (decay[id(p)] == 0) == (p.ndim <= 1 or key.endswith(".rpb")), key
        if not key.startswith("model.backbone.body.model."):
            assert rate[id(p)] == 1e-3, key
        rates.add(rate[id(p)])
    assert len(rates) > 4


# Metrics and predictions


class Oracle(nn.Module):
    """Detects what it is told to, image after image, and begins anew after the last."""

    def __init__(self, detections):
        super().__init__()
        self.detections = itertools.cycle(detections)

    def forward(self, images):
        return [next(self.detections) for _ in images]


def half_right(data):
    """Detections in the test scenes: shifted boxes and masks, some wrong labels, some missed objects, some invented."""
    random = torch.Generator().manual_seed(0)
    data.setup("test")
    for batch in data.test_dataloader():
        for target in batch[1]:
            count = len(target["labels"])
            shift = torch.randint(-3, 4, (count, 2), generator=random)
            masks = [mask.roll((y, x), (0, 1)) for mask, (x, y) in zip(target["masks"], shift.tolist(), strict=True)]
            wrong = torch.rand(count, generator=random) < 0.2
            kept = torch.cat([torch.rand(count, generator=random) < 0.9, torch.ones(1, dtype=torch.bool)])
            yield dict(
                boxes=torch.cat([target["boxes"] + shift.repeat(1, 2), torch.tensor([[1., 2, 20, 30]])])[kept],
                labels=torch.cat([torch.where(wrong, 1, target["labels"]), torch.tensor([2])])[kept],
                scores=torch.rand(count + 1, generator=random)[kept],
                masks=torch.cat([torch.stack(masks), torch.zeros_like(masks[0])[None]])[kept][:, None].float())


def coco_truth(data):
    """The test scenes as a COCO annotation file would have them."""
    data.setup("test")
    images, annotations = [], []
    for batch in data.test_dataloader():
        for image, target in zip(*batch, strict=True):
            images.append({"id": target["image_id"], "height": image.shape[1], "width": image.shape[2]})
            for box, label, mask, area in zip(
                    target["boxes"].tolist(), target["labels"].tolist(), target["masks"], target["area"].tolist(),
                    strict=True):
                code = coco_mask.encode(np.asfortranarray(mask.numpy()))
                annotations.append({
                    "id": len(annotations) + 1, "image_id": target["image_id"], "iscrowd": 0, "area": area,
                    "category_id": data.category_ids[label - 1], "segmentation": code,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})
    categories = [{"id": id_, "name": name} for id_, name in zip(data.category_ids, data.class_names, strict=True)]
    truth = COCO()
    truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
    truth.createIndex()
    return truth


@pytest.mark.parametrize("detector", ["fcos", "mask_rcnn"])
def test_pycocotools_agrees(detector, tmp_path, trainer):
    """COCO's own evaluation of the JSON gives our test metrics; the pictures are there."""
    data = scenes(masks=True, test_scenes=20)
    data.category_ids = [10 * id_ for id_ in data.category_ids]
    model = task(detector=detector)
    model.model = Oracle(list(half_right(data)))
    trainer().test(model, data, verbose=False)
    trainer().predict(model, data, return_predictions=False)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert (metrics["num_images"], metrics["backbone"], metrics["detector"]) == (20, "test_dinat", detector)
    with redirect_stdout(io.StringIO()):
        truth = coco_truth(data)
        found = truth.loadRes(records)
        for kind, prefix in {"fcos": [("bbox", "box")], "mask_rcnn": [("bbox", "box"), ("segm", "mask")]}[detector]:
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert metrics[f"{prefix}_map"] == pytest.approx(evaluation.stats[0], abs=1e-3)
            assert metrics[f"{prefix}_map_50"] == pytest.approx(evaluation.stats[1], abs=1e-3)
            assert metrics[f"{prefix}_mar_100"] == pytest.approx(evaluation.stats[8], abs=1e-3)
            assert 0.05 < metrics[f"{prefix}_map"] < 0.8
    assert {record["file_name"] for record in records} == {f"scene_{i:05d}" for i in range(20)}
    for i in range(20):
        assert Image.open(tmp_path / "pictures" / f"scene_{i:05d}.png").size == (256, 256)  # each pixel is a square


def test_class_metrics(tmp_path, trainer):
    model = task(num_classes=3, class_names=["cat", "dog", "cow"], class_metrics=True)
    trainer().test(model, loader(sample()), verbose=False)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert set(metrics["box_map_per_class"]) >= {"cat", "cow"}
    assert metrics["box_map_small"] is not None
    assert metrics["box_map_large"] is None  # there are no large objects


def test_metrics_and_pictures_are_in_pixels_of_the_file(tmp_path, trainer):
    """An image that was loaded at half the size of its file: boxes and masks double, and are found perfect."""
    image, target = sample(64, 96)
    boxes = target["boxes"][:1]
    target |= {key: target[key][:1] for key in ("boxes", "labels", "masks", "iscrowd", "area")}
    target |= {"orig_size": torch.tensor([128, 192]), "file_name": "folder/photo.jpg"}
    model = task(detector="mask_rcnn", num_classes=3, class_names=["a", "b", "c"])
    model.model = Oracle([dict(
        boxes=boxes, labels=target["labels"], scores=torch.tensor([0.9]), masks=target["masks"][:, None].float())])
    trainer().test(model, loader((image, target)), verbose=False)
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert metrics["box_map"] == metrics["mask_map"] == 1.0
    trainer().predict(model, loader((image, target)), return_predictions=False)
    record, = json.loads((tmp_path / "predictions.json").read_text())
    assert record["bbox"] == [20, 10, 40, 60]
    assert (record["category_id"], record["score"], record["image_id"]) == (1, 0.9, 7)
    mask = coco_mask.decode(record["segmentation"])
    assert mask.shape == (128, 192)
    assert mask.sum() == pytest.approx(4 * target["masks"].sum().item(), abs=8)
    picture = np.asarray(Image.open(tmp_path / "pictures" / "folder" / "photo.jpg.png"))
    assert picture.shape == (256, 384, 3)  # each pixel is a square
    plain = nn.functional.interpolate(image[None], size=(128, 192), mode="bilinear")[0].movedim(0, -1).numpy() * 255
    changed = np.abs(picture - plain.repeat(2, 0).repeat(2, 1)).max(axis=2) > 1
    assert changed[20:140, 40:120].mean() > 0.9
    assert changed[6:18, 42:60].all()  # the name
    assert not changed[160:].any()
    coco = json.loads((tmp_path / "predictions_coco.json").read_text())
    assert coco["images"] == [{"id": 7, "file_name": "folder/photo.jpg", "width": 192, "height": 128}]
    assert [category["name"] for category in coco["categories"]] == ["a", "b", "c"]
    assert coco["annotations"] == [{"id": 1, "iscrowd": 0, "area": mask.sum(), **record}]


def test_crowds(tmp_path, trainer):
    """Trained on are single objects only; detections in a crowd count neither way."""
    image, target = sample()
    target["iscrowd"] = torch.tensor([0, 1])
    model = task(num_classes=3)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args))
    trainer(limit_val_batches=0).fit(model, loader((image, target)))
    (_, (given,)), = seen
    assert given["labels"].tolist() == [1]
    boxes = torch.cat([target["boxes"], target["boxes"][1:] + 1])
    model.model = Oracle([dict(boxes=boxes, labels=torch.tensor([1, 3, 3]), scores=torch.tensor([0.5, 0.9, 0.8]))])
    metrics, = trainer().test(model, loader((image, target)), verbose=False)
    assert metrics["test/box_map"] == 1.0


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_objects(detector, trainer):
    image, target = sample()
    empty = target | {key: target[key][:0] for key in ("boxes", "labels", "masks", "iscrowd", "area")}
    model = task(detector=detector, num_classes=3)
    fit = trainer(limit_train_batches=1)
    fit.fit(model, loader((image, empty)), loader((image, empty)))
    assert fit.callback_metrics["train/loss"].isfinite()
    assert fit.callback_metrics["val/box_map"] == 0


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(num_classes=0), "num_classes must be at least 1"),
    (dict(class_names=["a"]), "1 class names were given for 10"),
    (dict(detector="yolo"), "detector must be one of fcos, retinanet, faster_rcnn, mask_rcnn"),
    (dict(detector_args={"nms": 0.5}), "fcos has no argument nms; it has .*nms_thresh"),
    (dict(fpn_channels=96), "a multiple of 64"),
    (dict(strides=[64, 128]), r"none for strides \[64, 128\]"),
    (dict(schedule="poly"), "schedule must be step or cosine"),
    (dict(backbone="test_dina"), "similar names: .*test_dinat"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        task(**kwargs)


def test_masks_are_needed_for_mask_rcnn(trainer):
    with pytest.raises(ValueError, match=r"mask_rcnn needs masks, .* set data.init_args.masks to true"):
        trainer().fit(task(detector="mask_rcnn"), scenes())


@pytest.mark.parametrize("name", list(SMALL))
def test_torchvision_takes_features_only_models(name):
    """Ours are backbones for others' code as any timm model is."""
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model(name, features_only=True, **SMALL[name])
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 64)
            self.out_channels = 64

        def forward(self, x):
            return self.fpn({str(i): x for i, x in enumerate(self.body(x))})

    backbone = Backbone()
    anchors = AnchorGenerator(tuple((r,) for r in backbone.body.feature_info.reduction()), ((1.0,),) * len(
        backbone.body.feature_info.reduction()))
    model = FCOS(backbone, 4, min_size=64, max_size=96, anchor_generator=anchors)
    image, target = sample()
    losses = model([image], [{key: target[key] for key in ("boxes", "labels")}])
    sum([*losses.values(), *auxiliary_losses(model).values()]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert set(model.eval()([image])[0]) == {"boxes", "scores", "labels"}


# Two processes


def measure(processes, folder):
    """Tests and predicts five scenes; with several processes trains too, with an odd number of images to validate."""
    pl.seed_everything(0, verbose=False)
    data = scenes(masks=True, batch_size=1, train_scenes=2, val_scenes=3, test_scenes=5)
    model = task(backbone="test_biformer", detector="mask_rcnn", class_metrics=True, class_names=data.class_names)
    run = pl.Trainer(
        devices=processes, strategy="ddp" if processes > 1 else "auto", accelerator="cpu", logger=False, max_epochs=1,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0)
    run.test(model, data, verbose=False)
    run.predict(model, data, return_predictions=False)
    if processes > 1:
        run.fit(model, data)
        assert run.callback_metrics["val/box_map"] >= 0


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    measure(1, tmp_path / "1")
    script = tmp_path / "script.py"  # a file, which DDP starts its second process from
    root = Path(__file__).parents[2]
    script.write_text(f"""
import sys
sys.path.insert(0, {str(root)!r})
import torch
torch.set_num_threads(1)
from tests.tasks.test_detection import measure
measure(2, {str(tmp_path / "2")!r})
""")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300, cwd=root)
    assert run.returncode == 0, run.stderr[-2000:]
    files = ("test_metrics.json", "predictions.json")
    one, two = ([json.loads((tmp_path / str(n) / file).read_text()) for file in files] for n in (1, 2))
    assert one == two
    assert one[0]["num_images"] == 5
    assert one[1]


class Maps(nn.Module):
    """What transformers on maps do between two stages: a norm of channels, then a convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.LayerNorm(16)
        self.downsample = nn.Conv2d(16, 8, 3, stride=2, padding=1)

    def forward(self, x):
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        return self.downsample(x.permute(0, 3, 1, 2))


@pytest.mark.slow
def test_what_is_compiled_takes_images_of_a_second_size(trainer):
    torch.compiler.reset()
    model, maps = task(compile=True), Maps()
    model.model.backbone, model._trainer = maps, trainer()
    model.setup("fit")
    for side in (64, 32):
        found = []
        for call in (maps, maps.forward):  # compiled, and as it is
            torch.manual_seed(0)
            maps.zero_grad()
            answer = call(torch.randn(2, 3, side, side))
            answer.square().sum().backward()
            found.append([answer, maps.stem.weight.grad.clone()])
        for compiled, eager in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
