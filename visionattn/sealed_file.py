"""Safetensors files that say what they are and carry a digest of all that they hold."""
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

__all__ = ["read_sealed", "tensor_bytes", "write_sealed"]


def write_sealed(path: str | Path, facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """Writes a file, whole or not at all.

    Args:
        path: Of the file; folders on the way are made.
        facts: What the file says of itself; ``format`` and ``version`` among them.
        tensors: What it holds, by names.

    Returns:
        Bytes of the file.
    """
    tensors = {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    safetensors.torch.save_file(tensors, unfinished, metadata={**facts, "digest": _digest(facts, tensors)})
    unfinished.replace(path)
    return path.stat().st_size


def read_sealed(
        path: str | Path, kind: str, format: str, version: str, keys: Sequence[str],
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads such a file.

    Args:
        path: Of the file.
        kind: What it should be, with an article: ``"an adapter file"``.
        format: Its ``format``.
        version: Its ``version``.
        keys: What else it has to say of itself.

    Returns:
        What it says of itself, and its tensors by names.

    Raises:
        ValueError: It is something else, of another version, or damaged.
        FileNotFoundError: There is no such file.
    """
    name = kind.partition(" ")[2]
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise ValueError(f"{name} {path} is damaged or not {kind} ({type(error).__name__})") from None
    if facts.get("format") != format:
        raise ValueError(f"{path} is not {kind} of visionattn")
    if facts.get("version") != version or not {*keys, "digest"} <= set(facts):
        raise ValueError(f"{path} is {kind} of another version of visionattn")
    if facts["digest"] != _digest(facts, tensors):
        raise ValueError(f"{name} {path} is damaged: its content does not match its digest")
    return facts, tensors


def tensor_bytes(x: Tensor) -> Any:
    """The bytes of a tensor's values, row by row, as an array that a digest takes."""
    return x.contiguous().flatten().view(torch.uint8).numpy()


def _digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of all that a file says and holds."""
    digest = hashlib.sha256(json.dumps({key: facts[key] for key in sorted(facts) if key != "digest"}).encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        digest.update(tensor_bytes(tensors[key]))
    return digest.hexdigest()
