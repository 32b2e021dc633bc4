"""``visionattn export``: a model as an ONNX file of standard operators, checked with onnxruntime before it is kept.

The file takes ``images [batch, channels, height, width]`` (normalised as in training) and gives ``logits``. The batch
size is free; with ``--dynamic-size`` height and width are too, in multiples of 32.
"""
import argparse
import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .checkpoint import create_model

__all__ = ["ExportReport", "export_onnx"]

OPSET = 20
MULTIPLE, MOST = 32, 4096  # of free image sizes: multiples of the one, up to the other
TOLERANCE = 1e-4  # largest difference from eager, as a share of the largest logit
_IMAGES = 3  # images per check batch beyond the first; batches of 1 and of 1 + _IMAGES are run


class ExportReport(NamedTuple):
    """What an export produced and how its answers compare with eager PyTorch."""

    path: Path
    difference: float  # largest absolute difference, in units of the logits' largest absolute value
    nodes: int
    megabytes: float
    opset: int
    ties: int  # random images redrawn because eager itself was undecided on them


def export_onnx(
        model: nn.Module,
        out: str | Path,
        image_size: tuple[int, int] | None = None,
        dynamic_size: bool = False,
        fuse: bool = False,
) -> ExportReport:
    """Writes ``model`` to the ONNX file ``out`` and checks it with onnxruntime on random images at two batch sizes.

    Args:
        model: A classifier from timm; it is copied, put in eval mode and exported in float32 from the CPU.
        out: The file to write. It is removed again if the check fails.
        image_size: Height and width of the images; None takes the model's own.
        dynamic_size: Leave height and width free as well, in multiples of 32; then two more sizes are checked.
        fuse: Fold batch norms and the like into the layers beside them first, where the model's layers can do that
            (``timm.utils.reparameterize_model``).

    Raises:
        ModuleNotFoundError: The packages of the ``export`` extra are missing.
        ValueError: ``dynamic_size`` with an ``image_size`` that is no multiple of 32.
        RuntimeError: PyTorch cannot export the model, the file needs operators beyond the standard ones, or
            onnxruntime's answers differ from eager's by more than 1e-4 of the logits' scale.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"export needs the package {error.name}: pip install 'visionattn[export]'") from None
    out = Path(out)
    model = copy.deepcopy(model).cpu().float().eval()
    if fuse:
        model = reparameterize_model(model, inplace=True)
    config: Any = model.pretrained_cfg
    channels, *default_size = config["input_size"]
    size = tuple(image_size or default_size)
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        if any(side % MULTIPLE for side in size):
            raise ValueError(f"free sizes are multiples of {MULTIPLE}; the example of {size[0]} x {size[1]} is not one")
        # Multiples of the coarsest stride keep the maps' sizes free of rounding, which torch.export cannot solve.
        rows, columns = (torch.export.Dim(name, min=2, max=MOST // MULTIPLE) for name in ("rows", "columns"))
        free |= {2: MULTIPLE * rows, 3: MULTIPLE * columns}
    try:
        program = torch.onnx.export(
            model, (torch.randn(2, channels, *size),), dynamo=True, opset_version=OPSET, verbose=False,
            dynamic_shapes=(free,), input_names=["images"], output_names=["logits"])
    except Exception as error:
        raise RuntimeError(f"PyTorch cannot export this model: {_first_line(error)}") from error
    assert program is not None
    proto = program.model_proto
    for item in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del item.metadata_props[:]  # holds stack traces with the paths of the machine that exported
    domains = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
    if domains or proto.functions:
        raise RuntimeError(f"the export needs operators outside standard ONNX: {', '.join(sorted(domains))}")
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(out))
    onnx.checker.check_model(str(out))
    sizes = [size, (size[0] + 32, size[1]), (size[0], size[1] + 64)] if dynamic_size else [size]
    try:
        difference, ties = _compare(model, out, channels, sizes)
    except RuntimeError:
        out.unlink()
        raise
    opset = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    return ExportReport(out, difference, len(proto.graph.node), out.stat().st_size / 2 ** 20, opset, ties)


def main(argv: list[str]) -> None:
    """Runs ``visionattn export`` with command line arguments."""
    parser = argparse.ArgumentParser(prog="visionattn export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model name as in timm.create_model; a run's own checkpoint knows it")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="weights: a run's .ckpt, the authors' file, or a state dict (.pth, .safetensors)")
    parser.add_argument("--pretrained", action="store_true", help="the authors' weights, downloaded")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint or of a fresh head")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="height and width, or one number for both")
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width free, in multiples of 32")
    parser.add_argument("--fuse", action="store_true", help="fold batch norms into the layers beside them first")
    parser.add_argument("--out", default="model.onnx", metavar="FILE")
    args = parser.parse_args(argv)
    size = None
    if args.img_size:
        if len(args.img_size) > 2 or min(args.img_size) < 1:
            parser.error("--img-size takes one or two positive numbers")
        size = (args.img_size[0], args.img_size[-1])
    if not args.model and not args.checkpoint:
        parser.error("give --model, or the --checkpoint of a run")
    model = create_model(args.model, args.checkpoint, pretrained=args.pretrained, num_classes=args.num_classes)
    print_report(export_onnx(model, args.out, size, args.dynamic_size, args.fuse))


def print_report(report: ExportReport) -> None:
    """Prints what was exported, a line each."""
    print(f"file                {report.path} ({report.megabytes:.1f} MiB, {report.nodes} nodes, opset {report.opset})")
    print(f"largest difference  {report.difference:.1e} of the logits' scale, onnxruntime against PyTorch"
          f" (limit {TOLERANCE:.0e})")
    if report.ties:
        print(f"redrawn images      {report.ties}, on which PyTorch itself was undecided between two routes")


def _compare(model: nn.Module, path: Path, channels: int, sizes: list[tuple[int, int]]) -> tuple[float, int]:
    """Largest relative difference of onnxruntime from eager, and how many undecided images were redrawn."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst, ties = 0.0, 0
    for size in sizes:
        for batch in (1, 1 + _IMAGES):
            for _ in range(10):
                images = torch.randn(batch, channels, *size, generator=generator)
                with torch.inference_mode():
                    expected = model(images)
                actual = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
                difference = _relative(actual, expected)
                if difference.max() <= TOLERANCE:
                    break
                # Routing is discrete: on a tie, rounding alone decides. Only images on which eager's own answer jumps
                # under a perturbation of rounding size are excused, and other images must agree instead.
                undecided = _undecided(model, images)
                if (difference > TOLERANCE)[~undecided].any():
                    break
                ties += int(undecided.sum())
            worst = max(worst, difference.max().item())
    if worst > TOLERANCE or worst != worst:
        raise RuntimeError(f"the exported file differs from PyTorch by {worst:.1e} of the logits' scale (limit "
                           f"{TOLERANCE:.0e}); it was removed")
    return worst, ties


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of each image's logits, in units of the batch's largest logit."""
    return ((actual - expected).abs().amax(dim=1) / expected.abs().max()).nan_to_num(torch.inf)


def _undecided(model: nn.Module, images: Tensor, tries: int = 8) -> Tensor:
    """Whether each image's logits jump when the image changes by one part in a million."""
    with torch.inference_mode():
        expected = model(images)
        jumps = [_relative(model(images * (1 + 1e-6 * torch.randn_like(images))), expected) for _ in range(tries)]
    return torch.stack(jumps).amax(dim=0) > TOLERANCE


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
