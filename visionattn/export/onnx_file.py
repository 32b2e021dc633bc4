"""A model as an ONNX file of standard operators, checked with onnxruntime before it is kept."""
import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.layers import to_2tuple
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchvision.transforms import v2

from ..heads import PyramidPooling, Segmenter
from ..heads.detector import DETECTORS
from .check import IMAGES, Check, blocks, compare, judge, onnx_runner, relative
from .detector import detector_graph
from .facts import describe, facts, timm_model, weights_sha256
from .graph import explained, graph_of, graphs, lengths
from .photos import photo_part, prepend

__all__ = ["OPSET", "OPSETS", "ExportReport", "export_onnx"]

OPSET, OPSETS = 20, range(18, 24)  # the usual one, and those that PyTorch writes
MULTIPLE, MOST = 32, 4096  # of free image sizes: multiples of the one, up to the other


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
        proto, check = detector_graph(model, image_size, opset)
    else:
        proto, check = _maps_or_logits(model, image_size, dynamic_size, opset)
    nodes = [node for graph in graphs(proto.graph) for node in graph.node]
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
        with explained("the exported file cannot be run beside PyTorch, and was removed"):
            difference, ties, rows = compare(check, onnx_runner(out))
        judge(difference)
    except BaseException:
        out.unlink()
        raise
    return ExportReport(
        out, difference, sum(len(graph.node) for graph in graphs(proto.graph)), out.stat().st_size / 2 ** 20, written,
        ties, rows if detector else None,
        [f"{item.name} [{', '.join(map(str, lengths(item)))}]: {item.doc_string}" for item in values])


def _maps_or_logits(
        model: Any, image_size: tuple[int, int] | None, dynamic_size: bool, opset: int) -> tuple[Any, Check]:
    """The graph of a model that takes batches of images to logits, or to a list of maps."""
    segmenter = isinstance(model, Segmenter)
    channels, *own_size = _image_shape(model)
    size = (image_size or own_size)[0], (image_size or own_size)[1]
    if dynamic_size and any(side % MULTIPLE for side in size):
        raise ValueError(f"free sizes are multiples of {MULTIPLE}; the example of {size[0]} x {size[1]} is not one")
    with torch.inference_mode(), explained("PyTorch cannot export this model"):
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
    proto = graph_of(model, torch.randn(2, channels, *example), opset, dynamic_shapes=(free,), input_names=["images"],
                   output_names=names)
    sizes = [size, (size[0] + 32, size[1]), (size[0], size[1] + 64)] if dynamic_size else [size]
    return proto, Check(
        answer=lambda images: tuple(model(images)) if features else (model(images),),
        difference=relative,
        draw=torch.rand if segmenter else torch.randn,
        shapes=[(batch, channels, *size) for size in sizes for batch in (1, 1 + IMAGES)])


def _image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was made for, or its run validated on."""
    settings = getattr(model, "run", {}).get("_image_settings") or {}
    model = timm_model(model)
    channels, height, width = model.pretrained_cfg["input_size"]
    inner = getattr(model, "model", model)  # of what timm wraps for features
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    channels = getattr(inner, "in_chans", first.in_channels if first else channels)
    made_for = getattr(inner, "img_size", None) or getattr(getattr(inner, "patch_embed", None), "img_size", None)
    made_for = settings.get("image_size") or made_for or settings.get("short_side") or settings.get("crop_size")
    return channels, *(to_2tuple(made_for) if made_for else (height, width))


def _with_photos(proto: Any, check: Check, found: dict[str, Any], opset: int) -> Check:
    """Puts what makes images of photos before a network, checks that part alone, and returns the check of both."""
    import onnxruntime

    part = photo_part(found, lengths(proto.graph.input[0]), opset)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])

    def prepared(photos: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"photos": photos.numpy()})[0])

    def draw(*shape: int, generator: torch.Generator) -> Tensor:
        images = torch.stack([blocks(*shape[-3:], generator=generator) for _ in range(math.prod(shape[:-3]))])
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
