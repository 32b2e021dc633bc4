"""What runs without PyTorch: reading images, exported files in ONNX Runtime, results as tables, JSON and pictures.

Needs numpy, Pillow and, for exported files, onnxruntime; nothing here imports torch or what is above it.
"""
from .predictor import Runner
from .results import Classification, Detections, Segmentation

__all__ = ["Classification", "Detections", "Runner", "Segmentation"]
