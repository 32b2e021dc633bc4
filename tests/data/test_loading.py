"""LoadedData: its loaders stand what Lightning does to them."""
from collections import Counter

import lightning.pytorch as pl
import pytest

from visionattn.data import DigitScenesData
from visionattn.data.loading import LoadedData, _EpochSampler


class _Counts(pl.LightningModule):
    """Keeps what it is shown."""

    def predict_step(self, batch):
        return batch[1]


@pytest.mark.parametrize(("task", "expected"), [
    ("detection", lambda names: [target["file_name"] for target in names]), ("segmentation", list),
])
def test_lightning_may_rebuild_the_loader_for_prediction(tmp_path, task, expected):
    data = DigitScenesData(task=task, test_scenes=3, batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    shown = trainer.predict(_Counts(), datamodule=data)
    assert [name for names in shown for name in expected(names)] == ["scene_00000", "scene_00001", "scene_00002"]


@pytest.mark.parametrize(("images", "times", "batches"), [(3, 7, 5), (20, 1, 5), (19, 2, 9), (400, 1, 100)])
def test_epochs_of_few_images_have_the_least_number_of_batches(images, times, batches, said):
    loader = LoadedData(batch_size=4, num_workers=0, seed=0, min_batches=5)._train_loader(range(images))
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append([index for batch in loader for index in batch.tolist()])
        assert len(epochs[-1]) == 4 * batches
        # Every image is shown as often as the others, but for the batch that would not be whole.
        assert sum(times - count for count in Counter(epochs[-1]).values()) + times * (
            images - len(set(epochs[-1]))) == images * times - 4 * batches < 4
    assert epochs[0] == epochs[2]  # a run that is resumed there sees the same
    assert epochs[0] != epochs[1]
    assert (f"goes through the {images} training images {times} times" in said.text) == (times > 1)


def test_a_bad_number_of_batches_is_refused():
    with pytest.raises(ValueError, match="min_batches must be 1 or more, got 0"):
        LoadedData(batch_size=4, num_workers=0, seed=0, min_batches=0)


@pytest.mark.parametrize("ranks", [1, 3])
def test_repeated_augmentation_shows_some_images_several_times_on_different_processes(ranks):
    samplers = [_EpochSampler(range(99), ranks, rank, seed=0, endless=False, repeats=3) for rank in range(ranks)]
    epochs = []
    for epoch in (0, 1, 0):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        epochs.append([list(sampler) for sampler in samplers])
    assert epochs[0] == epochs[2] != epochs[1]
    counts = Counter(index for part in epochs[0] for index in part)
    assert set(counts.values()) == {3}
    assert len(counts) == 33
    if ranks == 3:
        assert all(set(part) == set(counts) for part in epochs[0])
    else:
        assert epochs[0][0][0] == epochs[0][0][2]


def test_repeats_of_fewer_images_than_processes():
    assert [list(_EpochSampler(range(1), 4, rank, seed=0, endless=False, repeats=3)) for rank in range(4)] == [[0]] * 4
