"""Reversed attention: what its definition promises, both forms against each other, what it asks of arguments."""
import pytest
import torch

from visionattn.ops import BackendError, reversed_attention
from visionattn.ops.reversed import blocked

both = pytest.mark.parametrize("backend", ["blocked", "naive"])


def problem(senders=29, receivers=29, dim=8, value_dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, senders, 3, dim), "k": (2, receivers, 3, dim), "v": (2, senders, 3, value_dim)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["weights"] = torch.rand(2, senders, 3, generator=generator, dtype=torch.float64)
    return {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}


@both
def test_a_message_is_spread_and_not_lost(backend):
    """What all receivers get together is what was sent, weighted."""
    given = problem(receivers=13)
    out = reversed_attention(**given, backend=backend)
    assert out.shape == (2, 13, 3, 6)
    torch.testing.assert_close(out.sum(1), (given["v"] * given["weights"][..., None]).sum(1))


@both
def test_without_weights_it_is_the_transpose_of_attention(backend):
    """So it is what attention's result passes back to its values."""
    given = problem()
    del given["weights"]
    q, k, v = (x.transpose(1, 2) for x in given.values())
    values = torch.zeros_like(v).requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, values, scale=0.4)
    expected, = torch.autograd.grad(out, values, v)
    torch.testing.assert_close(reversed_attention(**given, scale=0.4, backend=backend), expected.transpose(1, 2))


@pytest.mark.parametrize(("senders", "receivers"), [(29, 29), (33, 7), (1, 5), (40, 1)])
def test_blocks_are_the_definition(senders, receivers, monkeypatch):
    monkeypatch.setattr(blocked, "_ENTRIES", 16)  # blocks of 16 senders, the last one smaller
    given = problem(senders, receivers)
    results = []
    for backend in ("blocked", "naive"):
        out = reversed_attention(**given, backend=backend)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, list(given.values()), direction)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_bad_arguments():
    q, k, v, weights = (x.detach() for x in problem(receivers=9).values())
    for arguments, message in (
            ((q[0], k, v), r"must be \[batch, tokens, heads, head_dim\]"),
            ((q, k[:1], v), "k must have q's batch, heads and head_dim"),
            ((q, k, v[:, 1:]), "v must have q's batch, tokens and heads"),
            ((q, k, v, weights[..., :1]), r"weights must be .* = \[2, 29, 3\], got \[2, 29, 1\]"),
            ((q, k, v.float(), weights), "v is torch.float32 on cpu, but q is torch.float64"),
            ((q, k, v, weights.float()), "weights is torch.float32 on cpu"),
            ((q.int(), k.int(), v.int()), "must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            reversed_attention(*arguments)
    with pytest.raises(BackendError, match="has no backend 'fused'; it has blocked, naive"):
        reversed_attention(q, k, v, backend="fused")
