"""The ONNX graph of torchvision's detectors, from the image to the objects in it."""
import copy
import io
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.detector import DETECTORS
from .check import IMAGES, Answers, Check, apart, blocks, photographs
from .graph import explained, graph_of, graphs

__all__ = ["detector_graph"]


def detector_graph(model: Any, image_size: tuple[int, int] | None, opset: int) -> tuple[Any, Check]:
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
    network = graph_of(_Network(model).eval(), image, opset, input_names=["image"], output_names=levels)
    file: Any = io.BytesIO()  # which PyTorch's annotations omit
    with explained("PyTorch cannot export this model"):
        torch.onnx.export(
            _Search(model, images, size, names).eval(), maps, file, dynamo=False, opset_version=opset,
            input_names=levels, output_names=names, dynamic_axes={name: {0: "objects"} for name in names})
    network = onnx.compose.add_prefix(network, "network/", rename_inputs=False)
    search = onnx.load_from_string(file.getvalue())
    search.ir_version = network.ir_version
    _, *inner = graphs(search.graph)
    for value in (value for graph in inner for value in (*graph.input, *graph.output, *graph.value_info)):
        for length in value.type.tensor_type.shape.dim:
            length.Clear()  # in a loop it would be that of the first turn, for good
    for length, known in zip(search.graph.output[-1].type.tensor_type.shape.dim[1:], (1, *size), strict=False):
        length.dim_value = known  # of masks; the tracer does not see it
    proto = onnx.compose.merge_models(network, search, [(f"network/{level}", level) for level in levels])
    proto.graph.name, proto.graph.doc_string = "detector", ""
    del proto.opset_import[1:]  # the same twice
    return proto, Check(
        answer=partial(_objects, model, names=names),
        difference=partial(apart, side=max(size)),
        draw=_drawing(),
        shapes=[(3, *size)] * IMAGES)


def _drawing() -> Callable[..., Tensor]:
    """Draws images ``[3, height, width]`` for a detector: in turns a photograph and squares."""
    kinds = cycle([lambda *shape, generator: photographs(1, *shape, generator=generator)[0], blocks])
    return lambda *shape, generator: next(kinds)(*shape, generator=generator)


class _Network(nn.Module):
    """A detector's maps of one image, after it is normalised and resized."""

    def __init__(self, detector: Any):
        super().__init__()
        self.transform, self.backbone = detector.transform, detector.backbone

    def forward(self, image: Tensor) -> Answers:
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

    def forward(self, *maps: Tensor) -> Answers:
        self.detector.backbone.forward = lambda _: {str(i): x for i, x in enumerate(maps)}
        return _objects(self.detector, torch.empty(3, *self.size), self.names)


def _objects(detector: nn.Module, image: Tensor, names: list[str]) -> Answers:
    """What is detected in one image, as a tuple: ONNX knows no lists or dicts."""
    found, = detector([image])
    return tuple(found[name] for name in names)
