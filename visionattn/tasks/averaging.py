"""The moving average of the weights: Lightning's, with a decay that rises, and in pieces where the model is."""
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from .sharding import FullySharded, whole

__all__ = ["MovingAverage"]


class MovingAverage(WeightAveraging):
    """Validates and keeps an exponential moving average of the weights and buffers.

    Args:
        decay: Of each optimiser step, less in the first ones.
    """

    def __init__(self, decay: float):
        super().__init__(multi_avg_fn=_Rising(decay))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins with the weights as they are."""
        if stage == "fit":  # not Lightning's, which would cut the weights before they are copied
            average = AveragedModel(pl_module, device=pl_module.device, use_buffers=True, **self._kwargs)
            average.module = trainer.precision_plugin.convert_module(average.module)  # the model is converted later
            if isinstance(trainer.strategy, FullySharded):
                trainer.strategy.shard(average.module)
            self._average_model = average

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes back to the raw weights."""
        if isinstance(trainer.strategy, FullySharded):
            trainer.strategy.scatter()
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the average as ``state_dict``, the raw weights as ``current_model_state``, both whole."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = whole(checkpoint["state_dict"])

    def on_load_checkpoint(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes both from there."""
        if isinstance(trainer.strategy, FullySharded) and self._average_model is not None:
            keys = checkpoint.keys() & {"state_dict", "current_model_state"}
            checkpoint = checkpoint | {key: trainer.strategy.cut(checkpoint[key]) for key in keys}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


class _Rising:
    """Updates an exponential moving average of weights whose decay rises to ``decay`` with the number of updates.

    A run's first weights thus do not outweigh those that were trained: after ``n`` steps the average spans about the
    last ninth of them, or what ``decay`` spans where that is less.
    """

    def __init__(self, decay: float):
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        """Takes tensors of one device and dtype, and the number of updates before this one."""
        count = int(updates)
        decay = min(self.decay, max(0.5, (1 + count) / (10 + count)))
        averages, weights = ([x.to_local() if isinstance(x, DTensor) else x for x in side]
                             for side in (averages, weights))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        else:  # counts, such as a batch norm's
            torch._foreach_copy_(averages, weights)
