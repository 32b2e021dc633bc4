"""Adapter files: a safetensors file of an adapter and its head, without the backbone, which it knows by its digests."""
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dense import backbone_of
from ..sealed_file import read_sealed, tensor_bytes, write_sealed
from ._adapter import Adapter, active_label, adapters_of, backbone_state, head_state, remove, switch
from ._registry import adapter_class

__all__ = ["info", "load", "save"]

FORMAT, VERSION = "visionattn adapter", "1"
KEYS = ("adapter", "options", "backbone", "shapes", "weights", "num_classes")


def save(model: Any, path: str | Path) -> int:
    """Writes the adapter that a model works with, and its head, into a file; the backbone is not in it.

    Args:
        model: The model.
        path: Of the file, ``.safetensors``.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: The model works with no adapter.
    """
    label = active_label(model)
    if label is None:
        raise ValueError("the model works with no adapter that could be saved")
    adapter = adapters_of(model)[label]
    tensors = {f"adapter.{key}": x for key, x in adapter.tensors().items()}
    if not adapter.owns_head:
        tensors |= {f"head.{key}": x for key, x in head_state(model).items()}
    shapes, weights = _digests(backbone_state(model))
    facts = {
        "format": FORMAT, "version": VERSION, "adapter": type(adapter).__module__.rpartition(".")[2],
        "options": json.dumps(adapter.options), "backbone": _name(model), "shapes": shapes, "weights": weights,
        "num_classes": str(getattr(model, "num_classes", 0)),
    }
    return write_sealed(path, facts, tensors)


def info(path: str | Path) -> dict[str, Any]:
    """What an adapter file says of itself.

    Returns:
        ``adapter`` (its name), ``options``, ``backbone`` (its name), ``num_classes``, ``bytes`` (of the file) and
        ``tensors`` (shapes by names).

    Raises:
        ValueError: The file is no adapter file, or damaged.
        FileNotFoundError: There is no such file.
    """
    facts, tensors = _read(path)
    return {
        "adapter": facts["adapter"], "options": json.loads(facts["options"]), "backbone": facts["backbone"],
        "num_classes": int(facts["num_classes"]), "bytes": Path(path).stat().st_size,
        "tensors": {key: list(x.shape) for key, x in tensors.items()},
    }


def load(model: Any, path: str | Path, label: str | None = None) -> Adapter:
    """Gives a model the adapter and the head of a file, which it works with from now on.

    Args:
        model: The plain model that the adapter was trained on, or one with other adapters of it; changed in place. Its
            head may be of another number of classes.
        path: Of the file.
        label: What the adapter is called on this model; None for the name of the file.

    Returns:
        The adapter.

    Raises:
        ValueError: The file is no adapter file or damaged, or the adapter was trained on another backbone.
        FileNotFoundError: There is no such file.
    """
    facts, tensors = _read(path)
    shapes, weights = _digests(backbone_state(model))
    if facts["shapes"] != shapes:
        raise ValueError(f"{path} is an adapter of {facts['backbone']}, whose weights have other names or shapes than "
                         f"those of this {_name(model)}")
    if facts["weights"] != weights:
        raise ValueError(f"{path} was trained on other weights of {facts['backbone']} than this model has")
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "head": {}}
    for key, x in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = x
    label = Path(path).name.partition(".")[0] if label is None else label
    before = active_label(model)
    try:
        adapter = adapter_class(facts["adapter"])(**json.loads(facts["options"]))
        if adapter.owns_head:
            parts["head"] = _resized(head_state(model), int(facts["num_classes"]))
        adapter.attach(model, label, parts["head"])
        try:
            adapter.load_tensors(parts["adapter"])
        except RuntimeError:
            switch(model, before)
            remove(model, label)
            raise
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this model: {' '.join(str(error).split())}") from error
    return adapter


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file says of its adapter, and its tensors."""
    return read_sealed(path, "an adapter file", FORMAT, VERSION, KEYS)


def _digests(state: dict[str, Tensor]) -> tuple[str, str]:
    """Of a backbone's names and shapes, and of its weights."""
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for key in sorted(state):
        shapes.update(f"{key} {list(state[key].shape)}".encode())
        if state[key].is_floating_point():
            weights.update(tensor_bytes(state[key].detach().float().cpu()))
    return shapes.hexdigest()[:16], weights.hexdigest()[:16]


def _name(model: Any) -> str:
    """What timm calls a model's backbone; the name of its class if timm does not know it."""
    backbone = backbone_of(model)
    config = getattr(backbone, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(backbone).__name__


def _resized(head: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """The tensors of a linear head as they are for another number of classes, of zeros then."""
    return {key: x if len(x) == classes else x.new_zeros(classes, *x.shape[1:]) for key, x in head.items()}
