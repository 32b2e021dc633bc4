"""Compares two checkouts of visionattn: whether ops and models still give the same, and how long they take.

    python tools/compare_versions.py path/to/before path/to/after --out compared.csv

Each checkout runs in a process of its own, on the same inputs and weights. A case is timed once both gave the same
result. The two take turns, so that a slow phase of the machine meets both, and the ratio is the median of the turns'
ratios. What looks slower than the bound is measured again with three times the turns. The op cases are those that the
second checkout's ops bring; the models are its test variants and a few of usual size. Ends with code 1 if a result
differs or something is slower than the bound.
"""
import argparse
import contextlib
import csv
import fnmatch
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["Worker", "compare", "main"]

DIRECTIONS = ("forward", "forward+backward")
REAL = {  # models of usual size, with the batch that they are run at
    "biformer_tiny": 1, "dinat_mini": 1, "nat_mini": 1, "dinat_s_tiny": 1, "dinat_iso_small": 1, "agent_swin_t": 1,
    "agent_deit_t": 1, "agent_pvt_t": 1, "agent_cswin_t": 1, "efficientvit_cga_m0": 4, "routing_vit_tiny": 1}
BLOCK_SECONDS = 0.05  # a turn is as many runs as take so long, after an untimed one
TOLERANCE = {"forward": 1e-5, "forward+backward": 1e-4}  # relative RMS difference, float32
GROUPS = ("small", "usual", "families", "strided")  # of the op cases that are run if none is chosen


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="Run it on an idle machine.")
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("after", type=Path, help="checkout to compare")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help=(
        "only names that match, * stands for anything: 'kmeans_attention/*', 'neighborhood_attention/56x56', 'test_*'"))
    parser.add_argument("--kinds", nargs="+", choices=["ops", "models"], default=["ops", "models"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--bound", type=float, default=3, help="per cent by which nothing may be slower (default: 3)")
    parser.add_argument("--processor-time", action="store_true", help=(
        "measure the processor time of one thread, which other processes on the machine disturb less"))
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args(argv)
    if args.processor_time and args.threads > 1:
        parser.error("--processor-time is that of one thread: leave --threads away")
    rows = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before, after = (stack.enter_context(Worker(path, folder, args.threads)) for path in (args.before, args.after))
        names = [name for kind in args.kinds for name in after.ask(f"list_{kind}")
                 if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
        if not names:
            parser.error(f"nothing is called {' or '.join(args.only)}")
        for worker in (before, after):
            worker.ask("measure", "process_time" if args.processor_time else "perf_counter")
        for name in names:
            for direction in args.directions:
                row = compare(before, after, name, direction, args.turns, 1 + args.bound / 100)
                rows.append(row)
                print("{name:48}{direction:18}{before_ms:>9} ms{after_ms:>9} ms{ratio:>7} x  {note}".format(**row),
                      flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    wrong = [row for row in rows if not row["ratio"]]
    slower = [row for row in rows if row["ratio"] and float(row["ratio"]) > 1 + args.bound / 100]
    for title, chosen in (("could not be compared", wrong), (f"slower by more than {args.bound:g} %", slower)):
        print(f"\n{title}: {len(chosen)} of {len(rows)}")
        print("".join(f"  {row['name']} {row['direction']}: {row['ratio'] or row['note']}\n" for row in chosen), end="")
    return 1 if wrong or slower else 0


def compare(before: "Worker", after: "Worker", name: str, direction: str, turns: int, bound: float) -> dict[str, Any]:
    """Checks and times one case.

    Args:
        before: Runs the checkout to compare with.
        after: Runs the other one; it draws the inputs and the weights.
        name: ``op/case`` or the name of a model.
        direction: One of ``DIRECTIONS``.
        turns: How often each is timed.
        bound: Ratio above which the case is timed again, in three times the turns.

    Returns:
        The row of the table; ``ratio`` is the time after over that before, empty where results differ.
    """
    row = {"name": name, "direction": direction, "before_ms": "", "after_ms": "", "ratio": "", "error": "",
           "turns": turns, "threads": after.threads, "torch": torch.__version__, "note": ""}
    for worker in (after, before):  # in this order: the second one loads what the first one drew
        problem = worker.ask("prepare", name, direction, worker is after)
        if problem:
            return row | {"note": f"{worker.checkout}: {problem}"}
    error = _difference(*(torch.load(worker.result) for worker in (after, before)))
    row["error"] = f"{error:.1e}"
    if not error <= TOLERANCE[direction]:
        return row | {"note": f"results differ by {error:.1e}"}
    for count in (turns, 3 * turns):
        seconds: list[tuple[float, float]] = []
        for turn in range(count):
            first, second = (before, after) if turn % 2 else (after, before)
            times = {worker: worker.ask("time") for worker in (first, second)}
            seconds.append((times[before], times[after]))
        ratio = statistics.median(y / x for x, y in seconds)
        row |= {"before_ms": f"{1e3 * statistics.median(x for x, _ in seconds):.4g}", "turns": count,
                "after_ms": f"{1e3 * statistics.median(y for _, y in seconds):.4g}", "ratio": f"{ratio:.3f}"}
        if ratio <= bound:
            break
    return row


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative RMS difference of two lists of tensors; infinite if they do not fit each other."""
    if [x.shape for x in actual] != [x.shape for x in expected]:
        return float("inf")
    scale = max((x.double().norm() / max(x.numel(), 1) ** 0.5).item() for x in expected)
    floor = 1e-6 * scale  # what should be zero is compared with the size of the rest
    return max(((a.double() - b.double()).norm() / (b.double().norm() + floor * max(b.numel(), 1) ** 0.5)).item()
               for a, b in zip(actual, expected, strict=True))


class Worker:
    """A process that runs one checkout and does as it is asked."""

    def __init__(self, checkout: Path, folder: Path, threads: int):
        self.checkout, self.threads = checkout.resolve(), threads
        if not (self.checkout / "visionattn" / "__init__.py").exists():
            raise ValueError(f"{checkout} is no checkout of visionattn: it has no visionattn/__init__.py")
        self.result = folder / f"result{len(list(folder.glob('result*')))}.pt"
        self.result.touch()
        environment = os.environ | {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(self.checkout), str(folder), str(self.result), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)

    def ask(self, question: str, *args: Any) -> Any:
        """Has the process call one of the functions of ``_Work`` and returns its result."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(repr((question, args)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.checkout} ended with code {self.process.wait()}")
        return _parse(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, at which it ends, and waits


def _parse(line: str) -> Any:
    import ast

    return ast.literal_eval(line)


class _Work:
    """What a worker's process can be asked."""

    def __init__(self, checkout: str, folder: str, result: str, threads: str):
        torch.set_num_threads(int(threads))
        import visionattn

        if Path(visionattn.__file__).parent.parent != Path(checkout):
            raise RuntimeError(f"imported {visionattn.__file__}, not what is in {checkout}")
        self.folder, self.result = Path(folder), Path(result)
        self.run: Callable[[], list[torch.Tensor]] = lambda: []

    def list_ops(self) -> list[str]:
        from visionattn.ops import cases, dispatch

        return [f"{op}/{name}" for op in dispatch.operations() for name, case in cases(op).items()
                if set(GROUPS) & set(case.groups)]

    def list_models(self) -> list[str]:
        import timm

        import visionattn

        families = visionattn.models.__all__
        tests = [name for family in families for name in timm.list_models("test_*", module=family)]
        return sorted(tests) + list(REAL)

    def prepare(self, name: str, direction: str, draws: bool) -> str:
        """Sets what :meth:`time` runs, runs it and writes its result; returns why it could not."""
        try:
            make = self._op if "/" in name else self._model
            self.run = make(name, direction == DIRECTIONS[1], draws)
            torch.save(self.run(), self.result)
        except Exception as error:
            self.run = lambda: []
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return ""

    def measure(self, clock: str) -> None:
        """Says which of Python's clocks times the runs."""
        self.clock = getattr(time, clock)

    def time(self) -> float:
        """Seconds of a run."""
        self.run()
        start, runs, elapsed = self.clock(), 0, 0.0
        while elapsed < BLOCK_SECONDS:
            self.run()
            runs += 1
            elapsed = self.clock() - start
        return elapsed / runs

    def _op(self, name: str, backward: bool, draws: bool) -> Callable[[], list[torch.Tensor]]:
        from visionattn import ops

        op, case = name.split("/")
        file = self.folder / "inputs.pt"
        if draws:
            torch.save((*ops.cases(op)[case].tensors(), dict(ops.cases(op)[case].options)), file)
        floating, tables, options = torch.load(file)
        function = getattr(ops, op)

        def run() -> list[torch.Tensor]:
            if not backward:
                with torch.no_grad():
                    return _tensors(function(**floating, **tables, **options))
            leaves = {key: x.detach().requires_grad_() for key, x in floating.items()}
            out = _tensors(function(**leaves, **tables, **options))
            return [*(x.detach() for x in out),
                    *torch.autograd.grad(out[0], list(leaves.values()), torch.ones_like(out[0]))]
        return run

    def _model(self, name: str, backward: bool, draws: bool) -> Callable[[], list[torch.Tensor]]:
        import timm

        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).train(backward)
        file = self.folder / "weights.pt"
        if draws:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)  # no zero hides a branch
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file))
        size = model.pretrained_cfg["input_size"]
        images = torch.randn(REAL.get(name, 2), *size, generator=torch.Generator().manual_seed(1))
        if not backward:
            def infer() -> list[torch.Tensor]:
                with torch.inference_mode():
                    return [model(images).clone()]
            return infer
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def train() -> list[torch.Tensor]:
            torch.manual_seed(2)  # of drop-path
            out = model(images)
            return [out.detach(), *torch.autograd.grad(out.square().mean(), parameters)]
        return train


def _tensors(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


def _questions() -> Iterator[tuple[str, tuple]]:
    for line in sys.stdin:
        yield _parse(line)


def _work(*args: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work = _Work(*args)
    for question, arguments in _questions():
        print(repr(getattr(work, question)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        _work(*sys.argv[2:])
    else:
        sys.exit(main())
