"""What checkpoints are for, by the name that users know: :mod:`visionattn.tasks.rebuild`, :mod:`visionattn.weights`."""
from .tasks.rebuild import create_model
from .weights import check_name, fitting, read_checkpoint, timm_model

__all__ = ["check_name", "create_model", "fitting", "read_checkpoint", "timm_model"]
