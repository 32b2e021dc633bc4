"""The command ``visionattn export``."""
import argparse
import tempfile
from pathlib import Path
from typing import Any

from .. import adapters
from ..tasks.rebuild import create_model
from .formats import FORMATS, export_model
from .onnx_file import OPSET, OPSETS
from .quantize import ERROR_LIMIT, IMAGES, Calibration, QuantizeReport, quantize_onnx, save_openvino
from .report import ExportReport

__all__ = ["main", "print_quantization", "print_report"]


def main(argv: list[str]) -> None:
    """Runs ``visionattn export`` with command line arguments."""
    parser = argparse.ArgumentParser(
        prog="visionattn export",
        description="Writes a model as a file for a runtime, ONNX if nothing is said, checked in it before it is kept.")
    parser.add_argument("--model", help="model name as in timm.create_model; a run's own checkpoint knows it")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="weights: a run's .ckpt, of any task, the authors' file, or a state dict (.pth, "
                             ".safetensors)")
    parser.add_argument("--pretrained", action="store_true", help="the authors' weights, downloaded")
    parser.add_argument("--adapter", metavar="FILE", help="an adapter file of this model, with its head")
    parser.add_argument("--keep-adapter", action="store_true",
                        help="leave an adapter beside the weights that it could be merged into")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint or of a fresh head")
    parser.add_argument("--img-size", "--image-size", type=int, nargs="+", metavar="N",
                        help="height and width, or one number for both; if not given, the backbone's own, and of a "
                             "detector the side that it resizes images to")
    parser.add_argument("--dynamic-size", action="store_true",
                        help="leave height and width free, in multiples of 32 (not for detectors)")
    parser.add_argument("--fuse", action="store_true", help="fold batch norms into the layers beside them first")
    parser.add_argument("--preprocess", action="store_true",
                        help="take photos as they are (uint8, height x width x RGB); a classifier's file resizes, "
                             "crops and normalises them as validation does")
    parser.add_argument("--opset", type=int, default=OPSET, choices=OPSETS, metavar="N",
                        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default: {OPSET})")
    parser.add_argument("--int8", metavar="FOLDER",
                        help="write 8-bit weights and activations, calibrated with the images of this folder; layers "
                             "that cost too much precision stay float. Of a classifier whose classes are the folder's "
                             "subfolders the accuracy before and after is printed")
    parser.add_argument("--int8-images", type=int, default=IMAGES, metavar="N",
                        help=f"most images that calibrate; three times as many others measure the error (default: "
                             f"{IMAGES})")
    parser.add_argument("--format", default="onnx", choices=FORMATS,
                        help="runtime of the file (default: onnx): openvino (IR), torch (torch.export's program), aoti "
                             "(AOTInductor, compiled for this machine), executorch, litert, coreml, or tensorrt (ONNX "
                             "whose operators TensorRT has)")
    parser.add_argument("--simplify", action="store_true", help="let onnxslim simplify the graph")
    parser.add_argument("--fp16", action="store_true",
                        help="weights and arithmetic in float16, inputs and outputs in float32 (not for detectors)")
    parser.add_argument("--out", metavar="FILE", help="default: model with the format's ending")
    args = parser.parse_args(argv)
    size = None
    if args.img_size:
        if len(args.img_size) > 2 or min(args.img_size) < 1:
            parser.error("--img-size takes one or two positive numbers")
        size = (args.img_size[0], args.img_size[-1])
    if not args.model and not args.checkpoint:
        parser.error("give --model, or the --checkpoint of a run")
    if args.int8 and (args.format not in ("onnx", "openvino") or args.fp16):
        parser.error("--int8 goes with --format onnx or openvino, and without --fp16")
    model = create_model(args.model, args.checkpoint, pretrained=args.pretrained, num_classes=args.num_classes)
    if args.adapter:
        adapters.load(model, args.adapter)
    if adapters.adapters_of(model) and not args.keep_adapter:
        adapters.merge(model)
    options: dict[str, Any] = dict(
        image_size=size, dynamic_size=args.dynamic_size, fuse=args.fuse, opset=args.opset, preprocess=args.preprocess,
        simplify=args.simplify, fp16=args.fp16)
    out = args.out or f"model{FORMATS[args.format].suffix}"
    if not args.int8:
        print_report(export_model(model, out, args.format, **options))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(model, Path(folder, "float.onnx"), **options)
        images = Calibration(report.path, args.int8, args.int8_images)
        if args.format == "openvino":
            quantized = save_openvino(report.path, out, images)
        else:
            quantized = quantize_onnx(report.path, out, images)
    print_report(report._replace(path=Path(out), nodes=quantized.nodes, megabytes=quantized.megabytes))
    print_quantization(quantized)


def print_report(report: ExportReport) -> None:
    """Prints what was exported, a line each."""
    scale = "the logits' scale"
    if report.detections is not None:
        scale = f"the image's side (boxes), 1 (scores) or 10 (masks) in {report.detections} detections"
    graph = "" if report.nodes is None else f", {report.nodes} nodes, opset {report.opset}"
    print(f"file                {report.path} ({report.megabytes:.1f} MiB{graph})")
    if report.runtime:
        print(f"largest difference  {report.difference:.1e} of {scale}, {report.runtime} against PyTorch"
              f" (limit {report.limit:.0e})")
    if report.agreement is not None:
        print(f"same class          {report.agreement:.1%} of the check's images or pixels")
    if report.milliseconds is not None:
        print(f"latency             {report.milliseconds:.1f} ms, PyTorch's {report.eager_milliseconds:.1f} ms")
    for line in report.values:
        print(line)
    if report.detections == 0:
        print("not checked         boxes: neither finds any object in the images of the check")
    if report.ties:
        print(f"redrawn images      {report.ties}, on which PyTorch itself was undecided")
    if report.note:
        print(f"note                {report.note}")


def print_quantization(report: QuantizeReport) -> None:
    """Prints what a quantisation produced, a line each."""
    size = f", {report.megabytes:.1f} MiB ({report.size_ratio:.0%} of float)" if report.megabytes else ""
    print(f"int8                {report.layers - len(report.float_layers)} of {report.layers} layers{size}, calibrated "
          f"with {report.calibrated} images")
    if report.float_layers:
        print(f"layers left float   {', '.join(report.float_layers)}")
    print(f"error               {report.error:.3f} of the answers in the mean of {report.judged} other images (limit "
          f"{ERROR_LIMIT:g})")
    if report.agreement is not None:
        print(f"agrees with float   {report.agreement:.1%}")
    if report.accuracy is not None:
        print("accuracy            {:.1%} before, {:.1%} after".format(*report.accuracy))
