"""The head of SegFormer (Xie et al., NeurIPS 2021, section 3.2), which DATR has too, and the weights of its authors."""
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import classifier, init_convolutions, resize

__all__ = ["SegFormerHead", "segformer_head_weights"]


class SegFormerHead(nn.Module):
    """A linear layer on every map, all brought to the size of the finest, and one linear layer of them together.

    The latter is computed on each map before it is enlarged, and summed: interpolation and linear layers may change
    places, and on the smaller maps there is less to compute.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        num_classes: Channels of the logits.
        channels: Width: 256 for SegFormer-B0 and B1 and DATR's class, 768 from B2 on, 512 in DATR's training.
        dropout: Before the classifier.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fusion = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in in_channels)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.classifier = classifier(channels, num_classes, dropout)
        init_convolutions(self.fusion)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` of maps ``[B, in_channels[i], H_i, W_i]``, at the size of the first."""
        size = features[0].shape[-2:]
        total: Any = 0
        for linear, fusion, x in zip(self.linear, self.fusion, features, strict=True):
            total = total + resize(fusion(linear(x)), size)
        return self.classifier(self.act(self.norm(total)))


def segformer_head_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a :class:`SegFormerHead` in a whole segmenter of DATR's or SegFormer's (NVlabs') authors.

    Args:
        state_dict: With entries ``decoder.*`` (DATR) or ``decode_head.*`` (SegFormer), of any backbone.

    Raises:
        ValueError: There are no such entries.
    """
    found = {key.partition(".")[2]: x for key, x in state_dict.items() if key.startswith(("decoder.", "decode_head."))}
    if "linear_fuse.conv.weight" not in found:
        raise ValueError("there is no head of SegFormer's in these weights: expected decoder.linear_fuse.conv.weight "
                         "or decode_head.linear_fuse.conv.weight")
    levels = sum(key.startswith("linear_c") and key.endswith(".proj.bias") for key in found)
    renamed = {f"norm.{key.removeprefix('linear_fuse.bn.')}": x for key, x in found.items() if "_fuse.bn." in key}
    for i, columns in enumerate(reversed(found["linear_fuse.conv.weight"].chunk(levels, dim=1))):  # coarsest first
        renamed[f"fusion.{i}.weight"] = columns
        renamed[f"linear.{i}.weight"] = found[f"linear_c{i + 1}.proj.weight"][:, :, None, None]
        renamed[f"linear.{i}.bias"] = found[f"linear_c{i + 1}.proj.bias"]
    return renamed | {f"classifier.conv.{leaf}": found[f"linear_pred.{leaf}"] for leaf in ("weight", "bias")}
