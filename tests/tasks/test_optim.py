"""Parameter groups and the schedule."""
import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from visionattn.tasks.optim import adamw, cosine_with_warmup


def _settings(model, optimizer):
    """``name: (lr, weight_decay)`` of every parameter."""
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["test_biformer", "test_dinat", "resnet10t"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_decayed_are_the_weights_and_nothing_else(name, layer_decay):
    model = timm.create_model(name, num_classes=4)
    settings = _settings(model, adamw(model, 1e-3, 0.05, layer_decay=layer_decay))
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
    settings = _settings(model, adamw(model, 1e-3, 0.05, layer_decay=0.5))
    rates = [settings[key][0] for key in settings]
    assert settings[model.pretrained_cfg["classifier"] + ".weight"][0] == max(rates) == pytest.approx(1e-3)
    assert settings[next(iter(settings))][0] == min(rates) < 1e-3 / 4
    assert len(set(rates)) >= 4  # stem, stages or blocks, head
    assert all(math.log2(1e-3 / rate) == pytest.approx(round(math.log2(1e-3 / rate))) for rate in rates)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert sum(len(group["params"]) for group in adamw(model, 1e-3, 0.1).param_groups) == 1


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


def test_schedule_without_warmup_starts_at_the_top():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine_with_warmup(optimizer, steps=10, warmup_steps=0)
    assert optimizer.param_groups[0]["lr"] == 1.0
