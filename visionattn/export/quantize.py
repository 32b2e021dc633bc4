"""Exported files with 8-bit weights and activations, quantised after training by ONNX Runtime's or OpenVINO's tools.

    images = Calibration("model.onnx", "photos")               # a folder of images; or a list of the file's inputs
    report = quantize_onnx("model.onnx", "model_int8.onnx", images)
    model, report = quantize_openvino("model.onnx", images)    # an openvino.Model, to be compiled or saved

What is quantised are the convolutions and the products with weights; a detector's search for objects stays float, and
so do the layers that cost most of the answers' precision, until the error is within the limit. That is measured: each
layer is quantised alone, and the error of the answers says what it costs.
"""
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .calibration import IMAGES, Calibration, error_of, known, parted, root, squares
from .graph import graphs
from .quantized_onnx import OnnxNetwork, finish
from .quantized_openvino import OpenvinoNetwork

__all__ = ["ERROR_LIMIT", "IMAGES", "Calibration", "QuantizeReport", "quantize_onnx", "quantize_openvino",
           "save_openvino"]

ERROR_LIMIT = 0.1  # of the answers: root mean square of the difference from float, as a share of that of the answers
TRIALS, TRIED = 128, 16  # groups of layers that are quantised alone, at most, and images that this is measured on


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
    network = OnnxNetwork(source, *parted(images))
    chosen = _choose(network, limit)
    proto = network.quantized(chosen.kept)
    finish(proto, network.proto, _facts("onnxruntime QDQ", chosen, network))
    report = _report(network, network.runner(proto), chosen, sum(len(graph.node) for graph in graphs(proto.graph)))
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
    network = OpenvinoNetwork(Path(source), *parted(images))
    model = network.quantized()
    error = _judged(network, model)
    if not error <= limit:
        model = network.controlled(limit)
        error = _judged(network, model)
    chosen = _Chosen(network.float_layers(model), error)
    if not error <= limit:
        raise RuntimeError(f"quantised by nncf, the model differs from float by {error:.3f} of the answers (limit "
                           f"{limit:g})")
    for key, value in network.facts.items():
        model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["visionattn", key])
    model.set_rt_info(json.dumps(_facts("nncf", chosen, network)), ["visionattn", "quantization"])
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


class _Chosen(NamedTuple):
    """Which layers stay float."""

    kept: list[str]
    error: float


def _choose(network: Any, limit: float) -> _Chosen:
    """The layers that must stay float for an error within the limit: those that cost most when quantised alone."""
    layers = list(network.layers)
    if not layers:
        raise RuntimeError("the file has no layers that can be quantised")
    whole = _judged(network, network.quantized([]))
    if whole <= limit:
        return _Chosen([], whole)
    groups = _groups(layers)
    some = list(known(network, network.judged[:TRIED]))
    costs = {}
    for group, members in groups.items():
        others = [layer for layer in layers if layer not in members]
        costs[group] = error_of(network, network.runner(network.quantized(others)), some) ** 2
    order = sorted(groups, key=lambda group: (-costs[group], group))
    # Errors of single layers add up in squares, nearly: as many stay float as the sum says, and then one after another.
    total, count = sum(costs.values()), 0
    while count < len(order) - 1 and sum(costs[group] for group in order[count:]) > total * (limit / whole) ** 2:
        count += 1
    while count < len(order):
        kept = [layer for group in order[:count] for layer in groups[group]]
        error = _judged(network, network.quantized(kept))
        if error <= limit:
            return _Chosen(sorted(kept), error)
        count += max(1, count // 4)
    raise RuntimeError(f"quantised, the file differs from float by {whole:.3f} of the answers, and by more than the "
                       f"limit of {limit:g} with any of its layers: it cannot be quantised")


def _judged(network: Any, quantized: Any) -> float:
    """The error of a quantised graph on the images that measure it."""
    return error_of(network, network.runner(quantized), known(network, network.judged))


def _groups(layers: list[str]) -> dict[str, list[str]]:
    """Layers by themselves or, where they are many, by their block."""
    if len(layers) <= TRIALS:
        return {layer: [layer] for layer in layers}
    groups: dict[str, list[str]] = {}
    for layer in layers:
        found = re.match(r".*?blocks\.\d+|.*?stages\.\d+\.\w+|\w+", layer)
        groups.setdefault(found[0] if found else layer, []).append(layer)
    return groups


def _report(network: Any, answer: Callable[[np.ndarray], Any], chosen: _Chosen, nodes: int) -> QuantizeReport:
    """Measures the final graph on the judged images."""
    sums: Any = 0.0
    agreed: list[float] = []
    classes: list[tuple[int, int]] = []
    task = network.facts["task"]
    for image in network.judged:
        actual, expected = answer(image), network.float(image)
        sums = sums + squares(network.compared(actual), network.compared(expected))
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
        root(sums), float(np.mean(agreed)) if agreed else None, accuracy, chosen.kept, len(network.layers),
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


def _facts(method: str, chosen: _Chosen, network: Any) -> dict[str, Any]:
    """What the metadata of a quantised file say under ``quantization``."""
    return {"method": method, "weights": "int8", "activations": "uint8", "float_layers": chosen.kept,
            "quantized_layers": len(network.layers) - len(chosen.kept), "error": round(chosen.error, 4),
            "calibration_images": len(network.calibrating)}
