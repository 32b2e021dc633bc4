"""Compiles the Triton kernels for named GPUs, which need not be there, and says what they take of one."""
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..ops import dispatch, triton_support
from .machine import dtype_name, version

__all__ = ["TARGETS", "compile_kernels"]

TARGETS = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB of shared memory of an SM
_REGISTERS, _THREADS, _BLOCKS = 65_536, 2048, 32  # of an SM


def compile_kernels(op: str, case: str, dtype: torch.dtype, target: str) -> list[dict[str, Any]]:
    """Compiles the kernels of one of an op's cases and its gradients, as a GPU ``target`` would be given them.

    The op's own launchers run with tensors on a CPU, so that tiles and constants are those of a real call; every launch
    stops at the compiled kernel. Registers and spilled bytes a thread are what ptxas says; blocks an SM follow from
    registers, threads and shared memory.

    Args:
        op: Name of an op with a ``triton`` backend: ``"neighborhood_attention"``, ...
        case: Name of one of its cases.
        dtype: Of the floating-point arguments, tables of biases apart, which are float32.
        target: One of :data:`TARGETS`.

    Returns:
        A row for each kernel, in the order of the launches.

    Raises:
        RuntimeError: Triton interprets kernels here, or is not installed.
        BackendError: The backend cannot do the case.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels, and they are to be compiled: unset it")
    example = dispatch.cases(op)[case]
    floating, tables = example.tensors(dtype)
    inputs = [x.requires_grad_() for x in floating.values()]
    with _compiling(target) as built:
        out = getattr(ops, op)(**floating, **tables, **example.options, backend="triton")
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad([x.sum() for x in outputs], inputs)
    return [{
        "op": op, "case": case, "dtype": dtype_name(dtype), "target": target, "kernel": name.strip("_"),
        **_usage(kernel, target), "triton": version("triton"),
    } for name, kernel in built]


class _Driver:
    """What Triton asks a driver for when it compiles."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Within it, launches of kernels compile them, and add their names and what was made to the list."""
    import triton

    built: list[tuple[str, Any]] = []
    function, driver = triton.runtime.jit.JITFunction, triton.runtime.driver
    launch, active = function.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        built.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    function.run, triton_support.compiling = compile_only, True
    driver.set_active(_Driver(target))
    try:
        yield built
    finally:
        function.run, triton_support.compiling, driver._active = launch, False, active


def _usage(kernel: Any, target: str) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared memory of a block, warps, blocks that an SM holds."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", said))
    registers, stack, shared = int(numbers["REG"]), int(numbers["STACK"]), kernel.metadata.shared
    warps = kernel.metadata.num_warps
    of_registers = _REGISTERS // (-(-registers * 32 // 256) * 256 * warps)  # given out by 256 a warp
    of_shared = TARGETS[target] * 1024 // (shared + 1024)  # each block takes a KiB for the system
    return {"registers": registers, "spilled_bytes": stack, "shared_bytes": shared, "warps": warps,
            "blocks_per_sm": min(of_registers, of_shared, _THREADS // (32 * warps), _BLOCKS)}
