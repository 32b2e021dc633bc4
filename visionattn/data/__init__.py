"""LightningDataModules: scikit-learn's digits (no download) and folders of images.

What a task may ask of a data module: the attributes ``num_classes`` and ``class_names`` from construction on, batches
``(images [B, C, H, W] float32 normalised, labels [B] int64)`` for training and evaluation, and
``(images, names: list of str)`` for prediction.
"""
from .digits import DigitsData
from .image_folder import ImageFolderData

__all__ = ["DigitsData", "ImageFolderData"]
