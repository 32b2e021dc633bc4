"""``visionattn embed RUN|MODEL|FILE IMAGE ... --out features.npy``: pooled features of images, a row each.

Beside ``features.npy``, ``[images, channels]`` float32, ``features.csv`` names the image of each row; a ``.parquet``
file has both.
"""
import argparse
import csv
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from .predictor import Predictor
from .runtime.command import progress, report_faults
from .runtime.inputs import find_inputs
from .runtime.say import say
from .runtime.sources import with_frames

__all__ = ["main"]

_GROUP = 1024  # rows that are written at once


def main(argv: list[str]) -> int:
    """Runs ``visionattn embed``.

    Returns:
        0, or 1 if images could not be read.
    """
    parser = argparse.ArgumentParser(
        prog="visionattn embed", description="Writes the features that a model pools of each image: of a training run, "
        "a model by its name, or a file exported without a classifier.", epilog="Exits with 1 if an image could not be "
        "used. docs/runtime.md has more.")
    parser.add_argument("model", metavar="MODEL", help="folder or .ckpt of a run, name of a model, or an .onnx file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="as of visionattn predict")
    parser.add_argument("--out", default="features.npy", metavar="FILE", help=(
        "features.npy, with the paths in features.csv, or features.parquet with both (default: features.npy)"))
    parser.add_argument("--checkpoint", metavar="FILE", help="of a model's name: its weights")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once (default: 8)")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest image that is decoded")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--half", action="store_true", help="half precision: float16 on a GPU, bfloat16 on the CPU")
    args = parser.parse_intermixed_args(argv)
    out = Path(args.out)
    table = {".npy": _Numpy, ".parquet": _Parquet}.get(out.suffix.lower())
    if table is None:
        raise ValueError(f"--out must end in .npy or .parquet, got {out}")
    predictor = Predictor(
        args.model, args.device, checkpoint=args.checkpoint, batch_size=args.batch_size, max_pixels=args.max_pixels,
        half=args.half)
    inputs = find_inputs(args.images)
    rows, faults = table(out), []
    try:
        seen = predictor.embedded(with_frames(inputs, predictor.decoding.max_pixels))
        for item, features, fault in progress(seen, inputs):
            if features is None:
                faults.append((item.file, fault))
            else:
                rows.add(item.file, features)
        if not rows.count:
            raise ValueError(f"{faults[0][0]} cannot be used: {faults[0][1]}")
        rows.close()
    except BaseException:
        rows.abandon()
        raise
    say(f"Features of {rows.count} images, {rows.width} numbers each, are in {out}.")
    return report_faults(faults, rows.count + len(faults), out.parent / "left_out_embed.csv")


class _Table(ABC):
    """Rows of a file, some of which are kept until they are written."""

    def __init__(self, out: Path):
        self.out, self.part = out, out.with_name(f"{out.name}.part")
        self.count = self.width = 0
        self.files: list[str] = []
        self.rows: list[np.ndarray] = []
        out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, file: str, features: np.ndarray) -> None:
        self.count, self.width = self.count + 1, len(features)
        self.files.append(file.encode("utf-8", "backslashreplace").decode("utf-8"))
        self.rows.append(features)
        if len(self.rows) == _GROUP:
            self.flush()

    @abstractmethod
    def flush(self) -> None:
        """Writes the rows that are kept."""

    def close(self) -> None:
        self.flush()
        os.replace(self.part, self.out)

    def abandon(self) -> None:
        self.part.unlink(missing_ok=True)


class _Numpy(_Table):
    """A ``.npy`` file, whose header is written when its rows are known, and a table of paths."""

    def __init__(self, out: Path):
        super().__init__(out)
        self.paths = out.with_suffix(".csv")
        if self.paths.is_file() and not self.paths.read_bytes()[:10].startswith((b"file\r\n", b"file\n")):
            raise ValueError(f"{self.paths} is not of earlier features and would be written over: move it, or name "
                             "another --out")
        self._file = self.part.open("wb")
        self._file.write(bytes(128))
        self._names: list[str] = []

    def flush(self) -> None:
        self._file.write(np.stack(self.rows).astype("<f4").tobytes() if self.rows else b"")
        self._names += self.files
        self.rows, self.files = [], []

    def close(self) -> None:
        self.flush()
        self._file.seek(0)
        header = str({"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)})
        # Version 1.0 of the format: the header's length, and spaces that fill it up to 128 bytes.
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n")
        self._file.close()
        os.replace(self.part, self.out)
        with self.paths.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file"], *([name] for name in self._names)])

    def abandon(self) -> None:
        self._file.close()
        super().abandon()


class _Parquet(_Table):
    """A ``.parquet`` file with the columns ``file`` and ``features``, a list of float32."""

    def __init__(self, out: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            if error.name != "pyarrow":
                raise
            raise ModuleNotFoundError(".parquet files need the package pyarrow: pip install pyarrow") from None
        super().__init__(out)
        self.arrow: Any = pyarrow
        self._writer: Any = None

    def flush(self) -> None:
        arrow = self.arrow
        if not self.rows:
            return
        kind = arrow.list_(arrow.float32(), self.width)
        values = arrow.array(np.concatenate(self.rows).astype(np.float32))
        table = arrow.table({
            "file": self.files, "features": arrow.FixedSizeListArray.from_arrays(values, type=kind)})
        if self._writer is None:
            self._writer = arrow.parquet.ParquetWriter(self.part, table.schema)
        self._writer.write_table(table)
        self.rows, self.files = [], []

    def close(self) -> None:
        self.flush()
        self._writer.close()
        os.replace(self.part, self.out)

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()
        super().abandon()
