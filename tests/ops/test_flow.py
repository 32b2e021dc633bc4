"""Flow attention: the authors' numbers, what causal means, long sequences, refusals.

What every op is asked for is in test_common.py and test_cases.py.
"""
import pytest
import torch

from tests import golden
from visionattn.layers import FlowAttention
from visionattn.ops import flow_attention

CASES = golden.load("flow_ops")["cases"]
CORES = [case for case in CASES if case["kind"].startswith("core")]
MODULES = [case for case in CASES if case["kind"] == "vision_module"]
both_backends = pytest.mark.parametrize("backend", ["linear", "naive"])


def assert_golden(out, case):
    if "out" in case:
        torch.testing.assert_close(out, torch.tensor(case["out"], dtype=torch.float64), rtol=0, atol=1e-12)
    else:
        golden.assert_matches(out, case["out_summary"], 1e-12)


@both_backends
@pytest.mark.parametrize("case", CORES, ids=lambda case: f"{case['kind']} {case['L']} {case['S']}")
def test_golden(case, backend):
    q, k, v = (
        golden.random(case[name]["seed"], case[name]["shape"]).unflatten(-1, (case["heads"], -1)) for name in "qkv")
    out = flow_attention(q, k, v, is_causal=case["kind"] == "core_causal", backend=backend)
    assert_golden(out.flatten(2), case)


@pytest.mark.parametrize("case", MODULES, ids=lambda case: f"{case['dim']}")
def test_golden_modules(case):
    """With the other version of the epsilon."""
    layer = FlowAttention(case["dim"], case["heads"], dtype=torch.float64)
    layer.load_state_dict({name: golden.fill(name, shape) for name, shape in case["state_dict"]}, strict=True)
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    with torch.no_grad():
        out = layer(x[:, None])[:, 0]
    assert_golden(out, case)


@both_backends
def test_causal(backend):
    """What comes later changes nothing, over the borders of chunks too; the last query sees all."""
    q, k, v = torch.randn(3, 1, 150, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = flow_attention(q, k, v, is_causal=True, backend=backend)
    for tokens in (1, 64, 65, 149):
        first = flow_attention(q[:, :tokens], k[:, :tokens], v[:, :tokens], is_causal=True, backend=backend)
        torch.testing.assert_close(first, out[:, :tokens])
    later = v.clone()
    later[:, 100:] += 1
    changed = flow_attention(q, k, later, is_causal=True, backend=backend)
    assert torch.equal(changed[:, :64], out[:, :64])
    assert (changed[:, 100:] != out[:, 100:]).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_in_half_precision(is_causal):
    """Sums over 100,000 tokens are far beyond float16's range."""
    q, k, v = (torch.randn(1, 100_000, 1, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    expected = flow_attention(q.double(), k.double(), v.double(), is_causal)
    actual = flow_attention(q.half(), k.half(), v.half(), is_causal)
    assert actual.dtype == torch.float16
    assert (actual.double() - expected).norm() < 5e-3 * expected.norm()


def test_versions_of_the_epsilon_differ():
    q, k, v = torch.randn(3, 1, 5, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 6
    assert not torch.allclose(flow_attention(q, k, v), flow_attention(q, k, v, eps_of_sums=True), rtol=1e-6)


@pytest.mark.parametrize(("shapes", "options", "message"), [
    ([(2, 5, 3, 8), (2, 5, 3, 8), (2, 5, 24)], {}, r"must be \[batch, tokens, heads, head_dim\]"),
    ([(2, 5, 3, 8), (2, 5, 3, 4), (2, 5, 3, 8)], {}, "k must have q's batch, heads and head_dim"),
    ([(2, 5, 3, 8), (2, 4, 3, 8), (2, 5, 3, 8)], {}, "v must have k's batch, tokens and heads"),
    ([(2, 5, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8)], dict(is_causal=True), "as many keys as queries"),
])
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        flow_attention(*map(torch.zeros, shapes), **options)
    with pytest.raises(ValueError, match="floating point"):
        flow_attention(*torch.zeros(3, 1, 2, 1, 4, dtype=torch.int64))
