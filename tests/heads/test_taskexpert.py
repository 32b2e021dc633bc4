"""The decoder after TaskExpert: what it computes, task by task, and that tasks share experts and nothing else."""
import pytest
import torch
from torch.nn.functional import gelu, interpolate

from visionattn.dense import DenseBackbone
from visionattn.heads import Segmenter, TaskExpertHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    made = TaskExpertHead([6, 10, 16], 3, channels=8, experts=4).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def maps(batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
            for shape in ((6, 12, 9), (10, 6, 5), (16, 3, 3))]


def by_hand(head, features):
    """The same, one image, map and expert at a time."""
    decoder, result = head.decoder, []
    for number in range(len(features[0])):
        memory, total = torch.zeros(4, 12, 9).double(), torch.zeros(4, 12, 9).double()
        for level, x in enumerate(features):
            linear, experts = head.experts.linear[level], head.experts.experts[level]
            tokens = x[number].flatten(1).T @ linear.weight.flatten(1).T + linear.bias
            memory = interpolate(memory[None], size=x.shape[-2:], mode="bilinear")[0]
            gate = decoder.gates[level]
            weights = (gate.weight @ (tokens.mean(dim=0) + decoder.task) + gate.bias).float().softmax(dim=0).double()
            assembled = weights[-1] * memory
            for k in range(4):
                part = slice(4 * k, 4 * (k + 1))
                made = gelu(tokens @ experts.weight.flatten(1)[part].T + experts.bias[part])
                assembled = assembled + weights[k] * made.T.unflatten(1, x.shape[-2:])
            total = total + interpolate(assembled[None], size=(12, 9), mode="bilinear")[0]
            if level < 2:
                memory = memory + decoder.updates[level](assembled[None])[0]
        result.append(decoder.classifier(decoder.fusion(total[None]))[0])
    return torch.stack(result)


@torch.no_grad()
def test_is_what_it_says(head):
    torch.testing.assert_close(head(maps()), by_hand(head, maps()), rtol=1e-6, atol=1e-7)  # gates are float32


@torch.no_grad()
def test_an_image_does_not_see_its_batch(head):
    both = head(maps())
    for number in range(2):
        alone = head([x[number:number + 1] for x in maps()])
        torch.testing.assert_close(both[number:number + 1], alone, rtol=1e-9, atol=1e-9)


def test_tasks_share_the_experts_alone(head):
    other = head.another(1).double()
    levels = head.experts(maps())
    other(levels).square().sum().backward()
    assert all(parameter.grad is not None for parameter in [*other.parameters(), *head.experts.parameters()])
    assert all(parameter.grad is None for parameter in head.decoder.parameters())


def test_every_parameter_learns(head):
    head(maps()).square().sum().backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_one_map_and_wrong_widths():
    assert TaskExpertHead([6], 2, channels=8).double()(maps()[:1]).shape == (2, 2, 12, 9)
    with pytest.raises(ValueError, match="reduction must be 1 to 8"):
        TaskExpertHead([6], 2, channels=8, reduction=9)


@torch.no_grad()
def test_as_a_segmenters_head():
    torch.manual_seed(0)
    model = Segmenter(DenseBackbone("test_dinat", "segmentation"), 4, "taskexpert", 16).eval()
    assert model(torch.rand(1, 3, 45, 70)).shape == (1, 4, 45, 70)
