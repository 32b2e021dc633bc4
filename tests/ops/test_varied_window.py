"""Varied-size windows: the authors' numbers, both backends against each other, what the op asks of its arguments."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden
from visionattn.layers import VariedSizeWindowAttention
from visionattn.ops import BackendError, use_backend, varied_window_attention

CASES = {case["name"]: case for case in golden.load("varied_window_ops")["cases"]}
RULES = {"cls_nopad": "vitae", "cls_pad_outdim": "vitae", "det_pad_nonsquare": "vitae_dense", "swin_vsa_pad": "swin"}


def layer_of(case: dict) -> VariedSizeWindowAttention:
    """The layer with a case's weights."""
    x = {key: golden.fill(f"{case['seed']}.{key}", shape) for key, shape in case["param_shapes"].items()}
    heads, window = case["num_heads"], case["window_size"]
    if "transform.2.weight" in x:
        predictor = {leaf: x[f"transform.2.{leaf}"] for leaf in ("weight", "bias")}
    else:
        predictor = {leaf: torch.cat([x[f"sampling_{kind}.2.{leaf}"].unflatten(0, (heads, 2)) for kind in (
            "offsets", "scales")], dim=1).flatten(0, 1) for leaf in ("weight", "bias")}
    layer = VariedSizeWindowAttention(
        case["dim"], heads, window, case.get("out_dim"), RULES[case["name"]], dtype=torch.float64)
    layer.load_state_dict({
        "rpb": x["relative_position_bias_table"].T.reshape(heads, 2 * window - 1, 2 * window - 1),
        "predictor.weight": predictor["weight"].flatten(1), "predictor.bias": predictor["bias"],
        **{f"{name}.{leaf}": x[f"{name}.{leaf}"].flatten(1) if leaf == "weight" else x[f"{name}.{leaf}"]
           for name in ("qkv", "proj") for leaf in ("weight", "bias")}})
    return layer.eval()


@pytest.mark.parametrize("backend", ["sampled", "naive"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_golden(name, backend):
    case = CASES[name]
    layer = layer_of(case)
    x = (case["input_scale"] * golden.random(case["seed"], case["input_shape"])).permute(0, 2, 3, 1)
    with use_backend(backend):
        out = layer(x)
    if name != "swin_vsa_pad":
        out = out.permute(0, 3, 1, 2)
    expected = torch.tensor(case["output"]["value"], dtype=torch.float64)
    torch.testing.assert_close(out.flatten(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_golden_places(name):
    """The windows that the layer shows are those that the authors' code samples."""
    case, window = CASES[name], CASES[name]["window_size"]
    x = (case["input_scale"] * golden.random(case["seed"], case["input_shape"])).permute(0, 2, 3, 1)
    grid = torch.tensor(case["sampling_grid"]["value"], dtype=torch.float64).view(case["sampling_grid"]["shape"])
    size = grid.new_tensor([grid.shape[2], grid.shape[1]])
    tokens = ((grid + 1) / 2 * (size - 1)).unflatten(0, (len(x), -1))
    if name == "det_pad_nonsquare":  # of 7 x 14, one row and two columns are added, of which half come first
        tokens = tokens - grid.new_tensor([1, 0])
    first, last = tokens[:, :, ::window, ::window], tokens[:, :, window - 1::window, window - 1::window]
    half = (last - first) / (window - 1) / 2
    expected = torch.cat([first - half + 0.5, last + half + 0.5], dim=-1).permute(0, 2, 3, 1, 4)
    torch.testing.assert_close(layer_of(case).windows(x), expected, rtol=1e-10, atol=1e-10)


def problem(batch=2, rows=2, columns=3, window=(3, 4), heads=2, dim=4, value_dim=5, reach=2., seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = (batch, rows * window[0], columns * window[1], heads)
    tensors = dict(
        q=draw(*size, dim), k=draw(*size, dim), v=draw(*size, value_dim),
        offset=reach * draw(batch, rows, columns, heads, 2), stretch=reach * draw(batch, rows, columns, heads, 2),
        bias=draw(heads, 2 * window[0] - 1, 2 * window[1] - 1))
    return {name: x.requires_grad_() for name, x in tensors.items()}, window


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)), window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    reach=st.sampled_from([0.3, 2., 30.]), with_bias=st.booleans(), scale=st.none() | st.floats(0.1, 2.),
    seed=st.integers(0, 2 ** 16))
def test_sampled_is_naive(grid, window, reach, with_bias, scale, seed):
    tensors, _ = problem(rows=grid[0], columns=grid[1], window=window, reach=reach, seed=seed)
    if not with_bias:
        del tensors["bias"]
    results = []
    for backend in ("sampled", "naive"):
        out = varied_window_attention(**tensors, window_size=window, scale=scale, backend=backend)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, list(tensors.values()), direction)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["sampled", "naive"])
def test_windows_as_they_are(backend):
    """Without offsets and growth it is attention within the windows."""
    def windows(x):
        x = x.unflatten(2, (3, width)).unflatten(1, (2, height))
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    tensors, (height, width) = problem(reach=0)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, right = (x.flatten()[:, None] - x.flatten() for x in (rows, columns))
    bias = tensors["bias"][:, down + height - 1, right + width - 1]
    expected = F.scaled_dot_product_attention(*(windows(tensors[name]) for name in "qkv"), bias)
    out = varied_window_attention(**tensors, window_size=(height, width), backend=backend)
    torch.testing.assert_close(windows(out), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["sampled", "naive"])
def test_a_window_moved_by_whole_tokens(backend):
    """Its keys are those of the window next to it; beyond the map they are zero, and count in the softmax."""
    tensors, window = problem(rows=1, columns=2, reach=0)
    tensors["bias"] = None
    tensors["offset"] = torch.zeros_like(tensors["offset"]) + torch.tensor([window[1], 0])
    out = varied_window_attention(**tensors, window_size=window, backend=backend)
    q, k, v = (tensors[name].transpose(1, 3) for name in "qkv")  # [batch, heads, width, height, dim]
    first, second = slice(0, window[1]), slice(window[1], None)
    seen = q[:, :, first], k[:, :, second], v[:, :, second]
    expected = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in seen))
    actual = out.transpose(1, 3)[:, :, first].flatten(2, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert not out[:, :, second].any()


def test_places_that_are_not_rounded_with_the_rest():
    """Half a token of 200 is nothing that bfloat16 could tell, so places are not cast under autocast."""
    tensors, window = problem(columns=50)
    tensors = {name: x.detach().float() for name, x in tensors.items()}
    tensors["offset"][..., 0] += 100.3
    expected = varied_window_attention(**tensors, window_size=window)
    with torch.autocast("cpu", torch.bfloat16):
        out = varied_window_attention(**tensors, window_size=window)
    assert expected.norm() > 1
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_bad_arguments():
    tensors, window = problem()
    tensors = {name: x.detach() for name, x in tensors.items()}
    q, k, v, offset = (tensors[name] for name in ("q", "k", "v", "offset"))
    for changed, message in (
            (dict(q=q[0]), r"must be \[batch, height, width, heads, head_dim\]"),
            (dict(k=k[:, :, 1:]), "k must have the shape of q"),
            (dict(v=v[:1]), "and v its batch, map and heads"),
            (dict(v=v.float()), r"v is torch\.float32 on cpu, but q is torch\.float64"),
            (dict(offset=offset[:, :1]), r"offset must be \[batch, rows, columns, heads, 2\] = \[2, 2, 3, 2, 2\], got"),
            (dict(stretch=offset.int()), "stretch must be floating point on cpu, got torch.int32"),
            (dict(bias=tensors["bias"][:, 1:]), r"bias must be \[heads, .*\] = \[2, 5, 7\], got \[2, 4, 7\]"),
            (dict(window_size=(4, 4)), r"window_size \(4, 4\) does not divide the map of 6 x 12; pad it first"),
            (dict(window_size=0), "window_size must be a positive int or two of them"),
            (dict(q=q.int(), k=k.int(), v=v.int()), "must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            varied_window_attention(**tensors | dict(window_size=window) | changed)
    with pytest.raises(BackendError, match="has no backend 'triton'; it has sampled, naive"):
        varied_window_attention(**tensors, window_size=window, backend="triton")
