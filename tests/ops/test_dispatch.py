"""How a call finds its backend."""
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tools import load_tool
from visionattn import ops
from visionattn.ops import (
    BackendError,
    agent_attention,
    dispatch,
    explain,
    neighborhood_attention,
    routed_attention,
    use_backend,
)
from visionattn.ops.checks import checked_once
from visionattn.ops.dispatch import Backend, Op


@pytest.fixture
def op():
    """An op whose backends say their name; ``small`` takes problems below 10."""
    op = Op("test_op", [
        Backend("small", lambda size: (size < 10, "" if size < 10 else f"{size} is not small"), lambda: "small"),
        Backend("never", lambda problem: (False, "it never can"), lambda: "never"),
        Backend("any", lambda problem: (True, ""), lambda: "any"),
    ])
    yield op
    del dispatch._OPS["test_op"]


def test_first_that_can_is_chosen(op):
    assert op.choose(3).run() == "small"
    assert op.choose(30).run() == "any"


def test_asked_for_by_name(op):
    assert op.choose(3, "any").run() == "any"
    with pytest.raises(BackendError, match="backend 'small' of test_op cannot do this: 30 is not small"):
        op.choose(30, "small")
    with pytest.raises(BackendError, match="test_op has no backend 'large'; it has small, never, any"):
        op.choose(3, "large")


def test_no_backend_can():
    try:
        none = Op("test_none", [Backend("never", lambda problem: (False, "it never can"), lambda: None)])
        with pytest.raises(BackendError, match="no backend of test_none can do this: never: it never can"):
            none.choose(3)
    finally:
        del dispatch._OPS["test_none"]


def test_explain(op):
    assert explain("test_op", 30) == [
        ("small", False, "30 is not small"), ("never", False, "it never can"), ("any", True, "")]
    with pytest.raises(ValueError, match=r"unknown op 'tset_op'; known: .*test_op"):
        explain("tset_op", 3)


def test_use_backend(op):
    with use_backend("any"):
        assert op.choose(3).name == "any"
        with use_backend("small"):
            assert op.choose(3).name == "small"
            assert op.choose(3, "any").name == "any"  # the call's own wish goes first
            with pytest.raises(BackendError, match="is not small"):
                op.choose(30)
        assert op.choose(3).name == "any"
    assert op.choose(3).name == "small"


def test_use_backend_ends_with_an_error(op):
    with pytest.raises(RuntimeError, match="inside"), use_backend("any"):
        raise RuntimeError("inside")
    assert op.choose(3).name == "small"


def test_use_backend_takes_what_the_op_has(op):
    with use_backend("gathered", "any"):
        assert op.choose(3).name == "any"
    with use_backend("gathered"):
        assert op.choose(3).name == "small"


def test_use_backend_unknown_name():
    with pytest.raises(BackendError, match=r"no op has a backend 'fats'; known: .*naive.*tiled"), use_backend("fats"):
        pass


def test_use_backend_reaches_the_ops():
    q = torch.randn(1, 8, 8, 2, 8)
    routes = torch.arange(4).view(1, 1, 4, 1)
    with use_backend("naive"):
        expected = neighborhood_attention(q, q, q, 3), routed_attention(q, q, q, routes, 4)
    assert torch.equal(expected[0], neighborhood_attention(q, q, q, 3, backend="naive"))
    assert torch.equal(expected[1], routed_attention(q, q, q, routes, 4, backend="naive"))
    with use_backend("natten"), pytest.raises(BackendError, match="natten"):
        neighborhood_attention(q.double(), q.double(), q.double(), 3)


@pytest.mark.parametrize(("value", "expected"), [
    ("gathered, naive", "naive"),
    ("fats", "no op has a backend 'fats'"),
])
def test_environment_variable(value, expected):
    code = """
import torch
from visionattn.ops import neighborhood
problem = neighborhood.NeighborhoodProblem(
    spatial=(9, 9), heads=2, kv_heads=2, head_dim=8, value_dim=8, kernel_size=(3, 3), dilation=(1, 1), stride=(1, 1),
    is_causal=(False, False), has_bias=False, additional=0, return_lse=False, dtype=torch.float32, device="cpu",
    requires_grad=False)
print(neighborhood._op.choose(problem).name)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VISIONATTN_BACKEND": value}, capture_output=True, text=True)
    if expected.startswith("no op"):
        assert result.returncode != 0
        assert expected in result.stderr.strip().splitlines()[-1]
    else:
        assert result.stdout.strip() == expected, result.stderr


@pytest.mark.parametrize("bad", [3.0, True, (3, 3.0), (3, True), [3], 9, "3", (3, 3, 3)])
def test_checks_meet_every_call(bad):
    """What was once found right makes nothing else right that equals it, and what was wrong stays so."""
    q = torch.randn(1, 8, 8, 2, 8)
    for kernel_size in (3, (3, 3), [3, 3]):
        assert neighborhood_attention(q, q, q, kernel_size).shape == q.shape
    for _ in range(2):
        with pytest.raises(ValueError, match="kernel_size"):
            neighborhood_attention(q, q, q, bad)


def test_checks_meet_every_bias():
    q, bias = torch.randn(1, 8, 2, 4), torch.zeros(2, 3, 8)
    for _ in range(2):
        assert agent_attention(q, q, q, q[:, :3], bias).shape == q.shape
        for wrong, message in ((bias[:1], r"agent_bias must be .* = \[2, 3, 8\]"), (bias.long(), "floating point")):
            with pytest.raises(ValueError, match=message):
                agent_attention(q, q, q, q[:, :3], wrong)


def test_checks_tell_tensors_apart():
    q, routes = torch.randn(1, 8, 8, 2, 8), torch.arange(4).view(1, 1, 4, 1)
    routed_attention(q, q, q, routes, 4)
    for wrong, message in ((q.double(), "k is torch.float64"), (q[:, :7], "grid"), (q.to("meta"), "k is .* on meta")):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                routed_attention(q, wrong, wrong, routes, 4)
    with pytest.raises(ValueError, match="routes must be region numbers 0 to 3, got 1 to 4"):
        routed_attention(q, q, q, routes + 1, 4)
    with torch.autocast("cpu"):  # the same arguments are another problem there
        assert routed_attention(q, q, q, routes, 4).dtype == torch.bfloat16
    assert routed_attention(q, q, q, routes, 4).dtype == torch.float32


def test_checks_tell_arguments_apart():
    """None, False, 0 and a tensor in the same place are different arguments, and so are tensors that swap shapes."""
    calls = []

    @checked_once
    def check(*args):
        calls.append(args)
        if args[0] == "bad":
            raise ValueError("bad")
        return len(calls)

    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    arguments = [
        (a, b), (b, a), (a, None), (None, a), (a, False), (a, 0), (a, 0.), (a, ""), (a, (2, 3)), (a, [2, 3]),
        (a, (2, 3.)), (a, (2,), 3), (a, b.double()), (a, b.to("meta")), (a, a, None), (a, None, a), (a,)]
    first = [check(*args) for args in arguments]
    assert first == list(range(1, len(arguments) + 1))
    assert first == [check(*args) for args in arguments]  # nothing is checked again
    assert check(torch.nn.Parameter(a), b) == 1  # a parameter is a tensor
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            check("bad")


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "case", "name"), [
    ("neighborhood_attention", "small_map", "neighborhood_slab"), ("routed_attention", "small", "routed_gathered"),
    ("aggregated_attention", "small", "aggregated_shifted")])
def test_operators_are_seen_where_they_matter(op, case, name):
    """A plain call goes past PyTorch's dispatcher, with the same bits; a mode sees the operators."""
    inputs, options = dispatch.cases(op)[case].tensors()
    options |= dispatch.cases(op)[case].options
    leaves = [x.requires_grad_() for x in inputs.values()]
    run = getattr(ops, op)

    def step():
        out = run(**inputs, **options)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    plain, seen = step(), _Seen()
    assert "Generated" not in plain[0].grad_fn.name()  # as PyTorch calls what it makes of an operator
    with seen:
        watched = step()
    assert {f"visionattn.{name}.default", f"visionattn.{name}_backward.default"} <= seen.names
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(run(**inputs, **options), plain[0])


def test_what_a_call_costs_beside_its_computation(capsys):
    tool = load_tool("measure_dispatch")
    assert tool.main(["--ops", "routed", "flow", "--seconds", "0.02"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["op", "routed", "routed", "flow", "flow"]
    for *_, call, bare, beside, front in lines[1:]:
        assert int(bare) > 0
        assert abs(int(call) - int(bare) - int(beside)) <= 1
        assert 0 < float(front) < int(call)
