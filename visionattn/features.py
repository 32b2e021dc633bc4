"""Features of frozen models, kept on disk: computed once for each weights, images and way of seeing them."""
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .heads.probing import map_tokens
from .runtime.say import say

__all__ = ["kept_features", "tokens_of", "weights_key"]

_LARGEST = torch.finfo(torch.float16).max


def weights_key(model: nn.Module) -> str:
    """A digest of a model's structure, as its modules print themselves, and of its weights."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """What ``forward_features`` of a timm model gives, ``[B, N, dim]``: maps as their tokens row by row."""
    features = model.forward_features(images)
    if features.ndim == 4:
        features = map_tokens(features, getattr(model, "output_fmt", "NCHW"))
    if features.ndim != 3:
        raise ValueError(f"{type(model).__name__} gives features of the shape {tuple(features.shape)}, not tokens or "
                         "maps")
    return features


def kept_features(
        model: Any, weights: str, loader: DataLoader, files: Sequence[Path], settings: dict[str, Any], folder: Path,
) -> np.ndarray:
    """Features of the images of a loader, from disk if they were computed before.

    Args:
        model: A timm model in eval mode, on the device that computes.
        weights: Its :func:`weights_key`.
        loader: Gives the images ``[B, C, H, W]`` of ``files`` in their order, with labels.
        files: Where they come from: files that have changed since are computed anew.
        settings: How files become images.
        folder: In which they are kept, in a folder of their own for all of the above.

    Returns:
        ``[images, tokens, channels]`` float16, or float32 of a model whose features are too large for it; mapped from
        the file, so that memory holds what is used.

    Raises:
        ValueError: Features are not finite, or not all images are of one size.
    """
    seen = [[str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
    known = json.dumps({"weights": weights, "images": seen, "settings": settings}, sort_keys=True, default=str)
    key = hashlib.sha256(known.encode()).hexdigest()
    kept = folder / key[:32]
    if kept.is_dir():
        try:
            features = np.load(kept / "features.npy", mmap_mode="r", allow_pickle=False)
            if len(features) == len(files) and (kept / "key").read_text() == key:
                return features
            raise ValueError(f"{len(features)} rows")
        except (OSError, ValueError) as error:
            say(f"{kept} is damaged ({' '.join(str(error).split())}) and computed anew.")
            shutil.rmtree(kept)
    part = folder / f"{key[:32]}.{os.getpid()}.part"
    part.mkdir(parents=True, exist_ok=True)
    try:
        try:
            _compute(model, loader, len(files), part / "features.npy", np.float16)
        except OverflowError:
            _compute(model, loader, len(files), part / "features.npy", np.float32)
        (part / "key").write_text(key)
        os.replace(part, kept)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return np.load(kept / "features.npy", mmap_mode="r", allow_pickle=False)


@torch.inference_mode()
def _compute(model: Any, loader: DataLoader, count: int, file: Path, dtype: Any) -> None:
    rows, start = None, 0
    device = next(model.parameters()).device
    for images, _ in loader:
        tokens = tokens_of(model, images.to(device)).float().cpu()
        if not tokens.isfinite().all():
            raise ValueError(f"the features of image {start} to {start + len(tokens) - 1} are not finite numbers: the "
                             "model's weights are damaged")
        if dtype == np.float16 and tokens.abs().max() > _LARGEST:
            raise OverflowError
        if rows is None:
            rows = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(count, *tokens.shape[1:]))
        rows[start:start + len(tokens)] = tokens.numpy()
        start += len(tokens)
    if rows is None or start != count:
        raise ValueError(f"{count} images were listed and {start} were read")
    rows.flush()
