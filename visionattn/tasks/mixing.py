"""Training images that are mixed with each other, and what of it the labels and the loss learn from attention.

* MaskMix and progressive attention labels: "MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling
  for Vision Transformer" (arXiv 2304.12043).
* SMMix: "SMMix: Self-Motivated Image Mixing for Vision Transformers" (arXiv 2212.12977).

The functions take batches of images ``[B, C, H, W]`` and maps of ``T = rows * columns`` tokens, row by row. Shares are
those of an image itself, between 0 and 1; the rest is its partner's. Random numbers are of PyTorch's generator for the
CPU. The classes put the functions together for a training step.
"""
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import attention_maps

__all__ = [
    "MaskMix", "Mixed", "Seen", "SelfMotivatedMix", "attention_share", "draw_cells", "forward_tokens", "masked_mean",
    "mix_by_attention", "mix_by_cells", "progressive_loss", "token_attention", "tokens_of_cells", "window_sums",
]

Grid = tuple[int, int]  # rows and columns


class Mixed(NamedTuple):
    """Mixed images and what they are made of.

    Attributes:
        images: ``[B, C, H, W]``.
        targets: Soft labels ``[B, classes]``.
        labels: Labels ``[B]`` of the images themselves.
        partner_labels: Labels ``[B]`` of their partners.
        share: Share of the image itself, the same for all of the batch.
        mask: What is of the image itself: booleans ``[B, rows, columns]``, of cells (MaskMix) or tokens (SMMix).
        clean: Of SMMix: logits ``[B, classes]`` of the images before they were mixed, mixed by the share.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    partner_labels: Tensor
    share: float
    mask: Tensor
    clean: Tensor | None = None


class Seen(NamedTuple):
    """A model's answers to images.

    Attributes:
        logits: ``[B, classes]``.
        tokens: Of the last map, ``[B, T, channels]``, as ``forward_features`` of the model gives them.
        grid: Rows and columns of the map.
        prefix: Number of tokens that the model has before those of the map, class tokens and the like.
    """

    logits: Tensor
    tokens: Tensor
    grid: Grid
    prefix: int


Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits and soft labels, both [B, classes]


class MaskMix:
    """MaskMix (MixPro) and, with ``attention_labels``, its progressive attention labels.

    Args:
        model: The timm model that is trained.
        num_classes: Its classes.
        mask_patch: Height and width of a cell, in pixels; a multiple of the model's patch, or with
            ``attention_labels`` of what a token of its last map spans, so that each token is of one image. None for the
            multiple that is nearest to a quarter of the image.
        attention_labels: Weigh the labels by attention.

    Raises:
        ValueError: ``mask_patch`` is no such multiple, or the model does not say what its patch is.
    """

    def __init__(self, model: Any, num_classes: int, mask_patch: int | None, attention_labels: bool):
        info = getattr(model, "feature_info", None)
        if not info:
            raise ValueError(f"{type(model).__name__} has no feature_info, which says how large its patches are: "
                             "maskmix cannot be used with it")
        self.num_classes, self.mask_patch, self.attention_labels = num_classes, mask_patch, attention_labels
        # Registers and the like also come first, but only a class token is asked for what it attends to.
        self.class_token = any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())
        self.patch = int(info[-1 if attention_labels else 0]["reduction"])
        if mask_patch is not None and (mask_patch < 1 or mask_patch % self.patch):
            what = "what a token of its last map spans" if attention_labels else "the model's patch"
            raise ValueError(f"mask_patch must be a multiple of {what}, {self.patch} pixels, got {mask_patch}")

    def mix(self, model: nn.Module, images: Tensor, labels: Tensor) -> Mixed:
        """Mixes every image with one of a random order of the batch.

        Raises:
            ValueError: The images have one cell.
        """
        cell = self._cell(images)
        grid = -(-images.shape[2] // cell), -(-images.shape[3] // cell)
        if grid == (1, 1):
            raise ValueError(f"maskmix needs images of several cells: with {cell} pixels a cell, images of "
                             f"{images.shape[2]} x {images.shape[3]} have one")
        mask, share = draw_cells(len(images), grid)
        mask, partner = mask.to(images.device), torch.randperm(len(images)).to(images.device)
        return Mixed(
            mix_by_cells(images, images[partner], mask, cell), _soft(labels, labels[partner], share, self.num_classes),
            labels, labels[partner], share, mask)

    def loss(
            self, mixed: Mixed, seen: Seen, attention: Tensor, smoothing: float, class_weight: Tensor | None) -> Tensor:
        """The loss with progressive attention labels; ``attention`` is that of the last layer."""
        found = token_attention(attention.detach(), seen, self.class_token)
        patch = mixed.images.shape[2] // seen.grid[0]
        mask = tokens_of_cells(mixed.mask, self._cell(mixed.images), patch, seen.grid)
        targets = mixed.targets * (1 - smoothing) + smoothing / self.num_classes
        return progressive_loss(
            seen.logits, mixed.labels, mixed.partner_labels, targets, attention_share(found, mask), mixed.share,
            class_weight)

    def _cell(self, images: Tensor) -> int:
        """Height and width of a cell in pixels."""
        return self.mask_patch or max(1, round(min(images.shape[2:]) / 4 / self.patch)) * self.patch


class SelfMotivatedMix(nn.Module):
    """SMMix: where the model looks in one image replaces where it does not look in another.

    Parameters: ``token_head``, the classifier of the mean tokens of each of the two parts; the model itself has none
    more.

    Args:
        model: The timm model that is trained.
        num_classes: Its classes.

    Raises:
        ValueError: The model does not say how many channels its last map has.
    """

    def __init__(self, model: Any, num_classes: int):
        super().__init__()
        if not isinstance(getattr(model, "num_features", None), int):
            raise ValueError(f"{type(model).__name__} has no num_features, the channels of its last map: smmix cannot "
                             "be used with it")
        self.num_classes = num_classes
        self.token_head = nn.Linear(model.num_features, num_classes)
        nn.init.trunc_normal_(self.token_head.weight, std=.02)
        nn.init.zeros_(self.token_head.bias)

    def mix(self, model: nn.Module, images: Tensor, labels: Tensor) -> Mixed:
        """Mixes every image with its partner, the one at the same place from the batch's end (of an odd batch the
        middle one is its own partner), by what the model, as in evaluation, attends to in both.

        Raises:
            ValueError: The model gives no attention over the tokens of its last map, or that has fewer than 2 x 2.
        """
        with torch.no_grad(), _evaluating(model), attention_maps(model, last=True) as maps:
            seen = forward_tokens(model, images)
        # Weights that autocast converted here have no gradients; it must not use them again in the training pass.
        torch.clear_autocast_cache()
        scores = token_attention(maps[0], seen).unflatten(1, seen.grid)
        side = min(seen.grid)
        if side < 2:
            raise ValueError(f"smmix needs a last map of 2 x 2 tokens at least, and {type(model).__name__} has "
                             f"{seen.grid[0]} x {seen.grid[1]} for images of {images.shape[2]} x {images.shape[3]}")
        least = max(1, int(0.25 * side))
        size = int(torch.randint(least, max(least, int(0.75 * side)) + 1, ()))
        mixed, mask = mix_by_attention(images, scores, size)
        share = 1 - size ** 2 / (seen.grid[0] * seen.grid[1])
        clean = share * seen.logits + (1 - share) * seen.logits.flip(0)
        return Mixed(mixed, _soft(labels, labels.flip(0), share, self.num_classes), labels, labels.flip(0), share, mask,
                     clean)

    def loss(self, mixed: Mixed, seen: Seen, criterion: Criterion) -> Tensor:
        """The loss of mixed images: of the mixed label, of both parts' own labels, and of the clean answers."""
        assert mixed.clean is not None
        own, partners = (F.one_hot(x, self.num_classes).to(mixed.targets) for x in (mixed.labels, mixed.partner_labels))
        mask = mixed.mask.flatten(1)
        parts = criterion(self.token_head(masked_mean(seen.tokens, mask)), own) \
            + criterion(self.token_head(masked_mean(seen.tokens, ~mask)), partners)
        consistency = F.kl_div(
            _wide(seen.logits).log_softmax(dim=1), _wide(mixed.clean).softmax(dim=1), reduction="batchmean")
        return criterion(seen.logits, mixed.targets) + 0.5 * parts + consistency

    def unused(self) -> Tensor:
        """Zero, for the loss of a batch that is not mixed so: several processes want a gradient of every parameter."""
        return 0 * (self.token_head.weight.sum() + self.token_head.bias.sum())


def forward_tokens(model: Any, images: Tensor) -> Seen:
    """Runs a timm model by its ``forward_features`` and ``forward_head``.

    Raises:
        ValueError: Its last features are no map of tokens that divide the images.
    """
    name = type(model).__name__
    features = model.forward_features(images)
    height, width = images.shape[2:]
    prefix, grid = 0, (0, 0)
    if isinstance(features, Tensor) and features.ndim == 4:
        last = features if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
        grid, tokens = (last.shape[1], last.shape[2]), last.flatten(1, 2)
    elif isinstance(features, Tensor) and features.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0) or 0
        tokens = features[:, prefix:]
        rows = round(math.sqrt(tokens.shape[1] * height / width))
        grid = rows, tokens.shape[1] // max(rows, 1)
    # A map of an image that its stride does not divide has tokens that hang over the border: they are no equal squares.
    patch = height // grid[0] if grid[0] else 0
    info = getattr(model, "feature_info", None)
    if 0 in grid or grid[0] * grid[1] != tokens.shape[1] or (grid[0] * patch, grid[1] * patch) != (height, width) \
            or (info and info[-1]["reduction"] != patch):
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the last features of {name} ({shape}) are no map of square tokens that images of {height} x {width} are "
            "made of: smmix and attention_labels cannot be used with it at this image size")
    return Seen(model.forward_head(features), tokens, grid, prefix)


def token_attention(attention: Tensor, seen: Seen, class_token: bool = False) -> Tensor:
    """What the tokens of a map get of the last layer's attention, mean over heads: ``[B, T]``.

    It is the attention of the class token (the paper's for MixPro), or the mean over the tokens of the map as queries
    (the paper's for SMMix, and ours for MixPro with a model that has no class token).

    Args:
        attention: Probabilities ``[B, heads, queries, keys]``.
        seen: What the model's forward pass gave.
        class_token: Whether it is that of the class token, the first query.

    Raises:
        ValueError: The attention is not over the tokens of the map: it is within windows, or keys are pooled or padded.
    """
    batch, tokens = seen.tokens.shape[:2]
    queries, keys = attention.shape[2:]
    if len(attention) != batch or keys != seen.prefix + tokens or (queries != keys and not class_token):
        raise ValueError(
            f"the last attention of the model ({len(attention)} maps of {queries} queries and {keys} keys for {batch} "
            f"images) is not over the {seen.grid[0]} x {seen.grid[1]} tokens of its last map: smmix and "
            "attention_labels cannot be used with it at this image size")
    attention = _wide(attention).mean(dim=1)
    rows = attention[:, 0] if class_token else attention[:, seen.prefix:].mean(dim=1)
    return rows[:, seen.prefix:]


def draw_cells(batch: int, grid: Grid) -> tuple[Tensor, float]:
    """Draws the cells that images keep of themselves (MixPro): of each another choice of as many.

    Returns:
        Booleans ``[batch, rows, columns]``, True in ``n`` places of each, and ``n`` as a share of all cells. The share
        before it is rounded up is uniform (``Beta(1, 1)``); ``n`` is 1 at least.
    """
    cells = grid[0] * grid[1]
    count = max(1, math.ceil(cells * torch.rand(()).item()))
    kept = torch.rand(batch, cells).argsort(dim=1)[:, :count]
    mask = torch.zeros(batch, cells, dtype=torch.bool).scatter_(1, kept, True)
    return mask.unflatten(1, grid), count / cells


def mix_by_cells(images: Tensor, partners: Tensor, mask: Tensor, cell: int) -> Tensor:
    """Images that are their own where the mask of square cells ``[B, rows, columns]`` is True, partners elsewhere.

    Cells at the bottom and on the right may be cut off by the border.
    """
    pixels = mask.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    return torch.where(pixels[:, None, :images.shape[2], :images.shape[3]], images, partners)


def tokens_of_cells(mask: Tensor, cell: int, patch: int, grid: Grid) -> Tensor:
    """Which tokens are of the image itself, ``[B, T]``, by the mask of the cells ``[B, rows, columns]``.

    Args:
        mask: True for a cell of the image itself.
        cell: Height and width of a cell in pixels.
        patch: Those of what a token spans.
        grid: Rows and columns of tokens.

    Raises:
        ValueError: A token lies in two cells.
    """
    if cell % patch:
        raise ValueError(
            f"mask_patch must be a multiple of what a token of the model's last map spans, {patch} pixels, got {cell}")
    rows, columns = (torch.arange(count, device=mask.device) * patch // cell for count in grid)
    return mask[:, rows[:, None], columns].flatten(1)


def attention_share(attention: Tensor, mask: Tensor) -> Tensor:
    """The share ``[B]`` of an image's attention ``[B, T]`` that its own tokens, by ``mask [B, T]``, get."""
    return (attention * mask).sum(dim=1) / attention.sum(dim=1)


def progressive_loss(
        logits: Tensor,
        labels: Tensor,
        partner_labels: Tensor,
        targets: Tensor,
        attention_shares: Tensor,
        area_share: float,
        class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy by progressive attention labels (MixPro), mean over the images.

    The more an answer is like the mixed label (by the cosine of both), the more attention, in place of area, says what
    each of the two labels weighs. Gradients flow through that likeness too, as in the authors' code.

    Args:
        logits: ``[B, classes]``.
        labels: Of the images themselves, ``[B]``.
        partner_labels: Of their partners, ``[B]``.
        targets: The mixed labels ``[B, classes]``, smoothed.
        attention_shares: ``[B]``.
        area_share: Of all images.
        class_weight: ``[classes]``; None for equal ones.
    """
    logits = _wide(logits)
    progress = F.cosine_similarity(targets.to(logits.dtype), logits.softmax(dim=1), dim=1)
    share = progress * attention_shares + (1 - progress) * area_share
    own, partners = (
        F.cross_entropy(logits, x, class_weight, reduction="none") for x in (labels, partner_labels))
    return (share * own + (1 - share) * partners).mean()


def mix_by_attention(images: Tensor, scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Copies the window with the most attention of each image's partner over the one with the least of its own.

    The partner of image i of B is that at B - 1 - i (SMMix).

    Args:
        images: ``[B, C, H, W]``, of whole tokens.
        scores: Attention that tokens get, ``[B, rows, columns]``.
        size: Rows and columns of tokens of a window.

    Returns:
        The mixed images, and which tokens are the image's own, ``[B, rows, columns]``.
    """
    batch, rows, columns = scores.shape
    patch = images.shape[2] // rows
    sums = window_sums(scores, size)
    places = sums.shape[2]
    target, source = sums.flatten(1).argmin(dim=1), sums.flatten(1).argmax(dim=1).flip(0)

    def window(first: Tensor, side: int, scale: int) -> Tensor:
        return first[:, None] * scale + torch.arange(side * scale, device=images.device)

    number, partner = torch.arange(batch, device=images.device), torch.arange(batch, device=images.device).flip(0)
    (to_y, to_x), (from_y, from_x) = (
        (window(place // places, size, patch)[:, :, None], window(place % places, size, patch)[:, None])
        for place in (target, source))
    mixed = images.clone()
    mixed[number[:, None, None], :, to_y, to_x] = images[partner[:, None, None], :, from_y, from_x]
    own = torch.ones(batch, rows, columns, dtype=torch.bool, device=images.device)
    own[number[:, None, None], window(target // places, size, 1)[:, :, None],
        window(target % places, size, 1)[:, None]] = False
    return mixed, own


def window_sums(scores: Tensor, size: int) -> Tensor:
    """Sums of all square windows of a map ``[B, rows, columns]``, ``[B, rows - size + 1, columns - size + 1]``."""
    return F.avg_pool2d(scores[:, None], size, stride=1, divisor_override=1)[:, 0]


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean ``[B, channels]`` of the tokens ``[B, T, channels]`` where ``mask [B, T]`` is True; it is so somewhere."""
    weights = mask.to(tokens.dtype)
    return (weights[:, None] @ tokens)[:, 0] / weights.sum(dim=1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _soft(labels: Tensor, partner_labels: Tensor, share: float, num_classes: int) -> Tensor:
    """Mixed labels ``[B, classes]``."""
    own, partners = (F.one_hot(x, num_classes).float() for x in (labels, partner_labels))
    return share * own + (1 - share) * partners


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; then all its parts are in the modes that they were in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
