"""``visionattn bench train``: the parts of a training step of our models and of timm's: time, memory, images a second.

Each model takes turns with timm's swin_tiny, so that a slow phase of the machine meets both; losses and gradients are
checked before anything is timed.
"""
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.image_folder import ImageFolderData
from ..export.check import photographs
from ..layers import checkpoint_attention
from ..models import families
from ..weights import sized_args
from .machine import figure, synchronize
from .timing import peak_memory

__all__ = ["BESIDE", "TRAINING_PEERS", "Step", "benchmark_training", "data_seconds", "models_of_families",
           "write_photographs"]

BESIDE = "swin_tiny_patch4_window7_224"  # timm's, what the others are timed beside
TRAINING_PEERS = (BESIDE, "deit_tiny_patch16_224", "efficientvit_m5", "convnext_tiny")
CLASSES = 1000
_PARTS = ("forward", "backward", "optimizer")
_TOLERANCE = 1e-3  # of another form's gradient than the eager model's, as a share of its length
_PHOTO = (375, 500)  # rows and columns of the photographs that are loaded


def models_of_families() -> list[str]:
    """A model of every family: the first that it is compared with others by, else the first that is no test variant."""
    found = []
    for family, record in families().items():
        others = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        found += [record.peers[0].ours] if record.peers else others[:1]
    return found


def benchmark_training(
        name: str,
        batch: int = 8,
        image_size: int = 224,
        repeat: int = 5,
        compiled: bool = False,
        device: str = "cpu",
        data: float | None = None,
        checkpointed: bool = False,
) -> list[dict[str, Any]]:
    """Checks, then times training steps of a model with random weights on random images, by AdamW in float32.

    Args:
        name: As of ``timm.create_model``.
        batch: Images of a step.
        image_size: Their height and width.
        repeat: Turns, each after an untimed step.
        compiled: Also the model as ``torch.compile`` makes it.
        device: ``cpu`` or ``cuda``.
        data: Seconds that one loader process takes for a batch (:func:`data_seconds`); None leaves its column empty.
        checkpointed: Also the model that computes inner values of its ``attention``, or of its whole ``blocks``, a
            second time (:func:`visionattn.layers.checkpoint_attention`, timm's ``set_grad_checkpointing``).

    Returns:
        A row of each form: medians of milliseconds of the parts and of the whole step, this as a multiple of
        swin_tiny's in the same turns, images a second, MiB of tensors that are allocated at the same time during a step
        beyond the weights and the optimiser's state, and ``data_ms``. A form that fails or is wrong has a note in place
        of figures.
    """
    forms = ["eager", *["attention", "blocks"] * checkpointed, *["compiled"] * compiled]
    steps: dict[str, Step] = {}
    notes = {}
    beside = Step(BESIDE, batch, image_size, device)
    for form in forms:
        try:
            steps[form] = Step(name, batch, image_size, device, form)
        except Exception as error:  # whatever a compiler or a model of another size leads to
            notes[form] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    for form in [form for form in steps if form != "eager" and "eager" in steps]:
        difference = steps[form].differs(steps["eager"])
        if not difference <= _TOLERANCE:
            del steps[form]
            notes[form] = f"wrong result: its gradient differs by {difference:.1e}"
    seconds = _take_turns({"": beside, **steps}, repeat) if steps else {}
    median = {key: statistics.median(turns) for key, turns in seconds.items()}
    rows = []
    for form in forms:
        step, whole = steps.get(form), median.get((form, "step"))
        rows.append({
            "model": name, "form": form, "image": image_size, "batch": batch,
            "parameters": step.count if step else "",
            **{f"{part}_ms": figure(1e3 * median[form, part] if step else None) for part in (*_PARTS, "step")},
            "step_over_swin_tiny": figure(whole and whole / median["", "step"]),
            "images_per_s": figure(whole and batch / whole),
            "peak_mib": figure(peak_memory(step.turn, device) if step else None),
            "data_ms": figure(data and 1e3 * data), "runs": repeat if step else 0, "note": notes.get(form, "")})
    return rows


def data_seconds(batch: int, image_size: int, repeat: int = 3) -> float:
    """Median of the seconds that one loader process takes for a batch of JPEG files of 500 x 375 pixels.

    They are decoded, cropped and augmented as ``ImageFolderData`` does by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder, "train"), max(batch, 4))  # of each of two classes one trains and one validates
        data = ImageFolderData(folder, image_size, batch, num_workers=0, verify=False)
        data.setup("fit")
        dataset: Any = data.train_dataloader().dataset
        seconds = []
        for _ in range(repeat + 1):
            start = time.perf_counter()
            for number in range(batch):
                dataset[number % len(dataset)]
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def write_photographs(folder: Path, count: int) -> None:
    """Writes so many JPEG files of 500 x 375 pixels, of 16 pictures at most, into the folders of two classes."""
    images = photographs(min(count, 16), 3, *_PHOTO, generator=torch.Generator().manual_seed(0))
    pixels = (255 * images).round().byte().movedim(1, -1).numpy()
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number % len(pixels)]).save(path, quality=90)


class Step:
    """A model with all that a training step takes: images and labels, loss, AdamW.

    Args:
        name: As of ``timm.create_model``.
        batch: Images of a step.
        image_size: Their height and width.
        device: ``cpu`` or ``cuda``.
        form: ``eager``, ``attention``, ``blocks`` or ``compiled``, as of :func:`benchmark_training`.

    Raises:
        RuntimeError: Logits, loss or a gradient are not finite, or a parameter has no gradient.
    """

    def __init__(self, name: str, batch: int, image_size: int, device: str, form: str = "eager"):
        torch.manual_seed(0)
        self.device = device
        model: Any = timm.create_model(name, num_classes=CLASSES, **sized_args(name, image_size))
        self.model = model.to(device).train()
        self.count = sum(parameter.numel() for parameter in self.model.parameters())
        if form == "attention":
            checkpoint_attention(self.model)
        elif form == "blocks":
            self.model.set_grad_checkpointing()
        elif form == "compiled":
            # Models share code (the call of a module, a block of another size), for which the compiler would go on from
            # the one before, with sizes that vary, and after a few of them not compile at all.
            torch.compiler.reset()
            self.model.compile()
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, image_size, image_size, generator=generator).to(device)
        self.labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)
        # The rate leaves the weights as they are: a longer measurement is of the same model.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9)
        loss = self._forward()
        loss.backward()
        self.gradient = {key: x.grad.clone() for key, x in self.model.named_parameters() if x.grad is not None}
        wrong = [key for key, _ in self.model.named_parameters()
                 if key not in self.gradient or not self.gradient[key].isfinite().all()]
        if wrong or not loss.isfinite():
            raise RuntimeError(f"{name}: no finite gradient of {', '.join(wrong[:3]) or 'the loss'}")
        self.optimizer.step()

    def turn(self) -> dict[str, float]:
        """Seconds of the parts of one step."""
        self.optimizer.zero_grad()
        marks = [self._now()]
        loss = self._forward()
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        parts = dict(zip(_PARTS, (end - start for start, end in itertools.pairwise(marks)), strict=True))
        return parts | {"step": marks[-1] - marks[0]}

    def differs(self, other: "Step") -> float:
        """Length of the difference of the first gradients, as a share of the other's."""
        error = sum((self.gradient[key] - x).double().square().sum() for key, x in other.gradient.items())
        length = sum(x.double().square().sum() for x in other.gradient.values())
        return float((torch.as_tensor(error) / torch.as_tensor(length)).sqrt())

    def _forward(self) -> Tensor:
        return cross_entropy(self.model(self.images), self.labels)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _take_turns(steps: Mapping[str, Step], repeat: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every part in every turn."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _, (form, step) in itertools.product(range(repeat), steps.items()):
        step.turn()
        for part, value in step.turn().items():
            seconds.setdefault((form, part), []).append(value)
    return seconds
