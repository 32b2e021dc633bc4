"""Training the head before the layers below it: which parameters train in which epoch."""
from typing import Any

from timm.models import group_parameters
from torch import nn

__all__ = ["Freezing"]


class Freezing:
    """What of a timm model does not train: everything but the head, or less from epoch to epoch, from the head down.

    Parts that do not train are in eval mode: batch norms keep their statistics, nothing is dropped at random. While
    layers are freed, all parameters belong to the optimiser from the start, so that a run can be resumed; those that do
    not train yet get no gradient, and AdamW leaves them and their moments alone.

    Args:
        model: A timm model.
        name: What it is called, for messages.
        epochs: Number of epochs after which all layers train; None for a head that trains alone for good.

    Raises:
        ValueError: timm does not know the model's layers.
    """

    def __init__(self, model: Any, name: str, epochs: int | None = None):
        if not hasattr(model, "group_matcher"):
            raise ValueError(f"{name} does not say what its layers are (it has no group_matcher), so that none of "
                             "it can be frozen")
        layers = list(group_parameters(model, model.group_matcher(coarse=True)).values())
        self.model, self.epochs = model, epochs
        self.known = dict(model.named_parameters())
        self.below = [set(names) for names in layers[:-1]]  # the layers below the head, the first at the front
        if epochs is None:
            for parameter in self.frozen(0):
                parameter.requires_grad_(False)

    def number(self, epoch: int) -> int:
        """How many layers do not train in an epoch."""
        if self.epochs is None:
            return len(self.below)
        return max(0, len(self.below) - len(self.below) * epoch // self.epochs)

    def frozen(self, epoch: int) -> list[nn.Parameter]:
        """The parameters that do not train in an epoch."""
        return [self.known[name] for names in self.below[:self.number(epoch)] for name in names]

    def set_modes(self, epoch: int) -> None:
        """Puts the parts that do not train, of a model in training mode, into eval mode."""
        frozen = {id(parameter) for parameter in self.frozen(epoch)}
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and all(id(parameter) in frozen for parameter in parameters):
                module.eval()
