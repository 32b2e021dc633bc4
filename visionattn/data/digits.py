"""scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels that come with the package."""
from collections import Counter
from collections.abc import Collection

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .loading import LoadedData, of_classes
from .report import DataReport, SplitReport

__all__ = ["DigitsData"]

MEAN, STD = 0.305, 0.376  # of the 8 x 8 scans scaled to [0, 1]


class DigitsData(LoadedData):
    """Ten classes of handwritten digits, split 1,197 / 300 / 300 into training, validation and test images.

    The split is stratified and fixed: it does not depend on ``seed``, so that test accuracies can be compared. The
    scans are enlarged to ``image_size`` (bicubic) and normalised; in training they are shifted, turned and scaled a
    little. ``predict`` runs over the test images, named ``digit_<index in scikit-learn's order>``.

    Args:
        image_size: Height and width of the images, in pixels.
        in_chans: 3 repeats the grey scan, as backbones expect; 1 does not.
        batch_size: Images per batch and device.
        num_workers: Loader processes; 0 loads in the training process, which is fastest for images this small.
        seed: Order of the training images and random numbers of the loader's processes.
    """

    def __init__(
            self,
            image_size: int = 32,
            in_chans: int = 3,
            batch_size: int = 64,
            num_workers: int = 0,
            seed: int = 0,
    ):
        super().__init__(batch_size, num_workers, seed)
        if image_size < 8:
            raise ValueError(f"image_size must be at least the scans' 8 pixels, got {image_size}")
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans must be 1 or 3, got {in_chans}")
        self.image_size, self.in_chans = image_size, in_chans
        self.num_classes = 10
        self.normalisation = [MEAN] * in_chans, [STD] * in_chans
        self.image_settings = dict(
            image_size=image_size, interpolation="bicubic", crop_pct=1.0, mean=[MEAN] * in_chans, std=[STD] * in_chans,
            decoding={"channels": in_chans})
        self.class_names = [str(digit) for digit in range(10)]

    def setup(self, stage: str) -> None:
        """Makes ``images [1797, 1, S, S]``, ``labels [1797]`` and the indices ``train``, ``val``, ``test``."""
        scans = load_digits()
        images = torch.from_numpy(scans.images).float()[:, None] / 16  # the scans hold 0..16
        images = interpolate(images, size=(self.image_size, self.image_size), mode="bicubic").clamp(0, 1)
        self.images = (images - MEAN) / STD
        self.labels = torch.from_numpy(scans.target)
        # Stratified, and seeded by a constant: the same split for everyone.
        rest, self.test = train_test_split(range(len(images)), test_size=300, random_state=0, stratify=scans.target)
        self.train, self.val = train_test_split(rest, test_size=300, random_state=0, stratify=scans.target[rest])
        self.report = DataReport("images")
        for split in ("train", "val", "test"):
            labels = Counter(scans.target[getattr(self, split)].tolist())
            counts = {name: labels[label] for label, name in enumerate(self.class_names)}
            self.report.splits[split] = SplitReport(labels.total(), counts)

    def train_dataloader(self) -> DataLoader:
        """Augmented training images, shuffled."""
        background = -MEAN / STD
        augment = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=5, fill=background,
                                  interpolation=v2.InterpolationMode.BILINEAR)
        return self._train_loader(_Digits(self, self.train, augment=augment))

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self.plain_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self.plain_dataloader("test")

    def plain_dataloader(self, split: str, classes: Collection[int] | None = None) -> DataLoader:
        """Images of ``train``, ``val`` or ``test`` in their order, as evaluation sees them.

        ``classes``: their images alone.
        """
        images: Dataset = _Digits(self, getattr(self, split))
        return self._eval_loader(images if classes is None else of_classes(images, classes)[0])

    def predict_dataloader(self) -> DataLoader:
        """Test images with a name in place of the label."""
        return self._eval_loader(_Digits(self, self.test, named=True))


class _Digits(Dataset):
    def __init__(self, data: DigitsData, indices: list[int], augment: v2.Transform | None = None, named: bool = False):
        self.images, self.labels, self.in_chans = data.images, data.labels, data.in_chans
        self.indices, self.augment, self.named = indices, augment, named

    def __len__(self) -> int:
        return len(self.indices)

    def file_name(self, item: int) -> str:
        return f"digit_{self.indices[item]:04d}"

    def label(self, item: int) -> int:
        return int(self.labels[self.indices[item]])

    def __getitem__(self, item: int) -> tuple[Tensor, int | str]:
        index = self.indices[item]
        image = self.images[index]
        if self.augment is not None:
            image = self.augment(image)
        label = self.file_name(item) if self.named else self.label(item)
        return image.expand(self.in_chans, -1, -1), label
