"""Heads over a backbone's maps, where torchvision has none, and its detectors over such maps."""
from .detector import build_detector
from .fpn import FeaturePyramid
from .incremental import IncrementalClassifier
from .probing import EfficientProbing, MultiHeadPooling, PooledHead, pool_tokens
from .segformer import SegFormerHead, segformer_head_weights
from .segmenter import Segmenter, multi_scale, sliding_window
from .semantic_fpn import SemanticFPNHead
from .taskexpert import TaskExpertHead
from .upernet import FCNHead, PyramidPooling, UPerNetHead

__all__ = [
    "EfficientProbing", "FCNHead", "FeaturePyramid", "IncrementalClassifier", "MultiHeadPooling", "PooledHead",
    "PyramidPooling", "SegFormerHead", "Segmenter", "SemanticFPNHead", "TaskExpertHead", "UPerNetHead",
    "build_detector", "multi_scale", "pool_tokens", "segformer_head_weights", "sliding_window",
]
