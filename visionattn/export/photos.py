"""The part of an exported graph that takes photos as they are: bytes, height x width x RGB, of any size."""
from typing import Any

import numpy as np

__all__ = ["photo_part", "prepend"]

_MODES: dict[str, dict[str, Any]] = {"bilinear": dict(mode="linear"), "bicubic": dict(mode="cubic", cubic_coeff_a=-0.5)}


def photo_part(facts: dict[str, Any], shape: list[Any], opset: int) -> Any:
    """An ONNX model from ``photos``, uint8 and channels last, to what the network with the metadata ``facts`` takes.

    A classifier's resizes, crops and normalises as validation does, photos of any size (those of a batch have one), by
    an interpolation that rounds as Pillow's but for a few levels of 255 at single pixels. Others take the network's own
    size.

    Args:
        facts: The network's metadata (:func:`visionattn.export.facts.facts`).
        shape: Of the network's input, ``[batch, 3, height, width]`` or ``[3, height, width]``; free lengths are names.
        opset: Version of ONNX's operators.

    Raises:
        ValueError: The network takes images of other channels than three, or its interpolation is one that ONNX lacks.
    """
    from onnx import TensorProto, helper

    if facts["channels"] != 3:
        raise ValueError(f"photos have three channels, the model's images {facts['channels']}: leave preprocess out")
    graph = _Graph()
    planar = [0, 3, 1, 2] if len(shape) == 4 else [2, 0, 1]
    size = [*shape[:-3], *shape[-2:], 3]
    x = graph.add("Transpose", "photos", perm=planar)
    if facts["task"] in ("classification", "features"):
        size[1:3] = "height", "width"
        x = graph.crop(graph.resize(x, facts["resize"]), facts["resize"]["centre_crop"])
    x = graph.add("Div", graph.add("Cast", x, to=TensorProto.FLOAT), graph.number(np.float32(255)))
    mean, std = (np.array(facts[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    if mean.any() or (std != 1).any():
        x = graph.add("Div", graph.add("Sub", x, graph.number(mean)), graph.number(std))
    return helper.make_model(
        helper.make_graph(
            graph.nodes, "photos", [helper.make_tensor_value_info("photos", TensorProto.UINT8, size)],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)], graph.numbers),
        opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def prepend(part: Any, proto: Any) -> None:
    """Puts the part before the network of ``proto``, whose input keeps its name."""
    source, = proto.graph.input
    result, = part.graph.output
    for node in proto.graph.node:
        node.input[:] = [result.name if value == source.name else value for value in node.input]
    nodes = [*part.graph.node, *proto.graph.node]
    for node in part.graph.node:
        node.input[:] = [source.name if value == "photos" else value for value in node.input]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(part.graph.initializer)
    source.type.CopyFrom(part.graph.input[0].type)


class _Graph:
    """Nodes of a graph, one after the other."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.numbers: list[Any] = []

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node and returns the name of its result."""
        from onnx import helper

        name = f"photos/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def number(self, value: Any) -> str:
        """Adds a constant and returns its name."""
        from onnx import numpy_helper

        name = f"photos/number_{len(self.numbers)}"
        self.numbers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        return self.number(np.array(values, np.int64))

    def resize(self, x: str, rule: dict[str, Any]) -> str:
        """Images ``[B, C, H, W]`` with the shorter side, or both sides, that the rule says."""
        if rule["interpolation"] not in _MODES:
            raise ValueError(f"ONNX has no interpolation {rule['interpolation']}, only {' and '.join(_MODES)}: leave "
                             "preprocess out")
        if "sides" in rule:
            sides = self.integers(*rule["sides"])
        else:
            own = self.add("Shape", x, start=2)
            shorter = self.add("ReduceMin", own, keepdims=0)
            sides = self.add("Div", self.add("Mul", own, self.integers(rule["shorter_side"])), shorter)
        # All four lengths: onnxruntime, which moves the transposition behind the resizing, overlooks the axes' names.
        lengths = self.add("Concat", self.add("Shape", x, end=2), sides, axis=0)
        return self.add("Resize", x, "", "", lengths, antialias=1,
                        coordinate_transformation_mode="half_pixel", **_MODES[rule["interpolation"]])

    def crop(self, x: str, size: list[int]) -> str:
        """The centre of images, rounded as torchvision rounds (half to even)."""
        from onnx import TensorProto

        wanted, own = self.integers(*size), self.add("Shape", x, start=2)
        half = self.add("Div", self.add("Cast", self.add("Sub", own, wanted), to=TensorProto.FLOAT),
                        self.number(np.float32(2)))
        start = self.add("Cast", self.add("Round", half), to=TensorProto.INT64)
        return self.add("Slice", x, start, self.add("Add", start, wanted), self.integers(2, 3))
