"""Training what is new before the layers below it: which parameters train in which epoch."""
from collections.abc import Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn

__all__ = ["Freezing", "below_head", "check_unfreezing"]


class Freezing:
    """What of a model does not train: its lower layers, or less of them from epoch to epoch, the uppermost freed first.

    Parts that do not train are in eval mode: batch norms keep their statistics, nothing is dropped at random. While
    layers are freed, all parameters belong to the optimiser from the start, so that a run can be resumed; those that do
    not train yet get no gradient, and AdamW leaves them and their moments alone.

    Args:
        model: The model.
        layers: Parameters of each layer that does not train at first, the one nearest to the image at the front.
        epochs: Number of epochs after which all layers train; None for layers that never do.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Sequence[nn.Parameter]], epochs: int | None = None):
        self.model, self.layers, self.epochs = model, layers, epochs
        if epochs is None:
            for parameter in self.frozen(0):
                parameter.requires_grad_(False)

    def number(self, epoch: int) -> int:
        """How many layers do not train in an epoch."""
        if self.epochs is None:
            return len(self.layers)
        return max(0, len(self.layers) - len(self.layers) * epoch // self.epochs)

    def frozen(self, epoch: int) -> list[nn.Parameter]:
        """The parameters that do not train in an epoch."""
        return [parameter for layer in self.layers[:self.number(epoch)] for parameter in layer]

    def set_modes(self, epoch: int) -> None:
        """Puts the parts that do not train, of a model in training mode, into eval mode."""
        frozen = {id(parameter) for parameter in self.frozen(epoch)}
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and all(id(parameter) in frozen for parameter in parameters):
                module.eval()


def below_head(model: Any, name: str) -> list[list[nn.Parameter]]:
    """Parameters of each layer of a timm model below its head, the first at the front.

    Args:
        model: A timm model.
        name: What it is called, for messages.

    Raises:
        ValueError: timm does not know the model's layers.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{name} does not say what its layers are (it has no group_matcher), so that none of "
                         "it can be frozen")
    layers = list(group_parameters(model, model.group_matcher(coarse=True)).values())
    known = dict(model.named_parameters())
    return [[known[key] for key in keys] for keys in layers[:-1]]


def check_unfreezing(epochs: int | None, frozen: int, how: str) -> None:
    """Raises a ValueError for ``unfreeze_epochs`` where nothing is ``frozen`` (``how`` says what it takes)."""
    if epochs is not None and (not frozen or epochs < 1):
        raise ValueError(f"unfreeze_epochs must be 1 or more, with {how}, got {epochs}")
