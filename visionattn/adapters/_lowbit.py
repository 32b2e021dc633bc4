"""Matrices whose weights take 1, 2, 4 or 8 bits each, trained through their rounding and packed into bytes."""
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BITS", "LowBitLinear", "codebook"]

BITS = (1, 2, 4, 8)
ROUNDS = 500  # the papers' files depend on it: with 8 bits the levels are still moving
TINY = 1e-5


@lru_cache
def codebook(bits: int) -> tuple[Tensor, Tensor]:
    """The levels of a standard normal variable with the least mean absolute error, and the boundaries of their cells.

    Every level is the median of its cell. The authors stop after 500 rounds of that, by which 1, 2 and 4 bits have
    converged; of 8 bits many levels still lie on top of each other, and the files that they publish have these.

    Args:
        bits: 1, 2, 4 or 8.

    Returns:
        ``2^bits`` levels and one boundary less, float32 on the CPU.
    """
    levels = torch.zeros(2 ** bits, dtype=torch.float64, device="cpu")
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64, device="cpu")
    boundaries = levels[1:]
    for _ in range(ROUNDS):
        boundaries = (levels[:-1] + levels[1:]) / 2
        shares = torch.special.ndtr(torch.cat([ends[:1], boundaries, ends[1:]]))
        levels = torch.special.ndtri((shares[:-1] + shares[1:]) / 2)
    return levels.float(), boundaries.float()


class LowBitLinear(nn.Module):
    """A matrix ``out_features x in_features`` without bias whose weights have ``2^bits`` values (section 3.2).

    It trains ``weight`` in full precision and multiplies by its rounding: normalised by mean and standard deviation of
    the whole matrix, to the levels of :func:`codebook`, and back. Gradients pass the rounding as if it were none and
    are exact otherwise, through mean and deviation too. From packed bytes (:meth:`unpack`) it becomes a plain matrix,
    whose weights do not train. All of it is computed in float32 at least, whatever dtype the weights have.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bits: Of a weight: 1, 2, 4 or 8; 32 for a plain matrix.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The weights do not fill whole bytes.
    """

    levels: Tensor
    boundaries: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, device=None, dtype=None):
        super().__init__()
        self.bits = bits
        self.packed_as: tuple[float, float] | None = None  # mean and deviation of the bytes that it was read from
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if bits == 32:
            return
        if out_features * in_features * bits % 8:
            raise ValueError(f"{out_features} x {in_features} weights of {bits} bits do not fill whole bytes: take "
                             f"another width, or a number of weights that is a multiple of {8 // bits}")
        self._set_codebook()

    def _set_codebook(self) -> None:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for name, values in zip(("levels", "boundaries"), codebook(self.bits), strict=True):
            values = values.clone().to(self.weight.device, dtype)  # exporters refuse shared ones
            self.register_buffer(name, values, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "LowBitLinear":
        super()._apply(fn, recurse)
        if self.bits != 32:
            self._set_codebook()  # to half precision go the weights, not the levels
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.weight.numel() * self.bits // 8 + (0 if self.bits == 32 else 8)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x, self.rounded())

    def rounded(self) -> Tensor:
        """The matrix that it multiplies by."""
        if self.bits == 32 or self.packed_as is not None:
            return self.weight
        weight = self.weight.to(self.levels.dtype)
        mean, deviation = weight.mean(), weight.std()
        normal = (weight - mean) / (deviation + TINY)
        with torch.no_grad():  # on a boundary: between its two levels
            level = (self.levels[torch.bucketize(normal, self.boundaries)]
                     + self.levels[torch.bucketize(normal, self.boundaries, right=True)]) / 2
        return ((level + (normal - normal.detach())) * deviation + mean).to(self.weight.dtype)

    @torch.no_grad()
    def pack(self) -> Tensor:
        """The matrix as bytes: weights row by row, the first in a byte's lowest bits, mean and deviation as float32."""
        weight = self.weight.detach().to(self.levels.dtype)
        if self.packed_as is None:
            mean, deviation = weight.mean(), weight.std()
            index = torch.bucketize((weight - mean) / (deviation + TINY), self.boundaries)
        else:
            mean, deviation = weight.new_tensor(self.packed_as[0]), weight.new_tensor(self.packed_as[1])
            levels = self.levels.double() * deviation.double() + mean.double()
            index = (weight.double().flatten()[:, None] - levels).abs().argmin(dim=1)
        shifts = torch.arange(0, 8, self.bits, device=weight.device)
        packed = (index.view(-1, len(shifts)) << shifts).sum(dim=1).to(torch.uint8).cpu()
        return torch.cat([packed, torch.stack([mean, deviation]).float().cpu().view(torch.uint8)])

    @torch.no_grad()
    def unpack(self, packed: Tensor) -> None:
        """Takes the matrix from bytes that :meth:`pack` gave.

        Raises:
            ValueError: They are not as many, or mean and deviation are no numbers.
        """
        if len(packed) != self.num_bytes:
            raise ValueError(f"{len(packed)} bytes are not a matrix of {self.num_bytes}")
        mean, deviation = packed[-8:].clone().view(torch.float32).tolist()
        if not (math.isfinite(mean) and math.isfinite(deviation) and deviation >= 0):
            raise ValueError(f"a matrix has the mean {mean} and the standard deviation {deviation}")
        device, shifts = self.weight.device, torch.arange(0, 8, self.bits)
        index = (packed[:-8, None].long() >> shifts) & (2 ** self.bits - 1)
        self.packed_as = mean, deviation
        self.weight.copy_((self.levels[index.to(device)] * deviation + mean).view_as(self.weight))
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def settle(self) -> None:
        """Makes it the plain matrix that it has been multiplying by."""
        if self.bits != 32 and self.packed_as is None:
            self.unpack(self.pack())

    def extra_repr(self) -> str:
        """What it prints of itself."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bits={self.bits}"
