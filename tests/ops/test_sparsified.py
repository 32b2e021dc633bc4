"""Sparsified attention: both forms against each other and against full attention, and what it asks of its arguments."""
import pytest
import torch
import torch.nn.functional as F

from visionattn.ops import BackendError, sparsified_attention
from visionattn.ops.dispatch import chosen
from visionattn.ops.sparsified import SparsifiedProblem, gathered, masked


def problem(queries=24, keys=17, groups=24, chosen=5, heads=3, dim=8, value_dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, heads, width, generator=generator, dtype=torch.float64).requires_grad_()
               for n, width in ((queries, dim), (keys, dim), (keys, value_dim)))
    return q, k, v, torch.rand(2, heads, groups, keys, generator=generator).topk(chosen).indices


@pytest.mark.parametrize("groups", [24, 8, 1])
@pytest.mark.parametrize("count", [1, 5, 17])
@pytest.mark.parametrize("fast", ["gathered", "masked"])
def test_fast_forms_are_naive(fast, groups, count, monkeypatch):
    monkeypatch.setattr(gathered, "_ENTRIES", 3 * 2 * 3 * count * 8)  # three groups at a time
    monkeypatch.setattr(masked, "_ENTRIES", 3 * 2 * 3 * 17 * 24 // groups)
    *given, index = problem(groups=groups, chosen=count)
    results = []
    for backend in (fast, "naive"):
        out = sparsified_attention(*given, index, scale=0.4, backend=backend)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, given, direction)])
        with torch.no_grad():
            torch.testing.assert_close(sparsified_attention(*given, index, scale=0.4, backend=backend), out)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["gathered", "masked", "naive"])
def test_with_all_keys_it_is_full_attention(backend):
    q, k, v, index = problem(groups=6, chosen=17)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(sparsified_attention(q, k, v, index, backend=backend), expected)


@pytest.mark.parametrize("groups", [24, 8])
@pytest.mark.parametrize("backend", ["gathered", "masked", "naive"])
def test_it_is_dense_attention_with_a_mask(backend, groups):
    q, k, v, index = problem(groups=groups)
    seen = torch.zeros(2, 3, groups, 17, dtype=torch.bool).scatter(3, index, True)
    seen = seen.repeat_interleave(24 // groups, dim=2)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen)
    torch.testing.assert_close(sparsified_attention(q, k, v, index, backend=backend), expected.transpose(1, 2))


@pytest.mark.parametrize(("tokens", "groups", "count", "backend"), [
    (1024, 1024, 256, "masked"), (1024, 1024, 16, "gathered"), (1024, 16, 256, "gathered"), (1024, 16, 900, "masked")])
def test_lists_are_copied_where_that_is_less_work(tokens, groups, count, backend):
    """Those of every query only if they are short; those of many queries unless they hold nearly all keys."""
    asked = SparsifiedProblem(tokens, tokens, groups, count, 2, 64, 64, torch.float32, "cpu")
    assert chosen("sparsified_attention", asked) == backend
    assert chosen("sparsified_attention", asked._replace(device="cuda")) == "gathered"


def test_bad_arguments():
    q, k, v, index = (x.detach() for x in problem())
    for arguments, message in (
            ((q[0], k, v, index), r"must be \[batch, tokens, heads, head_dim\]"),
            ((q, k[..., :4], v, index), "k must have q's batch, heads and head_dim"),
            ((q, k, v[:, 1:], index), "v must have k's batch, tokens and heads"),
            ((q, k.float(), v, index), "k is torch.float32 on cpu, but q is torch.float64"),
            ((q, k, v, index[0]), r"index must be \[batch, heads, groups, chosen\]"),
            ((q, k, v, index[:, :, :7]), r"groups of index \(7\) must divide the queries \(24\)"),
            ((q, k, v, index + 1), "index must hold 0 to 16, got 1 to 17"),
            ((q, k, v, index.int()), "index must be int64 on cpu, got torch.int32"),
            ((q.int(), k.int(), v.int(), index), "must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsified_attention(*arguments)
    with pytest.raises(BackendError, match="has no backend 'blocked'; it has masked, gathered, naive"):
        sparsified_attention(q, k, v, index, backend="blocked")
