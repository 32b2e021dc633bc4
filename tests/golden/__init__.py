"""Numbers that the models' authors' code gave (float64), and the recipe for the weights and inputs that gave them.

A weight is a function of its official key and shape, so a test rebuilds the whole official state dict from the key
list in a golden file, loads it through the zoo's checkpoint filter and compares what comes out.
"""
import functools
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch


@functools.cache
def load(name: str) -> dict:
    """The golden file ``name`` (e.g. ``"dinat_tiny"``)."""
    return json.loads(gzip.decompress((Path(__file__).parent / f"{name}.json.gz").read_bytes()))


def random(seed: int, shape) -> torch.Tensor:
    """Standard normal float64 tensor, the same on every machine."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def uniform(seed: int, shape) -> torch.Tensor:
    """Float64 tensor of numbers from 0 to 1, the same on every machine."""
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape))


def fill(key: str, shape) -> torch.Tensor:
    """The test weight that the official state dict calls ``key``."""
    shape = tuple(shape)
    noise = random(zlib.crc32(key.encode()) & 0xFFFFFFFF, shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        return 0.1 * noise
    if leaf == "running_var":
        return 1.0 + 0.2 * noise.abs()
    if len(shape) >= 2:
        return noise / float(np.prod(shape[1:])) ** 0.5 if leaf == "weight" else 0.3 * noise
    if len(shape) == 1:
        return {"weight": 1.0 + 0.2 * noise, "bias": 0.1 * noise}.get(leaf, 0.5 + 0.1 * noise)
    return torch.tensor(0.7, dtype=torch.float64)


def official_state_dict(golden: dict) -> dict[str, torch.Tensor]:
    """The official checkpoint of a golden file, without the tables that models compute themselves."""
    return {key: fill(key, shape) for key, shape, kind in golden["state_dict"] if kind != "computed"}


def filled(shapes) -> dict[str, torch.Tensor]:
    """The test weights of a golden case that lists ``[key, shape]``, with gradients."""
    return {key: fill(key, shape).requires_grad_() for key, shape in shapes}


def assert_equals(actual: torch.Tensor, expected, tolerance: float = 1e-12) -> None:
    """Asserts that a tensor is a golden array, which stands whole or as a summary."""
    if isinstance(expected, dict):
        assert_matches(actual, expected.get("summary", expected), tolerance)
        return
    expected = torch.tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual.detach() - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


def assert_matches(actual: torch.Tensor, summary: dict, tolerance: float = 1e-9) -> None:
    """Asserts that a tensor has the shape, mean, spread and sampled values of a golden summary."""
    assert list(actual.shape) == summary["shape"]
    flat = actual.detach().reshape(-1)
    index = torch.tensor(summary["index"])
    expected = torch.tensor(summary["value"], dtype=torch.float64)
    magnitude = max(1.0, expected.abs().max().item())
    assert (flat[index] - expected).abs().max().item() <= tolerance * magnitude
    assert abs(flat.mean().item() - summary["mean"]) <= tolerance * magnitude
    assert abs(flat.std().item() - summary["std"]) <= tolerance * magnitude
