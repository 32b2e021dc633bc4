"""Whether Triton kernels can run a problem here; asked without importing Triton."""
import importlib.util
import os

import torch
from torch import Tensor

__all__ = ["automatic", "supports", "token_strided"]

_INSTALLED = importlib.util.find_spec("triton") is not None  # torch.compile cannot trace the search
_MAX_DIM = 256
compiling = False  # whether launches only compile, which takes no device


def supports(problem) -> tuple[bool, str]:
    """What the kernels of all ops need: Triton, a device it compiles for (or its interpreter), dtypes, head dims."""
    if not _INSTALLED:
        return False, "triton is not installed"
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device != "cuda" and not ((interpreting or compiling) and problem.device == "cpu"):
        return False, f"triton compiles for cuda devices, not for {problem.device} (TRITON_INTERPRET=1 emulates it)"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"the triton kernels take float32, float16 and bfloat16, not {problem.dtype}"
    if interpreting and problem.dtype == torch.bfloat16:
        return False, "triton's interpreter computes bfloat16 wrongly"
    if max(problem.head_dim, problem.value_dim) > _MAX_DIM:
        return False, f"the triton kernels take head dims up to {_MAX_DIM}"
    if problem.standard_only:
        return False, "an exported graph, torch.func and forward mode take standard operators only"
    return True, ""


def automatic(problem) -> bool:
    """The interpreter is for tests: on a CPU the kernels run only when asked for by name."""
    return problem.device == "cuda"


def token_strided(x: Tensor) -> Tensor:
    """``x`` itself if its tokens are evenly spaced and its channels adjacent, as in views of a fused projection."""
    even = all(x.stride(axis) == x.stride(axis + 1) * x.shape[axis + 1] for axis in range(1, x.ndim - 3))
    return x if even and x.stride(-1) == 1 else x.contiguous()
