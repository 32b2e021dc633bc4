"""Bi-level routing attention and its full-attention partner (the authors' numbers are in tests/ops/test_routed.py)."""
import pytest
import torch
import torch.nn.functional as F

from visionattn.layers import BiLevelRoutingAttention, FullAttention


def bilevel(**options):
    torch.manual_seed(0)
    return BiLevelRoutingAttention(16, 2, dtype=torch.float64, **options)


@pytest.mark.parametrize("size", [(14, 21), (7, 7)])
def test_versions_agree_where_nothing_is_padded(size):
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    first, second = bilevel(pad="input"), bilevel(pad="qkv")
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), second(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(first.route(x)[0], second.route(x)[0])


def test_padding_the_input_is_padding_beforehand():
    x = torch.randn(1, 10, 17, 16, dtype=torch.float64)
    module = bilevel(pad="input")
    padded = F.pad(x, (0, 0, 0, 4, 0, 4))
    torch.testing.assert_close(module(x), module(padded)[:, :10, :17])
    routes, region_size = module.route(x)
    assert region_size == (2, 3)
    assert routes.shape == (1, 1, 49, 4)


def test_padding_the_projection():
    """Zero keys and values take part, but not in a region's mean."""
    x = torch.randn(1, 5, 5, 16, dtype=torch.float64)
    module = bilevel(n_win=2, topk=9, pad="qkv")  # regions of 2x2, a grid of 3x3, all of it attended to
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    attention = F.scaled_dot_product_attention(*(
        F.pad(t, (0, 0, 0, 1, 0, 1)).reshape(1, 36, 2, 8).transpose(1, 2) for t in (q, k, v)), scale=16 ** -0.5)
    attention = attention.transpose(1, 2).reshape(1, 6, 6, 16)[:, :5, :5]
    expected = module.proj(attention + module.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x), expected)

    routes, region_size = module.route(x)
    assert region_size == (2, 2)
    means = [torch.stack([t[0, i:i + 2, j:j + 2].mean(dim=(0, 1)) for i in (0, 2, 4) for j in (0, 2, 4)])
             for t in (q, k)]
    assert torch.equal(routes[0, 0], (means[0] @ means[1].T).argsort(dim=-1, descending=True))


@pytest.mark.parametrize("pad", ["input", "qkv"])
@pytest.mark.parametrize("size", [(1, 1), (3, 20), (20, 3), (8, 8)])
def test_any_size(pad, size):
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    module = bilevel(pad=pad)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.isfinite().all()
    routes, _ = module.route(x)
    assert routes.max() < routes.shape[2]


def test_topk_is_limited_to_the_regions_there_are():
    x = torch.randn(1, 2, 2, 16, dtype=torch.float64)
    assert bilevel(n_win=2, topk=16).route(x)[0].shape == (1, 1, 4, 4)
    assert torch.equal(bilevel(n_win=2, topk=16)(x), bilevel(n_win=2, topk=4)(x))


def test_no_gradient_through_routing():
    """Where a region attends to itself alone, the mean of its queries decides nothing that has a gradient."""
    module = bilevel(topk=1, n_win=2)
    x = torch.randn(1, 2, 2, 16, dtype=torch.float64)  # regions of one token: a softmax over one key
    module(x).sum().backward()
    queries_and_keys, values = module.qkv.weight.grad[:32], module.qkv.weight.grad[32:]
    assert queries_and_keys.abs().max() < 1e-14  # the rounding of a softmax over one key
    assert values.abs().max() > 0


def test_routing_of_bfloat16_is_computed_in_float32():
    """A mean over many tokens keeps its digits."""
    module = bilevel(n_win=1, topk=1).to(torch.bfloat16)
    assert module(torch.randn(1, 40, 40, 16, dtype=torch.bfloat16)).isfinite().all()
    from visionattn.layers.bilevel_routing import _region_means
    x = torch.ones(1, 64, 64, 1, dtype=torch.bfloat16)
    x[:, ::2] = 1.0078125
    assert _region_means(x, (1, 1), (64, 64)).item() == 1.00390625


@pytest.mark.parametrize("lepe_of", ["input", "value"])
def test_full_attention(lepe_of):
    torch.manual_seed(0)
    module = FullAttention(16, num_heads=4, lepe_of=lepe_of, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    assert module.qkv.bias is None
    q, k, v = (t.reshape(2, 15, 4, 4).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    attention = ((q @ k.mT) * 4 ** -0.5).softmax(dim=-1) @ v
    lepe = module.lepe((x if lepe_of == "input" else module.qkv(x)[..., 32:]).permute(0, 3, 1, 2))
    expected = module.proj(attention.transpose(1, 2).reshape(2, 3, 5, 16) + lepe.permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x), expected)


def test_wrong_options():
    with pytest.raises(ValueError, match="pad must be 'input' or 'qkv', got 'reflect'"):
        bilevel(pad="reflect")
    with pytest.raises(ValueError, match="lepe_of must be 'input' or 'value', got 'query'"):
        FullAttention(16, lepe_of="query")
    with pytest.raises(ValueError, match="num_heads 3 must divide dim 16"):
        BiLevelRoutingAttention(16, 3)
    with pytest.raises(ValueError, match="num_heads 3 must divide dim 16"):
        FullAttention(16, 3)
