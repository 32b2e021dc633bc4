"""Routed attention: the authors' numbers, the fast path against the definition, and what wrong calls are told."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from visionattn.layers import BiLevelRoutingAttention
from visionattn.ops import BackendError, routed_attention, use_backend
from visionattn.ops.routed import gathered

BACKENDS = ("naive", "gathered")


@pytest.fixture(params=["units", "dense"], autouse=True)
def form(request, monkeypatch):
    """The two forms of the fast path: that of small maps does nearly all cases of this file, if not kept out."""
    if request.param == "units":
        monkeypatch.setattr(gathered, "_DENSE_TOKENS", 0)
    else:
        monkeypatch.setattr(gathered, "_DENSE_REGIONS", 10**6)


CASES = {case["name"]: case for case in golden.load("routed_ops")["cases"]}


def problem(
        batch=2, grid=(3, 2), region=(2, 3), key_region=None, heads=2, dim=8, value_dim=None, topk=2, per_head=False,
        weighted=False, dtype=torch.float64, seed=0,
):
    """Arguments of ``routed_attention`` that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    key_region = key_region or region

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    regions = grid[0] * grid[1]
    q = leaf(batch, grid[0] * region[0], grid[1] * region[1], heads, dim)
    k = leaf(batch, grid[0] * key_region[0], grid[1] * key_region[1], heads, dim)
    v = leaf(batch, grid[0] * key_region[0], grid[1] * key_region[1], heads, value_dim or dim)
    rows = (batch, heads if per_head else 1, regions)
    routes = torch.rand(*rows, regions, generator=generator).topk(topk).indices
    return dict(q=q, k=k, v=v, routes=routes, region_size=region,
                route_weights=leaf(*rows, topk) if weighted else None)


def gradients(backend, arguments):
    """Output and every gradient, for the same random incoming gradient."""
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = routed_attention(**arguments, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def assert_close(actual, expected, tolerance):
    """Relative root mean square."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = a.double(), b.double()
        assert ((a - b).square().mean() / b.square().mean().clamp(min=1e-30)).sqrt().item() <= tolerance


class TestGolden:
    """The authors' code, in float64."""

    @staticmethod
    def x(case):
        x = golden.random(case["input"]["seed"], case["input"]["shape"])
        return x if case["layout"] == "NHWC" else x.permute(0, 2, 3, 1)

    @staticmethod
    def assert_output(y, case):
        golden.assert_matches(y if case["layout"] == "NHWC" else y.permute(0, 3, 1, 2), case["output"])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", [
        "legacy_14x14_top4", "legacy_10x17_pad_top4", "nchw_14x14_top4", "nchw_10x17_pad_top4", "nchw_20x30_pad_top4"])
    def test_published_module(self, name, backend):
        case, options = CASES[name], CASES[name]["kwargs"]
        module = BiLevelRoutingAttention(
            options["dim"], options["num_heads"], n_win=options["n_win"], topk=options["topk"],
            pad="input" if case["kind"] == "module_legacy" else "qkv", dtype=torch.float64)
        names = {"qkv.qkv": "qkv", "qkv_linear": "qkv", "wo": "proj", "output_linear": "proj", "lepe": "lepe"}
        state_dict = {}
        for key, shape in case["state_dict"]:
            layer, leaf = key.rsplit(".", 1)
            weight = golden.fill(key, shape)
            state_dict[f"{names[layer]}.{leaf}"] = weight if layer == "lepe" else weight.flatten(1) \
                if leaf == "weight" else weight
        module.load_state_dict(state_dict)
        x = self.x(case)
        with use_backend(backend), torch.no_grad():
            self.assert_output(module(x), case)
        routes, region_size = module.route(x)
        if "region_size" in case:
            assert list(region_size) == case["region_size"]
        if name != "legacy_10x17_pad_top4":  # regions of nothing but padding tie there
            assert routes[:, 0].tolist() == case["routing_index"]

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ["legacy_14x21_top2_soft_rect", "legacy_qkdim32_avgpool"])
    def test_unpublished_options(self, name, backend):
        """Weighted routes, and a pooled key map of a width of its own, composed from the op."""
        case, options = CASES[name], CASES[name]["kwargs"]
        weights = {key: golden.fill(key, shape) for key, shape in case["state_dict"]}
        x = self.x(case)
        dim, qk_dim, heads, n_win = options["dim"], options["qk_dim"], options["num_heads"], options["n_win"]
        q, k, v = F.linear(x, weights["qkv.qkv.weight"], weights["qkv.qkv.bias"]).split([qk_dim, qk_dim, dim], dim=-1)
        region = (x.shape[1] // n_win, x.shape[2] // n_win)

        def pool(t, size):
            return F.avg_pool2d(t.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)

        logits = (pool(q, region).flatten(1, 2) * qk_dim ** -0.5) @ pool(k, region).flatten(1, 2).mT
        kept, routes = logits.topk(options["topk"], dim=-1)
        assert routes.tolist() == case["routing_index"]
        lepe = F.conv2d(v.permute(0, 3, 1, 2), weights["lepe.weight"], weights["lepe.bias"], padding=2, groups=dim)
        if options["kv_downsample_mode"] == "avgpool":
            k, v = pool(k, options["kv_downsample_ratio"]), pool(v, options["kv_downsample_ratio"])
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        y = routed_attention(
            q, k, v, routes[:, None], region, scale=qk_dim ** -0.5, backend=backend,
            route_weights=kept.softmax(dim=-1)[:, None] if options.get("soft_routing") else None)
        y = F.linear(y.flatten(-2) + lepe.permute(0, 2, 3, 1), weights["wo.weight"], weights["wo.bias"])
        self.assert_output(y, case)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ["core_16x16_r4_top3", "core_13x18_r4_pad_top5"])
    def test_core(self, name, backend):
        case, options = CASES[name], CASES[name]["kwargs"]
        batch, channels, height, width = case["input"]["shape"]
        rows, columns = options["region_size"]
        seed = case["input"]["seed"]
        q, k, v = (
            F.pad(golden.random(seed + i, (batch, channels, height, width)), (0, -width % columns, 0, -height % rows))
            .permute(0, 2, 3, 1).unflatten(-1, (options["num_heads"], -1)) for i in range(3))
        y = routed_attention(q, k, v, torch.tensor(case["routing_index"])[:, None], (rows, columns),
                             scale=options["scale"], backend=backend)
        self.assert_output(y.flatten(-2)[:, :height, :width], case)


class TestGathered:
    """The fast path against the definition."""

    @pytest.mark.parametrize("options", [
        dict(),
        dict(topk=1, region=(3, 5)),
        dict(topk=6, per_head=True),
        dict(grid=(1, 1), topk=1),
        dict(grid=(7, 7), region=(1, 1), topk=5, heads=3),
        dict(region=(4, 2), key_region=(2, 1), value_dim=5),
        dict(weighted=True, topk=3),
        dict(weighted=True, per_head=True, key_region=(1, 2), value_dim=3),
    ], ids=str)
    @pytest.mark.parametrize(("dtype", "tolerance"), [
        (torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
    def test_gradients(self, options, dtype, tolerance):
        arguments = problem(**options, dtype=dtype)
        reference = {key: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x
                     for key, x in arguments.items()}
        expected = [x.to(dtype) for x in gradients("naive", reference)]
        assert_close(gradients("gathered", arguments), expected, tolerance)

    @pytest.mark.parametrize("chunk_bytes", [1, 3000, 10 ** 9])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_slices_do_not_matter(self, monkeypatch, chunk_bytes, weighted):
        arguments = problem(batch=3, weighted=weighted)
        expected = gradients("naive", arguments)
        monkeypatch.setattr("visionattn.ops.routed.gathered._CHUNK_BYTES", chunk_bytes)
        assert_close(gradients("gathered", arguments), expected, 1e-12)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_random_problems(self, data):
        small = st.integers(1, 3)
        grid = (data.draw(small), data.draw(small))
        key_region = data.draw(st.one_of(st.none(), st.tuples(small, small)))
        arguments = problem(
            batch=data.draw(small), grid=grid, region=(data.draw(small), data.draw(small)), key_region=key_region,
            heads=data.draw(small), dim=data.draw(small), value_dim=data.draw(small),
            topk=data.draw(st.integers(1, grid[0] * grid[1])), per_head=data.draw(st.booleans()),
            weighted=data.draw(st.booleans()), seed=data.draw(st.integers(0, 10 ** 6)))
        for actual, expected in zip(gradients("gathered", arguments), gradients("naive", arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    def test_strided_inputs_and_expanded_gradient(self):
        qkv = torch.randn(2, 6, 6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
        routes = torch.rand(2, 1, 9, 9).topk(3).indices
        grads = []
        for backend in BACKENDS:
            routed_attention(*qkv.unbind(3), routes, 2, backend=backend).sum().backward()
            grads.append(qkv.grad)
            qkv.grad = None
        assert_close(grads[1:], grads[:1], 1e-12)

    def test_leaves_its_inputs_alone(self):
        arguments = problem(grid=(1, 1), heads=1, topk=1, weighted=True)  # where a view in unit order needs no copy
        before = {key: x.detach().clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
        gradients("gathered", arguments)
        assert all(torch.equal(arguments[key], x) for key, x in before.items())

    def test_same_bits_again(self):
        arguments = problem(grid=(4, 4), topk=5, dtype=torch.float32)
        for first, second in zip(gradients("gathered", arguments), gradients("gathered", arguments), strict=True):
            assert torch.equal(first, second)

    def test_autocast_casts_the_inputs_and_nothing_inside(self):
        arguments = problem(dtype=torch.float32)
        rounded = {name: arguments[name].bfloat16().float() for name in "qkv"}
        expected = routed_attention(**arguments | rounded, backend="gathered").bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = routed_attention(**arguments, backend="gathered")
        assert torch.equal(out, expected)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_transforms_of_torch_func(self, weighted):
        arguments = problem(weighted=weighted)
        names = [name for name in ("q", "k", "v", "route_weights") if arguments[name] is not None]
        leaves = {name: arguments.pop(name).detach() for name in names}
        if not weighted:
            arguments.pop("route_weights")

        def loss(leaves, backend="gathered"):
            return routed_attention(**arguments, **leaves, backend=backend).sin().sum()

        expected = torch.func.grad(loss)(leaves, "naive")
        for name, gradient in torch.func.grad(loss)(leaves).items():
            torch.testing.assert_close(gradient, expected[name])
        tangents = {name: torch.randn_like(x) for name, x in leaves.items()}
        (_, forward), (_, slow) = (
            torch.func.jvp(lambda x, backend=backend: loss(x, backend), (leaves,), (tangents,))
            for backend in ("gathered", "naive"))
        torch.testing.assert_close(forward, slow)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_gradcheck(self, weighted):
        arguments = problem(batch=1, grid=(2, 2), region=(1, 2), heads=1, dim=3, topk=2, weighted=weighted)
        leaves = [arguments.pop(key) for key in ("q", "k", "v", "route_weights") if arguments[key] is not None]
        names = ("q", "k", "v", "route_weights")[:len(leaves)]
        arguments.pop("route_weights", None)
        assert torch.autograd.gradcheck(
            lambda *x: routed_attention(**arguments, **dict(zip(names, x, strict=True)), backend="gathered"), leaves)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_opcheck(self, weighted):
        arguments = problem(weighted=weighted, dtype=torch.float32)
        q, k, v, routes, region, weights = arguments.values()
        torch.library.opcheck(torch.ops.visionattn.routed_gathered.default,
                              (q, k, v, routes, weights, list(region), list(region), 0.3))

    def test_flops(self):
        arguments = problem(batch=2, grid=(3, 2), region=(2, 3), heads=2, dim=8, topk=2)
        with FlopCounterMode(display=False) as forward:
            out = routed_attention(**arguments)
        pairs = 2 * 2 * 36 * 12  # batch, heads, queries, keys of a query
        assert forward.get_total_flops() == 2 * pairs * (8 + 8)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert backward.get_total_flops() == 5 * 2 * pairs * 8

    def test_compile_without_graph_break(self):
        arguments = problem(dtype=torch.float32)
        expected = gradients("gathered", arguments)
        compiled = torch.compile(routed_attention, backend="aot_eager", fullgraph=True)
        leaves = [arguments[key] for key in "qkv"]
        out = compiled(**arguments)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
        assert_close([out, *torch.autograd.grad(out, leaves, grad)], expected, 1e-7)


class TestMeaning:
    """Special routes make it a form of attention that has a name."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_own_region_is_window_attention(self, backend):
        q, k, v = (torch.randn(1, 4, 6, 1, 8, dtype=torch.float64) for _ in range(3))
        routes = torch.arange(6).view(1, 1, 6, 1)
        y = routed_attention(q, k, v, routes, (2, 2), backend=backend)
        for row in (0, 2):
            for column in (0, 2, 4):
                window = [t[0, row:row + 2, column:column + 2, 0].reshape(1, 4, 8) for t in (q, k, v)]
                expected = F.scaled_dot_product_attention(*window).view(2, 2, 8)
                torch.testing.assert_close(y[0, row:row + 2, column:column + 2, 0], expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_all_regions_is_full_attention(self, backend):
        q, k, v = (torch.randn(2, 4, 6, 3, 8, dtype=torch.float64) for _ in range(3))
        routes = torch.rand(2, 3, 6, 6).argsort(-1)
        y = routed_attention(q, k, v, routes, 2, scale=0.2, backend=backend)
        expected = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)), scale=0.2)
        torch.testing.assert_close(y.flatten(1, 2).transpose(1, 2), expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_all_to_one_region(self, backend):
        q, k, v = (torch.randn(1, 4, 4, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        y = routed_attention(q, k, v, torch.full((1, 1, 4, 1), 3), 2, backend=backend)
        expected = F.scaled_dot_product_attention(
            q.reshape(1, 16, 8), k[:, 2:, 2:].reshape(1, 4, 8), v[:, 2:, 2:].reshape(1, 4, 8))
        torch.testing.assert_close(y.reshape(1, 16, 8), expected)
        y.square().sum().backward()
        assert k.grad[:, :2].abs().max() == 0
        assert k.grad[:, 2:, 2:].abs().min() > 0

    def test_default_is_the_fast_path(self):
        arguments = problem()
        assert torch.equal(routed_attention(**arguments), routed_attention(**arguments, backend="gathered"))


class TestExport:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_onnx(self, dynamic, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")

        class Module(torch.nn.Module):
            def forward(self, q, k, v, routes):
                return routed_attention(q, k, v, routes, (2, 3))

        module = Module().eval()

        def inputs(batch):
            arguments = problem(batch=batch, dtype=torch.float32, topk=3)
            return tuple(arguments[key].detach() for key in ("q", "k", "v", "routes"))

        batch = torch.export.Dim("batch")
        path = tmp_path / "op.onnx"
        torch.onnx.export(module, inputs(2), dynamo=True, opset_version=20, verbose=False,
                          dynamic_shapes=[{0: batch}] * 4 if dynamic else None).save(path)
        session = onnxruntime.InferenceSession(path)
        for size in (2, 5) if dynamic else (2,):
            x = inputs(size)
            feed = {arg.name: t.numpy() for arg, t in zip(session.get_inputs(), x, strict=True)}
            torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), module(*x))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
    def test_jit_trace(self):
        x = tuple(problem(dtype=torch.float32)[key].detach() for key in ("q", "k", "v", "routes"))
        traced = torch.jit.trace(lambda *x: routed_attention(*x, (2, 3)), x)
        assert "routed_gathered" not in str(traced.graph)
        torch.testing.assert_close(traced(*x), routed_attention(*x, (2, 3)))


class TestWrongCalls:
    @pytest.mark.parametrize(("change", "message"), [
        (dict(q=torch.zeros(2, 6, 6, 8)), r"must be \[batch, height, width, heads, head_dim\]"),
        (dict(k=torch.zeros(2, 6, 6, 3, 8)), "k must have q's batch, heads and head_dim"),
        (dict(v=torch.zeros(2, 6, 3, 2, 8)), "v must have k's batch, spatial shape and heads"),
        (dict(v=torch.zeros(2, 6, 6, 2, 8, dtype=torch.float16)), r"v is torch.float16 on cpu, but q is torch.float32"),
        (dict(k=torch.zeros(2, 6, 6, 2, 8, device="meta")), "k is torch.float32 on meta, but q is .* on cpu"),
        (dict(q=torch.zeros(2, 6, 6, 2, 8, dtype=torch.int64)), "must be floating point, got torch.int64"),
        (dict(region_size=4), r"region_size \(4, 4\) does not divide the map of 6 x 6; pad the map first"),
        (dict(region_size=0), "region_size must be a positive int or two of them"),
        (dict(region_size=(2, 2, 2)), "region_size must be a positive int or two of them"),
        (dict(region_size=1.5), "region_size must be a positive int or two of them"),
        (dict(k=torch.zeros(2, 4, 6, 2, 8), v=torch.zeros(2, 4, 6, 2, 8)), "key map of 4 x 6 cannot be cut into q's"),
        (dict(routes=torch.zeros(2, 9, 1, dtype=torch.int64)), r"routes must be .* \[2, 2 or 1, 9, topk\], got \[2, 9"),
        (dict(routes=torch.zeros(2, 1, 9, 0, dtype=torch.int64)), "routes must list at least one key region"),
        (dict(routes=torch.zeros(2, 1, 9, 1)), "routes must be int64 or int32 on cpu, got torch.float32"),
        (dict(routes=torch.full((2, 1, 9, 1), 9)), "routes must be region numbers 0 to 8, got 9 to 9"),
        (dict(routes=torch.full((2, 1, 9, 1), -1)), "routes must be region numbers 0 to 8, got -1 to -1"),
        (dict(route_weights=torch.ones(2, 1, 9, 2)), r"route_weights must have the shape of routes, \[2, 1, 9, 1\]"),
        (dict(backend="cuda"), "routed_attention has no backend 'cuda'; it has .*gathered, naive"),
    ], ids=lambda x: str(x)[:40] if isinstance(x, str) else "")
    def test_message(self, change, message):
        maps = {key: torch.zeros(2, 6, 6, 2, 8) for key in "qkv"}
        arguments = dict(maps, routes=torch.zeros(2, 1, 9, 1, dtype=torch.int64), region_size=2) | change
        with pytest.raises(ValueError, match=message) as caught:
            routed_attention(**arguments)
        assert "\n" not in str(caught.value)

    def test_dtype_of_the_fast_path(self):
        maps = [torch.zeros(1, 2, 2, 1, 8, dtype=torch.float8_e4m3fn)] * 3
        with pytest.raises(BackendError, match=r"'gathered' of routed_attention cannot do this: torch\.float8_e4m3fn"):
            routed_attention(*maps, torch.zeros(1, 1, 1, 1, dtype=torch.int64), 2, backend="gathered")
