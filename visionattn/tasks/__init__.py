"""LightningModules: what is trained, with which loss, and how it is measured."""
from .classification import ClassificationTask

__all__ = ["ClassificationTask"]
