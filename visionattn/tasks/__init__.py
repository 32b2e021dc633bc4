"""LightningModules: what is trained, with which loss, and how it is measured."""
from .classification import ClassificationTask
from .dense_tasks import DenseTasks
from .detection import DetectionTask
from .distillation import DistillationTask, FeaturePretrainingTask
from .incremental import IncrementalTask
from .multitask import MultiTask
from .segmentation import SegmentationTask

__all__ = ["ClassificationTask", "DenseTasks", "DetectionTask", "DistillationTask", "FeaturePretrainingTask",
           "IncrementalTask", "MultiTask", "SegmentationTask"]
