"""LightningDataModules: scikit-learn's digits (no download), image folders, tables of labels, tar files and other
archives, COCO, VOC and YOLO files, folders of masks.

What a task may ask of a data module: the attributes ``num_classes`` and ``class_names``, ``in_chans`` and
``multi_label`` (3 and False if absent) from construction on, and batches. H and W may differ from image to image where
a batch is a list.

``image_settings``, plain values that checkpoints keep, say how ``visionattn predict`` makes images of files: the fields
of ``visionattn.runtime.pixels.Decoding`` that differ as a dict ``decoding``, and beside them ``image_size``,
``interpolation``, ``crop_pct``, ``mean`` and ``std`` for classification, ``short_side`` and ``max_size`` for
segmentation. Without them that command has no predictions.

Classification
    ``(images [B, C, H, W] float32 normalised, labels [B] int64)`` for training and evaluation, where ``multi_label``
    labels are ``[B, classes]`` float32, 0 and 1;
    ``(images, names: list of str)`` for prediction.

Detection
    ``(images, targets)``: lists of ``[C, H, W]`` float32 in [0, 1], not normalised, and of dicts with

    * ``boxes [N, 4]`` float32: left, top, right, bottom in pixels of the image; N may be 0;
    * ``labels [N]`` int64: 1 to ``num_classes``, of which ``category_ids[label - 1]`` is the number in COCO files;
    * ``masks [N, H, W]`` uint8, where the data's ``masks`` asks for them;
    * ``area [N]`` float32 and ``iscrowd [N]`` int64 as in COCO's format; crowds are in no training target;
    * ``image_id`` int (str where the file's ids are no numbers), ``orig_size [2]`` int64: height and width of the
      file, as it is seen, and for evaluation and prediction ``file_name`` str. Prediction has these alone.

Segmentation
    ``(images [B, C, H, W] float32 in [0, 1], not normalised, labels [B, H, W] int64)`` for training and evaluation,
    where 255 is ignored and evaluation labels have the size of the file, which the image may not have;
    ``(images, names: list of str, sizes [B, 2] int64)`` for prediction: height and width of the files.
"""
from .coco import CocoData
from .digits import DigitsData
from .image_folder import ImageFolderData
from .multitask import MultiTaskData
from .packed import PackedData
from .scenes import DigitScenesData
from .segmentation_folder import SegmentationFolderData
from .table import CsvData
from .unlabelled import UnlabelledFolderData
from .voc_folder import VocData
from .yolo import YoloData

__all__ = [
    "CocoData", "CsvData", "DigitScenesData", "DigitsData", "ImageFolderData", "MultiTaskData", "PackedData",
    "SegmentationFolderData", "UnlabelledFolderData", "VocData", "YoloData",
]
