"""The commands ``visionattn backends`` and ``visionattn bench``."""
import argparse
import csv
import inspect
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from .. import ops as operations
from ..ops import cases, dispatch
from ..simulate import simulate
from . import attention_command
from .backends import backend_table
from .exported import BATCHES, EXPORT_FORMS, benchmark_export, default_models, describe_export
from .kernels import TARGETS, compile_kernels
from .machine import measure_machine, version
from .plots import plot_export, plot_scaling
from .timing import DIRECTIONS, benchmark
from .training import TRAINING_PEERS, benchmark_training, data_seconds, models_of_families

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Runs ``backends``, ``bench simulate ...``, ``bench ops ...``, ``bench attention ...``, ``bench kernels ...``,
    ``bench export ...``, ``bench train ...`` or ``bench data ...``."""
    if argv[:2] == ["bench", "data"]:
        return _time_data(argv[2:])
    parser = argparse.ArgumentParser(prog="visionattn")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("backends", help="what runs here, and why not")
    bench = commands.add_parser("bench", help="simulate tiles, or time what runs").add_subparsers(
        dest="subject", required=True)

    tiles = bench.add_parser("simulate", description=_summary(simulate), help="the tiles that a window makes visit",
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    tiles.add_argument("--size", nargs="+", type=int, required=True, help="tokens along 1, 2 or 3 axes")
    for name, default in (("--kernel", None), ("--dilation", 1), ("--stride", 1)):
        tiles.add_argument(name, nargs="+", type=int, required=default is None, default=[default],
                           help="one value, or one per axis" + ("" if default is None else " (default: 1)"))
    tiles.add_argument("--causal", nargs="+", type=int, choices=(0, 1), default=[0], help=(
        "1 for causal axes, one value or one per axis (default: 0)"))
    tiles.add_argument("--q-tile", nargs="+", type=int, help="queries of a tile per axis (default: search the best)")
    tiles.add_argument("--kv-tile", nargs="+", type=int, help="keys of a tile per axis (default: search the best)")

    names = list(_groups())
    single = list(dict.fromkeys(case for op in _ops().values() for case in cases(op)))
    ops = bench.add_parser("ops", description=_summary(benchmark), help="time the ops and their peers",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    ops.add_argument("--ops", nargs="+", choices=list(_ops()), default=list(_ops()))
    ops.add_argument("--cases", nargs="+", metavar="CASE", choices=[*names, *single], default=_DEFAULT_GROUPS, help=(
        f"groups: {', '.join(names)} (default: {', '.join(_DEFAULT_GROUPS)}); single cases: {', '.join(single)}"))
    ops.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    ops.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    ops.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    ops.add_argument("--compiled", action="store_true", help="also compiled FlexAttention (a minute of compiling each)")
    ops.add_argument("--threads", type=int, default=torch.get_num_threads())
    ops.add_argument("--repeat", type=int, default=15, help="turns of every backend")
    ops.add_argument("--out", type=Path, help="CSV file (default: results/ops_DEVICE.csv)")
    ops.add_argument("--plot", action="store_true", help="draw time and memory of the scaling cases beside the CSV")

    attention = attention_command.add_parser(bench)

    kernels = bench.add_parser("kernels", description=_summary(compile_kernels),
                               help="compile the Triton kernels for GPUs that need not be there",
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="(default: all)")
    kernels.add_argument("--ops", nargs="+", choices=_compiled_ops(), default=_compiled_ops())
    kernels.add_argument("--cases", nargs="+", metavar="CASE", choices=[*names, *single], default=["kernels"],
                         help="as those of bench ops (default: the group kernels)")
    dtypes = ["float16", "bfloat16", "float32"]
    kernels.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="(default: all)")
    kernels.add_argument("--out", type=Path, default=Path("results/kernels.csv"), help="CSV (default: %(default)s)")

    exported = bench.add_parser("export", description=_summary(benchmark_export), help="time exported models",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    exported.add_argument("--models", nargs="+", metavar="NAME", help=(
        "as of timm.create_model (default: a small one of every family, timm's swin_tiny and efficientvit_m5)"))
    exported.add_argument(
        "--forms", nargs="+", choices=EXPORT_FORMS, metavar="FORM",
        default=["eager", "onnxruntime", "openvino"],
        help=f"of {', '.join(EXPORT_FORMS)} (default: %(default)s; the others take a minute or more a model)")
    exported.add_argument("--threads", type=int, default=torch.get_num_threads())
    exported.add_argument("--repeat", type=int, default=7, help="turns of every form")
    exported.add_argument("--out", type=Path, default=Path("results/export_speed_cpu.csv"), help=(
        "CSV file (default: %(default)s); the picture is written beside it"))

    training = bench.add_parser("train", description=_summary(benchmark_training), help="time steps of training",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_argument("--models", nargs="+", metavar="NAME", help=(
        f"as of timm.create_model (default: one of every family, and {', '.join(TRAINING_PEERS)})"))
    training.add_argument("--batch", type=int, default=8, help="images of a step")
    training.add_argument("--image-size", type=int, default=224, help="their height and width")
    training.add_argument("--compiled", action="store_true", help="also compiled, which takes a minute a model")
    training.add_argument("--checkpointed", action="store_true",
                          help="also with inner values of attention, or of blocks, computed twice: for less memory")
    training.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    training.add_argument("--threads", type=int, default=torch.get_num_threads())
    training.add_argument("--repeat", type=int, default=5, help="turns of every model")
    training.add_argument("--out", type=Path, help="CSV file (default: results/train_DEVICE.csv)")

    bench.add_parser("data", help="what a loader gives and a model takes: RECIPE or configuration, and options of fit")

    args = parser.parse_args(argv)
    if args.command == "backends":
        print(backend_table())
    elif args.subject == "simulate":
        _print_simulation(args)
    elif args.subject == "attention":
        attention_command.run(args, attention)
    elif args.subject == "kernels":
        _print_kernels(args, kernels)
    elif args.subject == "export":
        _print_exported(args, exported)
    elif args.subject == "train":
        _print_training(args, training)
    else:
        _print_benchmark(args, ops)
    return 0


def _time_data(argv: list[str]) -> int:
    from ..tasks.bench_data import arguments
    from ..tasks.run import launch

    with tempfile.TemporaryDirectory() as folder:
        launch(arguments(argv, folder))
    return 0


_DEFAULT_GROUPS = ["families", "scaling", "strided"]


def _ops() -> dict[str, str]:
    """The ops by what ``--ops`` calls them: their public functions without ``_attention``."""
    return {name.removesuffix("_attention"): name for name in dispatch.operations() if hasattr(operations, name)}


def _compiled_ops() -> list[str]:
    """The ops that have Triton kernels, as ``--ops`` calls them."""
    return [short for short, name in _ops().items() if any(
        backend == "triton" for backend, _, _ in dispatch.explain(name, next(iter(cases(name).values())).problem))]


def _groups() -> list[str]:
    """The groups of cases, in the order in which they appear."""
    return list(dict.fromkeys(group for op in _ops().values() for case in cases(op).values() for group in case.groups))


def _chosen_cases(ops: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for op in ops:
        yield from ((op, name) for name, case in cases(_ops()[op]).items() if {name, *case.groups} & set(names))


def _summary(function: Callable) -> str:
    """The docstring without its sections."""
    return (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]


def _print_simulation(args: argparse.Namespace) -> None:
    def axes(values: Sequence) -> str:
        return "x".join(map(str, values))

    options: list[Any] = [args.kernel, args.dilation, args.stride, [bool(x) for x in args.causal]]
    kernel, dilation, stride, causal = (x[0] if len(x) == 1 else x for x in options)
    found = simulate(args.size, kernel, dilation, stride, causal, args.q_tile, args.kv_tile)
    rows = [
        ("map", axes(args.size)),
        ("window", f"{axes(args.kernel)}, dilation {axes(args.dilation)}, stride {axes(args.stride)}"
                   + (f", causal {axes(args.causal)}" if any(args.causal) else "")),
        ("query tile, key tile", f"{axes(found.q_tile)}, {axes(found.kv_tile)}"
                                 + ("" if args.q_tile and args.kv_tile else " (best of those searched)")),
        ("key tiles visited", f"{found.visited / found.query_tiles:.2f} per query tile (most {found.most}) of "
                              f"{found.key_tiles}, {100 * found.fraction:.2f} %"),
        ("best possible speed-up", f"{found.speedup:.2f} x over dense attention"),
        ("speed-up in FLOPs", f"{found.flop_speedup:.2f} x"),
        ("efficiency", f"{100 * found.efficiency:.1f} %"),
        ("perfectly block sparse", "yes" if found.perfectly_sparse else "no"),
    ]
    print("\n".join(f"{name:<24}{value}" for name, value in rows))


def _print_benchmark(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    chosen = list(_chosen_cases(args.ops, args.cases))
    if not chosen:
        parser.error("no case of the chosen ops has that name")
    _check_device(args.device, parser)
    out = args.out or Path("results") / f"ops_{args.device}.csv"
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    dtype = getattr(torch, args.dtype)
    machine = measure_machine(args.device, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with out.open("w", newline="") as file:
        writer = None
        for (op, case), direction in itertools.product(chosen, args.directions):
            for row in benchmark(op, case, direction == DIRECTIONS[1], dtype, args.device, args.repeat, args.compiled,
                                 machine):
                row |= machine.description
                if writer is None:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                writer.writerow(row)
                rows.append(row)
                print("{op:13}{case:16}{direction:18}{backend:14}{median_ms:>8} ms {ratio_to_ours:>7} x {peak_mib:>7} "
                      "MiB  bounds {bytes_ms} / {flops_ms} ms  {note}".format(**row), flush=True)
            file.flush()
    if args.plot:
        print(plot_scaling(rows, out.with_name(f"{out.stem}_scaling.png")))


def _print_kernels(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    chosen = list(_chosen_cases(args.ops, args.cases))
    if not chosen:
        parser.error("no case of the chosen ops has that name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print("a thread's registers and spilled bytes, a block's shared bytes, blocks that an SM holds")
    with args.out.open("w", newline="") as file:
        writer = None
        for target, (op, case), dtype in itertools.product(args.target, chosen, args.dtype):
            for row in compile_kernels(_ops()[op], case, getattr(torch, dtype), target):
                writer = writer or csv.DictWriter(file, fieldnames=list(row))
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
                print("{target:8}{op:25}{case:22}{dtype:10}{kernel:22}{registers:>5}{spilled_bytes:>8}{shared_bytes:>8}"
                      "{blocks_per_sm:>4}".format(**row), flush=True)
            file.flush()


def _print_training(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    names = args.models or [*TRAINING_PEERS, *models_of_families()]
    _check_names(names, parser)
    _check_device(args.device, parser)
    torch.set_num_threads(args.threads)
    description = measure_machine(args.device, torch.float32).description | {"timm": version("timm")}
    out = args.out or Path("results") / f"train_{args.device}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    data = data_seconds(args.batch, args.image_size)
    print(f"{'model':30}{'form':10}" + "".join(f"{title:>12}" for title in (
        "forward", "backward", "optimizer", "step, ms", "over swin_t", "images/s", "peak MiB", "data, ms")))
    with out.open("w", newline="") as file:
        writer = None
        for row in itertools.chain.from_iterable(
                benchmark_training(name, args.batch, args.image_size, args.repeat, args.compiled, args.device, data,
                                   args.checkpointed)
                for name in names):
            row |= description
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print("{model:30}{form:10}{forward_ms:>12}{backward_ms:>12}{optimizer_ms:>12}{step_ms:>12}"
                  "{step_over_swin_tiny:>12}{images_per_s:>12}{peak_mib:>12}{data_ms:>12}  {note}".format(**row),
                  flush=True)
    print(out)


def _check_names(names: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Stops at a model that timm does not know."""
    known = set(timm.list_models()) | set(timm.list_pretrained())
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no model is called {', '.join(unknown)}; visionattn list has ours")


def _check_device(device: str, parser: argparse.ArgumentParser) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")


def _print_exported(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    names = args.models or default_models()
    _check_names(names, parser)
    torch.set_num_threads(args.threads)
    description = describe_export(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'model':30}{'form':18}" + "".join(f"{title:>15}" for title in (
        "ms of one", "over eager", f"a second of {BATCHES[1]}", "over eager", "peak MiB", "disk MiB")))
    rows: list[dict[str, Any]] = []
    with args.out.open("w", newline="") as file:
        writer = None
        for row in itertools.chain.from_iterable(
                benchmark_export(name, args.forms, args.threads, args.repeat) for name in names):
            row |= description
            writer = writer or csv.DictWriter(file, fieldnames=list(row))
            if not rows:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            rows.append(row)
            print("{model:30}{form:18}{latency_ms:>15}{latency_over_eager:>15}{images_per_s:>15}{batch_over_eager:>15}"
                  "{peak_mib:>15}{disk_mib:>15}  {note}".format(**row), flush=True)
    print(plot_export(rows, args.out.with_suffix(".png")))
