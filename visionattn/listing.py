"""``visionattn list``: the models, what they cost, what they reached, and where their weights are.

Parameters and GMACs are counted on the model itself, at its own image size and without computing anything; the accuracy
is the one that its authors published.
"""
import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from . import models

__all__ = ["Entry", "chosen", "describe", "main"]


class Entry(NamedTuple):
    """A line of the list."""

    name: str
    parameters: int
    gmacs: float | None  # None for a model that cannot run without its weights in memory
    image_size: tuple[int, int]
    top1: float | None  # published, in per cent; None where the authors' figure is not known here
    licence: str  # of the weights
    weights: str  # address of the weights that pretrained=True loads; empty if there are none
    family: str


def main(argv: list[str]) -> None:
    """Runs ``visionattn list`` with command line arguments."""
    parser = argparse.ArgumentParser(
        prog="visionattn list", description="Shows models. Parameters and GMACs (multiplications with additions counted"
        " as one) are counted at the image size shown; top-1 on ImageNet-1k is what the authors published.")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help=(
        "only the models of this name, timm's own included; * stands for anything: 'biformer*', 'mambaout_*'"))
    parser.add_argument("--family", help="only the models of this family of ours: biformer, agent, ...")
    args = parser.parse_args(argv)
    names = chosen(args.pattern, args.family)
    widths = max(map(len, names)), max(len(_family(name)) for name in names)
    print(_line(widths, "model", "parameters", "GMACs", "image", "top-1", "licence", "family", "weights"), flush=True)
    for name in names:
        entry = describe(name)
        height, width = entry.image_size
        print(_line(
            widths, name, f"{entry.parameters / 1e6:.2f} M", "-" if entry.gmacs is None else f"{entry.gmacs:.3g}",
            f"{height} x {width}", "-" if entry.top1 is None else f"{entry.top1:.1f} %", entry.licence or "-",
            entry.family, entry.weights or "none"), flush=True)


def chosen(pattern: str | None = None, family: str | None = None) -> list[str]:
    """Names of models: ours, or with a ``pattern`` all of timm's registry that match it.

    Args:
        pattern: A name, in which ``*`` stands for anything.
        family: Only ours of this family, or of the families that begin with it and an underscore.

    Raises:
        ValueError: There is no such model, or no such family.
    """
    families = sorted({_family(name) for name in _ours()})
    members = [name for name in families if family is None or name == family or name.startswith(f"{family}_")]
    if not members:
        raise ValueError(f"there is no family {family!r}; there are {', '.join(families)}")
    names = timm.list_models(pattern) if pattern else list(_ours())
    if pattern is None or family is not None:
        names = [name for name in names if _family(name) in members]
    if not names:
        within = f" in the family {family}" if family else ""
        raise ValueError(f"no model{within} is called {pattern!r}; * stands for anything, as in '{pattern}*'")
    return names


def describe(name: str) -> Entry:
    """Counts and looks up the facts about the model ``name``, which is built on the meta device."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval().requires_grad_(False)
    config = model.pretrained_cfg
    gmacs: float | None = None
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *config["input_size"]))
        gmacs = counter.get_total_flops() / 2e9
    except (RuntimeError, NotImplementedError):  # some of timm's models read values of tensors, which meta ones lack
        pass
    family = models.family_of(name)
    published = family.published.get(name) if family else None
    hub = config.get("hf_hub_id")
    return Entry(
        name, sum(parameter.numel() for parameter in model.parameters()), gmacs, config["input_size"][1:],
        published.top1 if published else None, config.get("license") or "",
        f"https://huggingface.co/{hub}" if hub else config.get("url") or "", _family(name))


def _ours() -> Iterator[str]:
    return (name for name in timm.list_models() if not _family(name).startswith("timm."))


def _family(name: str) -> str:
    """The module of the zoo that has the model; of a model of timm's, ``timm.MODULE``."""
    module = timm.models.model_entrypoint(name).__module__
    return module.removeprefix(f"{models.__name__}.").replace("timm.models.", "timm.")


def _line(widths: tuple[int, int], name: str, *cells: str) -> str:
    parameters, gmacs, image, top1, licence, family, weights = cells
    return (f"{name:<{widths[0]}}  {parameters:>10}  {gmacs:>6}  {image:>9}  {top1:>6}  {licence:<14}  "
            f"{family:<{widths[1]}}  {weights}")
