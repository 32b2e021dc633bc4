"""DoRA: LoRA of the weights' direction, with a length of its own for each row; by Hugging Face's ``peft``.

Paper: "DoRA: Weight-Decomposed Low-Rank Adaptation" (ICML 2024, arXiv 2402.09353).
"""
from .lora import LoRA

__all__ = ["DoRA"]


class DoRA(LoRA):
    """Makes ``qkv`` multiply by ``m * (W + alpha / rank * up @ down)`` with rows of unit length times ``m``, learnt.

    Args:
        rank: Width of the two matrices' middle.
        alpha: Factor on their product, times ``rank``; None for ``rank``, which makes it 1.
        dropout: Of the input, in training.

    Raises:
        ValueError: ``rank`` is below 1.
        ImportError: ``peft`` is not installed.
    """

    summary = "LoRA with a learnt length of each row of the weights (DoRA); folds into qkv; needs peft"
    settings = {"use_dora": True}  # noqa: RUF012 - as the base has it


adapter = DoRA
