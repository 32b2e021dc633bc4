"""Measuring and explaining: ``visionattn backends`` and ``visionattn bench simulate|ops|attention|export|train|data``.

``backends`` asks every backend of every op what it can run here. ``simulate`` counts the tiles that a block-sparse
kernel must visit and so bounds its speed-up over dense attention. ``ops`` times the ops and their peers, each after its
result was checked. ``attention`` times them in four patterns of use, over lengths, and says from where they pay.
``export`` times models in PyTorch and exported, ``train`` steps of training, ``data`` a loader
beside the model that waits for it.
"""
from .backends import backend_table
from .command import main
from .exported import benchmark_export
from .machine import Machine, measure_machine
from .timing import benchmark
from .training import benchmark_training

__all__ = ["Machine", "backend_table", "benchmark", "benchmark_export", "benchmark_training", "main", "measure_machine"]
