"""Union of experts: the authors' numbers, the two ways to compute it, and what is ours beside them."""
import pytest
import torch

from tests import golden
from visionattn.layers import UnionOfExpertsAttention, UnionOfPerceptrons, attention_maps, auxiliary_losses, uoe

CASES = [case for case in golden.load("uoe_ops")["cases"] if case["kind"] == "smha"]
PERCEPTRONS = [case for case in golden.load("uoe_ops")["cases"] if case["kind"] != "smha"]
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
    check(out, x, weights, case)


@pytest.mark.parametrize("number", range(len(PERCEPTRONS)))
def test_golden_perceptrons(number):
    """The authors' second version, whose gates are those of a batch and change nothing, and the third."""
    case = PERCEPTRONS[number]
    weights = golden.filled(case["params"])
    second = case["kind"] == "uome_v2"
    x = golden.random(case["x_seed"], (case["batch"], case["tokens"], case["dim"])).requires_grad_()
    router = "switch_gate.w_gate" if second else "switch_gate"
    scores = torch.nn.functional.linear(x, weights[f"{router}.weight"], weights[f"{router}.bias"])
    probability = scores.softmax(-1)
    gates = probability * torch.zeros_like(probability).scatter(-1, probability.topk(case["topk"]).indices, 1)
    over = 0 if second else -1
    gates = gates / (gates.sum(dim=over, keepdim=True) + 1) * (case["batch"] if second else 1)
    golden.assert_equals(gates, case["route"])
    index = torch.tensor(case["seq_ids"]).transpose(0, 1)
    if not case.get("fill"):
        kept = case["tokens"] // 2 if second else None
        assert uoe._places(gates.transpose(1, 2) > (-1 if second else 0), gates, kept).tolist() == index.tolist()
    factors, names = torch.ones(index.shape, **D), ("linear1", "linear2")
    if not second:
        factors = gates.sum(dim=-1)[:, None].expand(-1, case["experts"], -1).gather(-1, index)
        names = ("linear1", "linear3", "linear2")
    arguments = []
    for name in names:
        bias = weights.get(f"{name}.bias", weights.get(f"{name}.bias.0"))
        arguments += [weights[f"{name}.weight.0"], bias.flatten(1)]
    check(uoe.expert_perceptrons(x, index, factors, *arguments), x, weights, case)


def check(out, x, weights, case):
    """Output and gradients; the case's None is for parameters that get none."""
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


@torch.no_grad()
def test_axial_positions():
    """Scores of two tokens depend on the steps between their rows and columns alone, and on both."""
    torch.manual_seed(0)
    vector = torch.randn(16, **D)
    u = uoe.rotate(vector.expand(1, 20, 16), 2, (4, 5)).unflatten(1, (4, 5))[0]
    scores = torch.einsum("hwc,yxc->hwyx", u, u)
    torch.testing.assert_close(scores[0, 1, 2, 4], scores[1, 0, 3, 3])
    assert (scores[0, 1, 2, 4] - scores[0, 1, 2, 3]).abs() > 1e-3
    assert (scores[0, 1, 2, 4] - scores[0, 1, 1, 4]).abs() > 1e-3
    column = uoe.rotate(torch.cat([vector[:4].new_zeros(4), vector[:4]]).expand(1, 5, 8), 1, (5, 1))[0]
    torch.testing.assert_close(column[:, 2:4], vector[2:4].expand(5, 2))  # one column: its pairs do not turn
    line = uoe.rotate(torch.cat([vector.new_zeros(2), vector[:2]]).expand(1, 5, 4), 1)[0]
    torch.testing.assert_close(column[:, :2], line[:, :2])
    layer = UnionOfExpertsAttention(16, 2, axial=True, **D).eval()
    x = golden.random(0, (2, 4, 5, 16))
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    with pytest.raises(ValueError, match=r"axial positions are those of a map .* got \(2, 20, 16\)"):
        layer(x.flatten(1, 2))


@torch.no_grad()
def test_perceptrons_are_those_that_a_token_chose(monkeypatch):
    """Gathered and masked, also where one serves no token; of an image alone."""
    torch.manual_seed(0)
    layer, x = UnionOfPerceptrons(8, 12, 3, topk=1, **D), golden.random(0, (2, 3, 2, 8))
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    layer.router_bias[0] = -99.
    found = layer(x)
    torch.testing.assert_close(layer(x[:1]), found[:1])
    monkeypatch.setattr(uoe, "concrete", lambda x: False)
    torch.testing.assert_close(layer(x), found)
    probability = (x @ layer.router.T + layer.router_bias).softmax(-1)
    best, chosen = probability.max(-1)
    assert set(chosen.flatten().tolist()) == {1, 2}
    i = chosen[1, 2, 0]
    y = x[1, 2, 0]
    y = torch.nn.functional.silu(y @ layer.fc1[i] + layer.fc1_bias[i]) * (y @ layer.value[i] + layer.value_bias[i])
    y = (y @ layer.fc2[i] + layer.fc2_bias[i]) * best[1, 2, 0] / (best[1, 2, 0] + 1)
    torch.testing.assert_close(found[1, 2, 0], y)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dim / num_heads = 12 / 2, must be a multiple of 4"):
        UnionOfExpertsAttention(12, 2)
    with pytest.raises(ValueError, match="topk must be 1 to 2 and capacity positive, got 3 and None"):
        UnionOfExpertsAttention(8, 2, 3)
    with pytest.raises(ValueError, match=r"dim / num_heads = 12 / 1, must be a multiple of 8"):
        UnionOfExpertsAttention(12, 1, axial=True)
    with pytest.raises(ValueError, match="num_experts 4 must divide hidden_dim 10"):
        UnionOfPerceptrons(8, 10)
    with pytest.raises(ValueError, match=r"topk must be at least 1 and less than num_experts \(4\), got 4"):
        UnionOfPerceptrons(8, 16, topk=4)
