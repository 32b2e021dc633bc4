"""``visionattn export``: a model as an ONNX file of standard operators, checked with onnxruntime before it is kept.

A classifier's file takes ``images [batch, channels, height, width]``, normalised as in training, and gives ``logits
[batch, classes]``. A segmenter's takes ``images [batch, 3, height, width]`` in [0, 1] and gives ``logits [batch,
classes, height, width]``. The batch size is free; with ``--dynamic-size`` height and width are too, in multiples of 32,
except UPerNet's.

A detector's file takes one ``image [3, height, width]`` in [0, 1], of one size, and gives ``boxes [N, 4]`` (x1, y1,
x2, y2 in pixels of the image), ``labels [N]`` from 1 on, ``scores [N]``, and of Mask R-CNN ``masks [N, 1, height,
width]``.
"""
import argparse
import copy
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.layers import to_2tuple
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from .facts import describe, facts, timm_model, weights_sha256
from .heads import PyramidPooling, Segmenter
from .heads.detector import DETECTORS
from .photos import photo_part, prepend
from .tasks.rebuild import create_model

__all__ = ["ExportReport", "export_onnx"]

OPSET, OPSETS = 20, range(18, 24)  # the usual one, and those that PyTorch writes
MULTIPLE, MOST = 32, 4096  # of free image sizes: multiples of the one, up to the other
TOLERANCE = 1e-4  # largest difference from eager, as a share of the answers' scale
_IMAGES = 3  # of a detector's check; of the others' checks images beyond the first, in a second batch

_Answers = tuple[Tensor, ...]


class ExportReport(NamedTuple):
    """What an export produced and how its answers compare with eager PyTorch."""

    path: Path
    difference: float  # largest absolute difference, as a share of the answers' scale (see export_onnx)
    nodes: int
    megabytes: float
    opset: int
    ties: int  # random images redrawn because eager itself was undecided on them
    detections: int | None  # that were compared, of a detector
    values: list[str]  # the inputs and outputs in words, a line each


def export_onnx(
        model: nn.Module,
        out: str | Path,
        image_size: tuple[int, int] | None = None,
        dynamic_size: bool = False,
        fuse: bool = False,
        opset: int = OPSET,
        preprocess: bool = False,
) -> ExportReport:
    """Writes ``model`` to the ONNX file ``out`` and checks it with onnxruntime on random images.

    The file may differ from eager PyTorch by 1e-4 of the answers' scale: of the largest logit; of the image's longer
    side for boxes, of 1 for scores, of 10 for masks. The objects that are detected and their labels must be the same.

    Args:
        model: A classifier or (``features_only``) a feature extractor from timm, a
            :class:`visionattn.heads.Segmenter`, or a detector as :func:`visionattn.heads.build_detector` makes it. It
            is copied, put in eval mode and exported in float32
            from the CPU.
        out: The file to write. It is removed again if the check fails.
        image_size: Height and width of the images; None takes those that the classifier or the segmenter's backbone
            was made for, and of a detector the square that it does not resize. (Its file resizes other images as it
            does itself.)
        dynamic_size: Leave height and width free as well, in multiples of 32; then two more sizes are checked. Not for
            detectors and UPerNet.
        fuse: Fold batch norms and the like into the layers beside them first, where the model's layers can do that
            (``timm.utils.reparameterize_model``).
        opset: Version of ONNX's operators, 18 to 23; of a detector 18 to 20.
        preprocess: Take photos as they are: uint8, ``[batch, height, width, 3]``, of a detector ``[height, width, 3]``.
            A classifier's file then resizes, crops and normalises them as validation does.

    Raises:
        ModuleNotFoundError: The packages of the ``export`` extra are missing.
        ValueError: ``dynamic_size`` with a detector, with UPerNet or with sides that are no multiples of 32; an
            opset out of range; ``preprocess`` for other channels than three.
        RuntimeError: PyTorch cannot export the model, the file needs operators beyond the standard ones, or
            onnxruntime's answers differ from eager's.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"export needs the package {error.name}: pip install 'visionattn[export]'") from None
    out = Path(out)
    sha256 = weights_sha256(model)
    model = copy.deepcopy(model).cpu().float().eval()
    if fuse:
        model = reparameterize_model(model, inplace=True)
    detector = isinstance(model, tuple(DETECTORS.values()))
    if opset not in OPSETS:
        raise ValueError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if detector and opset > OPSET:
        raise ValueError(f"the file of a detector has opset {OPSET} at most, {opset} was asked for")
    if dynamic_size and detector:
        raise ValueError("the file of a detector has one image size: leave dynamic_size out")
    if dynamic_size and any(isinstance(module, PyramidPooling) for module in model.modules()):
        raise ValueError("torch.export fixes the grids that UPerNet pools over, so its file has one image size: leave "
                         "dynamic_size out, or train head semantic_fpn")
    if detector:
        proto, check = _detector(model, image_size, opset)
    else:
        proto, check = _maps_or_logits(model, image_size, dynamic_size, opset)
    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    for item in (*nodes, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del item.metadata_props[:]  # holds stack traces with the paths of the machine that exported
        item.doc_string = ""  # the same
    # Weights have their shapes themselves; said twice, they bar onnxruntime's quantisation from transposing them.
    weights = {item.name for item in proto.graph.initializer}
    inner = [item for item in proto.graph.value_info if item.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inner)
    domains = {node.domain for node in nodes} - {"", "ai.onnx"}
    if domains or proto.functions:
        raise RuntimeError(f"the export needs operators outside standard ONNX: {', '.join(sorted(domains))}")
    written = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    found = facts(model, check.shapes[0]) | {"weights_sha256": sha256}
    if preprocess:
        check = _with_photos(proto, check, found, written)
    for key, value in found.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    words = describe(found)
    values = *proto.graph.input, *proto.graph.output
    for item in values:
        item.doc_string = words[re.sub(r"^map_\d+$", "map", item.name)]
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(out))
    onnx.checker.check_model(str(out))
    try:
        with _explained("the exported file cannot be run beside PyTorch, and was removed"):
            difference, ties, rows = _compare(check, out)
        _judge(difference)
    except BaseException:
        out.unlink()
        raise
    return ExportReport(
        out, difference, sum(len(graph.node) for graph in _graphs(proto.graph)), out.stat().st_size / 2 ** 20, written,
        ties, rows if detector else None,
        [f"{item.name} [{', '.join(map(str, _lengths(item)))}]: {item.doc_string}" for item in values])


def main(argv: list[str]) -> None:
    """Runs ``visionattn export`` with command line arguments."""
    parser = argparse.ArgumentParser(prog="visionattn export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model name as in timm.create_model; a run's own checkpoint knows it")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="weights: a run's .ckpt, of any task, the authors' file, or a state dict (.pth, "
                             ".safetensors)")
    parser.add_argument("--pretrained", action="store_true", help="the authors' weights, downloaded")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint or of a fresh head")
    parser.add_argument("--img-size", "--image-size", type=int, nargs="+", metavar="N",
                        help="height and width, or one number for both; if not given, the backbone's own, and of a "
                             "detector the side that it resizes images to")
    parser.add_argument("--dynamic-size", action="store_true",
                        help="leave height and width free, in multiples of 32 (not for detectors and UPerNet)")
    parser.add_argument("--fuse", action="store_true", help="fold batch norms into the layers beside them first")
    parser.add_argument("--preprocess", action="store_true",
                        help="take photos as they are (uint8, height x width x RGB); a classifier's file resizes, "
                             "crops and normalises them as validation does")
    parser.add_argument("--opset", type=int, default=OPSET, choices=OPSETS, metavar="N",
                        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default: {OPSET})")
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
    print_report(export_onnx(model, args.out, size, args.dynamic_size, args.fuse, args.opset, args.preprocess))


def print_report(report: ExportReport) -> None:
    """Prints what was exported, a line each."""
    scale = "the logits' scale"
    if report.detections is not None:
        scale = f"the image's side (boxes), 1 (scores) or 10 (masks) in {report.detections} detections"
    print(f"file                {report.path} ({report.megabytes:.1f} MiB, {report.nodes} nodes, opset {report.opset})")
    print(f"largest difference  {report.difference:.1e} of {scale}, onnxruntime against PyTorch"
          f" (limit {TOLERANCE:.0e})")
    for line in report.values:
        print(line)
    if report.detections == 0:
        print("not checked         boxes: neither finds any object in the random images of the check")
    if report.ties:
        print(f"redrawn images      {report.ties}, on which PyTorch itself was undecided")


class _Check(NamedTuple):
    """How a model is run beside its file."""

    answer: Callable[[Tensor], _Answers]  # eager PyTorch
    difference: Callable[[_Answers, _Answers], Tensor]  # of each image, as a share of the scale
    draw: Callable[..., Tensor]  # random images, with torch.randn's arguments
    shapes: list[tuple[int, ...]]  # of the images of each run


def _maps_or_logits(
        model: Any, image_size: tuple[int, int] | None, dynamic_size: bool, opset: int) -> tuple[Any, _Check]:
    """The graph of a model that takes batches of images to logits, or to a list of maps."""
    segmenter = isinstance(model, Segmenter)
    channels, *own_size = _image_shape(model)
    size = (image_size or own_size)[0], (image_size or own_size)[1]
    if dynamic_size and any(side % MULTIPLE for side in size):
        raise ValueError(f"free sizes are multiples of {MULTIPLE}; the example of {size[0]} x {size[1]} is not one")
    with torch.inference_mode(), _explained("PyTorch cannot export this model"):
        answers = model(torch.zeros(1, channels, *size))
    features = isinstance(answers, (list, tuple))
    names = [f"map_{i}" for i in range(len(answers))] if features else ["logits"]
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        # Multiples of the coarsest stride keep the maps' sizes free of rounding, which torch.export cannot solve.
        rows, columns = (torch.export.Dim(name, min=2, max=MOST // MULTIPLE) for name in ("rows", "columns"))
        free |= {2: MULTIPLE * rows, 3: MULTIPLE * columns}
    example = size
    if dynamic_size:
        # PyTorch takes lengths that are 1 in the example, such as the number of windows, for 1 in every image.
        example = 2 * max(size[0], own_size[0]), 2 * max(size[1], own_size[1])
    proto = _graph(model, torch.randn(2, channels, *example), opset, dynamic_shapes=(free,), input_names=["images"],
                   output_names=names)
    sizes = [size, (size[0] + 32, size[1]), (size[0], size[1] + 64)] if dynamic_size else [size]
    return proto, _Check(
        answer=lambda images: tuple(model(images)) if features else (model(images),),
        difference=_relative,
        draw=torch.rand if segmenter else torch.randn,
        shapes=[(batch, channels, *size) for size in sizes for batch in (1, 1 + _IMAGES)])


def _graph(model: nn.Module, images: Tensor, opset: int, **options: Any) -> Any:
    """The ONNX graph of a model, through torch.export."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript import optimizer

    with _explained("PyTorch cannot export this model"):
        program = torch.onnx.export(
            model, (images,), dynamo=True, opset_version=opset, verbose=False, optimize=False, **options)
        assert program is not None
        # The optimiser's time is that of the square of the nodes, and most of them say sizes.
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        CommonSubexpressionEliminationPass()(program.model)
        program.optimize()
    return program.model_proto


def _image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was made for."""
    model = timm_model(model)
    channels, height, width = model.pretrained_cfg["input_size"]
    inner = getattr(model, "model", model)  # of what timm wraps for features
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    channels = getattr(inner, "in_chans", first.in_channels if first else channels)
    made_for = getattr(inner, "img_size", None) or getattr(getattr(inner, "patch_embed", None), "img_size", None)
    return channels, *(to_2tuple(made_for) if made_for else (height, width))


def _detector(model: Any, image_size: tuple[int, int] | None, opset: int) -> tuple[Any, _Check]:
    """The graph of one of torchvision's detectors: from the image to objects in pixels of it.

    torch.export stops at the first size that depends on the number of objects. So what finds objects in the maps goes
    through PyTorch's older exporter, which traces and which torchvision wrote its detectors for; the network before it
    goes through the same as other models; and the two graphs are joined.
    """
    import onnx

    size = image_size or (model.transform.min_size[-1],) * 2
    image = torch.rand(3, *size)
    with torch.no_grad():
        images, _ = model.transform([image])
        maps = tuple(model.backbone(images.tensors).values())
    levels = [f"level_{i}" for i in range(len(maps))]
    names = ["boxes", "labels", "scores"] + ["masks"] * isinstance(model, DETECTORS["mask_rcnn"])
    network = _graph(_Network(model).eval(), image, opset, input_names=["image"], output_names=levels)
    file: Any = io.BytesIO()  # which PyTorch's annotations omit
    with _explained("PyTorch cannot export this model"):
        torch.onnx.export(
            _Search(model, images, size, names).eval(), maps, file, dynamo=False, opset_version=opset,
            input_names=levels, output_names=names, dynamic_axes={name: {0: "objects"} for name in names})
    network = onnx.compose.add_prefix(network, "network/", rename_inputs=False)
    search = onnx.load_from_string(file.getvalue())
    search.ir_version = network.ir_version
    _, *inner = _graphs(search.graph)
    for value in (value for graph in inner for value in (*graph.input, *graph.output, *graph.value_info)):
        for length in value.type.tensor_type.shape.dim:
            length.Clear()  # in a loop it would be that of the first turn, for good
    for length, known in zip(search.graph.output[-1].type.tensor_type.shape.dim[1:], (1, *size), strict=False):
        length.dim_value = known  # of masks; the tracer does not see it
    proto = onnx.compose.merge_models(network, search, [(f"network/{level}", level) for level in levels])
    proto.graph.name, proto.graph.doc_string = "detector", ""
    del proto.opset_import[1:]  # the same twice
    return proto, _Check(
        answer=partial(_objects, model, names=names),
        difference=partial(_apart, side=max(size)),
        draw=_blocks,
        shapes=[(3, *size)] * _IMAGES)


class _Network(nn.Module):
    """A detector's maps of one image, after it is normalised and resized."""

    def __init__(self, detector: Any):
        super().__init__()
        self.transform, self.backbone = detector.transform, detector.backbone

    def forward(self, image: Tensor) -> _Answers:
        images, _ = self.transform([image])
        return tuple(self.backbone(images.tensors).values())


class _Search(nn.Module):
    """A detector's objects in the maps of one image: a detector whose resizing and network give what is known."""

    def __init__(self, detector: Any, images: Any, size: tuple[int, int], names: list[str]):
        super().__init__()
        transform, backbone = copy.copy(detector.transform), nn.Identity()
        transform.forward = lambda *_: (images, None)
        self.detector = copy.copy(detector)
        self.detector._modules = detector._modules | {"transform": transform, "backbone": backbone}
        self.size, self.names = size, names

    def forward(self, *maps: Tensor) -> _Answers:
        self.detector.backbone.forward = lambda _: {str(i): x for i, x in enumerate(maps)}
        return _objects(self.detector, torch.empty(3, *self.size), self.names)


def _objects(detector: nn.Module, image: Tensor, names: list[str]) -> _Answers:
    """What is detected in one image, as a tuple: ONNX knows no lists or dicts."""
    found, = detector([image])
    return tuple(found[name] for name in names)


def _with_photos(proto: Any, check: _Check, found: dict[str, Any], opset: int) -> _Check:
    """Puts what makes images of photos before a network, checks that part alone, and returns the check of both."""
    import onnxruntime

    part = photo_part(found, _lengths(proto.graph.input[0]), opset)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])

    def prepared(photos: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"photos": photos.numpy()})[0])

    def draw(*shape: int, generator: torch.Generator) -> Tensor:
        images = torch.stack([_blocks(*shape[-3:], generator=generator) for _ in range(math.prod(shape[:-3]))])
        return (255 * images).round().byte().movedim(1, -1).reshape(*shape[:-3], *shape[-2:], shape[-3])

    shapes = check.shapes
    if "centre_crop" in found["resize"]:
        height, width = shapes[0][-2:]
        shapes = [(*shape[:-2], *size) for shape in shapes for size in (
            (height, width), (2 * height + 17, width + 60), (height // 2 + 1, width // 2 + 30))]
        _check_resizing(prepared, draw, found, shapes)
        found["resize"] = found["resize"] | {"inside": True}
    prepend(part, proto)
    found |= {"layout": "uint8, channels last", "mean": [0.] * 3, "std": [1.] * 3}
    return check._replace(answer=lambda photos: check.answer(prepared(photos)), draw=draw, shapes=shapes)


def _check_resizing(
        prepared: Callable[[Tensor], Tensor], draw: Callable[..., Tensor], found: dict[str, Any],
        shapes: list[tuple[int, ...]]) -> None:
    """Compares what the graph makes of photos with what validation makes of them."""
    rule = found["resize"]
    mode = v2.InterpolationMode(rule["interpolation"])
    transform = v2.Compose([
        v2.Resize(rule.get("sides") or rule["shorter_side"], mode), v2.CenterCrop(rule["centre_crop"]),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(found["mean"], found["std"])])
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        photos = draw(*shape, generator=generator)
        expected = torch.stack([transform(Image.fromarray(photo.numpy())) for photo in photos])
        levels = (prepared(photos) - expected).abs() * 255 * torch.tensor(found["std"])[:, None, None]
        if not levels.mean() <= 0.5 or not levels.max() <= 16:
            raise RuntimeError("the graph resizes photos in another way than PyTorch: they differ by "
                               f"{levels.max():.0f} of 255 levels, {levels.mean():.1f} in the mean")


def _lengths(value: Any) -> list[int | str]:
    """The shape of an input or output; what is free has a name."""
    return [length.dim_param or length.dim_value or "?" for length in value.type.tensor_type.shape.dim]


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Within the context others' code works: in silence, and its failure is an error of one line.

    PyTorch's attention is the plain one: of others, torch.export believes strides that their decomposition has not.
    """
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # of the tracer on each size that it takes as fixed
            yield
    except Exception as error:
        raise RuntimeError(f"{failure}: {_first_line(error)}") from error


def _graphs(graph: Any) -> Iterator[Any]:
    """An ONNX graph, and those of the branches and loops in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _compare(check: _Check, path: Path) -> tuple[float, int, int]:
    """Largest difference of onnxruntime from eager, how many undecided images were redrawn, and the rows of answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    generator = torch.Generator().manual_seed(0)
    worst, ties, rows = 0.0, 0, 0
    for shape in check.shapes:
        for _ in range(10):
            images = check.draw(*shape, generator=generator)
            with torch.inference_mode():
                expected = check.answer(images)
            actual = tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))
            difference = check.difference(actual, expected)
            if difference.max() <= TOLERANCE:
                break
            # Routing is discrete, and so is what a detector keeps: on a tie, rounding alone decides. Only images on
            # which eager's own answer jumps under a perturbation of rounding size are excused, and other images must
            # agree instead.
            undecided = _undecided(check, images, expected)
            if (difference > TOLERANCE)[~undecided].any():
                break
            ties += int(undecided.sum())
        worst = max(worst, difference.max().item())
        rows += len(expected[0])
    return worst, ties, rows


def _judge(difference: float) -> None:
    """Raises a RuntimeError for a difference beyond the limit."""
    if difference == math.inf:
        raise RuntimeError("the exported file gives other objects than PyTorch, or no numbers; it was removed")
    if difference > TOLERANCE:
        raise RuntimeError(f"the exported file differs from PyTorch by {difference:.1e} of the answers' scale (limit "
                           f"{TOLERANCE:.0e}); it was removed")


def _undecided(check: _Check, images: Tensor, expected: _Answers, tries: int = 8) -> Tensor:
    """Whether each image's answers jump when the image changes by one part in a million."""
    with torch.inference_mode():
        jumps = [check.difference(check.answer(images * (1 + 1e-6 * torch.randn_like(images))), expected)
                 for _ in range(tries)]
    return torch.stack(jumps).amax(dim=0) > TOLERANCE


def _relative(actual: _Answers, expected: _Answers) -> Tensor:
    """Largest difference of each image's logits, or maps, in units of the batch's largest value of the kind."""
    differences = [(a - b).abs().flatten(1).amax(dim=1) / b.abs().max() for a, b in zip(actual, expected, strict=True)]
    return torch.stack(differences).amax(dim=0).nan_to_num(torch.inf)


def _apart(actual: _Answers, expected: _Answers, side: int) -> Tensor:
    """Largest difference of one image's detections: boxes in units of ``side``, scores of 1, masks of 10; infinite if
    one has no partner of its label. Whatever the order: rounding decides on it where scores are equal.
    """
    (boxes, labels, scores, *masks), (known_boxes, known_labels, known_scores, *known_masks) = actual, expected
    if len(labels) != len(known_labels):
        return torch.tensor([torch.inf])
    if not len(labels):
        return torch.zeros(1)
    pairs = torch.maximum(torch.cdist(boxes, known_boxes, p=torch.inf) / side, (scores[:, None] - known_scores).abs())
    pairs = pairs.masked_fill(labels[:, None] != known_labels, torch.inf)
    nearest, partner = pairs.min(dim=1)
    differences = [nearest, pairs.amin(dim=0)]
    differences += [(a - b[partner]).abs().flatten() / 10 for a, b in zip(masks, known_masks, strict=True)]
    return torch.cat(differences).amax(dim=0, keepdim=True).nan_to_num(torch.inf)


def _blocks(*shape: int, generator: torch.Generator) -> Tensor:
    """A random image ``[3, height, width]`` in [0, 1] of squares of all sizes, for detectors to find something in."""
    channels, *size = shape
    grids = [torch.rand(1, channels, side, side, generator=generator) for side in (2, 4, 8, 16, 32)]
    return torch.stack([interpolate(grid, size)[0] for grid in grids]).mean(dim=0)


def _first_line(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    seen = {id(error)}
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        if id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
