"""LoRA: what attention's ``qkv`` gives, plus two thin matrices; by Hugging Face's ``peft``.

Paper: "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022, arXiv 2106.09685).
"""
import copy
import warnings
from collections import OrderedDict
from typing import Any, ClassVar

from torch import Tensor, nn

from ._adapter import Adapter
from ._places import find_attention

__all__ = ["LoRA"]

NAME = "default"  # peft's for what it injects


class LoRA(Adapter):
    """Adds ``alpha / rank * up(down(Dropout(x)))`` to what ``qkv`` makes of an attention's input ``x``.

    The layers are peft's own, each around its ``qkv``; the backbone keeps its names all the same.

    Args:
        rank: Width of the two matrices' middle.
        alpha: Factor on what is added, times ``rank``; None for ``rank``, which makes it 1.
        dropout: Of the input, in training.

    Raises:
        ValueError: ``rank`` is below 1.
        ImportError: ``peft`` is not installed.
    """

    summary = "two thin matrices beside each qkv of attention (LoRA); folds into it; needs peft"
    settings: ClassVar[dict[str, Any]] = {}  # of peft's configuration

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.):
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        _peft()
        self.layers = nn.ModuleDict()

    def inject(self, backbone: Any) -> None:
        """A layer of peft's for each attention."""
        peft, places = _peft(), find_attention(backbone)
        twins = nn.ModuleDict({f"qkv{i}": _twin(place.qkv) for i, place in enumerate(places)})
        config = peft.LoraConfig(
            r=self.options["rank"], lora_alpha=self.options["alpha"] or self.options["rank"],
            lora_dropout=self.options["dropout"], target_modules=list(twins), **self.settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about models of transformers
            peft.inject_adapter_in_model(config, twins, adapter_name=NAME)
        for place, (key, layer) in zip(places, twins.items(), strict=True):
            base = layer._modules.pop("base_layer")  # it is the backbone's: no weights of the adapter
            layer.__dict__["base_layer"] = base
            self.layers[key] = layer
            self.in_place_of(place.qkv, _Around(layer))

    def merge(self, backbone: Any) -> bool:
        """Adds the matrices' product to ``qkv``."""
        layers: Any = self.layers.values()
        for layer in layers:
            layer.merge()
        return True


class _Around:
    """Calls a layer of peft's in place of the ``qkv`` that it is around."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, qkv: nn.Module, x: Tensor) -> Tensor:
        return self.layer(x)


def _twin(qkv: nn.Linear) -> nn.Linear:
    """The same layer with the same parameters, without what hooks and forwards others have put on it."""
    twin = copy.copy(qkv)
    twin.__dict__.pop("forward", None)
    for key, value in twin.__dict__.items():
        if "hooks" in key and isinstance(value, dict):
            twin.__dict__[key] = OrderedDict()
    return twin


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("the adapters lora and dora need the package peft: pip install 'visionattn[peft]'") from None
    return peft


adapter = LoRA
