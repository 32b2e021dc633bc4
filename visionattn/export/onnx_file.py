"""A model as an ONNX file of standard operators, checked with onnxruntime before it is kept."""
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from .check import Check, blocks, onnx_runner, photographs
from .detector import detector_graph
from .facts import describe, facts, is_detector, weights_sha256
from .graph import explained, graph_of, graphs, lengths
from .photos import photo_part, prepend
from .report import ExportReport, removed_if_wrong, report_on
from .source import plain, source_of

__all__ = ["OPSET", "OPSETS", "export_onnx", "needed", "onnx_model", "values_of"]

OPSET, OPSETS = 20, range(17, 24)  # the usual one, and those that a file may have
_WRITTEN = 18  # the oldest that PyTorch writes
_FP16_TOLERANCE = 2e-2  # largest difference of float16 from eager's float32, as a share of the answers' scale
_FLOAT32_ALWAYS = ["ScatterElements"]  # beyond onnxruntime's own list: its CPU provider has no float16 kernel


def export_onnx(
        model: nn.Module,
        out: str | Path,
        image_size: tuple[int, int] | None = None,
        dynamic_size: bool = False,
        fuse: bool = False,
        opset: int = OPSET,
        preprocess: bool = False,
        simplify: bool = False,
        fp16: bool = False,
) -> ExportReport:
    """Writes ``model`` to the ONNX file ``out`` and checks it with onnxruntime on photographs and random images.

    The file may differ from eager PyTorch by 1e-4 of the answers' scale (in float16 2e-2): of the largest logit; of
    the image's longer side for boxes, of 1 for scores, of 10 for masks. The objects that are detected and their labels
    must be the same.

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
            detectors.
        fuse: Fold batch norms and the like into the layers beside them first, where the model's layers can do that
            (``timm.utils.reparameterize_model``).
        opset: Version of ONNX's operators, 17 to 23; of a detector 17 to 20. 17 is 18 in the older notation, which has
            no antialiased resizing.
        preprocess: Take photos as they are: uint8, ``[batch, height, width, 3]``, of a detector ``[height, width, 3]``.
            A classifier's file then resizes, crops and normalises them as validation does.
        simplify: Let onnxslim simplify the graph.
        fp16: Weights and arithmetic in float16, but for operators that lose too much by it; inputs and outputs stay
            float32. Not for detectors.

    Raises:
        ModuleNotFoundError: The packages of the ``export`` extra, or onnxslim, are missing.
        ValueError: ``dynamic_size`` with a detector or with sides that are no multiples of 32; an opset out of range;
            ``preprocess`` for other channels than three; ``fp16`` of a detector.
        RuntimeError: PyTorch cannot export the model, the file needs operators beyond the standard ones, or
            onnxruntime's answers differ from eager's.
    """
    proto, check = onnx_model(model, image_size, dynamic_size, fuse, opset, preprocess, simplify, fp16)
    import onnx

    out = Path(out)
    with removed_if_wrong(out):
        onnx.save(proto, str(out))
        onnx.checker.check_model(str(out))
        report = report_on(out, check, onnx_runner, values_of(proto), "onnxruntime", classes=fp16)
    return report._replace(nodes=sum(len(graph.node) for graph in graphs(proto.graph)), opset=_opset(proto))


def onnx_model(
        model: nn.Module,
        image_size: tuple[int, int] | None = None,
        dynamic_size: bool = False,
        fuse: bool = False,
        opset: int = OPSET,
        preprocess: bool = False,
        simplify: bool = False,
        fp16: bool = False,
) -> tuple[Any, Check]:
    """The ONNX model that :func:`export_onnx` writes, with its metadata, and how it is compared with eager PyTorch."""
    needed(["onnx", "onnxruntime", "onnxscript"], "export", "export")
    if simplify:
        needed(["onnxslim"], "simplify", "simplify")
    sha256 = weights_sha256(model)
    model = plain(model, fuse)
    detector = is_detector(model)
    if opset not in OPSETS:
        raise ValueError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if detector and opset > OPSET:
        raise ValueError(f"the file of a detector has opset {OPSET} at most, {opset} was asked for")
    if dynamic_size and detector:
        raise ValueError("PyTorch's tracer fixes the sizes of a detector's maps and anchors, so its file has "
                         "one image size: leave dynamic_size out")
    if detector and fp16:
        raise ValueError("a detector's boxes in pixels lose too much in float16: leave fp16 out")
    written = max(opset, _WRITTEN)
    if detector:
        proto, check = detector_graph(model, image_size, written)
    else:
        source = source_of(model, image_size, dynamic_size)
        proto, check = graph_of(model, source.images, written, dynamic_shapes=(source.free,), input_names=["images"],
                                output_names=source.names), source.check
    if simplify:
        import onnxslim

        with explained("onnxslim cannot simplify this file"):
            proto = onnxslim.slim(proto)
    if fp16:
        proto = _float16(proto)
        check = check._replace(tolerance=_FP16_TOLERANCE, rounding=2 ** -11)
    found = facts(model, check.shapes[0]) | {"weights_sha256": sha256}
    if preprocess:
        check = _with_photos(proto, check, found, written)
    if opset < written:
        proto = _older(proto)
    _cleaned(proto)
    for key, value in found.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    words = describe(found)
    for item in (*proto.graph.input, *proto.graph.output):
        item.doc_string = words[re.sub(r"^map_\d+$", "map", item.name)]
    return proto, check


def needed(packages: list[str], what: str, extra: str) -> None:
    """Raises a ModuleNotFoundError of one line if a package is missing that an option or a format needs."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{what} needs the package {name}: pip install 'visionattn[{extra}]'")


def values_of(proto: Any) -> list[str]:
    """The inputs and outputs of an ONNX model in words, a line each."""
    return [f"{item.name} [{', '.join(map(str, lengths(item)))}]: {item.doc_string}"
            for item in (*proto.graph.input, *proto.graph.output)]


def _opset(proto: Any) -> int:
    return next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))


def _cleaned(proto: Any) -> None:
    """Takes out of a model what is of no use to who runs it, and refuses operators that not every runtime has."""
    nodes = [node for graph in graphs(proto.graph) for node in graph.node]
    for item in (*nodes, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del item.metadata_props[:]  # holds stack traces with the paths of the machine that exported
        item.doc_string = ""  # the same
    # Weights have their shapes themselves; said twice, they bar onnxruntime's quantisation from transposing them.
    weights = {item.name for item in proto.graph.initializer}
    inner = [item for item in proto.graph.value_info if item.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inner)
    del proto.metadata_props[:]
    domains = {node.domain for node in nodes} - {"", "ai.onnx"}
    if domains or proto.functions:
        raise RuntimeError(f"the export needs operators outside standard ONNX: {', '.join(sorted(domains))}")


def _float16(proto: Any) -> Any:
    """The model with weights and arithmetic in float16, inputs and outputs in float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with explained("onnxruntime cannot convert this file to float16"):
        proto = convert_float_to_float16(
            proto, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_FLOAT32_ALWAYS])
        OnnxModel(proto).topological_sort()  # it puts its casts last
    return proto


def _older(proto: Any) -> Any:
    """The model in opset 17, which PyTorch does not write and onnx's converter, which knows no Split, does not reach.

    What differs from opset 18 in what our models have: axes of reductions are attributes, and a Split into equal parts
    does not count them. The checker refuses what else is of later opsets.
    """
    from onnx import checker, helper, numpy_helper

    constants = {item.name: item for graph in graphs(proto.graph) for item in graph.initializer}
    with explained("this model has no file of opset 17"):
        for node in (node for graph in graphs(proto.graph) for node in graph.node):
            if node.op_type == "Split":
                _set(node, [item for item in node.attribute if item.name != "num_outputs"])
            elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
                axes = helper.make_attribute("axes", numpy_helper.to_array(constants[node.input.pop()]).tolist())
                _set(node, [*(item for item in node.attribute if item.name != "noop_with_empty_axes"), axes])
        for graph in graphs(proto.graph):
            used = {name for inner in graphs(graph) for node in inner.node for name in node.input}
            weights = [item for item in graph.initializer if item.name in used]
            del graph.initializer[:]
            graph.initializer.extend(weights)
        del proto.opset_import[:]
        proto.opset_import.add(domain="", version=17)
        checker.check_model(proto, full_check=True)
    return proto


def _set(node: Any, attributes: list[Any]) -> None:
    """Gives a node these attributes in place of its own."""
    del node.attribute[:]
    node.attribute.extend(attributes)


def _with_photos(proto: Any, check: Check, found: dict[str, Any], opset: int) -> Check:
    """Puts what makes images of photos before a network, checks that part alone, and returns the check of both."""
    import onnxruntime

    part = photo_part(found, lengths(proto.graph.input[0]), opset)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])

    def prepared(photos: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"photos": photos.numpy()})[0])

    def draw(*shape: int, generator: torch.Generator) -> Tensor:
        images = photographs(math.prod(shape[:-3]), *shape[-3:], generator=generator)
        if len(images) > 1:
            images[-1] = blocks(*shape[-3:], generator=generator)
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
