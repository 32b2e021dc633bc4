"""Parameter groups and the schedule."""
import math
from itertools import pairwise

import pytest
import timm
import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

import visionattn  # noqa: F401
from visionattn.tasks import ClassificationTask
from visionattn.tasks.optim import check_optimizer, cosine_with_warmup, make_optimizer


def _settings(model, optimizer):
    """``name: (lr, weight_decay)`` of every parameter."""
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["test_biformer", "test_dinat", "resnet10t"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_decayed_are_the_weights_and_nothing_else(name, layer_decay):
    model = timm.create_model(name, num_classes=4)
    settings = _settings(model, make_optimizer("adamw", model, 1e-3, 0.05, layer_decay=layer_decay))
    assert len(settings) == len(list(model.parameters()))
    for key, (_, decay) in settings.items():
        table = key.rpartition(".")[2] == "rpb"
        exempt = model.get_parameter(key).ndim <= 1 or key.endswith(".bias") or table
        assert decay == (0.0 if exempt else 0.05), key
    assert any(decay == 0.05 for _, decay in settings.values())
    if name == "test_dinat":
        assert any(key.endswith(".rpb") for key in settings)


@pytest.mark.parametrize("name", ["test_biformer", "test_dinat"])
def test_layer_decay_grows_towards_the_head(name):
    model = timm.create_model(name, num_classes=4)
    settings = _settings(model, make_optimizer("adamw", model, 1e-3, 0.05, layer_decay=0.5))
    rates = [settings[key][0] for key in settings]
    assert settings[model.pretrained_cfg["classifier"] + ".weight"][0] == max(rates) == pytest.approx(1e-3)
    assert settings[next(iter(settings))][0] == min(rates) < 1e-3 / 4
    assert len(set(rates)) >= 4  # stem, stages or blocks, head
    assert all(math.log2(1e-3 / rate) == pytest.approx(round(math.log2(1e-3 / rate))) for rate in rates)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert sum(len(group["params"]) for group in make_optimizer("adamw", model, 1e-3, 0.1).param_groups) == 1


@pytest.mark.parametrize("kind", ["muon", "lookahead_lamb"])
def test_groups_are_the_same_for_any_optimizer(kind):
    model = timm.create_model("test_dinat", num_classes=4)
    optimizer = make_optimizer(kind, model, 1e-3, 0.05, layer_decay=0.5)
    assert _settings(model, optimizer) == _settings(model, make_optimizer("adamw", model, 1e-3, 0.05, layer_decay=0.5))
    tables = {id(value) for key, value in model.named_parameters() if key.endswith(".rpb")}
    orthogonal = {id(p) for group in optimizer.param_groups if not group.get("use_fallback") for p in group["params"]}
    assert tables.isdisjoint(orthogonal) == (kind == "muon")


@pytest.mark.parametrize("name", [
    "adafactor", "adan", "adamuon", "adopt", "lamb", "lars", "lion", "lookahead_adamw", "madgrad", "muon", "nadamw",
    "rmsproptf", "sgd"])
def test_optimizers_of_timm_take_steps(name):
    check_optimizer(name, None)
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(name, model, 1e-2, 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(before, model.weight)


def test_the_list_of_optimizers_is_timms():
    for name in list_optimizers():
        if get_optimizer_info(name).second_order:
            with pytest.raises(ValueError, match="second derivatives"):
                check_optimizer(name, None)
        else:
            check_optimizer(name, None)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"optimizer": "adamv"}, "no optimizer 'adamv' in timm; similar names: adam"),
    ({"optimizer": "lion_adamw"}, "no optimizer"),
    ({"optimizer": "sgd", "betas": (0.9, 0.99)}, "sgd has no betas"),
    ({"lr_batch": 0}, "lr_batch must be positive"),
    ({"clip_agc": -1.0}, "clip_agc must be positive"),
    ({"lr": 1e-3, "warmup_lr": 1e-2}, "warmup_lr must lie between 0 and lr"),
])
def test_what_is_wrong_is_said_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask("test_biformer", 10, **arguments)


def test_arguments_that_an_optimizer_does_not_take():
    with pytest.raises(ValueError, match=r"optimizer lamb cannot be made: .*rho"):
        make_optimizer("lamb", nn.Linear(2, 2), 1e-3, 0.0, args={"rho": 1})


def test_schedule():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.5}])
    schedule = cosine_with_warmup(optimizer, steps=24, warmup_steps=4, min_lr_ratio=0.1)
    rates = []
    for _ in range(30):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    first = [rate for rate, _ in rates]
    assert [half for _, half in rates] == pytest.approx([rate / 2 for rate in first])
    assert first[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert first[14] == pytest.approx(0.55)  # half way down
    assert all(a > b for a, b in pairwise(first[4:25]))
    assert first[24:] == pytest.approx([0.1] * 6)


def test_warmup_from_a_given_rate():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = cosine_with_warmup(optimizer, steps=24, warmup_steps=4, start_ratio=0.2).lr_lambdas[0]
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_schedule_without_warmup_starts_at_the_top():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine_with_warmup(optimizer, steps=10, warmup_steps=0)
    assert optimizer.param_groups[0]["lr"] == 1.0
