"""The proposal after MAELRE: its own numbers, and what its description promises."""
import pytest
import torch

from tests import golden
from visionattn.layers import LongRangeAttention, TokenMerging, attention_maps

CASES = golden.load("maelre_ops")["cases"]
D = dict(dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"])
def test_golden(case):
    weights = {key: x.detach() for key, x in golden.filled(case["params"]).items()}
    dim = case["x_shape"][-1]
    if case["kind"] == "merge":
        layer = TokenMerging(dim, **D)
        weights["score"] = weights.pop("score.weight")[0]
    else:
        layer = LongRangeAttention(dim, case["heads"], case["kind"].removeprefix("attention_"), **D)
    layer.load_state_dict(weights)
    x = golden.random(case["x_seed"], case["x_shape"]).requires_grad_()
    out = layer(x)
    golden.assert_equals(out, case["out"])
    (out * golden.random(case["grad_seed"], out.shape)).sum().backward()
    golden.assert_equals(x.grad, case["grad_x"])
    for key, expected in case["grads"].items():
        grad = layer.score.grad[None] if key == "score.weight" else layer.get_parameter(key).grad
        golden.assert_equals(grad, expected)


@torch.no_grad()
def test_the_mode_follows_the_number_of_tokens():
    torch.manual_seed(0)
    auto = LongRangeAttention(8, 2, **D)
    for mode, tokens in (("full", 8), ("linear", 9)):
        fixed = LongRangeAttention(8, 2, mode, **D)
        fixed.load_state_dict(auto.state_dict())
        x = torch.randn(2, tokens, 8, **D)
        assert torch.equal(auto(x), fixed(x))
        order = torch.randperm(tokens)
        torch.testing.assert_close(fixed(x[:, order]), fixed(x)[:, order])
        with attention_maps(fixed) as maps:
            fixed(x)
        v = fixed.qkv(x).unflatten(-1, (3, 2, 4))[:, :, 2]
        assert maps[0].shape == (2, 2, tokens, tokens)
        torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(2, 2, tokens, **D))
        heads = maps[0] @ v.transpose(1, 2)
        torch.testing.assert_close(fixed.proj(heads.transpose(1, 2).flatten(2)), fixed(x))


def test_a_graph_of_any_size_has_one_mode():
    layer, x = LongRangeAttention(8, 2), torch.randn(2, 6, 5, 8)
    sizes = ({1: torch.export.Dim("height", max=99)},)
    with pytest.raises(Exception, match="fix it by mode='linear'"):
        torch.export.export(layer.eval(), (x,), dynamic_shapes=sizes, strict=False)
    layer.mode = "linear"
    program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=False).module()
    x = torch.randn(2, 7, 5, 8)
    torch.testing.assert_close(program(x), layer(x))


@torch.no_grad()
def test_merging_starts_as_the_mean():
    layer, x = TokenMerging(6, **D), torch.randn(2, 5, 3, 6, **D)
    y = layer.norm(x)
    out = layer(x)
    torch.testing.assert_close(out[:, 0, 0], layer.reduce(y[:, :2, :2].mean(dim=(1, 2))))
    torch.testing.assert_close(out[:, 2, 1], layer.reduce(y[:, 4, 2]))  # the corner is alone in its cell
    torch.testing.assert_close(out[:, 2, 0], layer.reduce(y[:, 4, :2].mean(dim=1)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode must be auto, linear or full, got 'fast'"):
        LongRangeAttention(8, 2, "fast")
    with pytest.raises(ValueError, match=r"num_heads \(3\) must divide dim \(8\)"):
        LongRangeAttention(8, 3)
