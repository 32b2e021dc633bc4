"""What of an exported file can be quantised: its layers, by their names."""
import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LINEAR", "FloatFile", "float_file", "layers_of", "read_facts"]

LINEAR = "Conv", "MatMul", "Gemm"
TEXTS = "producer", "task", "model", "license", "weights_sha256", "channel_order", "layout"  # metadata that is no JSON


class FloatFile(NamedTuple):
    """An exported file that is to be quantised.

    Attributes:
        proto: The ONNX model, batch norms folded.
        facts: Its metadata.
        layers: By their module's name their nodes.
        search: Of a detector the maps in which it looks for objects; else nothing.
    """

    proto: Any
    facts: dict[str, Any]
    layers: dict[str, list[str]]
    search: list[str]


def float_file(source: Path) -> FloatFile:
    """Opens an exported file.

    Raises:
        ValueError: It is not one of visionattn's, or is quantised already.
    """
    import onnx

    proto = onnx.load(source)
    facts = read_facts(proto)
    if "quantization" in facts:
        raise ValueError(f"{source} is quantised already: give the float file")
    proto = _without_norms(proto)
    return FloatFile(proto, facts, layers_of(proto), _search_inputs(proto))


def _without_norms(proto: Any) -> Any:
    """The model with batch norms folded into the convolutions before them: left there, each would be computed in float.
    """
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    if not any(node.op_type == "BatchNormalization" for node in proto.graph.node):
        return proto
    before = {node.name for node in proto.graph.node}
    proto = rewrite(proto, [fuse_batchnorm_into_conv_rule])
    for node in proto.graph.node:
        if node.op_type == "Conv" and node.name not in before:  # which may not say whose part it is
            node.name = f"{node.input[1]}/normalised"
    return proto


def read_facts(proto: Any) -> dict[str, Any]:
    """The metadata that an export wrote into a file, as plain values.

    Raises:
        ValueError: The file is not one of visionattn's.
    """
    found = {item.key: item.value for item in proto.metadata_props}
    if "task" not in found:
        raise ValueError("the file has no metadata of visionattn's: export the model again")
    return {key: value if key in TEXTS else json.loads(value) for key, value in found.items()}


def layers_of(proto: Any) -> dict[str, list[str]]:
    """The layers of an exported file that can be quantised: by their module's name their nodes.

    They are the convolutions and products with constant weights; of a detector those of its network.
    """
    weights = {item.name for item in proto.graph.initializer}
    detector = any(node.name.startswith("network/") for node in proto.graph.node)
    users: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)
    layers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type not in LINEAR or node.input[1] not in weights or node.input[0] in weights:
            continue
        if detector and not node.name.startswith("network/"):
            continue
        named = [node.input[1]]  # of a product that the exporter turned the weights of, the bias alone tells
        for following in users.get(node.output[0], []):
            if following.op_type == "Add":  # equal biases are stored once, under the name of one of them
                named += [value for value in following.input if value in weights and len(users[value]) == 1]
        module = next((name.rpartition(".")[0] for name in named if name.endswith((".weight", ".bias"))), node.name)
        layers.setdefault(module.removeprefix("network/"), []).append(node.name)
    return layers


def _search_inputs(proto: Any) -> list[str]:
    """Of a detector the maps in which it looks for objects: what its network hands over."""
    inside = {value for node in proto.graph.node if node.name.startswith("network/") for value in node.output}
    if not inside:
        return []
    taken = {value for node in proto.graph.node if not node.name.startswith("network/") for value in node.input}
    return sorted(inside & taken)
