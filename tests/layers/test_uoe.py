"""Union of experts: the authors' numbers, the two ways to compute it, and what is ours beside them."""
import pytest
import torch

from tests import golden
from visionattn.layers import UnionOfExpertsAttention, attention_maps, auxiliary_losses, uoe

CASES = golden.load("uoe_ops")["cases"]
D = dict(dtype=torch.float64)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_golden(number):
    """With the tokens of each head that the authors' code took; its router gets no gradient."""
    case = CASES[number]
    weights = golden.filled(case["params"])
    dim, heads = case["dim"], case["experts"]
    x = golden.random(case["x_seed"], (case["batch"], case["tokens"], dim)).requires_grad_()
    u = uoe.rotate(x, heads)
    probability = torch.nn.functional.linear(u, weights["switch_gate.weight"], weights["switch_gate.bias"]).softmax(-1)
    chosen = torch.zeros_like(probability).scatter(-1, probability.topk(case["topk"]).indices, 1)
    gates = probability * chosen
    golden.assert_equals(gates / (gates.sum(dim=-1, keepdim=True) + 1), case["route"])
    index = torch.tensor(case["seq_ids"]).transpose(0, 1)
    if not case.get("fill"):
        for image, row in enumerate(index):
            for head, taken in enumerate(row):
                assert chosen[image, :, head].nonzero().flatten().tolist() == taken.tolist()
    keys = index < case["tokens"] - case.get("masked_last", 0)
    scale = (dim / case.get("num_heads", heads)) ** -0.5
    out = uoe.expert_attention(
        u, index, keys, torch.ones(index.shape, **D), weights["W_qkv.weight.0"], weights["W_qkv.bias.0"][:, 0],
        weights["ff.weight.0"], weights["ff.bias"], scale)
    golden.assert_equals(out, case["out"])
    (out * golden.random(case["grad_seed"], out.shape)).sum().backward()
    golden.assert_equals(x.grad, case["grad_x"])
    for key, expected in case["grads"].items():
        if expected is None:
            assert weights[key].grad is None
        else:
            golden.assert_equals(weights[key].grad, expected)


def make(topk=2, **options):
    torch.manual_seed(0)
    layer = UnionOfExpertsAttention(16, 4, topk, **options, **D)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return layer


@pytest.mark.parametrize("gate_output", [True, False])
def test_the_masked_form_is_the_gathered_one(gate_output, monkeypatch):
    """Heads of which some get no token of an image, too."""
    layer, x = make(1, gate_output=gate_output), golden.random(0, (3, 3, 2, 16))
    used = [parameter for name, parameter in layer.named_parameters() if gate_output or "router" not in name]
    results = []
    for gathers in (True, False):
        monkeypatch.setattr(uoe, "concrete", lambda x, gathers=gathers: gathers)
        leaf = x.clone().requires_grad_()
        with attention_maps(layer) as maps:
            out = layer(leaf)
        results.append([out, *maps, *torch.autograd.grad(out.sin().sum(), [leaf, *used])])
    for gathered, masked in zip(*results, strict=True):
        torch.testing.assert_close(gathered, masked)
    sums = results[0][1].sum(dim=-1)
    assert sums.shape == (3, 4, 6)
    torch.testing.assert_close(sums.sum(dim=1), torch.ones(3, 6, **D))  # each token is served by one head
    assert (sums.sum(dim=-1) == 0).any()  # the heads without a token


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates():
    layer, x = make(), golden.random(0, (3, 10, 16))
    together = layer(x)
    torch.testing.assert_close(together[:1], layer(x[:1]))
    x[1] = x[2, :1]  # all tokens of an image choose alike, so that heads of others fill up
    torch.testing.assert_close(layer(x)[:1], together[:1])


def test_the_router_learns_and_is_balanced():
    layer, x = make().train(), golden.random(0, (2, 10, 16))
    layer(x).sum().backward()
    assert layer.router.grad.any()
    assert layer.router_bias.grad.any()
    losses = auxiliary_losses(layer)
    assert losses.keys() == {"expert_balance"}
    with torch.no_grad():
        layer.router.zero_()
        layer.router_bias.copy_(torch.tensor([9., 9., 0., 0.]))  # two of four heads take all tokens
    layer(x)
    worst = auxiliary_losses(layer)["expert_balance"]
    torch.testing.assert_close(worst.item(), 0.01 * 4, rtol=1e-3, atol=0)
    assert losses["expert_balance"] < worst


@torch.no_grad()
def test_capacity_drops_the_least_gates():
    layer, x = make(1), golden.random(0, (2, 12, 16))
    expected = layer(x)
    layer.capacity = 4.  # room for all tokens in one head
    torch.testing.assert_close(layer(x), expected)
    layer.capacity = 1.
    served = (layer(x) != 0).any(dim=-1).sum(dim=1)
    assert (served <= 12).all()
    assert served.min() < 12
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dim / num_heads = 12 / 2, must be a multiple of 4"):
        UnionOfExpertsAttention(12, 2)
    with pytest.raises(ValueError, match="topk must be 1 to 2 and capacity positive, got 3 and None"):
        UnionOfExpertsAttention(8, 2, 3)
