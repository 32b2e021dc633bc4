"""An example problem of an op: what it is called with, as data, for tests, benchmarks and tables of backends."""
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CAUSAL", "CROSS", "PATTERNS", "PATTERN_WIDTH", "Case", "square"]

# What attention is used for ("CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", ICML 2023): in a
# causal pattern a query's result does not depend on what comes after it; in a cross pattern the keys are others.
PATTERNS = ("noncausal_self", "causal_self", "noncausal_cross", "causal_cross")
CAUSAL, CROSS = ("causal_self", "causal_cross"), ("noncausal_cross", "causal_cross")
PATTERN_WIDTH = (8, 64)  # heads and channels of a head of the patterns' cases: the paper's width of 512


def square(tokens: int) -> int:
    """The side of a square map of so many tokens.

    Raises:
        ValueError: It is no square.
    """
    side = math.isqrt(tokens)
    if side ** 2 != tokens:
        raise ValueError(f"a square map has a square number of tokens, not {tokens}")
    return side


class Case(NamedTuple):
    """One example of an op's calls.

    Attributes:
        problem: What the backends are asked about: the op's problem of such a call, in float32 on a CPU, without
            gradients. A named tuple with at least ``dtype``, ``device`` and ``requires_grad``.
        inputs: Shapes of the floating-point arguments that have the dtype of the call.
        options: Arguments that are no tensors.
        parameters: Shapes of the floating-point arguments that are float32 in every call: tables of biases.
        tables: Makes the other tensors, of indices and masks, from a generator of random numbers.
        pairs: Pairs of a query and a key that the definition multiplies, of all heads and samples.
        gathered: Keys that the naive form copies at once, of all heads and samples.
        summary: What is special about the case, in a few words.
        groups: Of cases that are looked at together: ``"small"`` ones take milliseconds in every form; ``"usual"`` ones
            are shown by ``visionattn backends``; others are timed by ``visionattn bench ops --cases GROUP``.
    """

    problem: Any
    inputs: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = {}
    parameters: Mapping[str, tuple[int, ...]] = {}
    tables: Callable[[torch.Generator], dict[str, Tensor]] | None = None
    pairs: int = 0
    gathered: int = 0
    summary: str = ""
    groups: tuple[str, ...] = ("small",)

    def tensors(
            self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws the tensors of a call, by their arguments' names: the same ones for the same seed, on any device.

        Returns:
            The floating-point ones, normally distributed, and the other ones.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.randn(shape, generator=generator, device="cpu").to(device, kind)
            for shapes, kind in ((self.inputs, dtype), (self.parameters, torch.float32))
            for name, shape in shapes.items()}
        tables = self.tables(generator) if self.tables else {}
        return drawn, {name: table.to(device) for name, table in tables.items()}

    def arguments(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """All arguments of a call, for the op's function: :meth:`tensors` and the options."""
        floating, tables = self.tensors(dtype, device, seed)
        return {**floating, **tables, **self.options}
