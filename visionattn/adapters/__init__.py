"""Adapters: few weights that tune a frozen backbone for a task, of any timm model, saved without the backbone.

Each is one file here, called as users call it, whose ``adapter`` is its class: it says where it goes, what it trains,
how it is saved and merged. ``_adapter.py`` and ``_hooks.py`` have what they share, ``_places.py``
where they find their places, and ``_files.py`` what becomes of them on disk.
"""
import inspect
from typing import Any

from ..dense import backbone_of
from ._adapter import Adapter, active_adapter, active_label, adapters_of, remove, switch
from ._files import info, load, save
from ._registry import adapter_class, names

__all__ = [
    "Adapter", "active_adapter", "adapter_class", "adapters_of", "attach", "info", "load", "merge", "names", "save",
    "switch",
]


def attach(model: Any, name: str, label: str | None = None, **options: Any) -> Adapter:
    """Freezes the backbone of a model and gives it a fresh adapter, which it works with from now on.

    Args:
        model: A timm model, or one of ours with a timm model in it, as a segmenter or detector; changed in place. What
            is no backbone trains on: a classifier, a dense head.
        name: Of the adapter.
        label: What it is called on this model; None for its name.
        options: Of the adapter.

    Returns:
        The adapter, whose parameters train.

    Raises:
        ValueError: There is no such adapter or option, the model has no places for it or has an adapter of this label.
    """
    kind = adapter_class(name)
    known = list(inspect.signature(kind).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"the adapter {name} has no option {option}; it has {', '.join(known)}")
    try:
        adapter = kind(**options)
    except TypeError as error:
        raise ValueError(f"the adapter {name} cannot be made: {error}") from error
    adapter.attach(model, label or name)
    return adapter


def merge(model: Any) -> bool:
    """Makes the adapter that a model works with as plain as it can be: folded into the backbone's weights, if it can.

    Args:
        model: The model; changed in place.

    Returns:
        Whether it is gone, folded into the backbone; else it stays beside it, as plain layers.

    Raises:
        ValueError: The model works with no adapter, or has others too, whose backbone it would change.
    """
    adapters = adapters_of(model)
    label = active_label(model)
    if label is None:
        raise ValueError("the model works with no adapter that could be merged")
    if len(adapters) > 1:
        raise ValueError(f"the model has the adapters {', '.join(adapters)}: merging one would change the backbone of "
                         "the others")
    folded = adapters[label].merge(backbone_of(model))
    if folded:
        remove(model, label)
    return folded
