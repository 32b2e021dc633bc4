"""Exported files with 8-bit weights and activations, quantised after training by ONNX Runtime's or OpenVINO's tools.

    images = Calibration("model.onnx", "photos")               # a folder of images; or a list of the file's inputs
    report = quantize_onnx("model.onnx", "model_int8.onnx", images)
    model, report = quantize_openvino("model.onnx", images)    # an openvino.Model, to be compiled or saved

What is quantised are the convolutions and the products with weights; a detector's search for objects stays float, and
so do the layers that cost most of the answers' precision, until the error is within the limit. That is measured: each
layer is quantised alone, and the error of the answers says what it costs.
"""
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..runtime.folders import find_images
from ..runtime.pixels import Decoding
from ..runtime.say import say
from .graph import graphs

__all__ = ["ERROR_LIMIT", "IMAGES", "Calibration", "QuantizeReport", "quantize_onnx", "quantize_openvino",
           "save_openvino"]

ERROR_LIMIT = 0.1  # of the answers: root mean square of the difference from float, as a share of that of the answers
IMAGES, FEWEST = 128, 8  # that calibrate, and that a folder must hold at least
JUDGED = 3  # images that the error is measured on, as a multiple of those that calibrate
TRIALS, TRIED = 100, 16  # groups of layers that are quantised alone, at most, and images that this is measured on
CONSTANTS = "constants"  # how large constants are called among the layers
TABLE = 1024  # least number of values of a constant that is stored in 8 bits
TEXTS = "producer", "task", "model", "license", "weights_sha256", "channel_order", "layout"  # metadata that is no JSON
_LINEAR = ("Conv", "MatMul", "Gemm")

_OPENVINO_LINEAR = ("Convolution", "GroupConvolution", "MatMul")


class QuantizeReport(NamedTuple):
    """What a quantisation produced and how its answers compare with float.

    Attributes:
        error: Root mean square of the answers' difference from float, as a share of that of the float answers (logits
            less their mean over the classes; of a detector the worst of the maps in which it looks for objects).
        agreement: Share of the images, of a segmenter of the pixels, with the same class; of a detector of the objects
            with a score of 0.3 or more that the quantised one finds too (same class, boxes that share half of their
            union); None of features, and where there are no such objects.
        accuracy: Of a classifier before and after, where the images' folders are its classes; else None.
        float_layers: Layers that stayed float.
        layers: Number of all layers that can be quantised.
        calibrated: Number of images that calibrated.
        judged: Number of other images on which the above was measured.
        nodes: Number of the result's nodes.
        megabytes: Size of the result; of OpenVINO 0, as it is not saved yet.
        size_ratio: Size as a share of the float file's; of OpenVINO 0.
    """

    error: float
    agreement: float | None
    accuracy: tuple[float, float] | None
    float_layers: list[str]
    layers: int
    calibrated: int
    judged: int
    nodes: int
    megabytes: float = 0.0
    size_ratio: float = 0.0


class Calibration(Sequence[np.ndarray]):
    """The images of a folder as an exported file takes them, read when they are asked for: ``[1, C, H, W]`` float32.

    Of a detector's file ``[C, H, W]``; of a file that takes photos uint8, channels last. They are prepared as the
    file's metadata says, which for a run is what validation does, and come in a fixed random order.

    Attributes:
        calibrating: How many of them, from the first on, calibrate; the others measure the error.
        labels: Of a classifier, where each image's folder bears the name of a class; else None.

    Args:
        file: The exported ONNX file.
        folder: Folder of images, at any depth.
        images: Most images that calibrate; three times as many others measure. A smaller folder is halved.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Fewer than 8 images in it can be read as images of the file's channels.
    """

    def __init__(self, file: str | Path, folder: str | Path, images: int = IMAGES):
        import onnx

        folder = Path(folder)
        if images < FEWEST // 2:
            raise ValueError(f"{FEWEST // 2} images or more must calibrate, {images} were asked for")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of images to calibrate with")
        proto = onnx.load(file, load_external_data=False)
        self._facts = read_facts(proto)
        self._batched = len(proto.graph.input[0].type.tensor_type.shape.dim) == 4
        decoding = self._facts.get("decoding") or {}
        self._decoding = Decoding(**decoding | {"channels": self._facts["channels"]})
        files = find_images(folder)
        shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
        self.files, faults = [], []
        for path in shuffled:
            if fault := self._decoding.look(path, decode=True).fault:
                faults.append(f"{path}: {fault}")
            else:
                self.files.append(path)
            if len(self.files) == (1 + JUDGED) * images:
                break
        left_out = f"; {len(faults)} cannot be read, the first is {faults[0]}" if faults else ""
        if len(self.files) < FEWEST:
            raise ValueError(
                f"{folder} holds {len(self.files)} images to calibrate with, {FEWEST} are needed{left_out}")
        if faults:
            say(f"{folder}: {len(self.files)} images are used{left_out}.")
        self.calibrating = min(images, len(self.files) // 2)
        names = self._facts.get("class_names") or []
        parents = [path.relative_to(folder).parts[0] for path in self.files]
        known = self._facts["task"] == "classification" and not self._facts.get("multi_label")
        self.labels = [names.index(parent) for parent in parents] if known and set(parents) <= set(names) else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = self._prepared(self.files[index])
        return image[None] if self._batched else image

    def _prepared(self, path: Path) -> np.ndarray:
        """One image as validation makes it."""
        import torch
        from torchvision.transforms import v2

        said, rule = self._facts, self._facts["resize"]
        photo = said["channels"] == 3
        image = self._decoding.read(path) if photo else torch.from_numpy(self._decoding.array(path))
        photos = bool(said.get("layout"))
        mode = v2.InterpolationMode(rule.get("interpolation", "bilinear"))
        if "centre_crop" not in rule:  # of a dense task: the size of the file
            image = v2.functional.resize(image, said["image_size"], mode)
        elif not photos:
            image = v2.functional.resize(image, rule.get("sides") or rule["shorter_side"], mode)
            image = v2.functional.center_crop(image, rule["centre_crop"])
        if photos:
            assert isinstance(image, Image.Image)
            return np.asarray(image)
        values = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True).clamp(0, 1)
        return v2.functional.normalize(values, said["mean"], said["std"]).numpy()


def quantize_onnx(
        source: str | Path,
        out: str | Path,
        images: Sequence[np.ndarray],
        limit: float = ERROR_LIMIT,
) -> QuantizeReport:
    """Writes the exported file ``source`` to ``out`` with 8-bit weights and activations, ONNX Runtime's QDQ.

    Weights are signed, symmetric and per output channel, activations unsigned and per tensor, between the least and the
    largest value that the calibrating images bring about. Large constants that stay float otherwise, such as tables of
    biases, are stored in 8 bits. All else about the file stays: metadata, names, descriptions, free lengths.

    Args:
        source: A file of :func:`visionattn.export.export_onnx`.
        out: The file to write; it may be ``source``.
        images: A :class:`Calibration`, or at least two arrays such as the file takes, of which every second calibrates.
        limit: Largest error of the answers (see :class:`QuantizeReport`).

    Raises:
        ModuleNotFoundError: The packages of the ``export`` extra are missing.
        ValueError: The file is quantised already, or there are too few images.
        RuntimeError: onnxruntime cannot quantise the file, or the result does not run or is beyond the limit.
    """
    import onnx

    source, out = Path(source), Path(out)
    before = source.stat().st_size
    network = _OnnxNetwork(source, *_parted(images))
    chosen = _choose(network, limit)
    proto = network.quantized(chosen.kept)
    _shorten_names(proto, network.proto)
    _say_so(proto, "onnxruntime QDQ", chosen, network)
    answers = network.runner(proto.SerializeToString())
    report = _report(network, answers, chosen, sum(len(graph.node) for graph in graphs(proto.graph)))
    if not report.error <= 1.01 * limit:
        raise RuntimeError(f"the quantised file differs from float by {report.error:.3f} of the answers (limit "
                           f"{limit:g}); it was not kept")
    onnx.checker.check_model(proto)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(out))
    size = out.stat().st_size
    return report._replace(megabytes=size / 2 ** 20, size_ratio=size / before)


def quantize_openvino(
        source: str | Path,
        images: Sequence[np.ndarray],
        limit: float = ERROR_LIMIT,
) -> tuple[Any, QuantizeReport]:
    """An exported file as OpenVINO's model with 8-bit weights and activations, by nncf.

    Where the error is beyond the limit, nncf makes the layers float again that it finds to cost most.

    Args:
        source: A file of :func:`visionattn.export.export_onnx`; not a detector's that takes photos.
        images: As of :func:`quantize_onnx`.
        limit: The same.

    Returns:
        An ``openvino.Model``, which ``openvino.save_model`` writes and ``openvino.compile_model`` makes run, and the
        report.

    Raises:
        ModuleNotFoundError: The packages of the ``quantize`` extra are missing.
        ValueError: As of :func:`quantize_onnx`.
        RuntimeError: nncf cannot quantise the model within the limit.
    """
    network = _OpenvinoNetwork(Path(source), *_parted(images))
    model = network.quantized()
    error = _error(network, network.runner(model), network.judged)
    if not error <= limit:
        model = network.controlled(limit)
        error = _error(network, network.runner(model), network.judged)
    chosen = _Chosen(network.float_layers(model), error)
    if not error <= limit:
        raise RuntimeError(f"quantised by nncf, the model differs from float by {error:.3f} of the answers (limit "
                           f"{limit:g})")
    for key, value in network.facts.items():
        model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["visionattn", key])
    said = quantization_facts("nncf", chosen.kept, len(network.layers), error, len(network.calibrating))
    model.set_rt_info(json.dumps(said), ["visionattn", "quantization"])
    return model, _report(network, network.runner(model), chosen, len(model.get_ops()))


def save_openvino(source: Path, out: str | Path, images: Sequence[np.ndarray]) -> QuantizeReport:
    """Writes what :func:`quantize_openvino` makes of a file: ``out`` (.xml) and its weights beside it (.bin)."""
    import openvino

    model, report = quantize_openvino(source, images)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, out)
    size = out.stat().st_size + out.with_suffix(".bin").stat().st_size
    return report._replace(megabytes=size / 2 ** 20, size_ratio=size / source.stat().st_size)


def read_facts(proto: Any) -> dict[str, Any]:
    """The metadata that an export wrote into a file, as plain values.

    Raises:
        ValueError: The file is not one of visionattn's.
    """
    found = {item.key: item.value for item in proto.metadata_props}
    if "task" not in found:
        raise ValueError("the file has no metadata of visionattn's: export the model again")
    return {key: value if key in TEXTS else json.loads(value) for key, value in found.items()}


class _Chosen(NamedTuple):
    """Which layers stay float."""

    kept: list[str]
    error: float


class _OnnxNetwork:
    """An exported file, the ranges of its values, and what becomes of it with some of its layers quantised."""

    def __init__(self, source: Path, calibrating: Sequence[np.ndarray], judged: Sequence[np.ndarray]):
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        self.proto = onnx.load(source)
        self.facts = read_facts(self.proto)
        if "quantization" in self.facts:
            raise ValueError(f"{source} is quantised already: give the float file")
        self.layers = layers_of(self.proto)
        if _tables(self.proto):
            self.layers[CONSTANTS] = []
        self.calibrating, self.judged = calibrating, judged
        self.search = _search_inputs(self.proto)
        self.input = self.proto.graph.input[0].name
        name = self.input

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.images = iter(calibrating)

            def get_next(self) -> Any:
                image = next(self.images, None)
                return None if image is None else {name: image}

        with tempfile.TemporaryDirectory() as folder, _quiet():
            # What is beyond the layers' inputs and outputs needs no range.
            calibrator = create_calibrator(
                source, list(_LINEAR), augmented_model_path=str(Path(folder, "augmented.onnx")),
                calibrate_method=CalibrationMethod.MinMax)
            calibrator.collect_data(Reader())
            self.ranges = calibrator.compute_data()
        self.float = self.runner(self.proto.SerializeToString())

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
        with _quiet():
            quantizer = QDQQuantizer(
                proto, True, False, QuantType.QInt8, QuantType.QUInt8, self.ranges, nodes, [], list(_LINEAR),
                # Products stay float, to which onnxruntime adds the bias and of which it takes the GELU at once.
                {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]})
            quantizer.quantize_model()
        _sort(quantizer.model.model.graph)
        return quantizer.model.model

    def runner(self, content: bytes) -> Callable[[np.ndarray], list[np.ndarray]]:
        """What answers to an image, with a graph; of a detector its maps."""
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.search:
            proto = onnx.load_from_string(content)
            proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.search)
            content = proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {self.input: image})

    def compared(self, answers: list[np.ndarray]) -> list[np.ndarray]:
        """Of all answers those whose error is measured."""
        return answers[-len(self.search):] if self.search else answers


class _OpenvinoNetwork:
    """An exported file in OpenVINO, and what becomes of it with some of its layers quantised."""

    def __init__(self, source: Path, calibrating: Sequence[np.ndarray], judged: Sequence[np.ndarray]):
        import onnx

        try:
            import nncf
            import openvino
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"quantising for OpenVINO needs the package {error.name}: pip install 'visionattn[quantize]'") from None
        self.openvino, self.nncf = openvino, nncf
        proto = onnx.load(source)
        self.facts = read_facts(proto)
        if "quantization" in self.facts:
            raise ValueError(f"{source} is quantised already: give the float file")
        self.layers = layers_of(proto)
        self.search = _search_inputs(proto)
        self.calibrating, self.judged = calibrating, judged
        self.core = openvino.Core()
        self.model = self.core.read_model(source)
        self.float = self.runner(self.model)
        wanted = {node for nodes in self.layers.values() for node in nodes}
        # What is no layer with weights stays float, and OpenVINO quantises no constants that are picked from.
        others = [op.get_friendly_name() for op in self.model.get_ordered_ops()
                  if op.get_type_name() in _OPENVINO_LINEAR and _onnx_name(op) not in wanted and self.search]
        self.ignored = nncf.IgnoredScope(names=others, types=["Gather"], validate=False)

    def quantized(self) -> Any:
        """The model with all its layers quantised."""
        with _quiet(), self._silent():
            return self.nncf.quantize(
                self.model, self.nncf.Dataset(self.calibrating), subset_size=len(self.calibrating),
                model_type=self.nncf.ModelType.TRANSFORMER, preset=self.nncf.QuantizationPreset.MIXED,
                ignored_scope=self.ignored)

    def controlled(self, limit: float) -> Any:
        """The model with as many of its layers quantised as the limit allows."""
        def goodness(model: Any, images: Iterable[np.ndarray]) -> tuple[float, None]:
            return 1 - _error(self, self._answers(model), images), None

        with _quiet(), self._silent():
            return self.nncf.quantize_with_accuracy_control(
                self.model, self.nncf.Dataset(self.calibrating), self.nncf.Dataset(self.judged[:2 * TRIED]), goodness,
                subset_size=len(self.calibrating), max_drop=0.9 * limit, drop_type=self.nncf.DropType.ABSOLUTE,
                model_type=self.nncf.ModelType.TRANSFORMER, preset=self.nncf.QuantizationPreset.MIXED,
                ignored_scope=self.ignored)

    def float_layers(self, model: Any) -> list[str]:
        """The layers of a quantised model whose weights are float."""
        short = {_onnx_name(op) for op in model.get_ordered_ops()
                 if op.get_type_name() in _OPENVINO_LINEAR and _has_short_weights(op)}
        return sorted(layer for layer, nodes in self.layers.items() if not short & set(nodes))

    def runner(self, model: Any) -> Callable[[np.ndarray], list[np.ndarray]]:
        """What answers to an image."""
        return self._answers(self.core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))

    def compared(self, answers: list[np.ndarray]) -> list[np.ndarray]:
        """Of all answers those whose error is measured."""
        return answers

    def _answers(self, compiled: Any) -> Callable[[np.ndarray], list[np.ndarray]]:
        request = compiled.create_infer_request()
        return lambda image: [np.array(value) for value in request.infer([image]).values()]

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Within the context nncf draws no bars."""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield


def _onnx_name(op: Any) -> str:
    """The name that one of OpenVINO's operators had in the ONNX file."""
    return op.get_friendly_name().partition("/WithoutBiases")[0]


def _has_short_weights(op: Any) -> bool:
    """Whether one of OpenVINO's operators computes with weights of 8 bits.

    They are stored so or, of depthwise convolutions, as float numbers that a node makes ones of 8 bits.
    """
    source = op.input_value(1).get_node()
    while source.get_type_name() not in ("Constant", "FakeQuantize") and source.get_input_size():
        source = source.input_value(0).get_node()
    return source.get_type_name() == "FakeQuantize" or (
        source.get_type_name() == "Constant" and source.get_element_type().get_size() == 1)


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
        if node.op_type not in _LINEAR or node.input[1] not in weights or node.input[0] in weights:
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


def _choose(network: Any, limit: float) -> _Chosen:
    """The layers that must stay float for an error within the limit: those that cost most when quantised alone."""
    layers = list(network.layers)
    if not layers:
        raise RuntimeError("the file has no layers that can be quantised")
    whole = _error(network, network.runner(_content(network.quantized([]))), network.judged)
    if whole <= limit:
        return _Chosen([], whole)
    groups = _groups(layers)
    some = network.judged[:TRIED]
    costs = {}
    for group, members in groups.items():
        others = [layer for layer in layers if layer not in members]
        costs[group] = _error(network, network.runner(_content(network.quantized(others))), some) ** 2
    order = sorted(groups, key=lambda group: (-costs[group], group))
    # Errors of single layers add up in squares, nearly: as many stay float as the sum says, and then one after another.
    total, count = sum(costs.values()), 0
    while count < len(order) - 1 and sum(costs[group] for group in order[count:]) > total * (limit / whole) ** 2:
        count += 1
    while count < len(order):
        kept = [layer for group in order[:count] for layer in groups[group]]
        error = _error(network, network.runner(_content(network.quantized(kept))), network.judged)
        if error <= limit:
            return _Chosen(sorted(kept), error)
        count += max(1, count // 4)
    raise RuntimeError(f"quantised, the file differs from float by {whole:.3f} of the answers, and by more than the "
                       f"limit of {limit:g} with any of its layers: it cannot be quantised")


def _groups(layers: list[str]) -> dict[str, list[str]]:
    """Layers by themselves or, where they are many, by their block."""
    if len(layers) <= TRIALS:
        return {layer: [layer] for layer in layers}
    groups: dict[str, list[str]] = {}
    for layer in layers:
        found = re.match(r".*?blocks\.\d+|.*?stages\.\d+\.\w+|\w+", layer)
        groups.setdefault(found[0] if found else layer, []).append(layer)
    return groups


def _content(proto: Any) -> bytes:
    return proto.SerializeToString()


def _error(network: Any, answer: Callable[[np.ndarray], Any], images: Iterable[np.ndarray]) -> float:
    """The root mean square of the answers' difference, as a share of that of the answers; the worst of several."""
    sums: Any = 0.0
    for image in images:
        pairs = zip(network.compared(answer(image)), network.compared(network.float(image)), strict=True)
        sums = sums + np.array([_squares(actual, expected) for actual, expected in pairs])
    return _root(sums)


def _squares(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Sums of the squares of the difference and of the answers, both less their mean over the classes."""
    actual, expected = (x - x.mean(axis=1, keepdims=True) for x in (actual, expected))
    difference, size = (float(np.square(x, dtype=np.float64).sum()) for x in (actual - expected, expected))
    return difference, size


def _root(sums: np.ndarray) -> float:
    shares = np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], 1e-12))
    return float(np.nan_to_num(shares, nan=np.inf).max())


def _report(network: Any, answer: Callable[[np.ndarray], Any], chosen: _Chosen, nodes: int) -> QuantizeReport:
    """Measures the final graph on the judged images."""
    sums: Any = 0.0
    agreed: list[float] = []
    classes: list[tuple[int, int]] = []
    task = network.facts["task"]
    for image in network.judged:
        actual, expected = answer(image), network.float(image)
        pairs = zip(network.compared(actual), network.compared(expected), strict=True)
        sums = sums + np.array([_squares(*pair) for pair in pairs])
        if task == "detection":
            agreed += _found_again(actual, expected)
        elif task != "features":
            found, known = (answers[0].argmax(axis=1) for answers in (actual, expected))
            agreed.append(float((found == known).mean()))
            if task == "classification":
                classes.append((int(known[0]), int(found[0])))
    accuracy = None
    labels = getattr(network.judged, "labels", None)
    if labels:
        right = (np.array(classes) == np.array(labels)[:, None]).mean(axis=0)
        accuracy = float(right[0]), float(right[1])
    return QuantizeReport(
        _root(sums), float(np.mean(agreed)) if agreed else None, accuracy, chosen.kept, len(network.layers),
        len(network.calibrating), len(network.judged), nodes)


def _found_again(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], least: float = 0.3) -> list[float]:
    """Of each object with a score of ``least`` or more, whether it was found again."""
    boxes, labels = actual[:2]
    found = []
    for box, label, score in zip(*expected[:3], strict=True):
        if score < least:
            continue
        low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
        both = (high - low).clip(min=0).prod(axis=1)
        either = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - both
        found.append(float(((both >= 0.5 * either) & (labels == label)).any()))
    return found


class _Part(Sequence[np.ndarray]):
    """Some of a calibration's images, with their labels."""

    def __init__(self, images: Sequence[np.ndarray], numbers: Sequence[int]):
        self.images, self.numbers = images, numbers
        labels = getattr(images, "labels", None)
        self.labels = [labels[i] for i in numbers] if labels else None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Part(self.images, self.numbers[index])
        return self.images[self.numbers[index]]


def _parted(images: Sequence[np.ndarray]) -> tuple[_Part, _Part]:
    """The images that calibrate, and those that the error is measured on."""
    if len(images) < 2:
        raise ValueError(f"quantisation needs two images or more: to calibrate and to measure; there are {len(images)}")
    count = getattr(images, "calibrating", (len(images) + 1) // 2)
    return _Part(images, range(count)), _Part(images, range(count, len(images)))


def _tables(proto: Any) -> list[Any]:
    """The large float constants of a graph that are no weights of its layers."""
    from onnx import TensorProto

    weights = {name for node in proto.graph.node if node.op_type in _LINEAR for name in node.input[1:]}
    return [item for item in proto.graph.initializer if item.data_type == TensorProto.FLOAT
            and np.prod(item.dims) >= TABLE and item.name not in weights]


def _shorten_tables(proto: Any) -> None:
    """Stores large float constants, such as tables of biases, in 8 bits: each with a node that makes it float again."""
    from onnx import helper, numpy_helper

    nodes = []
    for item in _tables(proto):
        values, short = numpy_helper.to_array(item), f"{item.name}_quantized"
        scale = np.float32(np.abs(values).max() / 127)
        if not np.isfinite(scale) or not scale:
            continue
        proto.graph.initializer.extend([
            numpy_helper.from_array(np.rint(values / scale).astype(np.int8), short),
            numpy_helper.from_array(np.array(scale), f"{short}_scale"),
            numpy_helper.from_array(np.array(0, np.int8), f"{short}_zero")])
        nodes.append(helper.make_node(
            "DequantizeLinear", [short, f"{short}_scale", f"{short}_zero"], [item.name], f"{item.name}_float"))
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


def _say_so(proto: Any, method: str, chosen: _Chosen, network: Any) -> None:
    """Adds to a file's metadata how it was quantised, and sees that all else is there."""
    said = quantization_facts(method, chosen.kept, len(network.layers), chosen.error, len(network.calibrating))
    known = {item.key for item in proto.metadata_props}
    for item in network.proto.metadata_props:
        if item.key not in known:
            proto.metadata_props.add(key=item.key, value=item.value)
    for item in [item for item in proto.metadata_props if item.key.startswith("onnx.")]:
        proto.metadata_props.remove(item)  # the quantiser's notes to itself
    proto.metadata_props.add(key="quantization", value=json.dumps(said))


def quantization_facts(method: str, kept: list[str], layers: int, error: float, images: int) -> dict[str, Any]:
    """What the metadata of a quantised file says under ``quantization``."""
    return {"method": method, "weights": "int8", "activations": "uint8", "float_layers": kept,
            "quantized_layers": layers - len(kept), "error": round(error, 4), "calibration_images": images}


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context the quantisers say nothing of what a user cannot change."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
