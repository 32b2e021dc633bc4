"""``visionattn.Predictor``: a trained model, whatever it lies in, as one object that looks at images of any source."""
from importlib import import_module
from pathlib import Path

from .runtime.engine import Engine
from .runtime.onnx_engine import OnnxEngine
from .runtime.predictor import BasePredictor

__all__ = ["Predictor"]


class Predictor(BasePredictor):
    """A trained model with all that it must know of images. Several threads may use one.

    Args:
        model: The folder of a training run (its best checkpoint is taken), its checkpoint, a file of ``visionattn
            export`` (then nothing of PyTorch is needed), or the name of a model as in ``timm.create_model``.
        device: Where it runs, such as ``cpu`` or ``cuda:1``; None for the GPU if there is one, of an ONNX file the
            CPU. ONNX files also run on ``openvino``.
        checkpoint: Of a model's name: its weights, in place of those that are downloaded.
        pretrained: Of a model's name: False leaves the weights as they are drawn.
        tile: Side of the tiles that a detector or segmenter looks at in large images, in pixels; None for the image at
            once.
        threshold: Least score of a detection; of multi-label classes the probability from which on an image has one;
            None for the model's own.
        batch_size: Images, or tiles, that are looked at at once; None for 8 of a classifier or tiles, else 1.
        max_pixels: Largest image that is decoded; None for what training allowed.
        half: Compute in half precision: float16 on a GPU, bfloat16 on the CPU. An ONNX file has its own.

    Raises:
        ValueError: There is no such model, it cannot be rebuilt, or an option does not fit it.
        FileNotFoundError: There is no such file or folder.
        ModuleNotFoundError: A package is missing that it needs.
    """

    def __init__(
            self, model: str | Path, device: str | None = None, *, checkpoint: str | Path | None = None,
            pretrained: bool = True, tile: int | None = None, threshold: float | None = None,
            batch_size: int | None = None, max_pixels: int | None = None, half: bool = False):
        engine = _engine(model, device, checkpoint, pretrained, half)
        super().__init__(engine, tile, threshold, batch_size, max_pixels)


def _engine(
        model: str | Path, device: str | None, checkpoint: str | Path | None, pretrained: bool, half: bool) -> Engine:
    name, path = str(model), Path(model)
    of_file = path.exists() or isinstance(model, Path) or path.suffix in (".onnx", ".ckpt", ".pth", ".safetensors")
    if of_file and checkpoint is not None:
        raise ValueError(f"{name} has its weights: a checkpoint is for the name of a model")
    if path.suffix.lower() == ".onnx":
        if half:
            raise ValueError("an ONNX file has its own precision: leave half out, or export it in float16")
        return OnnxEngine(path, device or "cpu")
    torch_engine = import_module(f"{__package__}.torch_engine")  # with all that it imports
    if of_file:
        return torch_engine.RunEngine(path, device, half)
    if "/" in name and ":" not in name:
        raise FileNotFoundError(f"there is no run folder, checkpoint or file {name}")
    return torch_engine.ModelEngine(name, checkpoint, pretrained, device, half)
