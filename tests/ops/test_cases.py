"""Each op's example problems: data that agrees with the op, and results that agree between its backends."""
import pytest
import torch

from visionattn import ops
from visionattn.ops import dispatch

OPS = [name for name in dispatch.operations() if hasattr(ops, name)]
CASES = [(op, case) for op in OPS for case in ops.cases(op)]
SMALL = [(op, case) for op, case in CASES if "small" in ops.cases(op)[case].groups]


def results(op, case, dtype, backend):
    """All outputs, and the gradients of all floating-point arguments, of a call on one backend."""
    tensors, tables = case.tensors(dtype)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    out = getattr(ops, op)(**tensors, **tables, **case.options, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, list(tensors.values()), grads))


def test_every_op_has_cases():
    assert OPS == ["agent_attention", "aggregated_attention", "combiner_attention", "factorized_attention",
                   "flow_attention", "kmeans_attention", "neighborhood_attention", "reversed_attention",
                   "routed_attention", "sparsified_attention", "varied_window_attention"]
    for op in OPS:
        groups = [group for case in ops.cases(op).values() for group in case.groups]
        assert {"small", "usual", "families"} <= set(groups)


@pytest.mark.parametrize(("op", "name"), CASES, ids="-".join)
def test_the_problem_of_a_case_is_that_of_its_call(op, name, monkeypatch):
    case, asked = ops.cases(op)[name], []

    def choose(self, problem, backend=None):
        asked.append((self.name, problem))
        raise RuntimeError("enough")

    monkeypatch.setattr(dispatch.Op, "choose", choose)
    with torch.device("meta"):  # no memory for the large ones
        tensors = {x: torch.empty(shape) for x, shape in (*case.inputs.items(), *case.parameters.items())}
    tables = {}
    if case.tables:
        tables = {x: table.to("meta") for x, table in case.tables(torch.Generator().manual_seed(0)).items()}
    with pytest.raises(RuntimeError, match="enough"):
        getattr(ops, op)(**tensors, **tables, **case.options)
    assert asked == [(op, case.problem._replace(device="meta"))]
    assert case.summary
    assert case.pairs > 0


@pytest.mark.parametrize(("op", "name"), CASES, ids="-".join)
def test_the_definition_can_do_every_case(op, name):
    problem = ops.cases(op)[name].problem
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for training in (False, True):
            answers = ops.explain(op, problem._replace(dtype=dtype, requires_grad=training))
            assert ("naive", True, "") in answers
            assert sum(can for _, can, _ in answers) >= 2  # a fast form too


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("op", "name"), SMALL, ids="-".join)
def test_backends_agree(op, name, dtype, tolerance):
    case = ops.cases(op)[name]
    expected = results(op, case, dtype, "naive")
    assert all(x.isfinite().all() for x in expected)
    for backend, can, _ in ops.explain(op, case.problem._replace(dtype=dtype, requires_grad=True)):
        if can and backend not in ("naive", "triton"):  # Triton's interpreter has tests of its own
            for actual, correct in zip(results(op, case, dtype, backend), expected, strict=True):
                assert actual.dtype == correct.dtype
                assert (actual.double() - correct.double()).norm() <= tolerance * correct.double().norm(), backend


def test_a_case_draws_the_same_tensors_again():
    case = ops.cases("kmeans_attention")["small_masked"]
    first, second, other = case.arguments(), case.arguments(torch.float64), case.arguments(seed=1)
    assert first.keys() == second.keys() == {"q", "k", "v", "query_index", "key_index", "mask"}
    for name, x in first.items():
        assert torch.equal(x, second[name].to(x.dtype))
        assert not torch.equal(x, other[name])


def test_options_and_parameters_of_a_case():
    case = ops.cases("neighborhood_attention")["small_bias"]
    arguments = case.arguments(torch.bfloat16)
    assert arguments["q"].dtype == torch.bfloat16
    assert arguments["bias"].dtype == torch.float32
    assert arguments["kernel_size"] == (5, 5)
    assert ops.neighborhood_attention(**arguments).dtype == torch.bfloat16
