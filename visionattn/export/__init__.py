"""``visionattn export``: a model as a file for ONNX Runtime or another runtime, checked in it before it is kept.

A classifier's file takes ``images [batch, channels, height, width]``, normalised as in training, and gives ``logits
[batch, classes]``. A segmenter's takes ``images [batch, 3, height, width]`` in [0, 1] and gives ``logits [batch,
classes, height, width]``. The batch size is free; with ``--dynamic-size`` height and width are too, in multiples of 32.

A detector's file takes one ``image [3, height, width]`` in [0, 1], of one size, and gives ``boxes [N, 4]`` (x1, y1,
x2, y2 in pixels of the image), ``labels [N]`` from 1 on, ``scores [N]``, and of Mask R-CNN ``masks [N, 1, height,
width]``.
"""
from .command import main, print_report
from .facts import weights_sha256
from .formats import FORMATS, export_model
from .onnx_file import export_onnx
from .quantize import Calibration, QuantizeReport, quantize_onnx, quantize_openvino
from .report import ExportReport

__all__ = ["FORMATS", "Calibration", "ExportReport", "QuantizeReport", "export_model", "export_onnx", "main",
           "print_report", "quantize_onnx", "quantize_openvino", "weights_sha256"]
