"""What all adapters have in common: how they are attached to a model and detached, and what of it they keep."""
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..dense import backbone_of
from ._hooks import hook_branch, hook_call, replace_forward, restore_forward
from ._places import Block

__all__ = [
    "Adapter", "active_adapter", "active_label", "adapters_of", "backbone_state", "classifiers", "head_state", "remove",
    "switch",
]

ROOM = "adapters"  # what the module of a model is called that holds its adapters


class Adapter(nn.Module, ABC):
    """Few weights beside a frozen backbone, with the places in it where they work.

    A subclass has its options as arguments of ``__init__``, hands them on to this one by name, and has the method
    :meth:`inject`, which makes its layers and binds them to the backbone by :meth:`on_branch`, :meth:`on_call` and
    :meth:`in_place_of`. These change no name of the backbone's weights and copy none of its forwards. The adapter's
    layers are its own submodules and so the backbone's, as ``adapters.<label>``; copies, checkpoints and exports of the
    model have them. An adapter that is not active computes nothing.

    Args:
        options: Those of the subclass, by name; a file keeps them.

    Attributes:
        summary: What the adapter is, in one line.
        active: Whether the model works with it.
        head: Tensors of the head that goes with it, by their names, as they were when it was left.
        owns_head: Whether its own layers take the place of the classifier, which then neither trains nor is kept.
    """

    summary: ClassVar[str]

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options
        self.active, self.owns_head = False, False
        self.head: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._replaced: list[nn.Module] = []
        self._still: tuple[nn.Module, ...] = ()

    # What a subclass says

    @abstractmethod
    def inject(self, backbone: Any) -> None:
        """Makes the layers and binds them to a timm model.

        Raises:
            ValueError: The model has no places for them.
        """

    def merge(self, backbone: Any) -> bool:
        """Makes the adapter as plain as it can be for the same function: folded into the backbone's weights, if it can.

        Returns:
            Whether nothing of it is left to compute; else it stays, as layers beside the backbone.
        """
        return False

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it, by names without dots in front; enough for :meth:`load_tensors`."""
        return self.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes what :meth:`tensors` gave.

        Raises:
            RuntimeError: They are not of this adapter.
        """
        self.load_state_dict(tensors)

    def begin_epoch(self, epoch: int) -> None:
        """Hears of each epoch of a training, from 0 on, before it begins."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return list(self.parameters())

    @property
    def steps_itself(self) -> bool:
        """Whether a training step of a classifier is :meth:`loss`, of more than one pass."""
        return False

    def loss(
            self, model: Callable[[Tensor], Tensor], images: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of a classifier's training step; those that layers have of their own are not in it.

        Args:
            model: Takes images to logits ``[batch, classes]``.
            images: What it is given.
            criterion: Takes logits to their loss.
        """
        return criterion(model(images))

    # What it says it with

    def on_call(self, module: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """From now on ``module(x, ...)`` gives ``function(x, module(x, ...))``."""
        self._handles.append(hook_call(self, module, function))

    def on_branch(
            self, block: Block, layer: Literal["attn", "mlp"], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """From now on a block adds ``function(x, branch)`` to ``x`` where it adds ``branch``, one of its two branches.

        Norm, layer, scale and stochastic depth are inside the branch.

        Args:
            block: The block.
            layer: What the branch is about.
            function: Of two tensors of one shape ``[..., width]``: the tokens that enter the branch, before any norm,
                and what comes out of it.
        """
        self._handles += hook_branch(self, block, layer, function)

    def in_place_of(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """From now on ``module(...)`` is ``function(module, ...)``; the module's own forward is ``plain(module)``."""
        replace_forward(self, module, function)
        self._replaced.append(module)

    def keep_still(self, modules: list[nn.Module]) -> None:
        """Keeps modules in eval mode while the model trains; frozen batch norms are so in any case."""
        self._still += tuple(modules)

    # What is done to it

    def attach(self, model: Any, label: str, head: dict[str, Tensor] | None = None) -> None:
        """Freezes the backbone of a model, injects the adapter and activates it; what is no backbone trains on: a head.

        Args:
            model: A timm model, or one of ours with a timm model in it, as a segmenter.
            label: What the adapter is called on this model.
            head: Tensors of the head that belongs to it; None for those of the model.

        Raises:
            ValueError: The model has no places for it, or another adapter of this label.
            RuntimeError: The model has no such head.
        """
        backbone = backbone_of(model)
        room = adapters_of(model)
        if label in room:
            raise ValueError(f"the model has an adapter {label!r} already")
        if not label or "." in label or hasattr(_Room(), label):
            raise ValueError(f"an adapter cannot be called {label!r} here: take a name without dots")
        if not room:
            backbone.add_module(ROOM, _Room())
        before = active_label(model)
        _leave(model)
        weight = next(iter(backbone.parameters()))
        try:
            if head is not None:
                set_head(model, head)
            self.inject(backbone)
        except Exception:
            self.detach()
            _enter(model, before)
            if not room:
                delattr(backbone, ROOM)
            raise
        self.to(weight.device, weight.dtype)
        self._freeze(model)
        getattr(backbone, ROOM)[label] = self
        self.active = True
        self.train(backbone.training)

    def _freeze(self, model: Any) -> None:
        """Lets nothing of a model train but the adapter and the head."""
        backbone = backbone_of(model)
        heads = [] if self.owns_head else [part for head in classifiers(model) for part in head.modules()]
        trained = {id(parameter) for module in heads for parameter in module.parameters()}
        trained |= {id(parameter) for parameter in self.trained()}
        for parameter in [*backbone.parameters(), *self.trained()]:
            parameter.requires_grad_(id(parameter) in trained)
        self.keep_still([module for module in backbone.modules()
                         if isinstance(module, _BatchNorm) and not any(module is part for part in heads)])

    def detach(self) -> None:
        """Takes its hands off the backbone."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            restore_forward(self, module)
        self._handles, self._replaced = [], []

    def train(self, mode: bool = True) -> "Adapter":
        """Sets the mode of its layers, and of what it keeps still."""
        super().train(mode)
        for module in self._still if mode else ():
            module.eval()
        return self


class _Room(nn.ModuleDict):
    """The adapters of a backbone by their labels; ``head`` is the plain backbone's while one of them is active."""

    def __init__(self) -> None:
        super().__init__()
        self.head: dict[str, Tensor] = {}


def adapters_of(model: Any) -> dict[str, Adapter]:
    """The adapters of a model by their labels."""
    return dict(getattr(backbone_of(model), ROOM, {}).items())


def active_adapter(model: Any) -> Adapter | None:
    """The adapter that a model works with, if any."""
    return next((adapter for adapter in adapters_of(model).values() if adapter.active), None)


def switch(model: Any, label: str | None) -> None:
    """Makes a model work with one of its adapters and the head that belongs to it, or with none.

    Args:
        model: The model.
        label: Of the adapter; None for the plain backbone with the head that it had before it had adapters.

    Raises:
        ValueError: The model has no such adapter.
    """
    adapters = adapters_of(model)
    if label is not None and label not in adapters:
        raise ValueError(f"the model has no adapter {label!r}; it has {', '.join(adapters) or 'none'}")
    if adapters and label != active_label(model):
        _leave(model)
        _enter(model, label)


def active_label(model: Any) -> str | None:
    """The label of the adapter that a model works with, if any."""
    return next((label for label, adapter in adapters_of(model).items() if adapter.active), None)


def _leave(model: Any) -> None:
    """Makes all adapters of a model inactive; what was active, the plain backbone or one of them, keeps its head."""
    room: Any = getattr(backbone_of(model), ROOM)
    left = next((adapter for adapter in room.values() if adapter.active), room)
    left.head = {key: x.detach().clone() for key, x in head_state(model).items()}
    for adapter in room.values():
        adapter.active = False


def _enter(model: Any, label: str | None) -> None:
    """Activates an adapter or none, with its head, where none is active."""
    room: Any = getattr(backbone_of(model), ROOM)
    entered = room if label is None else room[label]
    set_head(model, entered.head)
    if label is not None:
        entered.active = True


def remove(model: Any, label: str) -> None:
    """Takes an adapter off a model, whose head stays as it is and whose backbone but for what was merged into it."""
    backbone = backbone_of(model)
    room = getattr(backbone, ROOM)
    room[label].detach()
    del room[label]
    if not room:
        delattr(backbone, ROOM)


def classifiers(model: Any) -> list[nn.Module]:
    """The classifier of a timm model, or two of a distilled one; nothing for what is no timm model."""
    if backbone_of(model) is not model or not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    return [module for module in (found if isinstance(found, (tuple, list)) else [found])
            if isinstance(module, nn.Module)]


def head_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a model's head by their names, not copies of them.

    Of a timm model they are its classifier's, of another all that are not its backbone's.
    """
    backbone = backbone_of(model)
    state: dict[str, Tensor] = model.state_dict()
    if backbone is model:
        heads = classifiers(model)
        inside = tuple(f"{name}." for name, module in model.named_modules() if any(module is head for head in heads))
        return {key: x for key, x in state.items() if key.startswith(inside)} if inside else {}
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    return {key: x for key, x in state.items() if not key.startswith(f"{prefix}.")}


def set_head(model: Any, tensors: dict[str, Tensor]) -> None:
    """Gives a model the tensors of a head, by their names; of another number of classes too.

    Raises:
        RuntimeError: The model has no such tensors.
    """
    known = head_state(model)
    if set(tensors) != set(known):
        raise RuntimeError(f"the head has {', '.join(known) or 'no tensors'}, not {', '.join(tensors) or 'none'}")
    for key, x in tensors.items():
        path, _, leaf = key.rpartition(".")
        owner: Any = model.get_submodule(path)
        here = getattr(owner, leaf)
        if here.shape == x.shape:
            with torch.no_grad():
                here.copy_(x)
            continue
        x = x.to(here.device, here.dtype)
        setattr(owner, leaf, nn.Parameter(x, here.requires_grad) if isinstance(here, nn.Parameter) else x)
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
            if hasattr(model, "num_classes"):
                model.num_classes = owner.out_features


def backbone_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a model's backbone by their names in it, without adapters and classifier."""
    backbone = backbone_of(model)
    head = head_state(model) if backbone is model else {}
    return {key: x for key, x in backbone.state_dict().items() if key not in head and not key.startswith(f"{ROOM}.")}
