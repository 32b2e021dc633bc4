"""DigitsData: the split, the images, and an order that depends on seed and epoch alone."""
import numpy as np
import pytest
import torch

from visionattn.data import DigitsData


def _setup(**kwargs):
    data = DigitsData(**kwargs)
    data.setup("fit")
    return data


def test_split_is_fixed_stratified_and_complete():
    data, other = _setup(seed=0), _setup(seed=1, image_size=40)
    assert (len(data.train), len(data.val), len(data.test)) == (1197, 300, 300)
    assert sorted([*data.train, *data.val, *data.test]) == list(range(1797))
    for split in ("train", "val", "test"):
        indices = getattr(data, split)
        assert indices == getattr(other, split)
        shares = np.bincount(data.labels[list(indices)], minlength=10) / len(indices)
        assert np.abs(shares - 0.1).max() < 0.01


def test_split_is_the_documented_one():
    # Accuracies can be compared only on one and the same split: pinned against changes of the splitting library.
    data = _setup()
    assert data.test[:5] == [1053, 701, 364, 569, 1088]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_images(in_chans):
    data = _setup(image_size=24, in_chans=in_chans, batch_size=300)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (300, in_chans, 24, 24)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean().item()) < 0.05
    assert abs(images.std().item() - 1) < 0.1
    assert (data.num_classes, data.class_names[3]) == (10, "3")


def test_only_training_images_are_augmented():
    data = _setup(batch_size=8)
    val, test = data.val_dataloader(), data.test_dataloader()
    assert torch.equal(next(iter(val))[0], next(iter(val))[0])
    assert torch.equal(next(iter(test))[0][0, 0], data.images[data.test[0], 0])
    train = data.train_dataloader().dataset
    assert not torch.equal(train[0][0], train[0][0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_does_not_depend_on_the_ones_before(num_workers):
    def batch(data, epoch, before=0):
        loader = data.train_dataloader()
        for earlier in range(before):
            loader.sampler.set_epoch(earlier)
            next(iter(loader))
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))

    straight = batch(_setup(num_workers=num_workers), 2, before=2)
    resumed = batch(_setup(num_workers=num_workers), 2)
    assert all(map(torch.equal, straight, resumed))
    assert not torch.equal(straight[1], batch(_setup(num_workers=num_workers), 1)[1])
    assert not torch.equal(straight[1], batch(_setup(num_workers=num_workers, seed=1), 2)[1])


def test_predicted_images_have_names():
    data = _setup(batch_size=300)
    data.setup("predict")
    _, names = next(iter(data.predict_dataloader()))
    assert len(set(names)) == 300
    assert names[0] == f"digit_{data.test[0]:04d}"


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(image_size=7), "image_size"), (dict(in_chans=2), "in_chans"), (dict(batch_size=0), "batch_size"),
    (dict(num_workers=-1), "num_workers"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DigitsData(**kwargs)
