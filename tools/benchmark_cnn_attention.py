"""Times attention layers of networks of convolutions, timm's and this zoo's, in every block of timm's networks.

    python tools/benchmark_cnn_attention.py

Networks with the layers take turns, each after an untimed run of its own; the figure is the median of the processor
time of one thread, which other work on the machine stretches little. LBA stands at two positions besides, as it
is meant to.
"""
import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark_models import describe_machine
from torch import nn

from visionattn.layers import EfficientLocalAttention, LittleBitAttention, SubspaceAttention, attach_attention

__all__ = ["NETWORKS", "main", "measure"]

LAYERS: dict[str, Any] = {
    "SE": "se", "ECA": "eca", "CBAM": "cbam", "ELA": EfficientLocalAttention, "ULSAM": SubspaceAttention,
    "LBA": LittleBitAttention}


def _resnet(name: str, layer: Any) -> nn.Module:
    return timm.create_model(name, block_args=dict(attn_layer=layer))


def _mnasnet(name: str, layer: Any) -> nn.Module:
    # Without attention: its layers are taken out, as there is no network that differs in nothing else.
    model = timm.create_model(name, se_layer=layer or "se")
    if layer is None:
        for module in model.modules():
            if hasattr(module, "se"):
                module.se = nn.Identity()
    return model


# How timm's network takes a layer, and the two stages that LBA follows.
NETWORKS: dict[str, tuple[Callable[[str, Any], nn.Module], Sequence[str]]] = {
    "resnet50": (_resnet, ("layer2", "layer3")),
    "semnasnet_100": (_mnasnet, ("blocks.2", "blocks.4")),
    "test_resnet": (_resnet, ("layer2", "layer3")),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet50", "semnasnet_100"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/cnn_attention_cpu.csv"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine = describe_machine()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = None
        for network in args.networks:
            for row in measure(network, args.image_size, args.repeats):
                print("{network:16}{layer:22}{ms_per_image:>9.2f} ms{over_plain:>7.3f} x".format(**row), flush=True)
                row |= machine
                writer = writer or csv.DictWriter(file, fieldnames=list(row))
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
    return 0


@torch.inference_mode()
def measure(network: str, image_size: int, repeats: int) -> list[dict[str, Any]]:
    """A row for the network without attention and for each layer; ``over_plain`` is the median share of its time.

    Raises:
        RuntimeError: Logits are not finite.
    """
    build, positions = NETWORKS[network]
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    models = {layer or "none": build(network, LAYERS[layer] if layer else None).eval() for layer in ("", *LAYERS)}
    models["LBA, 2 positions"] = attach_attention(build(network, None), positions, LittleBitAttention, image).eval()
    milliseconds: dict[str, list[float]] = {layer: [] for layer in models}
    for _ in range(repeats):
        for layer, model in models.items():
            if not model(image).isfinite().all():
                raise RuntimeError(f"{network} with {layer} gives logits that are not finite")
            start = time.process_time()
            model(image)
            milliseconds[layer].append(1e3 * (time.process_time() - start))
    return [
        {
            "network": network, "layer": layer, "image": image_size,
            "ms_per_image": round(statistics.median(values), 3),
            "over_plain": round(statistics.median(
                one / plain for one, plain in zip(values, milliseconds["none"], strict=True)), 4),
            "parameters": sum(parameter.numel() for parameter in models[layer].parameters()), "runs": repeats,
        }
        for layer, values in milliseconds.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
