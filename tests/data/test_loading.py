"""LoadedData: its loaders stand what Lightning does to them."""
import lightning.pytorch as pl
import pytest

from visionattn.data import DigitScenesData


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
