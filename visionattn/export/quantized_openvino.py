"""An exported file with 8-bit layers for OpenVINO, by nncf."""
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .calibration import error_of, known
from .graph import silent
from .quantizable import float_file

__all__ = ["OpenvinoNetwork"]

JUDGED = 32  # images that nncf measures the error on, when it looks for the layers that cost most
LINEAR_OPERATORS = "Convolution", "GroupConvolution", "MatMul"


class OpenvinoNetwork:
    """An exported file in OpenVINO, and what becomes of it with some of its layers quantised."""

    def __init__(self, source: Path, calibrating: Sequence[np.ndarray], judged: Sequence[np.ndarray]):
        try:
            import nncf
            import openvino
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"quantising for OpenVINO needs the package {error.name}: pip install 'visionattn[quantize]'") from None
        self.openvino, self.nncf = openvino, nncf
        proto, self.facts, self.layers, self.search = float_file(source)
        self.calibrating, self.judged = calibrating, judged
        self.core = openvino.Core()
        self.model = self.core.read_model(proto.SerializeToString())
        self.float = self.runner(self.model)
        wanted = {node for nodes in self.layers.values() for node in nodes}
        # What is no layer with weights stays float, and OpenVINO quantises no constants that are picked from.
        others = [op.get_friendly_name() for op in self.model.get_ordered_ops()
                  if op.get_type_name() in LINEAR_OPERATORS and _onnx_name(op) not in wanted and self.search]
        self.ignored = nncf.IgnoredScope(names=others, types=["Gather"], validate=False)

    def quantized(self) -> Any:
        """The model with all its layers quantised."""
        with silent():
            return self.nncf.quantize(
                self.model, self.nncf.Dataset(self.calibrating), subset_size=len(self.calibrating),
                model_type=self.nncf.ModelType.TRANSFORMER, preset=self.nncf.QuantizationPreset.MIXED,
                ignored_scope=self.ignored)

    def controlled(self, limit: float) -> Any:
        """The model with as many of its layers quantised as the limit allows."""
        def goodness(model: Any, images: Iterable[np.ndarray]) -> tuple[float, None]:
            return 1 - error_of(self, self._answers(model), known(self, images)), None

        with silent():
            return self.nncf.quantize_with_accuracy_control(
                self.model, self.nncf.Dataset(self.calibrating), self.nncf.Dataset(self.judged[:JUDGED]), goodness,
                subset_size=len(self.calibrating), max_drop=0.9 * limit, drop_type=self.nncf.DropType.ABSOLUTE,
                model_type=self.nncf.ModelType.TRANSFORMER, preset=self.nncf.QuantizationPreset.MIXED,
                ignored_scope=self.ignored)

    def float_layers(self, model: Any) -> list[str]:
        """The layers of a quantised model whose weights are float."""
        short = {_onnx_name(op) for op in model.get_ordered_ops()
                 if op.get_type_name() in LINEAR_OPERATORS and _has_short_weights(op)}
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
