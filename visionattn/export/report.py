"""What an export produced and how it compares with eager PyTorch; what does not compare well is removed."""
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .check import Check, Run, agreement, compare, judge, latencies
from .graph import explained

__all__ = ["ExportReport", "megabytes", "removed_if_wrong", "report_on"]


class ExportReport(NamedTuple):
    """What an export produced and how its answers compare with eager PyTorch."""

    path: Path
    difference: float  # largest absolute difference, as a share of the answers' scale (see export_onnx)
    nodes: int | None  # of an ONNX file
    megabytes: float
    opset: int | None  # of an ONNX file
    ties: int  # images redrawn because eager itself was undecided on them
    detections: int | None  # that were compared, of a detector
    values: list[str]  # the inputs and outputs in words, a line each
    limit: float  # of the difference
    milliseconds: float | None  # of the file with one image; None if it cannot be run here
    eager_milliseconds: float | None  # of PyTorch
    agreement: float | None = None  # of float16: the share of images or pixels of the same class
    runtime: str = "onnxruntime"  # what ran the file
    note: str = ""  # what was not checked, or is left to do


def report_on(
        out: Path, check: Check, runner: Callable[[Path], Run], values: list[str], runtime: str, note: str = "",
        classes: bool = False) -> ExportReport:
    """Runs a file beside eager PyTorch and says how it did.

    Args:
        out: The file.
        check: How the model is run.
        runner: Opens the file in its runtime.
        values: The inputs and outputs in words.
        runtime: What the file is run in.
        note: What was not checked, or is left to do.
        classes: Also measure how often both give the same class.

    Raises:
        RuntimeError: The runtime cannot run the file, or its answers differ from eager's.
    """
    with explained("the exported file cannot be run beside PyTorch, and was removed"):
        run = runner(out)
        difference, ties, rows = compare(check, run)
    judge(difference, check.tolerance)
    own, eager = latencies(check, run)
    detector = len(check.shapes[0]) == 3  # which takes one image
    return ExportReport(
        out, difference, None, megabytes(out), None, ties, rows if detector else None, values, check.tolerance, own,
        eager, agreement(check, run) if classes else None, runtime, note)


@contextmanager
def removed_if_wrong(out: Path) -> Iterator[None]:
    """Within the context a file, whose folder is made, is written and checked; if that fails it is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for file in _files(out):
            file.unlink()
        if out.is_dir():
            shutil.rmtree(out)
        raise


def megabytes(out: Path) -> float:
    """Size on disk of what was exported, in MiB."""
    return sum(path.stat().st_size for path in _files(out)) / 2 ** 20


def _files(path: Path) -> list[Path]:
    """The files of an exported model."""
    if path.is_dir():
        return [inner for inner in path.rglob("*") if inner.is_file()]
    return [file for file in (path, path.with_suffix(".bin") if path.suffix == ".xml" else None)
            if file is not None and file.exists()]
