"""Combiner attention: the authors' numbers, what is exactly known of its patterns, and its layer."""
import pytest
import torch
import torch.nn.functional as F

from tests import golden
from visionattn.layers import CombinerAttention
from visionattn.layers.combiner import _window
from visionattn.ops import BackendError, combiner_attention
from visionattn.ops.combiner import naive, row_attention

CASES = golden.load("combiner_ops")["cases"]
D = dict(dtype=torch.float64)
PATTERNS = {"sqrt_fixed_full": "window", "window2d": "window", "axial_rowmajor": "axial", "logn": "logn",
            "axial_mixture_unidir": "mixture", "axial_mixture_bidir": "mixture", "mixture": "mixture"}
backends = pytest.mark.parametrize("backend", ["blocked", "naive"])


def qkv(*shape, seed=0):
    return [golden.random(seed + i, shape).requires_grad_() for i in range(3)]


def golden_output(case, x, weights, backend):
    """What the authors compute of tokens ``[batch, tokens, dim]``."""
    def heads(x, name):
        out = torch.einsum("...i,ihd->...hd", x, weights[f"{name}.weight"])
        return out + weights.get(f"{name}.bias", 0)

    def joined(x, name):
        return torch.einsum("...hd,hdo->...o", x, weights[f"{name}.weight"]) + weights.get(f"{name}.bias", 0)

    pattern, tokens = PATTERNS[case["fn"]], x.shape[1]
    rows = 1 if pattern in ("window", "logn") else tokens // case["seg"]
    x = x.unflatten(1, tuple(case.get("map", (rows, tokens // rows))))
    q, k, v = (heads(x, name) for name in "qkv")
    options = {"pattern": pattern, "causal": case["causal"]}
    if pattern == "window":
        options["window_size"] = tuple(case.get("window", (1, case.get("seg"))))
        act, options["pool"] = case["pool"].split("-")
        pooled = {"summary_q": q, "summary_k": k}
        if act == "deepset":
            pooled = {name: x @ weights[f"pool_{name[-1]}.weight"] for name, x in pooled.items()}
        if act != "identity":
            options |= {name: x.relu() for name, x in pooled.items()}
    if case["fn"] == "mixture":
        options["pool"] = "max"
    if summary := case.get("row_summary", "none").removesuffix("none"):
        values = row_attention(q, k, v)
        keys = row_attention(q, k, k) if summary.startswith("wsum") else values
        if summary.endswith("proj"):
            normed = F.layer_norm(x + joined(keys, "row.proj"), x.shape[-1:], weights["row.norm.weight"],
                                  weights["row.norm.bias"], eps=1e-5)
            keys = heads(normed, "row.key")
        options |= {"summary_k": keys, "summary_v": values}
    return joined(combiner_attention(q, k, v, backend=backend, **options), "out").flatten(1, 2)


@backends
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i]['fn']}-{i}")
def test_golden(number, backend):
    case = CASES[number]
    weights = golden.filled(case["params"])
    x = golden.random(case["x_seed"], case["x_shape"]).requires_grad_()
    out = golden_output(case, x, weights, backend)
    golden.assert_equals(out, case["out"])
    (out * golden.random(case["grad_seed"], out.shape)).sum().backward()
    golden.assert_equals(x.grad, case["grad_x"])
    assert case["grads"].keys() == weights.keys()
    for key, expected in case["grads"].items():
        golden.assert_equals(weights[key].grad, expected)


def full(q, k, v, extra=0.):
    """Full attention of tokens in one row, causal or with ``extra`` added to the score of the own token."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    tokens = scores.shape[-1]
    mask = torch.full((tokens, tokens), -torch.inf, **D).triu(1) if extra is None else extra * torch.eye(tokens, **D)
    return ((scores + mask).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("size", "options"), [
    ((1, 7), {"window_size": (1, 1)}), ((7, 1), {"pattern": "axial"}), ((1, 7), {"pattern": "mixture"}),
    ((7, 1), {"pattern": "mixture"})], ids=str)
def test_what_is_full_attention(size, options):
    q, k, v = qkv(2, *size, 2, 4)
    out = combiner_attention(q, k, v, causal=True, **options).flatten(1, 2)
    torch.testing.assert_close(out, full(q, k, v, None), rtol=1e-12, atol=1e-12)
    if options.get("pattern") != "mixture":  # else the own token counts twice
        out = combiner_attention(q, k, v, **options).flatten(1, 2)
        torch.testing.assert_close(out, full(q, k, v, torch.tensor(2.).double().log()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [
    {"window_size": (2, 3)}, {"pattern": "axial"}, {"pattern": "mixture"}, {"pattern": "mixture", "causal": True},
], ids=str)
def test_constant_values_stay_and_rows_can_be_permuted(options):
    q, k, v = qkv(2, 4, 6, 2, 3)
    constant = torch.full_like(v, 1.5)
    torch.testing.assert_close(combiner_attention(q, k, constant, **options), constant)
    if options.get("pattern") != "mixture":
        order = torch.tensor([2, 3, 0, 1])  # of rows, those of a window together
        torch.testing.assert_close(combiner_attention(q[:, order], k[:, order], v[:, order], **options),
                                   combiner_attention(q, k, v, **options)[:, order])


def test_logn_covers_every_earlier_token_once():
    for tokens in (5, 9, 12):  # of one more than a power of two the authors leave out the last block
        summaries, seen = naive.lists("logn", (1, tokens), None, True)
        for token, (direct, blocks) in enumerate(seen):
            found = direct + [other for block in blocks for other in summaries[block].seen]
            assert sorted(found) == [*range(token + 1)]


@pytest.mark.parametrize("options", [
    {"pattern": "window"}, {"pattern": "window", "window_size": (2, 3), "pool": "mean", "count_bias": True},
    {"pattern": "fixed"}, {"pattern": "fixed", "segment": 4}, {"pattern": "mixture"},
    *({"pattern": "axial", "row_summary": name} for name in ("none", "wsum", "proj", "wsum_proj"))], ids=str)
@torch.no_grad()
def test_layer(options):
    """Beside the authors' code for the pattern, whose weights have another layout."""
    torch.manual_seed(0)
    layer, x = CombinerAttention(8, 2, **options, **D), torch.randn(2, 5, 7, 8, **D)
    pattern, weights = options["pattern"], {}
    for key, value in layer.state_dict().items():
        parts = zip("qkv", value.chunk(3), strict=True) if key.startswith("qkv") else [("", value)]
        for part, rows in parts:
            name = key.replace("qkv", part).replace("row_keys.", "row.").replace("proj", "out")
            name = name.replace("row.out", "row.proj")
            if name.startswith(("out", "row.proj")):
                rows = rows.T.unflatten(0, (2, 4)) if rows.ndim == 2 else rows
            elif name.startswith(("q", "k", "v", "row.key")):
                rows = rows.unflatten(0, (2, 4)).movedim(-1, 0) if rows.ndim == 2 else rows.unflatten(0, (2, 4))
            weights[name] = rows
    function = {"mixture": "axial_mixture_bidir", "axial": "axial_rowmajor"}.get(pattern, "window2d")
    case = {"causal": False, "fn": function, "seg": 7,
            "map": (1, 35) if pattern == "fixed" else (5, 7), "row_summary": options.get("row_summary", "none"),
            "window": options.get("window_size", (1, options.get("segment", 6)) if pattern == "fixed" else (2, 2)),
            "pool": f"identity-{options.get('pool', 'max')}"}
    if options.get("count_bias"):
        q, k, v = (part.unflatten(-1, (2, 4)) for part in layer.qkv(x).chunk(3, dim=-1))
        expected = layer.proj(combiner_attention(
            q, k, v, window_size=(2, 3), pool="mean", count_bias=True, backend="naive").flatten(-2))
    else:
        expected = golden_output(case, x.flatten(1, 2), weights, "naive").reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_windows_grow_with_the_map():
    assert [_window("window", None, None, side, side)[0] for side in (14, 28, 56, 128, 1)] == [4, 5, 7, 11, 1]
    x, sizes = torch.randn(2, 6, 5, 8), ({1: torch.export.Dim("height", min=3, max=99)},)
    with pytest.raises(Exception, match="give the mixer a window_size"):
        torch.export.export(CombinerAttention(8, 2).eval(), (x,), dynamic_shapes=sizes, strict=False)


def test_bad_arguments():
    q, k, v = (x.detach() for x in qkv(1, 4, 6, 2, 3))
    for options, message in (
            ({}, "window_size belongs to pattern 'window' alone, got None"),
            ({"pattern": "rows"}, "pattern must be one of window, axial, mixture, logn, got 'rows'"),
            ({"pattern": "axial", "window_size": (2, 2)}, r"got \(2, 2\) for 'axial'"),
            ({"window_size": (0, 2)}, r"must be positive rows and columns, got \(0, 2\)"),
            ({"window_size": (2, 2), "pool": "least"}, "pool of pattern 'window' must be max or mean or sum"),
            ({"pattern": "logn"}, "'logn' is causal on tokens in one row only, got 4 rows"),
            ({"window_size": (2, 2), "causal": True}, "'window' is causal on tokens in one row only"),
            ({"pattern": "mixture", "summary_k": k}, "pattern 'mixture' takes no summary_k"),
            ({"pattern": "axial", "summary_v": v[..., :1]}, r"summary_v must be \[1, 4, 6, 2, 3\], got"),
            ({"pattern": "axial", "summary_k": k.float()}, "summary_k is torch.float32 on cpu, but q is torch.float64"),
            ({"pattern": "axial", "count_bias": True}, "count_bias belongs to pattern 'window' alone"),
    ):
        with pytest.raises(ValueError, match=message):
            combiner_attention(q, k, v, **options)
    with pytest.raises(ValueError, match=r"q, k and v must be \[batch, rows, columns, heads, head_dim\]"):
        combiner_attention(q, k[:, 1:], v, "axial")
    with pytest.raises(BackendError, match="has no backend 'tiled'; it has blocked, naive"):
        combiner_attention(q, k, v, "axial", backend="tiled")
    with pytest.raises(ValueError, match="row_summary must be one of none, wsum, proj, wsum_proj, got 'mean'"):
        CombinerAttention(8, 2, "axial", row_summary="mean")
