"""Mixtures of experts: numbers of the formulas, both ways to compute them, routers per task, and models cut to one."""
import copy

import pytest
import torch
from torch import nn

from tests import golden
from visionattn.layers import (
    ExpertAttention,
    ExpertMlp,
    attention_maps,
    auxiliary_losses,
    checkpoint_attention,
    cut_to_task,
    experts,
    set_task,
)

CASES = golden.load("experts_ops")["cases"]
D = dict(dtype=torch.float64)
KINDS = {"attention": lambda **options: ExpertAttention(12, 4, 6, 2, **options, **D),
         "perceptron": lambda **options: ExpertMlp(12, 8, 6, 2, **options, **D)}


def cases(kind):
    return [case for case in CASES if case["kind"] == kind]


def random(seed, shape, scale=1.):
    return scale * golden.random(seed, shape)


def assert_equals(actual, expected, tolerance=1e-12):
    golden.assert_equals(actual.flatten(), torch.tensor(expected, **D).flatten().tolist(), tolerance)


def make(kind, **options):
    """A layer whose experts differ."""
    torch.manual_seed(0)
    layer = KINDS[kind](**options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return layer


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("grouped", [True, False])
def test_golden(grouped, monkeypatch):
    monkeypatch.setattr(experts, "concrete", lambda x, **options: grouped)
    for case in cases("moe_mlp"):
        seed, count, dim, width = (case[key] for key in ("seed", "experts", "dim", "width"))
        layer = ExpertMlp(dim, width, count, case["k"], **D).eval()
        with torch.no_grad():
            layer.fc1.copy_(random(seed + 1, (count, dim, width), 0.3).mT)
            layer.fc1_bias.copy_(random(seed + 2, (count, width), 0.1))
            layer.fc2.copy_(random(seed + 3, (count, width, dim), 0.3))
            layer.fc2_bias.copy_(random(seed + 4, (count, dim), 0.1))
            layer.router.weight_0.copy_(random(seed + 5, (count, dim), 0.5))
        x = random(seed, (case["tokens"], dim))
        assert layer.router(x)[1].tolist() == case["chosen"]
        assert_equals(layer(x), case["out"])
    for case in cases("moe_attention"):
        seed, count, dim, width = (case[key] for key in ("seed", "experts", "dim", "head_dim"))
        layer = ExpertAttention(dim, width, count, case["k"], **D).eval()
        with torch.no_grad():
            layer.query.copy_(random(seed + 1, (count, dim, width), 0.3).mT)
            layer.proj.copy_(random(seed + 2, (count, width, dim), 0.3))
            layer.kv.weight.copy_(random(seed + 3, (2 * width, dim), 0.3))
            layer.kv.bias.copy_(random(seed + 4, (2 * width,), 0.1))
            layer.router.weight_0.copy_(random(seed + 5, (count, dim), 0.5))
        x = random(seed, (1, case["tokens"], dim))
        assert layer.router(x)[1][0].tolist() == case["chosen"]
        assert_equals(layer(x), case["out"])


def test_golden_losses():
    for case in cases("mutual_information"):
        shape = case["tasks"], case["tokens"], case["experts"]
        logits = random(case["seed"], shape).requires_grad_()
        probability = logits.softmax(dim=-1) + 1e-4
        chosen = torch.zeros_like(probability).scatter(-1, probability.topk(case["k"]).indices, 1)
        assert_equals(experts.balance_loss(probability.sum(dim=(0, 1)), chosen.sum(dim=(0, 1))), [case["balance"]])
        assert_equals(experts.z_loss(logits), [case["z"]])
        loss = experts.mutual_information_loss(probability.sum(dim=1), case["tasks"] * case["tokens"])
        assert_equals(loss, [case["loss"]])
        assert_equals(torch.autograd.grad(loss, logits)[0], case["grad_logits"], 1e-9)  # finite differences
    assert experts.z_loss(torch.full((2, 3), 1e4)).isfinite()


@pytest.mark.parametrize("training", [False, True])
def test_the_grouped_form_is_the_naive_one(kind, training, monkeypatch):
    """Values, attention maps, losses, gradients, and what is counted; with an expert that no token chose."""
    layer, x = make(kind, tasks=("a", "b")).train(training), golden.random(0, (3, 5, 12))
    set_task(layer, "b")
    with torch.no_grad():
        layer.router.weight_1[4] = 0
        layer.router.weight_1[4, 0] = -1e3
        x[..., 0] = 1
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(experts, "concrete", lambda x, grouped=grouped, **options: grouped)
        twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        torch.manual_seed(1)
        if kind == "attention":
            with attention_maps(twin) as maps:
                out = twin(leaf)
            assert maps[0].shape == (3, 2, 5, 5)
        else:
            out, maps = twin(leaf), []
        losses = auxiliary_losses(twin)
        assert losses.keys() == ({"expert_balance", "router_z", "expert_information"} if training else set())
        (out.sin().sum() + sum(losses.values())).backward()
        grads = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
        assert len(grads) == len(list(twin.parameters())) - (2 if training else 3)  # the other task's router, the noise
        results.append([out, leaf.grad, *maps, *losses.values(), *grads, *twin.buffers()])
    for grouped, naive in zip(*results, strict=True):
        torch.testing.assert_close(grouped, naive, rtol=1e-10, atol=1e-12)
    assert layer.router.frequency[1, 4] == (layer.router.topk / 6)
    assert not layer.router(x)[1].eq(4).any()


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates(kind):
    layer, x = make(kind).eval(), golden.random(0, (3, 10, 12))
    together = layer(x)
    torch.testing.assert_close(together[:1], layer(x[:1]))
    x[1:] = x[2, :1]  # all their tokens choose alike
    torch.testing.assert_close(layer(x)[:1], together[:1])
    assert torch.equal(layer(x), layer(x))  # without noise


@torch.no_grad()
def test_each_task_has_a_router():
    layer, x = make("perceptron", tasks=("a", "b")).eval(), golden.random(0, (2, 10, 12))
    first = layer(x)
    set_task(layer, "b")
    assert not torch.allclose(layer(x), first)
    layer.router.weight_0.zero_()
    other = layer(x)
    set_task(layer, "a")
    assert layer.router(x)[1].unique().tolist() == [0, 1]  # of equal ones the first
    set_task(layer, "b")
    assert torch.equal(layer(x), other)
    shared = make("perceptron")
    set_task(shared, "whatever")  # one router that serves all
    for wrong, message in ((lambda: set_task(layer, "c"), "know the tasks a, b, got 'c'"),
                           (lambda: set_task(nn.Linear(2, 2), "a"), "Linear has no mixtures of experts"),
                           (lambda: make("attention", tasks=("a", "a")), r"tasks must be names, each another one"),
                           (lambda: ExpertMlp(4, 4, 2, 3), "needs 1 to 2 of 2 experts, got 3"),
                           (lambda: cut_to_task(layer, "a", 3), "threshold must be a share of tokens, 0 to 1, got 3"),
                           (lambda: cut_to_task(layer, "c", 0.1), "know the tasks a, b, got 'c'")):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_noise_in_training_alone():
    layer, x = make("perceptron").train(), golden.random(0, (2, 10, 12))
    assert not torch.equal(layer(x), layer(x))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.router.weight_0.zero_()
        twin.router.noise_0.zero_()
    torch.manual_seed(0)
    chosen = twin.router(golden.random(1, (4000, 12)))[1]
    assert chosen.flatten().bincount(minlength=6).float().std() < 80  # equal experts, of 1333 choices each
    torch.testing.assert_close(twin.router.frequency.sum().item(), 2.)


def test_frequencies_are_moving_averages():
    layer, x = make("perceptron", tasks=("a", "b"), noise=False).train(), golden.random(0, (2, 10, 12))
    expected = torch.full((6,), 1 / 3, **D)
    for _ in range(3):
        layer(x)
        share = layer.router(x)[1].flatten().bincount(minlength=6) / 20
        expected = 0.95 * (0.95 * expected + 0.05 * share) + 0.05 * share  # the router ran twice
    torch.testing.assert_close(layer.router.frequency[0], expected)
    assert layer.router.frequency[1].eq(1 / 3).all()
    before = [buffer.clone() for buffer in layer.buffers()]
    layer(x[:0])
    layer.eval()(x)
    x[0, 0, 0] = torch.nan
    for buffer, old in zip(layer.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    layer.train()(x)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    with pytest.raises(RuntimeError, match=r"call eval\(\) before"):
        torch.func.vmap(layer)(x)


def test_mutual_information_takes_the_other_tasks_last_batch():
    layer, x = make("perceptron", tasks=("a", "b"), noise=False).train(), golden.random(0, (2, 10, 12))
    layer(x)
    set_task(layer, "b")
    layer(2 * x[:, :4])
    loss = auxiliary_losses(layer)["expert_information"]
    sums = [((t @ w.T).softmax(dim=-1) + 1e-4).sum(dim=(0, 1))
            for t, w in zip((x, 2 * x[:, :4]), layer.router.parameters(), strict=True)]
    torch.testing.assert_close(loss, 5e-4 * experts.mutual_information_loss(torch.stack(sums), 28))


def test_attention_computed_twice_counts_once():
    plain = nn.ModuleDict({"attn": make("attention", tasks=("a", "b"))}).train()
    other = copy.deepcopy(plain)
    checkpoint_attention(other)
    x, results = golden.random(0, (2, 10, 12)), []
    for model in (plain, other):
        torch.manual_seed(3)
        out = model["attn"](x)
        (out.sin().sum() + sum(auxiliary_losses(model).values())).backward()
        results.append([out, *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not auxiliary_losses(other)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_cut_layer_is_the_masked_one(kind, grouped, monkeypatch):
    monkeypatch.setattr(experts, "concrete", lambda x, **options: grouped)
    layer, x = make(kind, tasks=("a", "b")), golden.random(0, (2, 10, 12))
    layer.router.frequency.copy_(torch.tensor([[.6, .3, .3, .3, .3, .2], [.05, .7, .01, .6, 0, .64]], **D))
    model = nn.Sequential(layer).eval()
    cut = cut_to_task(model, "b", 0.05)
    kept = [0, 1, 3, 5]
    assert experts.expert_counts(cut) == {"attn": [4], "mlp": []} if kind == "attention" else {"attn": [], "mlp": [4]}
    assert cut[0].router.tasks == ["b"]
    assert [tuple(p.shape) for p in cut[0].router.parameters()] == [(4, 12), (4, 12)]
    assert torch.equal(cut[0].router.frequency, layer.router.frequency[1:, kept])
    assert layer.router.task == 0  # the model is left as it was
    set_task(model, "b")
    choose = nn.functional.linear

    def masked(x, weight, bias=None):
        out = choose(x, weight, bias)
        return out.index_fill(-1, torch.tensor([2, 4]), -torch.inf) if weight.shape == (6, 12) else out

    before = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(experts.F, "linear", masked)
        expected = model(x)
    torch.testing.assert_close(cut(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, expected)
    least = cut_to_task(model, "b", 1.)
    assert torch.equal(least[0].router.weight_0, layer.router.weight_1[[1, 5]])  # what a token needs
    torch.testing.assert_close(cut_to_task(model, "b", 0.)(x), before)
    cut.train()(x).sum().backward()
    with pytest.raises(ValueError, match="know the tasks b, got 'a'"):
        set_task(cut, "a")
