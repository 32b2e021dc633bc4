"""Attention probabilities of every op: by them the values are weighed."""
import pytest
import torch

from visionattn import ops
from visionattn.ops.dispatch import operations
from visionattn.ops.recording import Recorder, current_recorder, unit_values

SMALL = [(op, name) for op in operations() for name, case in ops.cases(op).items() if "small" in case.groups]
OPS = {op: getattr(ops, op) for op in operations()}


@pytest.mark.parametrize(("op", "name"), SMALL)
def test_probabilities_weigh_the_values(op, name):
    arguments = ops.cases(op)[name].arguments(torch.float64)
    arguments.pop("return_lse", None)
    arguments.pop("summary_v", None)  # which would have to be computed of the values
    weights_beside = arguments.pop("local_weights", None)  # not of the softmax
    memory = arguments.pop("memory_value", None)
    if memory is not None:
        arguments["memory_value"] = memory * 0
    arguments["q"].requires_grad_()
    recorder = Recorder()
    with recorder.recording():
        out = OPS[op](**arguments)
    found, = recorder.take()
    assert found.requires_grad
    assert {"route_weights", "weights"} & arguments.keys() or (found >= 0).all()
    values = [arguments[key] for key in ("v", "pooled_v", "additional_values") if arguments.get(key) is not None]
    values = torch.cat([value.flatten(1, -3) for value in values], dim=1).transpose(1, 2)
    values = values.repeat_interleave(found.shape[1] // values.shape[1], dim=1)
    expected = (found @ values).transpose(1, 2).reshape(out.shape)
    if "active" in arguments:
        out = out.where(arguments["active"][..., None], expected)
    assert torch.allclose(out, expected, atol=1e-9)
    if weights_beside is not None:
        with recorder.recording():
            OPS[op](**arguments, local_weights=weights_beside)
        assert torch.equal(recorder.take()[0], found)


def test_unit_values_of_two_tensors():
    v, more = unit_values(torch.zeros(2, 2, 3, 4, 5), torch.zeros(2, 1, 4, 5))
    assert v.shape == (2, 2, 3, 4, 7)
    assert more.shape == (2, 1, 4, 7)
    assert v[1, 1, 0, 2].tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert more[0, 0, 0].tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_the_innermost_recorder_alone_takes_offers():
    outer, inner = Recorder(), Recorder(last=True)
    with outer.recording():
        current_recorder().offer(lambda: torch.zeros(1))
        with inner.recording():
            for number in (1, 2):
                current_recorder().offer(lambda number=number: torch.full((1,), number))
        with outer.paused():
            assert current_recorder() is None
        assert current_recorder() is outer
    assert current_recorder() is None
    assert [x.item() for x in outer.take()] == [0]
    assert [x.item() for x in inner.take()] == [2]
