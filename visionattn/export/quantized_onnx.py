"""An exported file with 8-bit layers for ONNX Runtime: QDQ, as its quantiser writes it."""
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .graph import graphs, silent
from .quantizable import LINEAR, float_file

__all__ = ["OnnxNetwork", "finish"]

CONSTANTS = "constants"  # how large constants are called among the layers
TABLE = 1024  # least number of values of a constant that is stored in 8 bits


class OnnxNetwork:
    """An exported file, the ranges of its values, and what becomes of it with some of its layers quantised."""

    def __init__(self, source: Path, calibrating: Sequence[np.ndarray], judged: Sequence[np.ndarray]):
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        self.proto, self.facts, self.layers, self.search = float_file(source)
        if _tables(self.proto):
            self.layers[CONSTANTS] = []
        self.calibrating, self.judged = calibrating, judged
        self.input = self.proto.graph.input[0].name
        name = self.input

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.images = iter(calibrating)

            def get_next(self) -> Any:
                image = next(self.images, None)
                return None if image is None else {name: image}

        with tempfile.TemporaryDirectory() as folder, silent():
            plain = Path(folder, "plain.onnx")
            onnx.save(self.proto, str(plain))
            # What is beyond the layers' inputs and outputs needs no range.
            calibrator = create_calibrator(
                plain, [*LINEAR, "Relu"], augmented_model_path=str(Path(folder, "augmented.onnx")),
                calibrate_method=CalibrationMethod.MinMax)
            calibrator.collect_data(Reader())
            self.ranges = calibrator.compute_data()
        self.float = self.runner(self.proto)

    def quantized(self, kept: Iterable[str]) -> Any:
        """The graph with all layers but the kept ones quantised."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        kept = set(kept)
        nodes = [node for layer, nodes in self.layers.items() if layer not in kept for node in nodes]
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        if CONSTANTS in self.layers and CONSTANTS not in kept:
            _shorten_tables(proto)
        if not nodes:
            return proto
        with silent():
            quantizer = QDQQuantizer(
                proto, True, False, QuantType.QInt8, QuantType.QUInt8, self.ranges, nodes + _relus(proto, nodes), [],
                [*LINEAR, "Relu"],
                # Products stay float, to which onnxruntime adds the bias and of which it takes the GELU at once.
                {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]})
            quantizer.quantize_model()
        _sort(quantizer.model.model.graph)
        return quantizer.model.model

    def runner(self, proto: Any) -> Callable[[np.ndarray], list[np.ndarray]]:
        """What answers to an image, with a graph; of a detector its maps."""
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        whole.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.search)
        session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {self.input: image})

    def compared(self, answers: list[np.ndarray]) -> list[np.ndarray]:
        """Of all answers those whose error is measured."""
        return answers[-len(self.search):] if self.search else answers


def finish(proto: Any, known: Any, said: dict[str, Any]) -> None:
    """Makes a quantised graph a file like the one that it was made of: small, with its metadata and ``said``."""
    _shorten_names(proto, known)
    kept = {item.key for item in proto.metadata_props}
    for item in known.metadata_props:
        if item.key not in kept:
            proto.metadata_props.add(key=item.key, value=item.value)
    for item in [item for item in proto.metadata_props if item.key.startswith("onnx.")]:
        proto.metadata_props.remove(item)  # the quantiser's notes to itself
    proto.metadata_props.add(key="quantization", value=json.dumps(said))


def _sort(graph: Any) -> None:
    """Puts each node of a graph behind those that it needs values of, also within its branches and loops."""
    makers = {value: node for node in graph.node for value in node.output}
    placed: dict[int, Any] = {}

    def place(node: Any) -> None:
        if id(node) in placed:
            return
        inner = [other for attribute in node.attribute if attribute.HasField("g") for part in graphs(attribute.g)
                 for other in part.node]
        for value in (value for one in (node, *inner) for value in one.input):
            if (maker := makers.get(value)) is not None and maker is not node:
                place(maker)
        placed[id(node)] = node

    nodes = list(graph.node)
    for node in nodes:  # the network's own are in order, so that there is little to go back for
        place(node)
    ordered = list(placed.values())
    del graph.node[:]
    graph.node.extend(ordered)


def _relus(proto: Any, quantized: list[str]) -> list[str]:
    """The ReLUs of these nodes' convolutions, whose answers' unsigned range does what they do."""
    names = set(quantized)
    convolved = {node.output[0] for node in proto.graph.node if node.op_type == "Conv" and node.name in names}
    return [node.name for node in proto.graph.node if node.op_type == "Relu" and node.input[0] in convolved]


def _tables(proto: Any) -> list[Any]:
    """The large float constants of a graph that are no weights of its layers."""
    from onnx import TensorProto

    weights = {name for node in proto.graph.node if node.op_type in LINEAR for name in node.input[1:]}
    return [item for item in proto.graph.initializer if item.data_type == TensorProto.FLOAT
            and np.prod(item.dims) >= TABLE and item.name not in weights]


def _shorten_tables(proto: Any) -> None:
    """Stores large float constants, such as tables of biases, in 8 bits, with nodes that make them float again.

    These are a cast and a product, which onnxruntime computes once when it loads the file, and not DequantizeLinear,
    which it computes in every run.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    for item in _tables(proto):
        values, short = numpy_helper.to_array(item), f"{item.name}_quantized"
        scale = np.float32(np.abs(values).max() / 127)
        if not np.isfinite(scale) or not scale:
            continue
        proto.graph.initializer.extend([
            numpy_helper.from_array(np.rint(values / scale).astype(np.int8), short),
            numpy_helper.from_array(np.array(scale), f"{short}_scale")])
        nodes += [helper.make_node("Cast", [short], [f"{short}_cast"], f"{item.name}_cast", to=TensorProto.FLOAT),
                  helper.make_node("Mul", [f"{short}_cast", f"{short}_scale"], [item.name], f"{item.name}_float")]
        proto.graph.initializer.remove(item)
    kept = [*nodes, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def _shorten_names(proto: Any, known: Any) -> None:
    """Numbers what the quantiser added, whose long names fill a small file, and stores equal constants once."""
    names = {item.name for item in (*known.graph.initializer, *known.graph.input, *known.graph.output)}
    names |= {value for node in known.graph.node for value in node.output}
    short: dict[str, str] = {"": ""}
    seen: dict[bytes, str] = {}
    for item in list(proto.graph.initializer):
        if item.name in names:
            continue
        name, item.name = item.name, ""
        short[name] = item.name = seen.setdefault(item.SerializeToString(), f"q{len(short)}")
        if item.name != f"q{len(short) - 1}":
            proto.graph.initializer.remove(item)
    for node in proto.graph.node:
        for values in (node.input, node.output):
            values[:] = [value if value in names else short.setdefault(value, f"q{len(short)}") for value in values]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = ""
    del proto.graph.value_info[:]  # onnxruntime finds the shapes itself
