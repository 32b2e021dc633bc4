"""Factorized attention: tiles by a loop, maps smaller than a tile, both ways to merge, refusals.

What every op is asked for is in test_common.py and test_cases.py; that "runs" are the authors' is in the golden of
tests/models/test_favit.py.
"""
import pytest
import torch
import torch.nn.functional as F

from visionattn.ops import factorized_attention, merge_tiles

D = dict(dtype=torch.float64)


def places(x, window, dilation):
    """A list of what the tiles ``[batch, heads, dim]`` have, for each place of the window."""
    side = (window - 1) * dilation + 1
    height, width = x.shape[1:3]

    def mirrored(position, length):
        while length > 1 and not 0 <= position < length:
            position = abs(position) if position < 0 else 2 * (length - 1) - position
        return min(position, length - 1)

    return [
        [x[:, mirrored(top + i * dilation, height), mirrored(left + j * dilation, width)]
         for top in range(0, height, side) for left in range(0, width, side)]
        for i in range(window) for j in range(window)]


@pytest.mark.parametrize("size", [(10, 7), (9, 2), (1, 3)], ids=str)
@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (3, 2), (2, 4)])
def test_tiles(size, window, dilation):
    """Of maps of whole and of broken tiles, and of maps that are far smaller than a tile."""
    x = torch.randn(2, *size, 2, 5, generator=torch.Generator().manual_seed(0), **D)
    found = places(x, window, dilation)
    mean = torch.stack([torch.stack(tiles).mean(dim=0) for tiles in found], dim=1)
    torch.testing.assert_close(merge_tiles(x, window, dilation), mean)
    # All channels of the first tile, then of the second: the mean of each run of as many as there are tiles.
    runs = torch.stack([
        torch.stack([run.mean(dim=-1) for run in torch.cat(tiles, dim=-1).split(len(tiles), dim=-1)], dim=-1)
        for tiles in found], dim=1)
    torch.testing.assert_close(merge_tiles(x, window, dilation, "runs"), runs)
    for backend in ("merged", "naive"):
        actual = factorized_attention(x, x, x, window, (dilation,), backend=backend).flatten(1, 2)
        expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (x.flatten(1, 2), mean, mean)))
        torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_pytorchs_reflection():
    """Where it can be done, in one step."""
    x = torch.randn(1, 16, 18, 1, 4, generator=torch.Generator().manual_seed(0), **D)
    padded = F.pad(x[..., 0, :].movedim(-1, 1), (0, 7, 0, 9), mode="reflect").movedim(1, -1)[..., None, :]
    torch.testing.assert_close(merge_tiles(x, 7, 4), merge_tiles(padded, 7, 4))


def test_one_tile_is_full_attention():
    q, k, v = torch.randn(3, 2, 7, 7, 2, 8, generator=torch.Generator().manual_seed(0), **D)
    q = torch.cat([q, q + 1], dim=1)
    expected = F.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(factorized_attention(q, k, v).flatten(1, 2).transpose(1, 2), expected)


def test_heads_have_dilations_of_their_own():
    q = torch.randn(1, 9, 9, 4, 8, generator=torch.Generator().manual_seed(0), **D)
    both = factorized_attention(q, q, q, 3, (1, 4))
    for heads, dilation in ((slice(2), 1), (slice(2, 4), 4)):
        x = q[..., heads, :]
        torch.testing.assert_close(both[..., heads, :], factorized_attention(x, x, x, 3, (dilation,)))


@pytest.mark.parametrize(("shapes", "options", "message"), [
    ([(2, 5, 5, 8)] * 3, {}, r"must be \[batch, height, width, heads, head_dim\]"),
    ([(2, 5, 5, 2, 8), (2, 5, 5, 1, 8), (2, 5, 5, 2, 8)], {}, "k must have q's batch, heads and head_dim"),
    ([(2, 5, 5, 2, 8), (2, 5, 5, 2, 8), (2, 4, 5, 2, 8)], {}, "v must have k's batch, height, width and heads"),
    ([(2, 5, 5, 3, 8)] * 3, dict(dilations=(1, 2)), "2 dilations must divide the 3 heads"),
    ([(2, 5, 5, 2, 8)] * 3, dict(dilations=(0,)), "dilations must be positive ints"),
    ([(2, 5, 5, 2, 8)] * 3, dict(window=0), "window must be a positive int"),
])
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        factorized_attention(*map(torch.zeros, shapes), **options)


def test_unknown_merging_is_refused():
    with pytest.raises(ValueError, match="merging must be 'tiles' or 'runs', got 'mean'"):
        merge_tiles(torch.zeros(1, 7, 7, 1, 4), merging="mean")
