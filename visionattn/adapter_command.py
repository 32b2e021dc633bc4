"""``visionattn adapters``: the adapters that there are, what a file of one is, and models with one merged into them."""
import argparse
import inspect
from pathlib import Path

import safetensors.torch

from . import adapters
from .tasks.rebuild import create_model
from .tasks.run_folder import find_run

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Runs ``visionattn adapters`` with command line arguments."""
    parser = argparse.ArgumentParser(
        prog="visionattn adapters", description="Few weights that tune a frozen backbone: lists the kinds (fit "
        "--model.adapter NAME trains one), shows what a file is, merges one into its backbone.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the adapters that there are, with their options")
    shown = commands.add_parser("info", help="what an adapter file is, without its model")
    shown.add_argument("file", metavar="FILE", help="adapter.safetensors of a run")
    merged = commands.add_parser(
        "merge", help="write a model's weights with the adapter merged into them: a plain state dict")
    merged.add_argument("source", metavar="RUN|FILE",
                        help="a run that trained an adapter, its checkpoint, or with --model an adapter file")
    merged.add_argument("--model", help="of an adapter file: the name of the model that it is of")
    merged.add_argument("--checkpoint", metavar="FILE", help="of an adapter file: the weights that it was trained on")
    merged.add_argument("--pretrained", action="store_true", help="of an adapter file: those are the published ones")
    merged.add_argument("--num-classes", type=int, help="of an adapter file: the classes of those weights")
    merged.add_argument("--out", metavar="FILE", default="merged.safetensors",
                        help="default: %(default)s; --model NAME --checkpoint FILE of the other commands takes it")
    args = parser.parse_args(argv)
    if args.command == "list":
        _list()
    elif args.command == "info":
        _info(args.file)
    else:
        _merge(args)


def _list() -> None:
    """Prints a line for each adapter, and its options with their defaults."""
    width = max(map(len, adapters.names()))
    for name in adapters.names():
        kind = adapters.adapter_class(name)
        options = [f"{key}={parameter.default}" for key, parameter in inspect.signature(kind).parameters.items()]
        print(f"{name:<{width}}  {kind.summary}\n{'':<{width}}  {', '.join(options)}")


def _info(file: str) -> None:
    """Prints what a file says of its adapter."""
    found = adapters.info(file)
    print(f"adapter   {found['adapter']}")
    print(f"options   {', '.join(f'{key}={value}' for key, value in found['options'].items())}")
    print(f"backbone  {found['backbone']}")
    print(f"classes   {found['num_classes'] or 'none'}")
    print(f"bytes     {found['bytes']:,}")
    for key, shape in found["tensors"].items():
        print(f"          {key} {' x '.join(map(str, shape))}")


def _merge(args: argparse.Namespace) -> None:
    """Writes a model's weights with its adapter merged into them."""
    if args.model:
        model = create_model(
            args.model, args.checkpoint, pretrained=args.pretrained, num_classes=args.num_classes)
        adapters.load(model, args.source, label="merged")
    else:
        source = Path(args.source)
        if source.suffix == ".safetensors":
            raise ValueError(f"{source} is an adapter without its backbone: give --model and --pretrained or "
                             "--checkpoint, or the run that trained it")
        model = create_model(None, find_run(source).checkpoint)
    if not adapters.adapters_of(model):
        raise ValueError(f"{args.source} has no adapter that could be merged")
    if not adapters.merge(model):
        raise ValueError(f"the adapter of {args.source} cannot be folded into the backbone's weights, it computes what "
                         "no layer there does; visionattn export writes it as the layers that it is")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: x.contiguous() for key, x in model.state_dict().items()}, out)
    print(f"{out} ({out.stat().st_size:,} bytes): the adapter is part of the weights")
