"""What TensorRT lacks of ONNX's standard operators, by the list that its parser publishes."""
from collections.abc import Iterable
from typing import Any

__all__ = ["TENSORRT", "lacking"]

# https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md, as of this version: what it marks with N.
TENSORRT = "10.15"
_ABSENT = frozenset([
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
    "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det", "DynamicQuantizeLinear", "ImageDecoder",
    "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
    "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit",
    "TfIdfVectorizer", "Unique",
])


def lacking(nodes: Iterable[Any]) -> list[str]:
    """What of the nodes of an ONNX model TensorRT has not, in words, each thing once.

    The list's restrictions are looked at where these operators' attributes tell: antialiased and cubic resizing,
    scattering that adds, dilated or index-giving pooling, unsorted top-k.
    """
    found: dict[str, None] = {}
    for node in nodes:
        attributes = {item.name: item for item in node.attribute}
        if node.op_type in _ABSENT:
            found[f"no operator {node.op_type}"] = None
        elif node.op_type == "Resize":
            if "antialias" in attributes and attributes["antialias"].i:
                found["no antialiased Resize"] = None
            if "mode" in attributes and attributes["mode"].s == b"cubic":
                found["no cubic Resize"] = None
        elif node.op_type == "ScatterND" and "reduction" in attributes and attributes["reduction"].s != b"none":
            found["no ScatterND that adds"] = None
        elif node.op_type == "TopK" and "sorted" in attributes and not attributes["sorted"].i:
            found["no unsorted TopK"] = None
        elif node.op_type in ("MaxPool", "AveragePool"):
            steps = attributes["dilations"].ints if "dilations" in attributes else ()
            if any(step != 1 for step in steps) or (len(node.output) > 1 and node.output[1]):
                found[f"no dilated {node.op_type} or one that gives indices"] = None
    return list(found)
