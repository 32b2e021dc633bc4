"""DigitScenesData: what is in a scene, that its annotations agree, and what it depends on."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visionattn.data import DigitScenesData, DigitsData

SMALL = dict(batch_size=4, train_scenes=8, val_scenes=4, test_scenes=4)


def _setup(**kwargs):
    data = DigitScenesData(**SMALL | kwargs)
    data.setup("fit")
    return data


def _tight(mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]


def test_detection_batches():
    data = _setup(masks=True)
    assert (data.num_classes, data.category_ids) == (10, list(range(1, 11)))
    assert data.class_names == list("0123456789")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, targets = next(iter(loader))
        assert len(images) == len(targets) == 4
        for image, target in zip(images, targets, strict=True):
            assert (image.shape, image.dtype) == ((3, 128, 128), torch.float32)
            assert 0 <= image.min() < image.max() <= 1
            count = len(target["labels"])
            assert 1 <= count <= 6
            assert target["labels"].dtype == target["iscrowd"].dtype == torch.int64
            assert target["labels"].min() >= 1
            assert target["labels"].max() <= 10
            assert (target["masks"].shape, target["masks"].dtype) == ((count, 128, 128), torch.uint8)
            assert target["masks"].sum(0).max() == 1  # visible parts do not overlap
            assert target["boxes"].dtype == target["area"].dtype == torch.float32
            assert target["boxes"].tolist() == [_tight(mask) for mask in target["masks"]]
            assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()
            assert target["orig_size"].tolist() == [128, 128]
            assert isinstance(target["image_id"], int)
    assert target["file_name"] == "scene_00003"
    assert "masks" not in next(iter(_setup().val_dataloader()))[1][0]


def test_segmentation_labels_are_the_masks_of_detection():
    data = _setup(task="segmentation")
    assert (data.num_classes, data.class_names[:2]) == (11, ["background", "0"])
    images, labels = next(iter(data.val_dataloader()))
    assert (images.shape, labels.shape, labels.dtype) == ((4, 3, 128, 128), (4, 128, 128), torch.int64)
    others, targets = next(iter(_setup(masks=True).val_dataloader()))
    assert torch.equal(images, torch.stack(others))
    for label_map, target in zip(labels, targets, strict=True):
        expected = (target["masks"] * target["labels"][:, None, None]).sum(0)
        assert torch.equal(label_map, expected)  # a digit's label is one more than the digit in both tasks
        assert torch.equal(label_map > 0, target["masks"].any(0))


def test_predicted_scenes_have_names():
    data = _setup()
    data.setup("predict")
    _, targets = next(iter(data.predict_dataloader()))
    assert [target["file_name"] for target in targets] == [f"scene_{index:05d}" for index in range(4)]
    assert set(targets[0]) == {"image_id", "file_name", "orig_size"}
    images, names, sizes = next(iter(_setup(task="segmentation").predict_dataloader()))
    assert images.shape == (4, 3, 128, 128)
    assert list(names) == [target["file_name"] for target in targets]
    assert sizes.tolist() == [[128, 128]] * 4


def test_most_of_every_digit_is_visible():
    data = _setup(task="segmentation", train_scenes=60, digits=(6, 6), digit_size=(50, 56))
    scenes = data.train_dataloader().dataset
    composed = [scenes._compose(np.random.default_rng(index)) for index in range(60)]
    counts = [len(scene.digits) for scene in composed]
    assert min(counts) < 6  # on so full a canvas, some find no place
    for scene in composed:
        # A digit of 50 pixels has several hundred pixels of ink.
        assert torch.bincount(scene.owner.flatten().long())[1:].min() > 200
        assert scene.area.tolist() == torch.bincount(scene.owner.flatten().long())[1:].tolist()


def test_digits_stand_out():
    image, target = _setup(masks=True, digits=(1, 1)).val_dataloader().dataset[0]
    mask = target["masks"][0].bool()
    assert abs(image[:, mask].mean() - image[:, ~mask].mean()) > 0.15


def test_splits_are_made_of_the_digits_of_their_split():
    data, source = _setup(), DigitsData(image_size=8, in_chans=1)
    source.setup("fit")
    for split, count in (("train", 1197), ("val", 300), ("test", 300)):
        scans, labels = data.scans[split]
        assert scans.shape == (count, 8, 8)
        assert labels.tolist() == source.labels[getattr(source, split)].tolist()
    flat = {split: {tuple(scan.flatten().tolist()) for scan in data.scans[split][0]} for split in data.scans}
    assert not flat["train"] & flat["test"]
    assert not flat["train"] & flat["val"]


def test_scenes_are_the_documented_ones():
    # Results can be compared only on the same scenes: pinned against changes of the generator.
    data = _setup()
    _, targets = next(iter(data.test_dataloader()))
    labels = [target["labels"].tolist() for target in targets]
    assert labels == [[5, 8, 2, 8, 10], [3, 4, 5, 4], [5, 6, 1, 7], [10, 1, 1, 10, 3]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_scenes_depend_on_seed_epoch_and_number(num_workers):
    def batch(epoch, seed=0):
        loader = _setup(seed=seed, num_workers=num_workers).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))[0]

    def same(one, other):
        return all(map(torch.equal, one, other))

    first = batch(0)
    assert same(first, batch(0))
    assert not any(torch.equal(one, other) for one in first for other in batch(1))
    assert not same(first, batch(0, seed=1))


def test_an_epoch_has_every_scene_once():
    loader = _setup().train_dataloader()
    loader.sampler.set_epoch(3)
    assert sorted(target["image_id"] for _, targets in loader for target in targets) == list(range(24, 32))


def test_processes_share_the_scenes():
    def numbers(loader):
        return [target["image_id"] for _, targets in loader for target in targets]

    shares = []
    for rank in range(3):
        data = _setup(test_scenes=7)
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        shares.append(numbers(data.test_dataloader()))
        assert len(numbers(data.train_dataloader())) == 3
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]  # none twice, or test metrics would not be those of one process
    data = _setup(test_scenes=2)
    data.trainer = SimpleNamespace(world_size=3, global_rank=0)
    with pytest.raises(ValueError, match="2 images cannot be shared by 3 processes"):
        data.test_dataloader()


def test_evaluation_does_not_depend_on_the_seed():
    one, other = (next(iter(_setup(seed=seed).test_dataloader()))[0] for seed in (0, 1))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(task="classification"), "task"), (dict(digits=(0, 3)), "digits"), (dict(digit_size=(30, 20)), "digit_size"),
    (dict(image_size=48), r"digits of 56 pixels, turned, need an image_size of at least 69, got 48"),
    (dict(val_scenes=0), "val_scenes"), (dict(batch_size=0), "batch_size"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DigitScenesData(**kwargs)
