"""Where the time of a training step goes, of a model and of timm's swin_tiny:

    python tools/profile_training.py dinat_tiny --batch 4 --repeat 3 --out results/train_profile.csv

writes a row for every operator that takes at least ``--least`` of either step: its share of the step's time, without
the operators that it calls, in both models. Both take turns; the least of the turns counts. One thread.
"""
import argparse
import csv
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from visionattn.bench.machine import figure
from visionattn.bench.training import BESIDE, Step


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--image-size", type=int, default=224, help="their height and width")
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    parser.add_argument("--least", type=float, default=0.005, help="share of a step that an operator must take")
    parser.add_argument("--out", type=Path, default=Path("results/train_profile.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: Step(name, args.batch, args.image_size, "cpu") for name in (args.model, BESIDE)}
    times: dict[str, dict[str, float]] = {name: {} for name in steps}
    for _ in range(args.repeat):
        for name, step in steps.items():
            step.turn()
            for operator, seconds in _operators(step).items():
                times[name][operator] = min(times[name].get(operator, seconds), seconds)
    totals = {name: sum(found.values()) for name, found in times.items()}
    shares = {name: {key: value / totals[name] for key, value in found.items()} for name, found in times.items()}
    ours, other = shares[args.model], shares[BESIDE]
    rows = [
        {"operator": key, args.model: figure(ours.get(key, 0.)), BESIDE: figure(other.get(key, 0.))}
        for key in sorted(ours | other, key=lambda key: -max(ours.get(key, 0.), other.get(key, 0.)))
        if max(ours.get(key, 0.), other.get(key, 0.)) >= args.least]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ratio = totals[args.model] / totals[BESIDE]
    print(f"{args.out}: {len(rows)} operators; a profiled step is {ratio:.3f} of {BESIDE}'s")


def _operators(step: Step) -> dict[str, float]:
    """Seconds of one step by operator."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step.turn()
    return {row.key: 1e-6 * row.self_cpu_time_total for row in recorded.key_averages()}


if __name__ == "__main__":
    main()
