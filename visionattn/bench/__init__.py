"""Measuring and explaining the ops: ``visionattn backends``, ``visionattn bench simulate`` and ``bench ops``.

``backends`` asks every backend of every op what it can run here. ``simulate`` counts the tiles that a block-sparse
kernel must visit and so bounds its speed-up over dense attention. ``ops`` times the ops and their peers, each after its
result was checked.
"""
from .backends import backend_table
from .command import main
from .machine import Machine, measure_machine
from .timing import benchmark

__all__ = ["Machine", "backend_table", "benchmark", "main", "measure_machine"]
