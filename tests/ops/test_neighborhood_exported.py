"""Neighborhood attention's form of exported graphs, as a call, against the naive form."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.ops.test_neighborhood import (
    CASES,
    EXAMPLES,
    Attention,
    assert_like_naive,
    make,
    problems,
    relative_error,
    seed,  # noqa: F401  (of every test)
)
from visionattn.ops import neighborhood_attention
from visionattn.ops.neighborhood import halo


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exported_form_matches_naive(case, monkeypatch):
    monkeypatch.setattr(halo, "exporting", lambda: True)
    assert_like_naive(*make(**case))


@settings(max_examples=EXAMPLES // 5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_random_problems_in_the_exported_form(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "exporting", lambda: True)
        assert_like_naive(*make(**case), tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exported_form_rounds_half_precision_once(dtype, monkeypatch):
    tensors, options = make(**CASES["stride_bias"], dtype=dtype)
    double = {name: x.detach().double() for name, x in tensors.items()}
    expected = neighborhood_attention(**double, **options, backend="naive")
    monkeypatch.setattr(halo, "exporting", lambda: True)
    actual = neighborhood_attention(**tensors, **options, backend="halo")
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_exported_graphs_of_dilated_maps_gather_nothing():
    """Classes of the window's size are reshaped axes under a bias that is constant but for its table."""
    program = torch.export.export(
        Attention(kernel_size=7, dilation=4), (torch.randn(2, 28, 28, 3, 2, 8),), strict=False)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.aten.index_select.default) == 1  # of the table
    assert torch.ops.aten.masked_fill.Scalar not in calls
