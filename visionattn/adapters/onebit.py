"""Adapters of low-bit weights: two small matrices a block, or for queries and values, that take a few kB on disk.

Paper: "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy" (ICCV 2023, arXiv
2307.16867). Official code: JieShibo/PETL-ViT, MIT.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._adapter import Adapter, active_label, adapters_of, classifiers, head_state
from ._lowbit import BITS, LowBitLinear
from ._places import find_attention, find_blocks

__all__ = ["OneBit", "load_headerless", "save_headerless"]

DROPOUT = 0.1


class OneBit(Adapter):
    """Bottlenecks of matrices whose weights take ``bits`` bits each.

    With the shape ``adaptformer`` a block adds ``scale * up(Dropout(ReLU(down(x))))`` of the tokens that enter its
    MLP's branch, beside it; with ``lora`` an attention's queries and values get ``scale * up(Dropout(down(x)))`` each
    of the attention's input.

    Args:
        bits: Of a weight: 1, 2, 4, 8, or 32 for plain ones.
        dim: Width of the bottleneck.
        scale: Factor on what is added. The authors search it among 0.01, 0.1, 1, 10 and 100.
        shape: ``adaptformer`` or ``lora``.
        bihead: The classifier too is a matrix, of 1 bit and without bias.

    Raises:
        ValueError: There are no such bits, width or shape.
    """

    summary = "bottlenecks of 1, 2, 4 or 8 bits a weight in parallel to the MLPs, or for queries and values"

    def __init__(
            self,
            bits: int = 1,
            dim: int = 32,
            scale: float = 1.0,
            shape: Literal["adaptformer", "lora"] = "adaptformer",
            bihead: bool = False,
    ):
        super().__init__(bits=bits, dim=dim, scale=scale, shape=shape, bihead=bihead)
        if bits not in (*BITS, 32):
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))} or 32, got {bits}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if shape not in ("adaptformer", "lora"):
            raise ValueError(f"shape must be adaptformer or lora, got {shape!r}")
        self.layers = nn.ModuleList()
        self.classifier: LowBitLinear | None = None
        self.owns_head = bihead

    def inject(self, backbone: Any) -> None:
        """A bottleneck for each block, or two for each attention, and the classifier if it is of 1 bit."""
        bits, dim, scale = (self.options[key] for key in ("bits", "dim", "scale"))
        if self.options["shape"] == "lora":
            for attention in find_attention(backbone):
                pair = QueryValue(attention.width, dim, attention.rows, bits, scale)
                self.on_call(attention.qkv, pair)
                self.layers.append(pair)
        else:
            for block in find_blocks(backbone):
                layer = Bottleneck(block.width, dim, block.width, bits, scale, nn.ReLU())
                self.on_branch(block, "mlp", layer.beside)
                self.layers.append(layer)
        if self.options["bihead"]:
            head = self._head_of(backbone)
            self.classifier = LowBitLinear(head.in_features, head.out_features, bits=1)
            self.in_place_of(head, self._classify)

    def merge(self, backbone: Any) -> bool:
        """Makes the matrices plain ones; those of the shape ``lora`` are added to the rows of queries and values."""
        for matrix in self.matrices():
            matrix.settle()
        if self.classifier is not None:
            head = self._head_of(backbone)
            with torch.no_grad():
                head.weight.copy_(self.classifier.weight)
                if isinstance(head.bias, Tensor):
                    head.bias.zero_()
        if self.options["shape"] != "lora":
            return False
        pairs: Any = self.layers
        for attention, pair in zip(find_attention(backbone), pairs, strict=True):
            pair.fold(attention.qkv)
        return True

    def matrices(self) -> Iterator[LowBitLinear]:
        """All low-bit matrices, in the order of the authors' files: by block, down before up, the classifier last."""
        for layer in self.modules():
            if isinstance(layer, LowBitLinear) and layer is not self.classifier:
                yield layer
        if self.classifier is not None:
            yield self.classifier

    def tensors(self) -> dict[str, Tensor]:
        """The matrices as bytes, one after the other; plain ones by their names."""
        if self.options["bits"] == 32:
            return super().tensors()
        return {"packed": torch.cat([matrix.pack() for matrix in self.matrices()])}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the matrices from their bytes; they are plain ones from then on, which do not train."""
        if self.options["bits"] == 32:
            super().load_tensors(tensors)
            return
        matrices = list(self.matrices())
        sizes = [matrix.num_bytes for matrix in matrices]
        if set(tensors) != {"packed"} or tensors["packed"].shape != (sum(sizes),):
            raise RuntimeError(f"the packed matrices have not the {sum(sizes)} bytes of this adapter")
        for matrix, packed in zip(matrices, tensors["packed"].split(sizes), strict=True):
            matrix.unpack(packed)

    def _classify(self, head: nn.Module, x: Tensor) -> Tensor:
        assert self.classifier is not None
        return self.classifier(x)

    def _head_of(self, backbone: Any) -> nn.Linear:
        """The linear layer that a head of 1 bit works in place of."""
        found = classifiers(backbone)
        if len(found) != 1 or not isinstance(found[0], nn.Linear):
            raise ValueError(f"bihead takes the place of a linear classifier, and {type(backbone).__name__} has "
                             f"{', '.join(type(head).__name__ for head in found) or 'none'}: leave bihead out")
        return found[0]


def save_headerless(model: Any, path: str | Path) -> int:
    """Writes the low-bit adapter that a model works with as its authors do: packed matrices and head, nothing else.

    Nothing in such a file says what it is of; :func:`visionattn.adapters.save` writes one that does.

    Args:
        model: The model.
        path: Of the file.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: The model works with no adapter of this kind, or with one of plain weights, of which the authors'
            files have none.
    """
    adapter = adapters_of(model).get(active_label(model) or "")
    if not isinstance(adapter, OneBit):
        raise ValueError("the model works with no adapter of the kind onebit")
    _check_headerless(adapter)
    parts = [adapter.tensors()["packed"]]
    if not adapter.owns_head:
        parts += [x.detach().cpu().float().flatten().view(torch.uint8) for x in head_state(model).values()]
    content = torch.cat(parts).numpy().tobytes()
    Path(path).write_bytes(content)
    return len(content)


def load_headerless(model: Any, path: str | Path, label: str = "onebit", **options: Any) -> OneBit:
    """Gives a timm model the low-bit adapter and head of a file of the authors', which it works with from now on.

    Args:
        model: The model that the adapter was trained on; changed in place. Its head gets the file's number of classes.
        path: Of the file.
        label: What the adapter is called on this model.
        options: Those of :class:`OneBit` that the file is of.

    Returns:
        The adapter.

    Raises:
        ValueError: The file's size does not fit the model and the options.
        FileNotFoundError: There is no such file.
    """
    adapter = OneBit(**options)
    _check_headerless(adapter)
    content = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
    probe = OneBit(**options | {"bihead": False})
    with torch.device("meta"):
        probe.inject(model)
    probe.detach()
    head = adapter._head_of(model)
    size = sum(matrix.num_bytes for matrix in probe.matrices())
    rest, width = len(content) - size, head.in_features
    classes = (rest - 8) * 8 // width if adapter.owns_head else rest // (4 * (width + 1))
    whole = classes * width // 8 + 8 if adapter.owns_head else classes * 4 * (width + 1)
    if classes < 1 or rest != whole:
        raise ValueError(f"{path} has {len(content)} bytes: not {size} of an adapter with these options on this "
                         f"{type(model).__name__} and a head of {width} channels after them")
    weight = torch.zeros(classes, width)
    bias = torch.zeros(classes)
    if not adapter.owns_head:
        numbers = content[size:].clone().view(torch.float32)
        weight, bias = numbers[:-classes].view(classes, width), numbers[-classes:]
    tensors = {key: weight if key.endswith("weight") else bias for key in head_state(model)}
    adapter.attach(model, label, tensors)
    adapter.load_tensors({"packed": content if adapter.owns_head else content[:size]})
    return adapter


def _check_headerless(adapter: OneBit) -> None:
    if adapter.options["bits"] == 32:
        raise ValueError("the authors' files have no adapters of 32 bits, only their heads")


class Bottleneck(nn.Module):
    """``scale * up(Dropout(activation(down(x))))`` of ``x [..., width]``.

    Args:
        width: Of the input.
        dim: Of the bottleneck.
        out_width: Of the output.
        bits: Of a weight.
        scale: Factor on the output.
        activation: Between the matrices.
    """

    def __init__(
            self, width: int, dim: int, out_width: int, bits: int, scale: float, activation: nn.Module | None = None):
        super().__init__()
        self.scale = scale
        self.down = LowBitLinear(width, dim, bits)
        self.act = activation or nn.Identity()
        self.drop = nn.Dropout(DROPOUT)
        self.up = LowBitLinear(dim, out_width, bits)
        if bits == 32:
            nn.init.zeros_(self.up.weight)
        else:  # of zeros there is no standard deviation
            nn.init.trunc_normal_(self.up.weight, std=0.001, a=-0.002, b=0.002)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., width]`` to ``[..., out_width]``."""
        return self.scale * self.up(self.drop(self.act(self.down(x))))

    def beside(self, x: Tensor, branch: Tensor) -> Tensor:
        """A block's branch on the tokens ``x``, with what the bottleneck gives of them beside it."""
        return branch + self(x)


class QueryValue(nn.Module):
    """A bottleneck each for the queries and the values of an attention, without activation.

    Args:
        width: Of the attention's input.
        dim: Of the bottlenecks.
        rows: Width of queries and of values.
        bits: Of a weight.
        scale: Factor on what is added.
    """

    def __init__(self, width: int, dim: int, rows: int, bits: int, scale: float):
        super().__init__()
        self.q = Bottleneck(width, dim, rows, bits, scale)
        self.v = Bottleneck(width, dim, rows, bits, scale)

    def forward(self, x: Tensor, qkv: Tensor) -> Tensor:
        """``qkv [..., 3 * rows]`` of ``x [..., width]`` with what is added."""
        q, k, v = qkv.chunk(3, dim=-1)
        return torch.cat([q + self.q(x), k, v + self.v(x)], dim=-1)

    @torch.no_grad()
    def fold(self, qkv: nn.Linear) -> None:
        """Adds the bottlenecks' products, of plain matrices, to the weights of ``qkv``."""
        q, _, v = qkv.weight.chunk(3)
        for rows, pair in ((q, self.q), (v, self.v)):
            rows += pair.scale * pair.up.rounded() @ pair.down.rounded()


adapter = OneBit
