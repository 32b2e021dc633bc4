"""What a family of models says about itself, once, in its own file; lists, benchmarks, tests and dense tasks read it here.

A family's module ends with ``family = Family(...)``. Any module that registers models in timm may have one, in this
package or elsewhere: :func:`families` finds it.
"""
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

__all__ = ["DenseNorm", "Family", "Peer", "Published", "families", "family_of"]

TASKS = ("detection", "segmentation")


class Published(NamedTuple):
    """What the authors published about a model at its own image size."""

    top1: float  # per cent of ImageNet-1k's validation images, single crop
    gmacs: float | None  # the papers' "FLOPs", 10^9: multiplications with additions counted as one; None for no figure
    whole: bool = True  # False if the authors' counter does not see the products of queries, keys and values
    source: str = ""  # address of the page that says so; "" for the origin_url of the model's cfg


class Peer(NamedTuple):
    """A model of the family and the one of timm's to compare it with, at one image size."""

    ours: str
    peer: str
    size: int = 224
    fused: bool = False  # ours with norms folded into convolutions, as its authors time it
    same_weights: bool = False  # the peer's weights load into ours and must give the peer's logits


class DenseNorm(NamedTuple):
    """Layer norms that the authors' dense backbones put on each map that they hand to the heads.

    Some of them change its channels first, by a 1x1 convolution without a bias.
    """

    prefix: str  # of the authors' names; the level's number follows
    eps: float
    widths: Sequence[int] | None = None  # channels of the levels after that convolution; None for no such
    projection: str = ""  # prefix of its names


def no_dense_args(variant: str, task: str) -> dict[str, Any]:
    """Nothing: no argument changes for dense tasks."""
    return {}


def same_names(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries as they are."""
    return state_dict


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts about the models that a module registers; licence, paper and address stand in their timm cfgs.

    Attributes:
        small: Models for tests, by registered name, with the arguments that make them small (none for a variant that
            is small itself). Between them they have all that the family can do.
        published: Figures of models with the classes of ImageNet-1k, by registered name: of all whose weights load, and
            of those that have figures alone.
        goldens: The files of ``tests/golden`` that hold numbers of the authors' code, and whose: a registered model, or
            a pattern (``*`` for all) of the models that have the part which the file is about. Empty for a family that
            was written from a text.
        peers: What to time the family beside.
        dense_args: ``dense_args(variant, task)``: the arguments of a registered model that its authors change for
            ``"detection"`` or ``"segmentation"``; they change no weight that a classifier has.
        dense_norm: The norms of the authors' dense backbones, None for none.
        checkpoint_filter_fn: Renames the entries of the authors' checkpoints to ours and leaves ours as they are.
        reductions: Strides of the maps on the image, in pixels; a single one for models of one resolution. A function
            of the registered name where the models differ; :meth:`strides` gives those of a model.
        auxiliary_parameters: A pattern of the names of parameters that learn by auxiliary losses of training alone, as
            what the model returns has no gradient for them; "" for none.
    """

    small: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, Published] = field(default_factory=dict)
    goldens: Mapping[str, str] = field(default_factory=dict)
    peers: Sequence[Peer] = ()
    dense_args: Callable[[str, str], dict[str, Any]] = no_dense_args
    dense_norm: DenseNorm | None = None
    checkpoint_filter_fn: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = same_names
    reductions: Sequence[int] | Callable[[str], Sequence[int]] = (4, 8, 16, 32)
    auxiliary_parameters: str = ""

    def strides(self, name: str) -> list[int]:
        """Strides of the maps of the model ``name``; a single one if it has one resolution."""
        return list(self.reductions(name.split(".")[0]) if callable(self.reductions) else self.reductions)

    def dense_settings(self, name: str, task: str) -> dict[str, Any]:
        """The arguments of the model ``name`` for a dense task, checked.

        Raises:
            ValueError: There is no such task.
            TypeError: The family's function gives no dictionary of arguments.
        """
        if task not in TASKS:
            raise ValueError(f"task must be {' or '.join(TASKS)}, got {task!r}")
        settings = self.dense_args(name.split(".")[0], task)
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise TypeError(f"dense_args of {name} must give a dictionary of arguments, got {settings!r}")
        return settings


def families() -> dict[str, Family]:
    """The families of all modules that have registered models in timm, by the modules' names without packages."""
    found = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if not module.startswith("timm.") and isinstance(record := _record(module), Family):
            found[module.rpartition(".")[2]] = record
    return dict(sorted(found.items()))


def family_of(name: str) -> Family | None:
    """The family of a registered model; None for one without, such as timm's.

    Raises:
        RuntimeError: There is no such model (as timm says it).
    """
    return _record(timm.model_entrypoint(name.split(".")[0]).__module__)


def _record(module: str) -> Family | None:
    record = getattr(sys.modules[module], "family", None)
    return record if isinstance(record, Family) else None
