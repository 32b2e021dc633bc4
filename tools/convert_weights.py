"""Turns a weights file of a model's authors into a safetensors file with this zoo's names, and says where it came from.

    python tools/convert_weights.py dinat_tiny dinat_tiny_in1k_224.pth

writes dinat_tiny.safetensors and dinat_tiny.json (source, its SHA-256, licence, date, versions). Without a file the
authors' one is downloaded. The result is kept only if the model that reads it back computes, bit for bit, what the
model with the authors' file computes. A file that is damaged, carries code or is of another model ends in one line and
exit code 1, with nothing written.
"""
import argparse
import datetime
import hashlib
import http.client
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import timm
import torch
from torch import nn

from visionattn.listing import chosen
from visionattn.tasks.rebuild import create_model
from visionattn.weights import fitting, read_checkpoint

__all__ = ["convert", "main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", help="a model of `visionattn list`")
    parser.add_argument("source", nargs="?", type=Path, help="the authors' file (default: download it)")
    parser.add_argument("--url", help=(
        "address that SOURCE came from, for the record; without SOURCE, the address to download it from"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="safetensors file to write (default: after the model)")
    args = parser.parse_args(argv)
    out = args.out or Path(f"{args.model}.safetensors")
    try:
        record = convert(args.model, out, args.source, args.url)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"convert_weights: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{out}: {record['parameters']:,} parameters in {record['entries_written']} entries, of "
          f"{record['entries_read']} in the source; the same logits, bit for bit; record in {out.with_suffix('.json')}")
    return 0


def convert(name: str, out: Path, source: Path | None = None, url: str | None = None) -> dict[str, Any]:
    """Writes the safetensors file ``out`` and, beside it, the record of where it came from.

    Args:
        name: A model of this zoo.
        out: The file to write; the record gets the same name with the suffix ``.json``. Neither may exist.
        source: The authors' file; None downloads it.
        url: Where ``source`` came from, if anybody knows, or where to get it; None downloads from the authors' address.

    Returns:
        The record.

    Raises:
        ValueError: The source is damaged, carries code, or holds no weights or those of another model; there is no such
            model, or no address for it.
        OSError: There is no such file or folder, the result exists, or the download fails.
        RuntimeError: The converted weights compute something else, or anything but finite numbers.
    """
    if name not in chosen():
        raise ValueError(f"{name!r} is no model of this zoo; `visionattn list` shows them")
    if out.suffix != ".safetensors":
        raise ValueError(f"the file to write must end in .safetensors, {out} does not")
    record_file = out.with_suffix(".json")
    for path in (out, record_file):
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it or choose another --out")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}")
    cfg: Any = timm.get_pretrained_cfg(name)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert_weights_") as folder:
        if source is None:
            url = url or cfg.url
            source = _download(name, url, Path(folder))
        _check_name(name, source)
        weights, run = read_checkpoint(source)
        if run is not None:
            raise ValueError(f"{source} is the checkpoint of a training run, which holds our names already")
        with fitting(name, source):
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights, custom_load=False)).eval()
        entries = {key: value.contiguous() for key, value in model.state_dict().items()}
        converted = Path(folder) / "converted.safetensors"
        converted.write_bytes(safetensors.torch.save(entries, metadata={"format": "pt"}))
        _verify(model, create_model(name, converted).eval(), cfg.input_size, source)
        record = {
            "model": name,
            "file": out.name,
            "sha256": _sha256(converted),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "source_file": source.name,
            "source_sha256": _sha256(source),
            "source_url": url,
            "published_at": cfg.url or None,
            "origin": cfg.origin_url,
            "paper": cfg.paper_ids,
            "licence": cfg.license,
            "entries_read": len(weights),
            "entries_written": len(entries),
            "converted_on": datetime.date.today().isoformat(),
            "versions": {library: importlib.metadata.version(library) for library in ("visionattn", "torch", "timm")},
        }
        written = Path(folder) / "record.json"
        written.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(written, record_file)
        os.replace(converted, out)
    return record


def _download(name: str, url: str | None, folder: Path) -> Path:
    """Fetches the authors' file into ``folder``."""
    if not url:
        raise ValueError(f"nobody published a file of {name} that could be downloaded; give one")
    target = folder / (PurePosixPath(urlparse(url).path).name or "weights")
    try:
        torch.hub.download_url_to_file(url, str(target), progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}); if you have the file, give its path") from None
    return target


def _check_name(name: str, source: Path) -> None:
    """Refuses the authors' file of another model, by its name: some models differ in nothing else, as NAT and DiNAT."""
    addresses = {other: timm.get_pretrained_cfg(other).url for other in chosen()}
    owners = [other for other, url in addresses.items()
              if url and source.suffix and PurePosixPath(urlparse(url).path).name == source.name]
    if owners and name not in owners:
        raise ValueError(f"{source} is, by its name, the authors' file of {' and '.join(owners)}, not of {name}")


def _verify(direct: nn.Module, reread: nn.Module, input_size: tuple[int, int, int], source: Path) -> None:
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = direct(images), reread(images)
    if not expected.isfinite().all():
        raise RuntimeError(f"{source}: with these weights the logits are not finite")
    if not torch.equal(actual, expected):
        raise RuntimeError(f"{source}: the converted weights give other logits than the source, by up to "
                           f"{(actual - expected).abs().max():.1e}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
