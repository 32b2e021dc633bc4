"""Losses that a layer adds to the task's own, such as the commitment loss of k-means routing: how they reach a trainer.

A layer inherits from :class:`AuxiliaryLosses` and keeps each loss in its training forward; a training step adds what
:func:`auxiliary_losses` collects from the whole model. No model has to pass such losses through its outputs.
"""
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AuxiliaryLosses", "auxiliary_losses", "in_backward"]


class AuxiliaryLosses:
    """Mixin of an ``nn.Module`` (named before it among the bases) whose training forward has losses of its own.

    A loss lives from the forward that made it until it is collected or the next such forward replaces it. Copies and
    pickles of the module hold none.
    """

    _auxiliary: dict[str, Tensor]

    def keep_auxiliary_loss(self, name: str, loss: Tensor) -> None:
        """Offers the scalar ``loss``, weighted and with its graph, under ``name`` to :func:`auxiliary_losses`."""
        self.__dict__["_auxiliary"] = {**self.__dict__.get("_auxiliary", {}), name: loss}

    def take_auxiliary_losses(self) -> dict[str, Tensor]:
        """The losses of the last forward by name; each is handed out once."""
        return self.__dict__.pop("_auxiliary", {})

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can neither be copied nor pickled.
        return {key: value for key, value in self.__dict__.items() if key != "_auxiliary"}


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Collects the auxiliary losses of the last training forward of ``model``, summed over its layers by name.

    They are weighted already: a training step adds all of them to its loss, and logs each as ``train/<name>``::

        loss = criterion(model(images), targets)
        losses = auxiliary_losses(model)
        (loss + sum(losses.values())).backward()

    Args:
        model: Any module, wrapped (DDP, ``torch.compile``) or not.

    Returns:
        Scalars with gradients by name; empty for a model without such losses, and if they were collected already.
    """
    losses: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, AuxiliaryLosses):
            for name, loss in module.take_auxiliary_losses().items():
                losses[name] = losses[name] + loss if name in losses else loss
    return losses


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as where gradient checkpointing computes anew."""
    # torch.utils.checkpoint asks the same; there is no public way. A compiled graph has no recomputation of its own.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
