"""K-means routed attention: the numbers of routing-transformer, backends against each other, selection by hand."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden
from visionattn.ops import BackendError, explain, kmeans_attention
from visionattn.ops.kmeans import KMeansProblem
from visionattn.ops.kmeans.clustering import (
    assign_tokens,
    cluster_scores,
    cluster_statistics,
    commitment_loss,
    top_tokens,
    unit_tokens,
)

CASES = {case["name"]: case for case in golden.load("kmeans_ops")["cases"]}
ATTENTION = [name for name, case in CASES.items() if case["kind"] == "kmeans_attention"]
BACKENDS = ["gathered", "naive"]


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden_centroids(case) -> torch.Tensor:
    """From the recipe where the numbers themselves are not in the file."""
    if case.get("centroids"):
        return float64(case["centroids"])
    seed = case["q"]["seed"] + 9
    return F.normalize(golden.random(seed, (case["heads"], case["num_clusters"], case["head_dim"])), dim=-1)


def update(tokens, centroids):
    """Directions of the clusters' sums, and the assignment; a cluster without tokens stays where it is."""
    owners = cluster_scores(tokens, centroids).argmax(dim=2)
    sums, sizes = cluster_statistics(tokens, owners, centroids.shape[1])
    return torch.where(sizes[..., None] > 0, F.normalize(sums, dim=-1), centroids), owners


# The reference's numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ATTENTION)
def test_golden(name, backend):
    case = CASES[name]
    shared = case["shared_qk"]
    q = golden.random(case["q"]["seed"], case["q"]["shape"]).transpose(1, 2)
    k = q if shared else golden.random(case["k"]["seed"], case["k"]["shape"]).transpose(1, 2)
    v = golden.random(case["v"]["seed"], case["v"]["shape"]).transpose(1, 2)
    centroids = golden_centroids(case)
    window = min(case["window"], case["tokens"])

    units = [unit_tokens(x) for x in ((q,) if shared else (q, k))]
    scores = [cluster_scores(x, centroids) for x in units]
    index = [top_tokens(x, window) for x in scores]
    for x, expected in zip((index[0], index[-1]), (case["q_indices"], case["k_indices"]), strict=True):
        assert torch.equal(x.sort().values, torch.tensor(expected).sort().values)
    owners = torch.cat([x.argmax(dim=2) for x in scores], dim=2)
    assert owners.tolist() == case["hard_assignment_q_then_k"]
    loss = case["commitment"] * commitment_loss(torch.cat(units, dim=2), centroids, owners)
    assert loss.item() == pytest.approx(case["commitment_loss"], rel=1e-9)

    options = {}
    if case["mem"]:
        options = {name: golden.random(case["mem"][f"{short}_seed"], case["mem"]["shape"])
                   for name, short in (("memory_key", "mem_key"), ("memory_value", "mem_value"))}
    if case["query_mask"]:
        options["mask"] = torch.tensor(case["query_mask"])
    out = kmeans_attention(
        q, F.normalize(k, dim=-1) if shared else k, v, index[0], index[-1], mask_self=shared, backend=backend,
        **options).transpose(1, 2)
    golden.assert_matches(out, case["out_summary"])
    if "out" in case:
        torch.testing.assert_close(out, float64(case["out"]), rtol=1e-9, atol=1e-9)
    picked = torch.tensor(case["times_each_query_was_selected"])
    assert torch.equal((out == 0).all(dim=-1), picked == 0)


def test_golden_update():
    """Two forwards before an update: the port averages the directions of the two, then moves the centroids."""
    case = CASES["centroid_update"]
    centroids = float64(case["means_before"])
    pending = []
    for seed, loss, assignment in ((600, "loss1", "assignment1"), (601, "loss2", "assignment2")):
        tokens = F.normalize(golden.random(seed, (2, 2, 12, 4)).abs(), dim=-1)
        means, owners = update(tokens, centroids)
        assert owners.tolist() == case[assignment]
        value = case["commitment"] * commitment_loss(tokens, centroids, owners)
        assert value.item() == pytest.approx(case[loss], rel=1e-9)
        pending.append(means)
    torch.testing.assert_close(pending[0], float64(case["new_means_after_first_forward"]), rtol=1e-9, atol=1e-9)
    mean = (pending[0] + pending[1]) / 2
    torch.testing.assert_close(mean, float64(case["new_means_after_second_forward"]), rtol=1e-9, atol=1e-9)
    moved = mean.lerp(centroids, case["ema_decay"])
    torch.testing.assert_close(moved, float64(case["means_after_update"]), rtol=1e-9, atol=1e-9)


def test_golden_lloyd_iterations():
    case = CASES["init_iterations"]
    tokens = golden.random(case["x"]["seed"], case["x"]["shape"])
    centroids = float64(case["start_means"])
    for _ in range(case["iterations"]):
        centroids, _ = update(tokens, centroids)
    torch.testing.assert_close(centroids, float64(case["means"]), rtol=1e-9, atol=1e-9)


def test_golden_layer():
    case = CASES["self_attention_layer"]
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    weights = {name: golden.fill(f"to_{name}.weight", (case["dim"], case["dim"])) for name in ("q", "k", "v", "out")}
    q, k, v = (F.linear(x, weights[name]).unflatten(-1, (case["heads"], -1)) for name in "qkv")
    centroids = golden_centroids(case)
    units = [unit_tokens(t) for t in (q, k)]
    scores = [cluster_scores(t, centroids) for t in units]
    out = kmeans_attention(q, k, v, *(top_tokens(s, case["window"]) for s in scores))
    out = F.linear(out.flatten(-2), weights["out"])
    torch.testing.assert_close(out, float64(case["out"]), rtol=1e-9, atol=1e-9)
    owners = torch.cat([s.argmax(dim=2) for s in scores], dim=2)
    loss = 1e-4 * commitment_loss(torch.cat(units, dim=2), centroids, owners)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)


# Backends


def problem(tokens=23, clusters=4, window=7, dtype=torch.float64, seed=0, batch=2, heads=3, dim=5, value_dim=6):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (normal(batch, tokens, heads, d).requires_grad_() for d in (dim, dim, value_dim))
    index = [normal(batch, heads, clusters, tokens).topk(window, dim=-1).indices for _ in range(2)]
    return q, k, v, *index


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("options", [
    {}, dict(mask=True), dict(mask_self=True), dict(memory=2), dict(mask=True, mask_self=True, memory=1),
    dict(empty=True), dict(scale=0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gathered_is_naive(dtype, options):
    q, k, v, query_index, key_index = problem(dtype=dtype)
    options = dict(options)
    if options.pop("empty", False):
        query_index = query_index.masked_fill(torch.rand(query_index.shape) < 0.4, -1)
    if options.pop("mask", False):
        options["mask"] = torch.rand(2, 23, generator=torch.Generator().manual_seed(1)) < 0.7
    inputs = [q, k, v]
    if memory := options.pop("memory", 0):
        for name, dim in (("memory_key", 5), ("memory_value", 6)):
            options[name] = torch.randn(3, 4, memory, dim, dtype=torch.float64).to(dtype).requires_grad_()
            inputs.append(options[name])
    results = []
    for backend in BACKENDS:
        out = kmeans_attention(q, k, v, query_index, key_index, backend=backend, **options)
        assert out.dtype == dtype
        assert out.shape == (2, 23, 3, 6)
        grads = torch.autograd.grad((out.double() * torch.arange(out.numel()).view(out.shape).sin()).sum(), inputs)
        results.append([out, *grads])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for actual, expected in zip(*results, strict=True):
        assert rms(actual.double() - expected.double()) < tolerance * rms(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    q, k, v, *index = problem(tokens=6, clusters=2, window=4, batch=1, heads=2, dim=2, value_dim=2)
    assert torch.autograd.gradcheck(lambda *x: kmeans_attention(*x, *index, backend=backend), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_cluster_is_full_attention(backend):
    q, k, v, *_ = problem(tokens=9)
    everything = torch.arange(9).expand(2, 3, 1, 9)
    out = kmeans_attention(q, k, v, everything, everything, backend=backend)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, expected / (1 + 1e-5))


def test_deterministic():
    """Also where the same token is taken many times, and backward."""
    q, k, v, *index = problem(tokens=40, clusters=20, window=20, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = kmeans_attention(q, k, v, *index)
            runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_explain():
    problem = KMeansProblem(49, 7, 7, 7, 2, 32, 32, False, False, 0, torch.float32, "cpu", False)
    assert [name for name, can, _ in explain("kmeans_attention", problem) if can] == BACKENDS


@pytest.mark.parametrize(("change", "message"), [
    (lambda q, k, v, a, b: (q[0], k, v, a, b), r"q, k and v must be \[batch, tokens, heads, head_dim\]"),
    (lambda q, k, v, a, b: (q, k[:, 1:], v, a, b), "k must have the shape of q"),
    (lambda q, k, v, a, b: (q, k, v.float(), a, b), "v is torch.float32 on cpu, but q is torch.float64"),
    (lambda q, k, v, a, b: (q, k, v, a[:, :1], b), r"query_index must be .* = \[2, 3, 4, window\]"),
    (lambda q, k, v, a, b: (q, k, v, a, b[:, :, 1:]), r"key_index must be .* = \[2, 3, 4, window\]"),
    (lambda q, k, v, a, b: (q, k, v, a.int(), b), "query_index must be int64"),
    (lambda q, k, v, a, b: (q, k, v, a, b + 1), "key_index must hold 0 to 22, got 1 to 23"),
    (lambda q, k, v, a, b: (q, k, v, a - 2, b), "query_index must hold -1 to 22, got -2"),
    (lambda q, k, v, a, b: (q, k, v, a, b - 1), "key_index must hold 0 to 22, got -1"),
])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        kmeans_attention(*change(*problem()))


@pytest.mark.parametrize(("options", "message"), [
    (dict(mask=torch.ones(2, 23)), "mask must be bool"),
    (dict(memory_key=torch.zeros(3, 4, 1, 5)), "must be given together"),
    (dict(memory_key=torch.zeros(3, 4, 1, 5), memory_value=torch.zeros(3, 4, 1, 6)), "memory_key must be torch.float6"),
    (dict(backend="triton"), "has no backend 'triton'"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as error:
        kmeans_attention(*problem(), **options)
    assert isinstance(error.value, BackendError) == ("backend" in options)


# Selection


def assign_by_hand(scores: np.ndarray, window: int) -> list[list[int]]:
    """What ``assign_tokens`` says it does, for one head, with lists."""
    clusters, tokens = scores.shape
    members: list[list[int]] = [[] for _ in range(clusters)]
    waiting = list(range(tokens))
    for _ in range(4):
        room = [window - len(taken) for taken in members]
        applicants: list[list[int]] = [[] for _ in range(clusters)]
        for token in waiting:
            open_ = [c for c in range(clusters) if room[c]]
            applicants[max(open_, key=lambda c: (scores[c, token], -c))].append(token)
        for c, names in enumerate(applicants):
            members[c] += sorted(names, key=lambda token: (-scores[c, token], token))[:room[c]]
        waiting = [token for token in waiting if not any(token in taken for taken in members)]
    for taken in members:
        while waiting and len(taken) < window:
            taken.append(waiting.pop(0))
    return members


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 3), st.sampled_from([2, 1000]), st.integers(0, 2 ** 31))
def test_assignment(tokens, clusters, spare, levels, seed):
    """Every token once, no cluster over its window, and as by hand; two levels make ties."""
    scores = torch.from_numpy(np.random.RandomState(seed).randint(levels, size=(2, 2, clusters, tokens))).float()
    scores[0] += 2 * torch.arange(clusters, dtype=torch.float32)[:, None]  # everybody wants the last cluster
    window = math.ceil(tokens / clusters) + spare
    index = assign_tokens(scores, window)
    assert index.shape == (2, 2, clusters, window)
    for b in range(2):
        for h in range(2):
            assert sorted(x for x in index[b, h].flatten().tolist() if x >= 0) == list(range(tokens))
            members = [[x for x in row if x >= 0] for row in index[b, h].tolist()]
            assert members == assign_by_hand(scores[b, h].numpy(), window)


def test_everybody_is_served_by_assignment():
    q, k, v, _, key_index = problem(tokens=23, clusters=4, window=7)
    index = assign_tokens(torch.randn(2, 3, 4, 23), 7)
    assert (kmeans_attention(q, k, v, index, key_index) != 0).all()


def test_selection_is_not_under_autocast():
    x, centroids = torch.randn(2, 50, 2, 16), F.normalize(torch.randn(2, 6, 16), dim=-1)
    expected = cluster_scores(unit_tokens(x), centroids)
    owners = expected.argmax(dim=2)
    statistics = cluster_statistics(unit_tokens(x), owners, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cluster_scores(unit_tokens(x), centroids), expected)
        for a, b in zip(cluster_statistics(unit_tokens(x), owners, 6), statistics, strict=True):
            assert torch.equal(a, b)


def test_commitment_loss_reaches_tokens_only():
    x = torch.randn(2, 9, 2, 4, dtype=torch.float64, requires_grad=True)
    centroids = F.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=-1).requires_grad_()
    owners = cluster_scores(unit_tokens(x), centroids).argmax(dim=2)
    loss = commitment_loss(unit_tokens(x), centroids, owners)
    assert loss.item() == pytest.approx(np.mean([
        [((unit_tokens(x)[b, h, n] - centroids[h, owners[b, h, n]]) ** 2).mean().item() for n in range(9)]
        for b in range(2) for h in range(2)]))
    loss.backward()
    assert x.grad.any()
    assert centroids.grad is None
