"""Times models of this zoo beside timm's nearest, and measures their peak memory; every output is checked first.

    python tools/benchmark_models.py --models 'efficientvit*'
    python tools/benchmark_models.py --models transnext_micro --plain  # beside plain_transnext.py in place of timm's

The timed runs of a pair are interleaved, each after an untimed one of the same model, and the figure is the median, so
that a slow phase of the machine meets both. The peak memory of a forward pass is measured in a process of its own.
"""
import argparse
import csv
import fnmatch
import importlib.metadata
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from plain_transnext import make_plain
from torch import Tensor, nn

from visionattn.bench import measure_machine
from visionattn.models import Peer, families

__all__ = ["PAIRS", "benchmark", "describe_machine", "main", "timed"]

_PLAIN = "_plain"  # ends the name of a plain composition
TOLERANCE = 1e-4  # of logits that must agree, as a share of the largest

PAIRS = [peer for family in families().values() for peer in family.peers]


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", metavar="PATTERN", default="*", help=(
        f"only ours of this name, * stands for anything; there are {', '.join(dict.fromkeys(x.ours for x in PAIRS))}"))
    parser.add_argument("--plain", action="store_true", help=(
        "beside the same model with the same weights as a plain composition of PyTorch's operations: TransNeXt only"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21, help="timed runs of each model")
    parser.add_argument("--output", type=Path, default=Path("results/models_cpu.csv"))
    args = parser.parse_args(argv)
    pairs = [pair for pair in PAIRS if fnmatch.fnmatch(pair.ours, args.models)]
    if args.plain:
        names = dict.fromkeys(pair.ours for pair in pairs if pair.ours.startswith("transnext"))
        pairs = [Peer(name, name + _PLAIN, timm.get_pretrained_cfg(name).input_size[1]) for name in names]
    if not pairs:
        parser.error(f"no model here is called {args.models!r}")
    torch.set_num_threads(args.threads)
    machine = describe_machine()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = None
        for pair, batch in itertools.product(pairs, args.batch):
            for row in benchmark(pair, batch, args.repeats):
                row |= machine
                writer = writer or csv.DictWriter(file, fieldnames=list(row))
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
                print("{model:30}{image:>5} px  batch {batch:<3}{median_ms:>9.2f} ms{peer_over_this:>7.2f} x "
                      "{peak_mib:>8.1f} MiB  {checked}".format(**row), flush=True)
            file.flush()
    print(args.output)
    return 0


def benchmark(pair: Peer, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Checks, then times a pair.

    Returns:
        A row for ours and one for timm's. ``peer_over_this`` is the peer's median over the row's own: above 1, ours is
        faster. ``peak_mib`` is how much a first forward pass raises the resident memory of a fresh process, weights and
        images excluded.

    Raises:
        RuntimeError: An output is of another shape, not finite, or not what it must be equal to.
    """
    images = torch.randn(batch, 3, pair.size, pair.size, generator=torch.Generator().manual_seed(1))
    ours, peer, checked = _checked(pair, images)
    models: dict[str, nn.Module] = {pair.ours: ours, pair.peer: peer}
    with torch.inference_mode():
        seconds = timed({name: partial(model, images) for name, model in models.items()}, repeats)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "model": name + ("_fused" if pair.fused and name == pair.ours else ""), "image": pair.size, "batch": batch,
            "median_ms": round(medians[name], 3), "best_ms": round(1e3 * min(seconds[name]), 3),
            "peer_over_this": round(medians[pair.peer] / medians[name], 3),
            "peak_mib": round(_apart(_peak_memory, pair, name, batch), 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()), "runs": repeats,
            "checked": checked if name == pair.ours else "finite",
        }
        for name, model in models.items()
    ]


def timed(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of what takes turns, each time after an untimed run of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(repeats), runs.items()):
        run()
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def describe_machine() -> dict[str, Any]:
    """The machine and the versions that figures are of."""
    return measure_machine("cpu", torch.float32).description | {
        library: importlib.metadata.version(library) for library in ("timm", "visionattn")}


def _checked(pair: Peer, images: Tensor) -> tuple[Any, nn.Module, str]:
    """Ours and the peer, and what was found true of their outputs."""
    ours, peer = _create(pair, pair.ours), _create(pair, pair.peer)
    facts = ["finite"]
    if pair.same_weights:
        _perturb(peer)
        overlay = dict(state_dict=peer.state_dict())
        ours = timm.create_model(pair.ours, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        expected, logits = peer(images), ours(images)
        for name, out in ((pair.ours, logits), (pair.peer, expected)):
            if out.shape != (len(images), 1000) or not out.isfinite().all():
                raise RuntimeError(f"{name}: the output, {list(out.shape)}, is not finite or not of 1000 classes")
        if pair.same_weights:
            facts.append(f"timm's logits to {_agree(pair.ours, logits, expected):.0e}")
        if pair.peer.endswith(_PLAIN):
            facts.append(f"the plain composition's logits to {_agree(pair.ours, logits, expected):.0e}")
        if pair.fused:
            ours = ours.fuse()
            facts.append(f"as unfused to {_agree(pair.ours, ours(images), logits):.0e}")
    return ours, peer, ", ".join(facts)


def _create(pair: Peer, name: str) -> Any:
    torch.manual_seed(0)
    if name.endswith(_PLAIN):
        return make_plain(timm.create_model(name.removesuffix(_PLAIN)).eval(), pair.size)
    takes_size = name == pair.peer or name.startswith("agent")  # those that have tables for one image size
    changed = takes_size and pair.size != timm.get_pretrained_cfg(name).input_size[1]
    return timm.create_model(name, **dict(img_size=pair.size) if changed else {}).eval()


def _perturb(model: nn.Module) -> None:
    """Draws norms anew: those that start at zero would hide whole branches from a comparison."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, least in ((module.weight, 0.5), (module.bias, -0.2), (module.running_var, 0.8),
                                  (module.running_mean, -0.2)):
                tensor.data.uniform_(least, least + 0.4, generator=generator)


def _agree(name: str, actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest logit."""
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{name}: logits differ by {difference:.1e} of the largest from those they must be equal to")
    return difference


def _apart(function: Callable[..., float], *args: Any) -> float:
    """Calls ``function`` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, torch.get_num_threads()).result()


def _peak_memory(pair: Peer, name: str, batch: int, threads: int) -> float:
    """MiB by which a forward pass raises this process's resident memory; not a number where Linux does not say."""
    torch.set_num_threads(threads)
    model = _create(pair, name)
    if pair.fused and name == pair.ours:
        model = model.fuse()
    images = torch.randn(batch, 3, pair.size, pair.size)
    try:
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    except OSError:
        return float("nan")
    before = _status("VmRSS")
    with torch.inference_mode():
        model(images)
    return (_status("VmHWM") - before) / 1024


def _status(entry: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


if __name__ == "__main__":
    sys.exit(main())
