"""``visionattn backends``: which implementation of each op runs here, why others cannot, and what memory is held."""
import itertools
import os
from collections.abc import Mapping

import torch

from .. import __version__
from ..ops import BackendError, Case, cases, dispatch, explain, held_bytes
from .machine import LIBRARIES, cpu_name, driver, dtype_name, version

__all__ = ["backend_table"]


def backend_table() -> str:
    """Says for every op which backends can run usual problems here, which one is chosen, and why the others cannot."""
    lines = [f"visionattn {__version__}; " + "; ".join(f"{name} {version(name)}" for name in LIBRARIES)]
    lines += [f"cpu: {cpu_name()}, {torch.get_num_threads()} threads"]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines += [f"cuda: {torch.cuda.get_device_name()}, driver {driver()}"]
    else:
        lines += ["cuda: none"]
    lines += [f"held between calls: {_size(held_bytes())} (visionattn.ops.release_memory() gives it back)"]
    for device, op in itertools.product(devices, dispatch.operations()):
        examples = cases(op)
        usual = {name: case for name, case in examples.items() if "usual" in case.groups}
        lines += ["", *_op_lines(op, usual or examples, device)]
    asked = os.environ.get("VISIONATTN_BACKEND")
    lines += ["", "chosen: runs without being asked for by name" + (f" (VISIONATTN_BACKEND={asked})" if asked else ""),
              'yes: runs if asked for by name: backend="...", use_backend("...") or VISIONATTN_BACKEND']
    return "\n".join(lines)


def _op_lines(op: str, examples: Mapping[str, Case], device: str) -> list[str]:
    """The table of one op on one device."""
    rows: list[tuple[str, ...]] = []
    names: list[str] = []
    reasons: list[str] = []
    for dtype, (label, case), training in itertools.product(
            (torch.float32, torch.bfloat16), examples.items(), (False, True)):
        problem = case.problem._replace(device=device, dtype=dtype, requires_grad=training)
        try:
            chosen = dispatch.chosen(op, problem)
        except BackendError:  # the one that was asked for cannot do this, so a call would fail
            chosen = ""
        answers = explain(op, problem)
        names = [name for name, _, _ in answers]
        reasons += dict.fromkeys(reason for _, can, reason in answers if not can and reason not in reasons)
        rows.append((dtype_name(dtype), label, "training" if training else "forward", *(
            "chosen" if name == chosen else "yes" if can else f"({reasons.index(reason) + 1})"
            for name, can, reason in answers)))
    if not rows:
        return [f"{op} on {device}", "  no examples"]
    rows.insert(0, ("dtype", "example", "pass", *names))
    widths = [max(10, *(len(cell) + 2 for cell in column)) for column in zip(*rows, strict=True)]
    return [
        f"{op} on {device}",
        *("  " + "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        *(f"  ({number}) {reason}" for number, reason in enumerate(reasons, 1))]


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1024 else f"{count / 2**20:.1f} MiB"
