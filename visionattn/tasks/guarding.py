"""Losses that are not finite: the training stops before they reach the weights, or leaves such steps out and counts."""
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..runtime.say import say
from .resuming import newest_checkpoint

__all__ = ["LossGuard", "NotFiniteError"]


class NotFiniteError(RuntimeError):
    """The loss, or a weight, is NaN or infinite."""


class LossGuard(pl.Callback):
    """Stops a training whose loss is NaN or infinite, before the step that would carry it into the weights.

    A checkpoint of weights that are not finite is not written. Steps that a gradient scaler leaves out (``16-mixed``),
    whose loss is finite, are its own business. Several processes decide together.

    Args:
        skip: Leave such steps out instead, and those with such gradients: weights, moments and statistics of batch
            norms stay as they are. Their number is said at the end of the epoch.
        in_a_row: More of them one after another stop the training all the same.

    Attributes:
        skipped: Number of steps that were left out, those before a resume included.
    """

    def __init__(self, skip: bool = False, in_a_row: int = 10):
        self.skip, self.in_a_row = skip, in_a_row
        self.skipped, self._row, self._in_epoch = 0, 0, 0
        self._bad: Tensor | None = None
        self._buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The counts, so that a resumed run goes on with them."""
        return {"skipped": self.skipped, "row": self._row, "in_epoch": self._in_epoch,
                "bad": self._bad is not None and bool(self._bad)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.skipped, self._row = state_dict["skipped"], state_dict["row"]
        self._in_epoch, self._bad = state_dict["in_epoch"], torch.tensor(state_dict["bad"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the buffers, should the first step be left out."""
        self._bad = None if self._bad is None else self._bad.to(pl_module.device)
        self._keep_buffers(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Looks at the loss of every batch that a step accumulates, without waiting for the device."""
        bad = ~loss.detach().isfinite().all()
        self._bad = bad if self._bad is None else self._bad | bad

    def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Decides about the step.

        Raises:
            NotFiniteError: The loss is not finite, and the step is not to be left out, or too many were.
        """
        bad, self._bad = self._bad is not None and bool(self._bad), None
        what = "loss"
        if self.skip and not bad and getattr(trainer.precision_plugin, "scaler", None) is None:
            bad, what = not _are_finite(parameter.grad for parameter in pl_module.parameters()), "gradient"
        if not _any_process(trainer, bad):
            self._row = 0
            self._keep_buffers(pl_module)
            return
        if not self.skip or self._row == self.in_a_row:
            rate = max((group["lr"] for group in optimizer.param_groups), default=0.0)
            many = f" and so were {self._row} steps before, which were left out" if self._row else ""
            raise NotFiniteError(
                f"the {what} of step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1}) is not finite{many}"
                f", at a learning rate of {rate:.3g}; {_last_good(trainer)}. Lower the learning rate, clip gradients "
                "(trainer.gradient_clip_val), or leave such steps out (docs/training.md, Losses that are not finite)")
        self.skipped, self._row, self._in_epoch = self.skipped + 1, self._row + 1, self._in_epoch + 1
        for parameter in pl_module.parameters():
            parameter.grad = None  # which optimisers pass over, moments and all
        with torch.no_grad():
            for buffer, kept in zip(pl_module.buffers(), self._buffers, strict=True):
                buffer.copy_(kept)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says how many steps of the epoch were left out."""
        if self._in_epoch:
            say(f"Epoch {trainer.current_epoch + 1}: {self._in_epoch} of the steps left out: their loss or gradients "
                "were not finite.")
        self._in_epoch = 0

    def on_save_checkpoint(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises a NotFiniteError where weights are not finite, so that they replace no checkpoint."""
        if _any_process(trainer, not _are_finite(pl_module.parameters())):
            raise NotFiniteError(f"weights are not finite after step {trainer.global_step} (epoch "
                                 f"{trainer.current_epoch + 1}) and were not saved; {_last_good(trainer)}")

    def _keep_buffers(self, module: pl.LightningModule) -> None:
        if self.skip:
            self._buffers = [buffer.detach().clone() for buffer in module.buffers()]


def _are_finite(tensors: Any) -> bool:
    """Whether all are; of what is shared among processes this one's part."""
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor
             for tensor in tensors if tensor is not None]
    return not parts or bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())


def _any_process(trainer: pl.Trainer, decision: bool) -> bool:
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision


def _last_good(trainer: pl.Trainer) -> str:
    """The last good checkpoint, in words."""
    try:
        found = newest_checkpoint(Path(trainer.default_root_dir))
    except ValueError:
        found = None
    return f"the last good checkpoint is {found.path}, {found.place()}" if found else "no checkpoint was saved before"
