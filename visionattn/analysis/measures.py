"""What the heads of attention look at, in numbers: how far, how widely, how much at class tokens and themselves.

After "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (TVCG 2023, arXiv 2303.13731).
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .by_layer import LayerAttention, recorded_by_layer
from .places import Places, token_places

__all__ = ["Attended", "measure_attention", "measure_maps"]


class Attended(NamedTuple):
    """What the heads of a layer look at; means over images and queries, those in padding left out.

    Each query's attention counts as shares that sum to one, also where the layer's rows do not; queries that attend to
    nothing are left out.

    Attributes:
        entropy: Of a query's attention, in nats ``[heads]``.
        distance: Mean distance that attention between tokens of the map goes over, from centre to centre, in pixels of
            the image ``[heads]``. NaN where it is not known, as are the shares.
        class_share: Share of attention that goes to class tokens and the like ``[heads]``; NaN where there are none.
        self_share: Share of attention that goes to the query itself ``[heads]``; NaN where it is none of the keys.
        offsets: Mean attention of all pairs of tokens of the map at an offset, in steps of a query's side, ``[heads,
            2 rows + 1, 2 columns + 1]``, the query in the middle; 0 at offsets of no pair. None where places are not
            known.
        pixels: Side of a token, the step between offsets, in pixels of the image.
        why: Why something is not known; "" if all is.
    """

    entropy: Tensor
    distance: Tensor
    class_share: Tensor
    self_share: Tensor
    offsets: Tensor | None = None
    pixels: float = 0
    why: str = ""


def measure_attention(model: nn.Module, images: Tensor, batch: int = 8) -> dict[str, list[Attended]]:
    """Measures what the heads of a model look at in some images.

    Maps are measured layer by layer and forgotten: a batch takes its queries and keys, and the maps of one layer.

    Args:
        model: A model in eval mode.
        images: ``[images, channels, height, width]``.
        batch: Images at once.

    Returns:
        By the name of the layer, for each group of its heads that looks in a way of its own (most layers have one), in
        the order of the heads. Layers without maps are missing.
    """
    sums: dict[str, list[_Sums]] = {}
    size = images.shape[2], images.shape[3]
    with torch.no_grad():
        for x in images.split(batch):
            with recorded_by_layer(model) as layers:
                model(x)
            layers.reverse()
            queries: dict[str, list[Tensor]] = {}  # of each group, as far as its parts have run
            while layers:
                layer = layers.pop()  # and its map with it
                places, why = _places(layer)
                groups, boxes = queries.setdefault(layer.name, []), torch.empty(0, 4)
                if places is not None:
                    boxes = places.queries.flatten(0, 1).nan_to_num(-1)
                # Where a layer comes to a query again, it has come to its next heads; stripes run one after the other.
                if not groups or not len(boxes) or (groups[-1] == boxes[0]).all(dim=1).any():
                    groups.append(boxes)
                else:
                    groups[-1] = torch.cat([groups[-1], boxes])
                of_layer = sums.setdefault(layer.name, [])
                if len(of_layer) < len(groups):
                    of_layer.append(_Sums(layer.maps.shape[1], size))
                of_layer[len(groups) - 1].add(layer.maps, places, why)
    return {name: [group.result() for group in groups] for name, groups in sums.items()}


def measure_maps(maps: Tensor, places: Places, size: tuple[int, int]) -> Attended:
    """Measures maps ``[images * windows, heads, queries, keys]`` whose tokens lie at ``places`` of an image.

    Args:
        maps: Weights of keys.
        places: Of one image's queries and keys.
        size: Height and width of the image, in pixels.
    """
    sums = _Sums(maps.shape[1], size)
    sums.add(maps, places, "")
    return sums.result()


def _places(layer: LayerAttention) -> tuple[Places | None, str]:
    try:
        return token_places(layer), ""
    except ValueError as error:
        return None, str(error)


class _Sums:
    """Sums over images, queries and keys, of the heads of one group."""

    def __init__(self, heads: int, size: tuple[int, int]):
        self.size = size
        self.entropy, self.rows = _zeros(heads), _zeros(heads)
        self.distance, self.placed = _zeros(heads), _zeros(heads)
        self.to_class, self.class_rows = _zeros(heads), _zeros(heads)
        self.to_self, self.self_rows = _zeros(heads), _zeros(heads)
        self.offsets: Tensor | None = None
        self.pairs: Tensor = _zeros(1)
        self.side, self.why = 0., ""

    def add(self, maps: Tensor, places: Places | None, why: str) -> None:
        """Adds maps ``[images * windows, heads, queries, keys]``."""
        maps = maps.float()
        if maps.min() < 0:
            self.why = "its weights may be negative, and are no shares of attention"
            return
        self.why = self.why or why
        counts = maps.sum(dim=-1, keepdim=True) > 0
        if places is not None:
            places = places._replace(queries=places.queries.to(maps.device), keys=places.keys.to(maps.device))
            inside = self._inside(places.queries)
            inside[:, :places.prefix] = True
            counts &= inside.repeat(len(maps) // len(inside), 1)[:, None, :, None]
        shares = torch.where(counts, maps / maps.sum(dim=-1, keepdim=True), 0)
        self.entropy += _by_head(torch.special.entr(shares))
        self.rows += _by_head(counts)
        if places is not None:
            windows = len(places.queries)
            self._add_shares(shares.unflatten(0, (-1, windows)).sum(dim=0),
                             counts[..., 0].unflatten(0, (-1, windows)).sum(dim=0), places, len(maps) // windows)

    def _add_shares(self, shares: Tensor, counts: Tensor, places: Places, images: int) -> None:
        """Adds sums over images ``[windows, heads, queries, keys]``, of so many of them ``[windows, heads, queries]``.
        """
        if places.prefix:
            self.to_class += _by_head(shares[..., :places.prefix])
            self.class_rows += _by_head(counts)
        queries, keys = places.queries, places.keys
        itself = (queries[:, :, None] == keys[:, None]).all(dim=-1)
        itself[:, :places.prefix, :places.prefix] |= torch.eye(
            places.prefix, dtype=torch.bool, device=itself.device)[:queries.shape[1]]
        self.to_self += _by_head(shares * itself[:, None])
        self.self_rows += _by_head(counts * itself.any(dim=-1)[:, None])
        placed = self._inside(queries)[:, :, None] & self._inside(keys)[:, None]
        if not placed.any():
            return
        steps = torch.where(placed[..., None], (_centres(keys)[:, None] - _centres(queries)[:, :, None]), 0)
        self.distance += _by_head(shares * steps.norm(dim=-1)[:, None])
        self.placed += _by_head(shares * placed[:, None])
        self._add_offsets(shares, steps, placed, queries, images)

    def _add_offsets(self, shares: Tensor, steps: Tensor, placed: Tensor, queries: Tensor, images: int) -> None:
        sides = queries[..., 2] - queries[..., 0]
        self.side = sides[sides.isfinite()][0].item()
        rows, columns = (int(-(-length // self.side)) for length in self.size)
        index = (steps / self.side + 0.5).floor().long()  # of pooled keys half-way between two offsets, the larger
        index = (index[..., 0] + rows) * (2 * columns + 1) + index[..., 1] + columns
        index, chosen = index[placed], shares.transpose(0, 1)[:, placed]
        if self.offsets is None:
            shape = 2 * rows + 1, 2 * columns + 1
            self.offsets = torch.zeros(len(chosen), *shape, dtype=torch.float64)
            self.pairs = torch.zeros(shape, dtype=torch.float64)
        found = torch.zeros(len(chosen), self.pairs.numel(), device=chosen.device).index_add_(1, index, chosen)
        self.offsets += found.cpu().view_as(self.offsets)
        self.pairs += images * index.bincount(minlength=self.pairs.numel()).cpu().view_as(self.pairs)

    def _inside(self, boxes: Tensor) -> Tensor:
        """Whether centres are those of tokens within the image, ``[windows, tokens]``."""
        centres = _centres(boxes)
        return ((centres > 0) & (centres < torch.tensor(self.size, device=boxes.device))).all(dim=-1)

    def result(self) -> Attended:
        """The means."""
        offsets = None
        if self.offsets is not None:
            offsets = (self.offsets / self.pairs.clamp(min=1)).float()
        entropy, distance, to_class, to_self = ((total / rows).float() for total, rows in (  # 0 / 0 is NaN
            (self.entropy, self.rows), (self.distance, self.placed), (self.to_class, self.class_rows),
            (self.to_self, self.self_rows)))
        return Attended(entropy, distance, to_class, to_self, offsets, self.side, self.why)


def _zeros(heads: int) -> Tensor:
    return torch.zeros(heads, dtype=torch.float64)


def _by_head(values: Tensor) -> Tensor:
    """Sums over all axes but that of the heads, the second."""
    return values.sum(dim=[i for i in range(values.ndim) if i != 1], dtype=torch.float64).cpu()


def _centres(boxes: Tensor) -> Tensor:
    """Rows and columns ``[..., 2]``, in pixels; NaN of tokens without a place."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2
